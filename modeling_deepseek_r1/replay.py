"""Rollout routing replay: the experts that one pass of the model chose, used again in another.

A policy is sampled by other kernels, in another precision, or before an update of the routing biases; near-tied experts
then swap places, and with them the log-probabilities that the loss compares. Given `routes`, a forward pass sends every
token to the experts recorded while sampling; the gate values still come from the pass's own scores, so that the routers
get their gradients, normalised over the replayed experts where the router normalises.
Source: rollout routing replay (R3), arXiv:2510.11370. The selection itself: `routing.DeepSeekR1Router.replayed`.

Shapes here (B rows, S tokens, M decoder layers with experts, in order, K num_experts_per_tok):
    routes (B, S, M, K) of an integer dtype, 2 * M * K bytes a token as int16; the order of a token's experts is free.
    A token whose entries are -1 (the first decides) was not recorded: its experts are the router's own choice.
"""

import contextlib

import torch


def split_routes(routes, layers, inputs_embeds):
    """`routes` as `DeepSeekR1Model.forward` takes them -> for each of `layers` its (B, S, K), None without experts.

    `inputs_embeds` (B, S, D) says what the routes have to fit. Values are looked at where that waits for no device: not
    of CUDA tensors, where an expert out of range stops the process in a later kernel, and not in a compiled graph.

    Raises:
        ValueError: for another dtype or shape, for experts that do not exist or stand twice at a token, and for layers
            without experts.
    """
    if routes is None:
        return [None] * len(layers)
    routers = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]
    if not routers:
        raise ValueError("routes were given, but no layer of this model has experts; leave routes out")
    if routes.dtype == torch.bool or routes.is_floating_point() or routes.is_complex():
        raise ValueError(f"routes are of dtype {routes.dtype}; they must be of an integer dtype, such as torch.int16")
    expected = (*inputs_embeds.shape[:2], len(routers), routers[0].top_k)
    if routes.shape != expected:
        raise ValueError(
            f"routes are of shape {tuple(routes.shape)}; these inputs need {expected}: rows, tokens, layers with "
            "experts, experts a token. A record of `generate` lacks the last token; append -1 for it, as "
            "torch.nn.functional.pad(routes, (0, 0, 0, 0, 0, 1), value=-1) does"
        )
    if routes.device.type == "cpu" and not torch.compiler.is_compiling():
        check_experts(routes, routers[0].num_experts)
    layer_of = iter(routes.to(inputs_embeds.device, non_blocking=True).unbind(2))
    return [next(layer_of) if hasattr(layer.mlp, "gate") else None for layer in layers]


def check_experts(routes, num_experts):
    """Raises ValueError unless every recorded token has different experts in [0, num_experts)."""
    recorded = routes[routes[..., 0] >= 0].sort(-1).values
    if not recorded.numel():
        return
    lowest, highest = int(recorded.min()), int(recorded.max())
    if lowest < 0 or highest >= num_experts:
        raise ValueError(
            f"routes name expert {lowest if lowest < 0 else highest}; the {num_experts} experts are "
            f"0 to {num_experts - 1}, and a token that was not recorded has -1 in all its entries"
        )
    if bool((recorded[..., 1:] == recorded[..., :-1]).any()):
        raise ValueError("routes name an expert twice at one token; a token that was not recorded has -1, not 0, "
                         "in all its entries")


@contextlib.contextmanager
def recorded_routes(model):
    """Keeps the experts used in the ordinary forward passes of the block, for measuring.

    -> a list that gets (B, S, M, K) int16, on the device, with every forward pass of the decoder, padding included; not
    with a recomputation under activation checkpointing, and not with the steps of `generate`, for which there is
    `model.decoding.record_routes`. `model`: any class or wrapper with this decoder inside.

        with recorded_routes(model) as passes:
            model(input_ids)
        routes = passes[0]

    Raises:
        ValueError: if `model` has no decoder with experts.
    """
    decoder = next((module for module in model.modules() if hasattr(module, "mtp_layers")), None)
    layers = () if decoder is None else decoder.layers[: decoder.config.num_hidden_layers]
    routers = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no layers with experts whose routes could be recorded")
    passes, found = [], []

    def start(module, given):
        found.clear()  # of a pass that failed, or of layers that were computed again

    def keep(module, given, output):
        found.append(output[2].to(torch.int16))

    def end(module, given, output):
        passes.append(torch.stack(found, dim=1).unflatten(0, output[0].shape[:2]))

    hooks = [decoder.register_forward_pre_hook(start), *(router.register_forward_hook(keep) for router in routers),
             decoder.register_forward_hook(end)]  # fmt: skip
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def route_mismatch(routes_a, routes_b, mask=None):
    """How far two records of the same tokens part, whatever the order of a token's experts.

    `mask` (B, S) bool: the tokens that count; None: all. Tokens that either record lacks never count.

    Returns:
        {"tokens": share of (token, layer) whose sets of experts differ, "experts": share of the chosen experts that the
        other did not choose}, floats; NaN if there is nothing to compare.
    Raises:
        ValueError: for records, or a mask, of different shapes.
    """
    if routes_a.shape != routes_b.shape or (mask is not None and mask.shape != routes_a.shape[:2]):
        shapes = [tuple(values.shape) for values in (routes_a, routes_b, *(() if mask is None else (mask,)))]
        raise ValueError(f"routes_a, routes_b and mask are of shapes {shapes}; need (B, S, M, K) twice and (B, S)")
    routes_b = routes_b.to(routes_a.device)
    counted = (routes_a[..., 0] >= 0) & (routes_b[..., 0] >= 0)
    if mask is not None:
        counted = counted & mask.to(routes_a.device).bool()[..., None]
    missing = ~(routes_a.unsqueeze(-1) == routes_b.unsqueeze(-2)).any(-1)[counted]                 # (n, K)
    return {"tokens": float(missing.any(-1).float().mean()), "experts": float(missing.float().mean())}
