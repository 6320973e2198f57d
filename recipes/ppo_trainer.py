"""Proximal policy optimisation of language models on the seams of TRL's GRPOTrainer.

`PPOTrainer` inherits what GRPOTrainer does well (prompts, sampling, vLLM, rewards, PEFT, logs) and replaces what makes
it GRPO: rewards become token-level advantages by GAE, with a value function, and a KL to the reference in the reward;
the loss gets a clipped value term. The equations are in `ppo_losses.py`, the value function in `value_head.py`, the
settings in `ppo_arguments.py`.

    trainer = PPOTrainer("my-sft-model", my_reward_function, PPOConfig(output_dir="runs/ppo"), train_dataset=prompts)
    trainer.train()

Sources: PPO (arXiv:1707.06347); InstructGPT (arXiv:2203.02155, Sec. 3.5); PPO as compared with GRPO in DeepSeek-R1
(arXiv:2501.12948, supplement A.3).
"""

import torch
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from recipes import ppo_losses
from recipes.fused_forward import extend_fused_forward
from recipes.ppo_arguments import PPOConfig
from recipes.ppo_checkpoints import PPOCheckpointMixin
from recipes.rl_setup import RolloutBalanceCallback, count_alone, without_adapter
from recipes.rollouts import RolloutMixin
from recipes.value_head import PPOModelOutput, build_value_head

__all__ = ["PPOConfig", "PPOTrainer", "RolloutBalanceCallback"]


class PPOTrainer(PPOCheckpointMixin, RolloutMixin, GRPOTrainer):
    """PPO with a value function, for prompts in TRL's standard or conversational format.

    Args beyond `GRPOTrainer`'s:
        reward_funcs: one or several of: a function of TRL's signature (sync or async), a sequence classifier with one
            label, its folder or Hub name; their sum, weighted by `args.reward_weights`, is a completion's score.
        ref_model: model, folder or Hub name that KL is measured against; None: a copy of the policy, or with PEFT the
            base without its adapter (give the merged model where the adapter has been trained before).
        value_model: model or name for `value_function="separate"`; None: `args.value_model_name_or_path`.

    Multi-token-prediction layers are frozen. `save_model` writes the policy as a plain causal LM and
    `value_head.safetensors` beside it.

    Raises:
        ValueError: for rewards, references and prompts that cannot work.
        FloatingPointError: where KL exceeds `max_kl`.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    config_class = PPOConfig

    def __init__(self, model, reward_funcs, args=None, value_model=None, **kwargs):
        super().__init__(model, reward_funcs, args, **kwargs)
        args, policy = self.args, self._policy()
        source = args.value_model_name_or_path if value_model is None else value_model
        policy.value_head = build_value_head(policy, args.value_function, source).to(args.device)
        policy.value_head.trunk_gradient = args.value_trunk_gradient
        count_alone(self.model)  # a separate value model counts too
        extend_fused_forward(policy, PPOModelOutput, lambda lm, *inputs: {"value_preds": lm.value_head(*inputs)})
        self.kl_coef, self._sums = args.kl_coef, {"train": {}, "eval": {}}

    @staticmethod
    def wants_reference(args):
        return bool(args.kl_coef)

    def create_optimizer(self, *args, **kwargs):
        return self.part_value_function(super().create_optimizer(*args, **kwargs))

    def part_value_function(self, optimizer):
        """The value function's parameters in groups of their own, where it has a learning rate of its own; also in an
        optimizer that was made without them."""
        rate = self.args.value_learning_rate
        of_value = {id(each): each for each in self._policy().value_head.parameters() if each.requires_grad}
        absent = dict(of_value)
        for group in list(optimizer.param_groups):
            moved = [each for each in group["params"] if absent.pop(id(each), None) is not None]
            if moved and rate != group["lr"]:
                group["params"] = [each for each in group["params"] if id(each) not in of_value]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
        if absent:
            optimizer.add_param_group({"params": list(absent.values()), "lr": rate})
        return optimizer

    # -- rollout

    def _log_probs(self, model, rollout, batch_size=None, compute_entropy=False):
        input_ids, attention_mask = (
            torch.cat([rollout[f"prompt_{name}"], rollout[f"completion_{name}"]], 1) for name in ("ids", "mask")
        )
        length = rollout["completion_ids"].size(1)
        return self._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, length, batch_size, compute_entropy
        )[:2]

    @torch.no_grad()
    def _ref_log_probs(self, rollout, batch_size):
        if self.ref_model is not None:
            return self._log_probs(self.ref_model, rollout, batch_size)[0]
        with without_adapter(self.accelerator.unwrap_model(self.model)):
            return self._log_probs(self.model, rollout, batch_size)[0]

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        start, args, self._values = self.rollout_clock(), self.args, None
        mode = "train" if self.model.training else "eval"
        rollout = super()._generate_and_score_completions(inputs)
        batch_size = getattr(args, f"per_device_{mode}_batch_size")
        with disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            if self._values is None:  # GRPO needs no old log-probabilities where all steps are on-policy
                with self.replaying(rollout):
                    rollout["old_per_token_logps"], _ = self._log_probs(self.model, rollout, batch_size)
            values = self._values
            ref_log_probs = self._ref_log_probs(rollout, batch_size) if args.kl_coef else None
        scored = self._score_rollout(rollout, values, ref_log_probs)
        mask = rollout["loss_mask"]
        rollout["old_values"] = values[:, :-1]
        rollout["advantages"], rollout["returns"] = ppo_losses.generalized_advantages(
            scored["token_rewards"], rollout["old_values"], mask, args.gamma, args.lam, scored["last_values"]
        )
        if args.whiten_advantages:
            rollout["advantages"] = ppo_losses.whiten(rollout["advantages"], mask, self._sum)
        rollout["num_items_in_batch"] = self._sum(mask.sum())
        self._log_advantages(rollout)
        self._log_rollout(mode, rollout, scored, start)
        return rollout

    def _score_rollout(self, rollout, values, ref_log_probs):
        """Sets `loss_mask`; returns the tokens' rewards (KL, and the score at the last token), the values after the
        last tokens, and what is logged."""
        args, completion_mask = self.args, rollout["completion_mask"].bool()
        rows = torch.arange(len(completion_mask), device=completion_mask.device)
        rewards = self._rewards_per_func[rows + len(rows) * self.accelerator.process_index]
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        unscored = rewards[:, self.reward_weights.to(rewards.device) != 0].isnan().all(1)
        last = completion_mask.size(1) - 1 - completion_mask.flip(1).int().argmax(1)
        ends = torch.tensor(self.eos_token_ids, device=rows.device)
        truncated = ~torch.isin(rollout["completion_ids"][rows, last], ends)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * truncated
        left_out = unscored | (truncated & (args.truncated_completions == "mask"))
        bootstrapped = truncated & (args.truncated_completions == "bootstrap")

        mask = completion_mask & rollout["tool_mask"].bool() if "tool_mask" in rollout else completion_mask
        mask = rollout["loss_mask"] = mask & ~left_out.unsqueeze(1)
        kl = torch.zeros_like(values[:, 1:])
        if ref_log_probs is not None:
            kl = ppo_losses.kl_estimate(rollout["old_per_token_logps"], ref_log_probs, args.kl_estimator)
            kl = kl.masked_fill(~mask, 0.0)
        token_rewards = -self.kl_coef * kl
        last_chosen = mask.size(1) - 1 - mask.flip(1).int().argmax(1)
        token_rewards[rows, last_chosen] += scores.masked_fill(bootstrapped, 0.0)
        if args.whiten_rewards:
            token_rewards = ppo_losses.whiten(token_rewards, mask, self._sum, shift_mean=False)
        last_values = values[rows, last + 1].masked_fill(~bootstrapped, 0.0)
        empty = (completion_mask.sum(1) == 1) & ~truncated
        return {
            "token_rewards": token_rewards, "last_values": last_values, "kl": kl, "empty": empty, "unscored": unscored,
        }  # fmt: skip

    def _log_rollout(self, mode, rollout, scored, start):
        """Metrics of a rollout, over the tokens and completions of all processes; adapts kl_coef."""
        args, mask, returns = self.args, rollout["loss_mask"].float(), rollout["returns"]
        errors = (returns - rollout["old_values"]) * mask
        local = [
            mask.sum(), scored["kl"].sum(), (returns * mask).sum(), (returns.square() * mask).sum(), errors.sum(),
            errors.square().sum(), mask.new_tensor(len(mask)), scored["empty"].sum(), scored["unscored"].sum(),
        ]  # fmt: skip
        sums = self._sum(torch.stack([value.double() for value in local])).tolist()
        tokens, kl, total, squares, error, error_squares, completions, empty, unscored = sums
        tokens, log = max(tokens, 1), self._metrics[mode]
        variance = squares / tokens - (total / tokens) ** 2
        log["returns"].append(total / tokens)
        if variance > 1e-12:
            log["explained_variance"].append(1 - (error_squares / tokens - (error / tokens) ** 2) / variance)
        log["completions/empty"].append(empty / completions)
        log["completions/unscored"].append(unscored / completions)
        self.log_seconds(start)
        if args.kl_coef:
            log["kl"].append(kl / tokens)
            log["kl_coef"].append(self.kl_coef)
            self._check_kl(kl / tokens)
            if args.kl_target is not None and mode == "train":
                self.kl_coef = ppo_losses.adapted_kl_coef(
                    self.kl_coef, kl / tokens, args.kl_target, completions, args.kl_horizon
                )

    def _log_advantages(self, rollout):
        """The table of completions gets each one's mean advantage in place of GRPO's."""
        mask, logged = rollout["loss_mask"], self._logs["advantages"]
        mean = (rollout["advantages"] * mask).sum(1) / mask.sum(1).clamp(min=1)
        means = self.accelerator.gather(mean).tolist()
        kept = list(logged)[: -len(means)]
        logged.clear()
        logged.extend(kept + means)

    # -- update

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        chunks, buffered = self.args.steps_per_generation, self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._step % chunks == 0:  # an epoch of the rollout begins
            if self._buffered_inputs is buffered:  # not the first one: other mini-batches of the same completions
                whole = {
                    name: torch.cat([part[name] for part in buffered]) if value.ndim else value
                    for name, value in buffered[0].items()
                }
                self._buffered_inputs = split_tensor_dict(shuffle_sequence_dict(whole), chunks)
            self._count_tokens_of_steps()
            inputs = self._buffered_inputs[0]
        return inputs

    def _count_tokens_of_steps(self):
        """Every micro-batch is told the tokens of its whole optimizer step: any split of it gives the same step."""
        counts = torch.stack([part["loss_mask"].sum() for part in self._buffered_inputs])
        counts = self._sum(counts.view(-1, self.args.gradient_accumulation_steps).sum(1))
        for place, part in enumerate(self._buffered_inputs):
            part["num_items_in_batch"] = counts[place // self.args.gradient_accumulation_steps]

    def _compute_loss(self, model, inputs):
        args, mask = self.args, inputs["loss_mask"].float()
        mode = "train" if self.model.training else "eval"
        with self.replaying(inputs):
            log_probs, entropy = self._log_probs(model, inputs, compute_entropy=True)
        values, self._values = self._values[:, :-1], None
        cycle = args.steps_per_generation * self.num_iterations
        # The first step of a rollout is on-policy: the ratio is 1 exactly, whatever rounding another batch brings.
        on_policy = mode == "train" and self._step % cycle < args.gradient_accumulation_steps
        old_log_probs = log_probs.detach() if on_policy else inputs["old_per_token_logps"]
        policy, ratio, clipped = ppo_losses.policy_loss(
            log_probs, old_log_probs, inputs["advantages"], self.epsilon_low, self.epsilon_high
        )
        if "importance_sampling_ratio" in inputs:  # of vLLM's probabilities and the trainer's, truncated as TRL does
            policy = policy * inputs["importance_sampling_ratio"]
        value, value_clipped = ppo_losses.value_loss(
            values, inputs["old_values"], inputs["returns"], args.cliprange_value
        )
        log_ratio = log_probs.detach() - old_log_probs
        named = {
            "policy_loss": policy, "value_loss": value, "entropy": entropy, "ratio": ratio, "clip_fraction": clipped,
            "value_clip_fraction": value_clipped, "approx_kl": torch.expm1(log_ratio) - log_ratio,
        }  # fmt: skip
        sums = torch.stack([mask.sum(), *((part.detach() * mask).sum() for part in named.values())])
        self._sums[mode] = {"names": list(named), "sums": self._sums[mode].get("sums", 0.0) + sums.double()}
        total = policy + args.vf_coef * value - args.entropy_coef * entropy
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes  # DDP takes the mean
        return (total * mask).sum() / tokens

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        if self._sums[mode]:
            names, sums = self._sums[mode]["names"], self._sum(self._sums[mode]["sums"]).tolist()
            for name, value in zip(names, sums[1:]):
                self._metrics[mode][name] = [value / max(sums[0], 1)]
            self._sums[mode] = {}
        if self.num_generations == 1:
            self._metrics[mode].pop("frac_reward_zero_std", None)  # there are no groups
        super().log(logs, start_time)
