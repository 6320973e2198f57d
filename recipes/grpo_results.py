"""GRPO inside a run folder: the trainer, the head of a run, and the pre-flight before its first step."""

import json
import logging
from pathlib import Path

import torch

from recipes.checkpoint_files import write_atomically
from recipes.grpo_trainer import R1GRPOTrainer
from recipes.memory_plan import memory_plan
from recipes.preflight import survey
from recipes.rl_results import RecipeRLMixin, announce_run

logger = logging.getLogger(__name__)


class RecipeGRPOTrainer(RecipeRLMixin, R1GRPOTrainer):
    """`R1GRPOTrainer` with checkpoints that survive a kill and tokens/s."""


def announce(trainer, facts):
    """The head of a run, printed and stored."""
    args = trainer.args
    clip = f"clip {args.epsilon:g}" + (f" to {args.epsilon_high:g}" if args.epsilon_high else "")
    loss = f"{args.loss_type}, ratios per {args.importance_sampling_level}, {clip}, advantages scaled by "
    reference = "none" if not args.beta else f"KL {args.beta:g}" + (
        f", replaced by {args.ref_model_mixup_alpha:g} of the policy every {args.ref_model_sync_steps} steps"
        if args.sync_ref_model else ""
    )
    announce_run(trainer, facts, "grpo", {
        "loss": loss + str(args.scale_rewards), "reference": reference, "curriculum": args.curriculum,
        "dynamic sampling": f"up to {args.dynamic_sampling_rounds} rounds" if args.dynamic_sampling else "off",
    })  # fmt: skip


def preflight(trainer):
    """What a run needs and whether it can learn, before its first step; stored in `preflight.json`.

    Raises:
        ValueError: where nothing can be learned, with advice; where the memory cannot suffice.
    """
    args = trainer.args
    if not args.preflight_prompts:
        return
    memory = memory_plan(args, trainer.accelerator.unwrap_model(trainer.model), trainer.ref_model, trainer.reward_funcs)
    sample = trainer.sample_groups(args.preflight_prompts, args.num_generations)
    groups = sample["rewards"].shape[:2]
    report = survey(
        {name: sample["rewards"][..., place] for place, name in enumerate(sample["names"])}, sample["completions"],
        weights=dict(zip(sample["names"], sample["weights"])),
        truncated=torch.tensor(sample["truncated"]).view(groups), lengths=torch.tensor(sample["lengths"]).view(groups),
        prompts=sample["prompts"][:: args.num_generations],
        passed_by=args.curriculum_reward if args.curriculum_reward in sample["names"] else None,
        settings={name: getattr(args, name) for name in ("max_completion_length", "num_generations", "temperature")},
        memory=memory,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(args.output_dir) / "preflight.json", json.dumps(report.to_json(), indent=1))
        print(report.table(), flush=True)
    for warning in report.check():
        logger.warning("pre-flight: %s", warning)
