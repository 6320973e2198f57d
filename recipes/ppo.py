"""PPO: a fine-tuned model -> one that is rewarded more, by rules, functions or reward models.

    accelerate launch recipes/ppo.py --config recipes/configs/ppo_tiny.yaml [--key value]

Every key is a field of `PPORecipeConfig` (`--help`). A run folder holds config.yaml (resolved), metrics.jsonl,
checkpoints that resume exactly, the policy as a plain causal LM (with LoRA the adapter, and the model with it merged in
`merged/`), value_head.safetensors, eval.json with the accuracy on held-out problems before and after, and report.html.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers

from recipes import rl_stage
from recipes.ppo_config import PPORecipeConfig
from recipes.ppo_results import RecipePPOTrainer, announce
from recipes.pretrain_config import parse_config

# What a resumed run must share beyond `rl_stage.GUARDED`.
GUARDED = (
    "num_ppo_epochs", "num_mini_batches", "gamma", "lam", "vf_coef", "cliprange_value", "kl_coef", "kl_estimator",
    "kl_target", "kl_horizon", "whiten_rewards", "whiten_advantages", "truncated_completions", "missing_eos_penalty",
    "value_function", "value_model_name_or_path", "value_learning_rate", "value_trunk_gradient",
)  # fmt: skip


def build_trainer(args, tokenizer):
    """The trainer with its data, models, rewards and callbacks."""
    return rl_stage.build_trainer(args, tokenizer, RecipePPOTrainer, GUARDED, announce)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return rl_stage.run_stage(parse_config(PPORecipeConfig, argv), "ppo", build_trainer)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
