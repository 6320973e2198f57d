"""Group relative policy optimisation for DeepSeek models (and any causal LM) on TRL's GRPOTrainer.

`R1GRPOTrainer` adds what R1-style training needs: the experts chosen while sampling are replayed in the loss, routing
biases move once a rollout, prompts are drawn by a curriculum, groups without variance can be replaced, the reference
can follow the policy, and checkpoints continue exactly, buffered rollouts included.

    trainer = R1GRPOTrainer("my-sft-model", my_reward, R1GRPOConfig(output_dir="runs/grpo"), train_dataset=prompts)
    trainer.train()

Sources: GRPO (arXiv:2402.03300, Sec. 4.1), DeepSeek-R1 (arXiv:2501.12948, Sec. 2.2), DAPO (arXiv:2503.14476), Dr. GRPO
(arXiv:2503.20783), GSPO (arXiv:2507.18071), rollout routing replay (arXiv:2510.11370).
"""

import numpy
import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from trl import GRPOTrainer

from recipes.curriculum import PromptCurriculum
from recipes.dynamic_sampling import GroupBuffer
from recipes.grpo_arguments import R1GRPOConfig
from recipes.grpo_reference import ReferenceCallback, ReferenceCheckpointMixin
from recipes.reflection import reflection_words
from recipes.reward_schedule import weights_at
from recipes.rewards import completion_text
from recipes.rl_setup import RolloutBalanceCallback
from recipes.rollouts import RolloutMixin, same_random_numbers

__all__ = ["R1GRPOConfig", "R1GRPOTrainer", "RolloutBalanceCallback"]


class R1GRPOTrainer(ReferenceCheckpointMixin, RolloutMixin, GRPOTrainer):
    """GRPO for prompts in TRL's standard or conversational format.

    Args beyond `GRPOTrainer`'s:
        reward_funcs: one or several of: a function of TRL's signature (sync or async), a sequence classifier with one
            label, its folder or Hub name.
        ref_model: model, folder or Hub name that KL is measured against (`beta` > 0); None: a copy of the policy, or
            with PEFT the base without its adapter.

    Multi-token-prediction layers are frozen.

    Raises:
        ValueError: for rewards, references, prompts and group sizes that cannot work.
    """

    _tag_names = ["trl", "grpo"]
    config_class = R1GRPOConfig

    def __init__(self, model, reward_funcs, args=None, train_dataset=None, **kwargs):
        if isinstance(train_dataset, IterableDataset):
            raise ValueError("train_dataset is a stream: prompts are drawn by number here; load it (streaming=False)")
        super().__init__(model, reward_funcs, args, train_dataset=train_dataset, **kwargs)
        args = self.args
        names = self.reward_func_names
        self._pass_column = names.index(args.curriculum_reward) if args.curriculum_reward in names else None
        if args.curriculum != "none" and self._pass_column is None:
            raise ValueError(
                f"curriculum_reward={args.curriculum_reward!r} is none of the rewards "
                f"{', '.join(names)}; add it to rewards or track_rewards, or name another"
            )
        unknown = sorted(set(args.reward_from_step or {}) - set(names))
        if unknown:
            raise ValueError(f"reward_from_step names {unknown[0]!r}; the rewards are {', '.join(names)}")
        self.full_weights = self.reward_weights.clone()
        self.curriculum = PromptCurriculum(
            self.train_dataset, seed=args.seed, mode=args.curriculum, target=args.curriculum_target,
            half_life=args.curriculum_half_life, from_step=self._first_steps(),
        )  # fmt: skip
        if args.sync_ref_model:
            self._follow_policy()

    @staticmethod
    def wants_reference(args):
        return args.beta > 0

    def _first_steps(self):
        """The step from which each prompt is asked, or None: all of them at once."""
        if not self.args.prompts_from_step:
            return None
        if "task" not in self.train_dataset.column_names:
            raise ValueError(
                f"prompts_from_step={self.args.prompts_from_step} holds back prompts without a task, but the prompts "
                "have no column task; make them with python -m data_scripts.prepare_prompts, or leave it out"
            )
        steps = [0 if task is not None else self.args.prompts_from_step for task in self.train_dataset["task"]]
        if min(steps):
            raise ValueError(
                f"prompts_from_step={self.args.prompts_from_step} holds back all prompts, as none has a task; leave it "
                "out, or add prompts with one"
            )
        return steps

    def _follow_policy(self):
        if self.ref_model is None:
            raise ValueError(
                "sync_ref_model=true with an adapter: the reference is the base without it, which stays as it is; "
                "leave it out, or train all weights (lora_rank=0)"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "sync_ref_model=true under FSDP or DeepSpeed: checkpoints cannot hold a sharded reference; run with "
                "DDP, or start a new run from the policy every so many steps"
            )
        shapes = [
            {name: tensor.shape for name, tensor in model.state_dict().items()}
            for model in (self._policy(), self.accelerator.unwrap_model(self.ref_model))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "sync_ref_model=true: the reference is no copy of the policy (other weights or shapes) and cannot take "
                "the policy's; leave out ref_model or sync_ref_model"
            )
        self.add_callback(ReferenceCallback(self))

    # -- checkpoints

    def rollout_state(self):
        return super().rollout_state() | {"curriculum": self.curriculum.state_dict()}

    def load_rollout_state(self, state):
        super().load_rollout_state(state)
        self.curriculum.load_state_dict(state["curriculum"])

    # -- rollouts

    def _calculate_rewards(self, *args, **kwargs):
        """A completion that no reward with a weight could judge has none at all, as if nothing was tracked beside."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        weighted = self.full_weights.to(rewards.device) != 0
        rewards[rewards[:, weighted].isnan().all(1)] = float("nan")
        return rewards

    def _weigh_rewards(self):
        """The weights of this step, in training and evaluation, also right after a resume."""
        names = self.reward_func_names
        weights = weights_at(
            self.state.global_step, dict(zip(names, self.full_weights.tolist())), self.args.reward_from_step
        )
        self.reward_weights = self.full_weights.new_tensor([weights[name] for name in names])

    def _generate_and_score_completions(self, inputs):
        self._weigh_rewards()
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        start = self.rollout_clock()
        asked = []  # (numbers of the prompts, their pass rates, their scored completions) of each round
        if self.args.dynamic_sampling:
            rollout = self._informative_rollout(len(inputs), asked)
        else:
            rollout = self._ask(len(inputs), asked)[0]
        self._learn_pass_rates(asked)
        self.log_seconds(start)
        return rollout

    def _ask(self, count, asked):
        """A rollout of `count` completions on this process, of prompts that the curriculum draws.

        Returns:
            the rollout, and the weighted rewards (count,) of this process's completions, NaN without any.
        """
        group, rank = self.num_generations, self.accelerator.process_index
        total = count * self.accelerator.num_processes
        seen = [place for places, *_ in asked for place in places]
        drawn = self.curriculum.draw(total // group, self.state.global_step, exclude=seen)
        places = [int(place) for place in drawn for _ in range(group)][rank * count : (rank + 1) * count]
        rollout = super()._generate_and_score_completions([self.train_dataset[place] for place in places])
        rewards = self._rewards_per_func  # of all processes, in the order of `drawn`
        passed = rewards[:, self._pass_column or 0].view(-1, group)
        asked.append((list(drawn), passed.nanmean(1), (~passed.isnan()).sum(1)))
        own = rewards[rank * count : (rank + 1) * count]
        weighted = (own * self.reward_weights.to(own.device)).nansum(1)
        return rollout, weighted.masked_fill(own.isnan().all(1), float("nan"))

    def _learn_pass_rates(self, asked):
        """Tells the curriculum what came of a rollout, all rounds together, and logs where it stands."""
        if self._pass_column is None:
            return
        places, rates, scored = zip(*asked)
        rates, scored = (torch.cat(each).cpu().numpy() for each in (rates, scored))
        beyond = rates[numpy.abs(2 * rates - 1) > 1]
        if beyond.size and self.args.curriculum == "none":
            return  # a reward of that name which is no pass rate
        if beyond.size:
            raise ValueError(
                f"curriculum_reward={self.args.curriculum_reward!r} gave a group {beyond[0]:g} on average, which is no "
                "pass rate from 0 to 1; name another reward, or set curriculum=none"
            )
        self.curriculum.update(numpy.concatenate(places), rates, scored)
        log = self._metrics["train"]
        for name, value in self.curriculum.metrics(self.state.global_step).items():
            if isinstance(value, dict):
                for task, rate in value.items():
                    log[f"{name}/{task}"].append(rate)
            else:
                log[name].append(value)

    def _informative_rollout(self, count, asked):
        """Rounds of sampling until every process has as many groups with variance as it trains on, or too many."""
        buffer = GroupBuffer(
            count // self.num_generations, self.num_generations, self._tokenizer.pad_token_id,
            self.args.dynamic_sampling_rounds, agree=self._least, multiple_of=self.pad_to_multiple_of,
        )  # fmt: skip
        while not buffer.done:
            buffer.add(*self._ask(count, asked))
        rollout, _ = buffer.take()
        mask = rollout["completion_mask"] * rollout.get("tool_mask", 1)
        rollout["num_items_in_batch"] = self._sum(mask.sum())  # over all processes
        figures = buffer.metrics()  # of this process
        sums = self._sum(mask.new_tensor(list(figures.values()), dtype=torch.float64)).tolist()
        for name, value in zip(figures, sums):
            counted = name in ("groups generated", "groups dropped", "groups filled up")
            self._metrics["train"][name].append(value if counted else value / self.accelerator.num_processes)
        return rollout

    def _least(self, number):
        return self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).min().item()

    def _generate(self, prompts):
        result = super()._generate(prompts)
        words = [float(reflection_words(completion_text(text))) for text in result[3]]
        mean = self.accelerator.gather(torch.tensor(words, device=self.accelerator.device)).mean().item()
        self._metrics["train" if self.model.training else "eval"]["reflection_words"].append(mean)
        return result

    # -- update

    def _compute_loss(self, model, inputs):
        with self.replaying(inputs):
            return super()._compute_loss(model, inputs)

    # -- before the first step

    @torch.no_grad()
    def sample_groups(self, prompts, group):
        """Completions of the policy for a look at what can be learned: nothing of the run changes.

        Args:
            prompts: how many of the training prompts that may be asked now, spread over the set, at least one a
                process; `group`: completions of each. At most a rollout's completions are sampled at a time.
        Returns:
            {"rewards": (groups, G, functions) with NaN where one could not judge, "names", "weights" as they are now,
            "prompts", "completions", "lengths", "truncated"}, of all processes.
        """
        self._weigh_rewards()
        places = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.seed))
        places = places[torch.from_numpy(self.curriculum.from_step)[places] <= self.state.global_step]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count = -(-min(prompts, len(places)) // world) * world  # as many on each process
        own = places[torch.arange(count) % len(places)].tolist()[rank::world]
        at_once = max(1, self.args.per_device_train_batch_size * self.args.steps_per_generation // group)
        training, seen = self.model.training, self.state.num_input_tokens_seen
        self.model.eval()
        parts = []
        try:
            with same_random_numbers(self.accelerator.device):
                for start in range(0, len(own), at_once):
                    parts.append(self._sample_part(own[start : start + at_once], group))
        finally:
            self.model.train(training)
            self._metrics["eval"].clear()
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()
            self.state.num_input_tokens_seen = seen
        rewards, prompts, completions, ids = zip(*parts)
        join = lambda lists: [item for each in lists for item in each]
        return {
            "rewards": torch.cat([each.view(-1, group, each.size(1)) for each in rewards]).cpu(),
            "names": self.reward_func_names, "weights": self.reward_weights.tolist(),
            "prompts": join(prompts), "completions": join(completions),
            "lengths": [len(each) for each in join(ids)],
            "truncated": [each[-1] not in self.eos_token_ids for each in join(ids)],
        }  # fmt: skip

    def _sample_part(self, places, group):
        """(rewards, prompts, completions as text, their tokens) of all processes, in the same order."""
        rows = [self.train_dataset[place] for place in places for _ in range(group)]
        prompts = [row["prompt"] for row in rows]
        _, ids, _, completions, *_ = self._generate(prompts)
        rewards = self._calculate_rewards(rows, prompts, completions, ids)
        return rewards, *map(gather_object, (prompts, list(map(completion_text, completions)), ids))
