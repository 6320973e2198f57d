"""Pretraining, from nothing or from released weights: config -> model, data -> train -> evaluate -> save.

    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_tiny.yaml [--key value]
    python recipes/pretrain.py --config recipes/configs/pretrain_r1.yaml --dry_run

Every key is a field of `PretrainConfig` (`--help`). A run folder holds config.yaml (resolved), metrics.jsonl,
checkpoints that resume exactly, the final model (and `ema/`, its averaged twin), eval.json and report.html.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from transformers import set_seed

from recipes.callbacks import ExpertBalanceCallback
from recipes.data import PackingCollator, check_enough_rows, load_pretraining_data
from recipes.ema import EMACallback
from recipes.logging_callbacks import RunLogCallback, SampleCallback
from recipes.model_loading import build_config, build_model, load_tokenizer
from recipes.pretrain_config import PretrainConfig, parse_config
from recipes.pretrain_trainer import PretrainTrainer
from recipes.process_start import watched
from recipes.run_results import announce_run, finish_run
from recipes.sizing import sizing_table


def build_trainer(args, model, tokenizer):
    """The trainer with its data and callbacks."""
    train, validation, info = load_pretraining_data(
        args.dataset_name,
        tokenizer,
        args.sequence_length,
        streaming=args.streaming,
        text_column=args.text_column,
        seed=args.seed if args.data_seed is None else args.data_seed,
        validation_fraction=args.validation_fraction,
        max_validation_tokens=args.max_validation_tokens,
        errors=args.errors,
    )
    check_enough_rows(train, args)
    trainer = PretrainTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=PackingCollator(same_keys=args.streaming and args.world_size > 1),
        processing_class=tokenizer,
        callbacks=[ExpertBalanceCallback()],
    )
    trainer.resume_guard = {"train_tokens": info["train_tokens"], "train_data": info["checksum"]}
    log = RunLogCallback(args.output_dir, show_bar=not args.disable_tqdm, announce=lambda: announce_run(trainer, info))
    samples = SampleCallback(log, tokenizer, args.sample_prompts, args.sample_steps, args.sample_tokens, trainer.speed)
    trainer.add_callback(samples)  # before the log: it closes the progress bar when training ends
    trainer.add_callback(log)
    if args.ema_decay:
        trainer.add_callback(EMACallback(args.ema_decay))
    return trainer


def run(args):
    """A whole run with parsed settings. Returns the content of eval.json."""
    if args.dry_run:
        print(sizing_table(build_config(args), args))
        return None
    set_seed(args.seed)
    tokenizer = load_tokenizer(args)
    trainer = build_trainer(args, build_model(args, tokenizer), tokenizer)
    with watched(trainer, trainer.resume_guard):
        trainer.train()
        return finish_run(trainer)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return run(parse_config(PretrainConfig, argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
