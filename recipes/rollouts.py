"""What the trainers with rollouts share on the seams of TRL's GRPOTrainer: prompts, sampling, replay, clocks.

Put `RolloutMixin` before `trl.GRPOTrainer` in the list of bases.
"""

import contextlib
import logging
import random
import time

import numpy
import torch
from transformers import AutoTokenizer
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from recipes.callbacks import ExpertBalanceCallback
from recipes.rl_setup import (
    EpochSampler,
    RolloutBalanceCallback,
    build_reference,
    causal_lm,
    count_alone,
    load_causal_lm,
    never_empty,
    prepare_frozen,
    prompt_budget,
    reward_functions,
    same_trained,
)
from recipes.rollout_checkpoints import RolloutCheckpointMixin
from recipes.router_replay import (
    adapter_is_off,
    bytes_per_token,
    compare_routing,
    padded_routes,
    replay_obstacle,
)
from recipes.vllm_policy import attach, vllm_engine

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def settings_of(args, **changes):
    """Fields of `args` changed for the time being."""
    kept = {name: getattr(args, name) for name in changes}
    vars(args).update(changes)
    try:
        yield
    finally:
        vars(args).update(kept)


@contextlib.contextmanager
def same_random_numbers(device):
    """After it random numbers are drawn as if nothing in the block had drawn any; rewards may draw as well."""
    states, cuda = (random.getstate(), numpy.random.get_state()), [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def balanced_callbacks(model, callbacks):
    """Freezes multi-token-prediction layers, which no rollout trains; adds the callback that balances the experts."""
    policy = causal_lm(model)
    if hasattr(policy, "freeze_mtp"):
        policy.freeze_mtp()
    if not hasattr(policy, "update_expert_bias"):
        return callbacks
    if any(isinstance(callback, ExpertBalanceCallback) for callback in callbacks or []):
        return callbacks
    return [*(callbacks or []), RolloutBalanceCallback()]


class RolloutMixin(RolloutCheckpointMixin):
    """Text rollouts of a policy that may be a DeepSeek model, with its experts balanced and replayed.

    A subclass names `config_class` and says in `wants_reference(args)` whether a KL is measured.
    """

    # -- construction

    def __init__(
        self, model, reward_funcs, args=None, train_dataset=None, eval_dataset=None, processing_class=None,
        reward_processing_classes=None, ref_model=None, callbacks=None, **kwargs,
    ):  # fmt: skip
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.rstrip('/').split('/')[-1] or 'model'}-{self._name}")
        loaded = isinstance(model, str)
        if loaded:
            quantised = {name: kwargs.pop(name) for name in ("quantization_config",) if name in kwargs}
            model = load_causal_lm(model, args, **quantised)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                get_config_model_id(model.config), trust_remote_code=args.trust_remote_code
            )
        rewards, reward_models = reward_functions(
            reward_funcs, reward_processing_classes, processing_class, args.per_device_eval_batch_size,
            args.chat_template_kwargs,
        )  # fmt: skip
        adapted = causal_lm(model) is not model or kwargs.get("peft_config") is not None
        ref_model = build_reference(model, ref_model, args, adapted, self.wants_reference(args))
        callbacks = balanced_callbacks(model, callbacks)
        # TRL loads a reference from the policy's path where beta > 0, and warns of arguments for loading it ignores.
        ours = {"beta": 0.0, "sync_ref_model": False} | ({"model_init_kwargs": None} if loaded else {})
        with settings_of(args, **ours), vllm_engine(model, processing_class, args):
            super().__init__(
                model, rewards, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
                processing_class=processing_class, callbacks=callbacks, **kwargs,
            )  # fmt: skip
        if hasattr(self._policy(), "freeze_mtp"):
            self._policy().freeze_mtp()  # the adapter that `peft_config` has just put there too
        self.beta = args.beta
        if ref_model is not None:
            add_fused_lm_head(ref_model, self.temperature, args.cast_lm_head_to_fp32)
            self.ref_model = prepare_frozen(ref_model, self)
        for reward in reward_models:
            reward.accelerator, reward.model = self.accelerator, prepare_frozen(reward.model, self, shard=False)
        count_alone(self.model)
        self._start_rollouts()

    def _start_rollouts(self):
        args = self.args
        obstacle = replay_obstacle(self._policy(), args, self.rollout_func, self.tools)
        if args.router_replay and obstacle:
            raise ValueError(f"router_replay=true: {obstacle}; leave it out")
        self.router_replay = obstacle is None and args.router_replay is not False
        self.records_routes = obstacle is None and (self.router_replay or args.route_probe_rows > 0)
        if self.rollout_func is not None:
            self.rollout_func = never_empty(self.rollout_func, self.eos_token_ids[0])
        self._rollout_seconds, self._update_seconds = 0.0, 0.0
        self._recorded = self._replayed = None
        self._has_recorded = False
        self.max_prompt_length = prompt_budget(args, self.model.config.get_text_config(), self.train_dataset)
        if self.use_vllm:
            attach(self)

    @staticmethod
    def wants_reference(args):
        """Whether a KL to a reference is measured."""
        raise NotImplementedError

    def _policy(self):
        return causal_lm(self.accelerator.unwrap_model(self.model))

    def replay_line(self):
        """One line for the head of a run: whether routes are replayed, and what that takes."""
        if not self.records_routes:
            return "off"
        size = bytes_per_token(self._policy())
        tokens = self.args.generation_batch_size * (self.args.max_completion_length + (self.max_prompt_length or 0))
        what = "on" if self.router_replay else "off (only measured)"
        return f"{what}; {size} bytes a token, at most {size * tokens / 2**20:,.1f} MiB a rollout"

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(
            sampler.data_source, sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count, sampler.shuffle,
            sampler.seed, epoch=lambda: int(self.state.epoch or 0),
        )  # fmt: skip

    # -- sampling

    def _tokenize_prompts(self, prompts):
        prompt_ids, *rest = super()._tokenize_prompts(prompts)
        lengths = [len(ids) for ids in prompt_ids]
        if max(lengths) > (self.max_prompt_length or max(lengths)):
            place = lengths.index(max(lengths))
            raise ValueError(
                f"a prompt has {lengths[place]} tokens, max_prompt_length={self.max_prompt_length}: raise it, lower "
                f"max_completion_length, or leave such prompts out. It begins {str(prompts[place])[:200]!r}"
            )
        return prompt_ids, *rest

    def _generate_single_turn(self, *args, **kwargs):
        records = self.records_routes and self.model.training
        options = self._policy().decoding if records else None
        if records:
            options.record_routes = options.record_log_probs = True
            options.log_prob_temperature = self.temperature
        try:
            with self.accelerator.autocast():
                completion_ids, log_probs = super()._generate_single_turn(*args, **kwargs)
        finally:
            if records:
                options.record_routes = options.record_log_probs = False
        self._recorded = self._take_record() if records else None
        output = never_empty(lambda: {"completion_ids": completion_ids, "logprobs": log_probs}, self.eos_token_ids[0])()
        return output["completion_ids"], output["logprobs"]

    def _take_record(self):
        """The experts and log-probabilities of the last `generate`, or None where that recorded none."""
        record = self._policy().decoding_record
        if record is not None:
            self._has_recorded = True
            return record
        told = "generate did not take the fast path, which records the experts (its message above says why)"
        if self.router_replay and (self.args.router_replay or self._has_recorded):
            raise ValueError(f"router_replay: {told}; mend that, or set router_replay=false")
        logger.warning("%s: they are not replayed", told)
        self.records_routes = self.router_replay = False
        return None

    def _generate(self, prompts):
        start = time.perf_counter()
        result = super()._generate(prompts)
        self._rollout_seconds += time.perf_counter() - start  # a rollout may take several rounds
        return result

    def _calculate_rewards(self, *args, **kwargs):
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        self._recorded = self._replayed = None
        with same_trained(self.model):
            rollout = super()._generate_and_score_completions(inputs)
        self._replayed = None
        if self._recorded is not None:
            columns = rollout["prompt_ids"].size(1) + rollout["completion_ids"].size(1)
            routes = padded_routes(self._recorded.routes, columns)
            if self.args.route_probe_rows:
                self._compare_routing(rollout, routes)
            if self.router_replay:
                rollout["routes"] = routes
            self._recorded = None
        return rollout

    def evaluate(self, *args, **kwargs):
        """As in Trainer; training goes on as it would have without."""
        with same_random_numbers(self.accelerator.device):
            return super().evaluate(*args, **kwargs)

    # -- clocks

    def rollout_clock(self):
        """The time now, with everything done that belongs to the update before."""
        self._rollout_seconds = 0.0
        return self._now()

    def _now(self):
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def log_seconds(self, start):
        """Seconds of the sampling of a rollout that began at `start`, and of what has followed it."""
        log = self._metrics["train" if self.model.training else "eval"]
        log["seconds/rollout"].append(self._rollout_seconds)
        log["seconds/scoring"].append(self._now() - start - self._rollout_seconds)

    def training_step(self, *args, **kwargs):
        """Times the update: what steps take besides rollout and scoring."""
        start, log = time.perf_counter(), self._metrics["train"]
        rollouts = len(log.get("seconds/rollout", ()))
        loss = super().training_step(*args, **kwargs)
        seconds = time.perf_counter() - start
        if len(log.get("seconds/rollout", ())) > rollouts:
            seconds -= log["seconds/rollout"][-1] + log["seconds/scoring"][-1]
        self._update_seconds += seconds
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            log["seconds/update"].append(self._update_seconds)
            self._update_seconds = 0.0
        return loss

    # -- log-probabilities

    @contextlib.contextmanager
    def replaying(self, rollout):
        """Passes of the policy take the experts of this rollout, or micro-batch of one, meanwhile."""
        self._replayed = rollout.get("routes")
        try:
            yield
        finally:
            self._replayed = None

    def _routes_for(self, model, columns):
        """The routes that a pass of `model` replays, or None; a reference goes its own ways."""
        routes = self._replayed
        if routes is None and self._recorded is not None and self.router_replay:  # scoring, right after sampling
            routes = padded_routes(self._recorded.routes, columns)
        if routes is None or model is self.ref_model or adapter_is_off(model):
            return None
        return routes

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
        compute_aux_loss=False, **images,
    ):  # fmt: skip
        """As GRPOTrainer's, for text, with the experts of the rollout.

        Keeps in `self._values` the (B, T + 1) values of the states before each token of the completion and after the
        last one, where the model has a value function.

        Returns:
            log-probabilities (B, T), entropies (B, T), balance loss of another model with experts; None what is not
            asked for.
        """
        if any(value is not None for value in images.values()):
            raise ValueError(f"{self._name} reads text only: leave out the images of the prompts")
        routes, found, balance = self._routes_for(model, input_ids.size(1)), [], []
        size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
            if routes is not None:
                inputs["routes"] = routes[rows]
            if compute_aux_loss:
                inputs["output_router_logits"] = True
            output = self._score(model, inputs, logits_to_keep, compute_entropy)
            found.append(output[:3])
            balance.append(output[3])
        log_probs, entropy, self._values = (None if part[0] is None else torch.cat(part) for part in zip(*found))
        return log_probs, entropy, torch.stack(balance).mean() if compute_aux_loss else None

    def _score(self, model, inputs, kept, compute_entropy=False):
        """(log-probabilities (B, T), their entropies or None, values (B, T + 1) or None) of the last `kept` tokens, and
        the balance loss of another model with experts where `inputs` ask for router logits, else None."""
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :-kept] = -100
        with self.accelerator.autocast():
            output = model(**inputs, labels=labels, fused_lm_head=True)
        values = output.get("value_preds")
        values = None if values is None else values[:, -kept - 1 :]
        entropy = output.entropy[:, -kept:] if compute_entropy else None
        return output.log_probs[:, -kept:], entropy, values, output.get("aux_loss")

    def _compare_routing(self, rollout, routes):
        """Logs what replay changes, on the first completions of the rollout."""
        rows = slice(0, min(self.args.route_probe_rows, len(routes)))
        inputs = {
            name: torch.cat([rollout[f"prompt_{part}"][rows], rollout[f"completion_{part}"][rows]], 1)
            for name, part in (("input_ids", "ids"), ("attention_mask", "mask"))
        }
        mask = rollout["completion_mask"][rows]
        unseen = inputs["attention_mask"] == 0  # padding, and completions that are left out of the loss
        routes = routes[rows].masked_fill(unseen[:, :, None, None], -1)
        recorded, sampled = self._recorded.log_probs[rows, : mask.size(1)], torch.zeros_like(mask, dtype=torch.float32)
        sampled[:, : recorded.size(1)] = recorded

        def log_probs_of(replayed):
            more = {} if replayed is None else {"routes": replayed}
            return self._score(self.model, inputs | more, mask.size(1))[0]

        training = self.model.training
        self.model.eval()  # no dropout, no counts
        try:
            sums = compare_routing(self._policy(), log_probs_of, routes, sampled, mask)
        finally:
            self.model.train(training)
        largest = self.accelerator.gather(sums[-1:]).max().item()
        experts, of_experts, sets, of_sets, replayed, own, tokens, _ = self._sum(sums).tolist()
        log = self._metrics["train"]
        log["routing/experts_differ"].append(experts / max(of_experts, 1))
        log["routing/tokens_differ"].append(sets / max(of_sets, 1))
        log["routing/kl_replayed"].append(replayed / max(tokens, 1))
        log["routing/kl_own"].append(own / max(tokens, 1))
        log["routing/largest_difference"].append(largest)

    def _sum(self, tensor):
        return self.accelerator.reduce(tensor, "sum")
