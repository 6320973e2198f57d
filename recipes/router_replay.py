"""Router replay in reinforcement learning: the experts chosen while sampling are those that the loss trains with.

Sampling and training compute the same model by other kernels, in other batches and precisions. Where two experts are
nearly tied, the router then picks another one, and the probabilities of a token part by far more than rounding; with
several updates on one rollout the ratio of the policy's probabilities measures the routing instead of the update.
Source: rollout routing replay, arXiv:2510.11370. The selection is replayed, the gate values are the trainer's own and
get gradients (`modeling_deepseek_r1/routing.py`).
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from modeling_deepseek_r1.replay import recorded_routes, route_mismatch


def replay_obstacle(policy, args, rollout_func, tools=()):
    """Why the experts chosen while sampling cannot be recorded, or None."""
    if not getattr(policy, "routers", None) or not hasattr(policy, "decoding"):
        return f"{type(policy).__name__} is not a DeepSeek-R1 model with experts"
    if not policy.decoding.enabled:
        return "model.decoding.enabled is false, and the library's loop records no experts"
    if args.use_vllm or args.use_transformers_continuous_batching or rollout_func is not None:
        return "the rollouts do not come from generate, which records the experts"
    if tools:
        return "tools make a completion of several calls of generate, each with a record of its own"
    return None


def bytes_per_token(policy):
    """What a token's routes take: 16 bits for each expert of each layer."""
    config = policy.config
    layers = sum(index < config.num_hidden_layers for index in policy.routers)
    return 2 * layers * config.num_experts_per_tok


def adapter_is_off(model):
    """Whether a PEFT model computes its base, or another adapter than the trained one, as it does for a reference."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return module.disable_adapters or "ref" in module.active_adapters
    return False


def padded_routes(routes, columns):
    """(B, C, M, K) routes for a batch of `columns` tokens: the last token, which is never fed while sampling, and
    columns that only pad, get -1: the router's own choice."""
    if routes.shape[1] >= columns:
        routes = routes[:, : columns - 1]
    filling = routes.new_full((len(routes), columns - routes.shape[1], *routes.shape[2:]), -1)
    return torch.cat([routes, filling], dim=1)


def k3(log_probs, sampled, mask):
    """Sum over the tokens of the k3 estimate of KL(sampler || trainer), in nats."""
    log_ratio = (log_probs - sampled).double()
    return ((torch.expm1(log_ratio) - log_ratio) * mask).sum()


@torch.no_grad()
def compare_routing(policy, log_probs_of, routes, sampled, mask):
    """What replay changes on a few completions of a rollout, as sums that add up over processes.

    Args:
        log_probs_of: function (routes or None) -> (B, T) log-probabilities of the completions' tokens by the trainer.
        routes: (B, P + T, M, K); sampled: (B, T) log-probabilities that the sampler had; mask: (B, T).
    Returns:
        (8,) float64: expert choices that differ, of how many; sets of experts that differ, of how many; KL with
        replay and without, tokens; largest difference of a log-probability with replay.
    """
    with recorded_routes(policy) as passes:
        own = log_probs_of(None)
    replayed = log_probs_of(routes)
    mismatch = route_mismatch(routes, passes[0])
    sets = (routes[..., 0] >= 0).sum().double()
    mask = mask.double()
    largest = ((replayed - sampled).abs() * mask).max()
    experts = sets * routes.shape[3]
    return torch.stack([
        mismatch["experts"] * experts, experts, mismatch["tokens"] * sets, sets, k3(replayed, sampled, mask),
        k3(own, sampled, mask), mask.sum(), largest.double(),
    ])  # fmt: skip
