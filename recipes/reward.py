"""Reward models: from preference pairs, or from solutions with a label for each step.

    accelerate launch recipes/reward.py --config recipes/configs/reward_tiny.yaml [--key value]

Every key is a field of `RewardRecipeConfig` (`--help`). A run folder holds config.yaml (resolved), metrics.jsonl,
checkpoints that resume exactly, the model with its tokenizer, eval.json (held-out accuracy with interval, calibration,
length bias), the held-out rewards and report.html. `recipes/reward_scoring.py` reads rewards off the model.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from transformers import set_seed

from recipes.adapters import add_adapters
from recipes.callbacks import ExpertBalanceCallback
from recipes.logging_callbacks import RunLogCallback
from recipes.model_loading import load_chat_tokenizer
from recipes.pretrain_config import parse_config
from recipes.process_start import watched
from recipes.reward_config import RewardRecipeConfig
from recipes.reward_data import RewardEncoding, checksum, encode_rows, split_rows, without_trained
from recipes.reward_models import KINDS, load_for_training
from recipes.reward_results import announce_run, finish_run
from recipes.reward_trainer import ProcessRewardTrainer, RecipeRewardTrainer

TRAINERS = {"preference": RecipeRewardTrainer, "process": ProcessRewardTrainer}
# What a resumed run must share beyond `resume_guard.TRAJECTORY_FIELDS`.
GUARDED = (
    "kind", "center_rewards_coefficient", "use_margin", "overlong", "disable_dropout",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_groups", "lora_target_modules",
)  # fmt: skip


def build_data(args, tokenizer):
    """(training rows, held-out rows or None, facts for config.yaml)."""
    parts = split_rows(args.dataset_name, args.validation_fraction, args.seed)
    encoding = RewardEncoding(
        args.kind, args.max_length, args.overlong, args.errors, args.use_margin, args.step_separator
    )
    found, facts = {}, {"dataset": args.dataset_name}
    for part, rows in zip(("training", "held out"), parts):
        if rows is None:
            continue
        where = f"{args.dataset_name} ({part})"
        with args.main_process_first(desc="encoding"):  # the others read what it has cached
            found[part], report = encode_rows(rows, tokenizer, encoding, where, args.dataset_num_proc)
        facts[part] = report.lines()
    train, held_out = found["training"], found.get("held out")
    if held_out is not None:
        held_out, shared = without_trained(held_out, train)
        facts["held out"] += [f"{shared:,} left out: their problems are trained on"] if shared else []
        if not len(held_out):
            raise ValueError(
                f"dataset_name={args.dataset_name}: the problem of every held-out row is in the training rows too; "
                "split by problem (python -m data_scripts.prepare_preferences does), or leave the test file out"
            )
    return train, held_out, facts | {"checksum": checksum(train)}


def build_trainer(args, tokenizer):
    """The trainer with its model, data and callbacks."""
    train, held_out, facts = build_data(args, tokenizer)
    if held_out is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value} needs held-out rows: raise validation_fraction="
            f"{args.validation_fraction}, bring a test split, or set eval_strategy=no"
        )
    model = load_for_training(args, tokenizer)
    balanced = hasattr(model, "update_expert_bias")
    if args.lora_rank:
        model = add_adapters(model, args, KINDS[args.kind].task_type)
    trainer = TRAINERS[args.kind](
        model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        callbacks=[ExpertBalanceCallback()] if balanced else [],
    )  # fmt: skip
    trainer.resume_guard = {"train_data": facts["checksum"]} | {name: getattr(args, name) for name in GUARDED}
    log = RunLogCallback(args.output_dir, show_bar=not args.disable_tqdm, announce=lambda: announce_run(trainer, facts))
    trainer.add_callback(log)
    return trainer


def run(args):
    """A whole run with parsed settings. Returns the content of eval.json."""
    set_seed(args.seed)
    trainer = build_trainer(args, load_chat_tokenizer(args))
    if not args.resume_from_checkpoint:
        trainer.require_fresh_output_dir()
    with watched(trainer, trainer.resume_guard):
        trainer.train()
        return finish_run(trainer)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return run(parse_config(RewardRecipeConfig, argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
