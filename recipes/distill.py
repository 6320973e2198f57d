"""Distillation: a teacher -> a smaller student, by the teacher's traces, its logits, or on the student's own answers.

    accelerate launch recipes/distill.py --config recipes/configs/distill_tiny.yaml [--key value]

Every key is a field of `DistillRecipeConfig` (`--help`); docs/distillation.md says when to take which method. A run
folder holds config.yaml (resolved), metrics.jsonl, checkpoints that resume exactly, the student, eval.json with the
accuracy of student (before and after) and teacher, their sizes and speeds, and report.html.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from transformers import set_seed

from recipes.callbacks import ExpertBalanceCallback
from recipes.distill_config import DistillRecipeConfig
from recipes.distill_results import announce_run, describe_teacher, finish_run, read_teacher_eval
from recipes.distill_stages import run_stages
from recipes.distill_students import build_student, check_same_vocabulary, load_teacher, resume_facts, teacher_tokenizer
from recipes.distill_trainer import RecipeDistillationTrainer, RecipeLogitsTrainer
from recipes.evaluation import load_problems
from recipes.logging_callbacks import RunLogCallback
from recipes.model_loading import load_chat_tokenizer
from recipes.pretrain_config import parse_config
from recipes.process_start import watched
from recipes.rl_data import build_prompts
from recipes.run_results import text_table
from recipes.sft import build_data
from recipes.sft_trainer import RecipeSFTTrainer, causal_lm
from recipes.stage_results import evaluate_before

TRAINERS = {"traces": RecipeSFTTrainer, "logits": RecipeLogitsTrainer, "on_policy": RecipeDistillationTrainer}


def read_data(args, tokenizer, config=None):
    """(training rows, held-out rows or None, facts for config.yaml): prompts for on_policy, else encoded traces."""
    if args.method == "on_policy":
        return build_prompts(args, tokenizer, config)
    return build_data(args, tokenizer)


def build_trainer(args, tokenizer, teacher):
    """The trainer with its student, data and callbacks. `teacher`: None for traces."""
    student = build_student(args, tokenizer)
    train, held_out, facts = read_data(args, tokenizer, causal_lm(student).config.get_text_config())
    if held_out is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value} needs held-out rows: raise validation_fraction="
            f"{args.validation_fraction}, bring a test split, or set eval_strategy=no"
        )
    balanced = hasattr(causal_lm(student), "update_expert_bias")
    trainer = TRAINERS[args.method](
        model=student, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        callbacks=[ExpertBalanceCallback()] if balanced else [],
        **({} if args.method == "traces" else {"teacher": teacher}),
    )  # fmt: skip
    trainer.resume_guard = {"train_data": facts["checksum"]} | resume_facts(args, teacher)
    log = RunLogCallback(args.output_dir, show_bar=not args.disable_tqdm, announce=lambda: announce_run(trainer, facts))
    trainer.add_callback(log)
    return trainer


def run(args):
    """A whole run with parsed settings, intermediate students first. Returns the content of eval.json."""
    if args.progressive:
        args, stages = run_stages(args, run)
        return run(args) | {"stages": [folder for folder, _ in stages]}
    set_seed(args.seed)
    tokenizer, own, teacher, described = load_chat_tokenizer(args), None, None, None
    if args.teacher_model_name_or_path:
        own = teacher_tokenizer(args)
        if args.method != "traces":
            check_same_vocabulary(args, tokenizer, own)
    if args.dry_run:
        facts = read_data(args, tokenizer)[2]
        print(text_table([(part, facts[part]) for part in ("training", "held out") if part in facts]))
        return None
    if args.eval_tasks:
        load_problems(args.task_evaluation())  # too few problems, or no files: said now, not after training
    if args.eval_tasks and args.teacher_eval:
        read_teacher_eval(args)
    if args.method != "traces":
        teacher = load_teacher(args, own)
    trainer = build_trainer(args, tokenizer, teacher)
    if not args.resume_from_checkpoint:
        trainer.require_fresh_output_dir()  # now, and not after the evaluation
    with watched(trainer, trainer.resume_guard):
        if args.teacher_model_name_or_path:  # measured, and under traces let go again
            described = describe_teacher(trainer, teacher, own)
        before = evaluate_before(trainer)
        trainer.train()
        return finish_run(trainer, before, described)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return run(parse_config(DistillRecipeConfig, argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
