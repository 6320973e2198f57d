"""GRPO: a model -> one that reasons its way to more right answers, by rules, functions or reward models.

    accelerate launch recipes/grpo.py --config recipes/configs/grpo_tiny.yaml [--key value]

From a base model with `chat_template: deepseek_r1_zero` this is DeepSeek-R1-Zero, from a fine-tuned one DeepSeek-R1's
RL stages; `configs/grpo_*.yaml` hold the papers' settings (R1-Zero, R1, DAPO, Dr. GRPO, GSPO) and smaller ones.
Every key is a field of `GRPORecipeConfig` (`--help`). Before the first step a pre-flight prints the memory plan, scores
the policy on a few prompts, and refuses where nothing can be learned. A run folder holds config.yaml (resolved),
preflight.json, metrics.jsonl, checkpoints that resume exactly, the model (with LoRA the adapter, and the model with it
merged in `merged/`), eval.json with the accuracy on held-out problems before and after, and report.html.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers

from recipes import rl_stage
from recipes.grpo_config import GRPORecipeConfig
from recipes.grpo_results import RecipeGRPOTrainer, announce, preflight
from recipes.pretrain_config import parse_config

# What a resumed run must share beyond `rl_stage.GUARDED`.
GUARDED = (
    "num_iterations", "generation_batch_size", "beta", "loss_type", "scale_rewards", "importance_sampling_level",
    "delta", "mask_truncated_completions", "multi_objective_aggregation", "top_entropy_quantile",
    "off_policy_mask_threshold", "use_bias_correction_kl", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "dynamic_sampling", "dynamic_sampling_rounds", "curriculum", "curriculum_reward",
    "curriculum_target", "curriculum_half_life", "prompts_from_step", "reward_from_step",
)  # fmt: skip


def build_trainer(args, tokenizer):
    """The trainer with its data, models, rewards and callbacks."""
    return rl_stage.build_trainer(args, tokenizer, RecipeGRPOTrainer, GUARDED, announce)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return rl_stage.run_stage(parse_config(GRPORecipeConfig, argv), "grpo", build_trainer, preflight)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
