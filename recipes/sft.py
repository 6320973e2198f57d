"""Supervised fine-tuning: a base model -> one that thinks in <think>...</think> and answers.

    accelerate launch recipes/sft.py --config recipes/configs/sft_tiny.yaml [--key value]

Every key is a field of `SFTRecipeConfig` (`--help`). A run folder holds config.yaml (resolved), metrics.jsonl,
checkpoints that resume exactly, the model (or the adapter, and the model with it merged in `merged/`), eval.json with
the accuracy on held-out problems before and after, and report.html.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from transformers import set_seed

from recipes.adapters import add_adapters, describe_quantisation, quantization_config
from recipes.callbacks import ExpertBalanceCallback
from recipes.evaluation import load_problems
from recipes.logging_callbacks import RunLogCallback
from recipes.model_loading import load_causal_lm, load_chat_tokenizer
from recipes.pretrain_config import parse_config
from recipes.process_start import watched
from recipes.run_results import text_table
from recipes.sft_config import SFTRecipeConfig
from recipes.sft_data import Encoding, checksum, encode_dataset, hold_out, read_splits, training_template
from recipes.sft_results import announce_run, finish_run
from recipes.sft_trainer import RecipeSFTTrainer, causal_lm
from recipes.stage_results import evaluate_before

# What a resumed run must share beyond `resume_guard.TRAJECTORY_FIELDS`.
GUARDED = (
    "packing_strategy", "shuffle_dataset", "loss_type", "neftune_noise_alpha",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_groups", "lora_target_modules",
)  # fmt: skip


def build_data(args, tokenizer):
    """(training examples, held-out examples or None, facts for config.yaml)."""
    train, held_out = read_splits(args.dataset_name)
    if held_out is None and args.validation_fraction:
        train, held_out = hold_out(train, args.validation_fraction, args.seed)
    template = training_template(tokenizer, args.multi_turn) if args.assistant_only_loss else None
    encoding = Encoding(
        args.max_length, args.multi_turn, args.overlong, args.assistant_only_loss, args.errors, template
    )
    facts, found = {"dataset": args.dataset_name}, {"training": train, "held out": held_out}
    for part, rows in found.items():
        if rows is None or not len(rows):
            found[part] = None
            continue
        where = f"{args.dataset_name} ({part})"
        with args.main_process_first(desc="encoding"):  # the others read what it has cached
            found[part], report = encode_dataset(rows, tokenizer, encoding, where, args.dataset_num_proc)
        facts[part] = report.lines()
    facts["checksum"] = checksum(found["training"])
    return found["training"], found["held out"], facts


def build_model(args, tokenizer):
    """The model, with adapters where `lora_rank` asks for them."""
    quantisation = quantization_config(args)
    model = load_causal_lm(args, tokenizer, quantisation)
    if quantisation is not None:
        print(describe_quantisation(model), flush=True)
    return add_adapters(model, args) if args.lora_rank else model


def build_trainer(args, model, tokenizer):
    """The trainer with its data and callbacks."""
    train, held_out, facts = build_data(args, tokenizer)
    if held_out is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value} needs held-out examples: raise validation_fraction="
            f"{args.validation_fraction}, bring a test split, or set eval_strategy=no"
        )
    balanced = hasattr(causal_lm(model), "update_expert_bias")
    trainer = RecipeSFTTrainer(
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
    tokenizer = load_chat_tokenizer(args)
    if args.dry_run:
        _, _, facts = build_data(args, tokenizer)
        print(text_table([(part, line) for part in ("training", "held out") for line in facts.get(part, [])]))
        return None
    if args.eval_tasks:
        load_problems(args.task_evaluation())  # too few problems, or no files: said now, not after training
    trainer = build_trainer(args, build_model(args, tokenizer), tokenizer)
    if not args.resume_from_checkpoint:
        trainer.require_fresh_output_dir()  # now, and not after the evaluation
    with watched(trainer, trainer.resume_guard):
        before = evaluate_before(trainer)
        trainer.train()
        return finish_run(trainer, before)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return run(parse_config(SFTRecipeConfig, argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
