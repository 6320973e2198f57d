"""Evaluation of any model folder or Hub name: verified tasks, perplexity, a report; or a comparison of such runs.

    accelerate launch recipes/eval.py --model_name_or_path runs/sft --tasks chain_sum gcd:1-3 mathematics \\
        --problems 100 --samples 4 --temperature 0.6 --output_dir runs/eval_sft --text_dataset data/nano
    python recipes/eval.py --compare runs/eval_base/eval.json runs/eval_sft/eval.json --output_dir runs/compare

Every key is a field of `EvalConfig` (`--help`). The output folder holds eval.json (figures with intervals,
settings, seeds, versions), completions.jsonl (one line a completion, resumed from) and report.html.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from accelerate import Accelerator

from recipes.eval_config import EvalConfig
from recipes.eval_model import check_output_dir, load_model, load_tokenizer, model_facts
from recipes.eval_report import write_comparison, write_evaluation
from recipes.eval_tables import comparison_table, read_results, results_table
from recipes.evaluation import clear_completions, evaluate_tasks, evaluate_text
from recipes.pretrain_config import parse_config


def compare(args):
    """Tables and report.html of several eval.json files."""
    results = read_results(args.compare)
    print(comparison_table(results))
    print(write_comparison(results, args.compare, args.output_dir))
    return results


def evaluate(args):
    """A whole evaluation with parsed settings. Returns the content of eval.json."""
    accelerator = Accelerator(cpu=args.use_cpu)
    check_output_dir(args.output_dir)
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 results hold for any batch size
    tokenizer = load_tokenizer(args)
    model = load_model(args, tokenizer, accelerator.device)
    result = {"name": args.name or Path(args.model_name_or_path.rstrip("/")).name}
    result |= model_facts(args, model, accelerator)
    if args.tasks:
        if args.overwrite_output_dir and accelerator.is_main_process:
            clear_completions(args.output_dir)
        accelerator.wait_for_everyone()
        result |= evaluate_tasks(model, tokenizer, args.evaluation_settings(), args.output_dir, result["name"],
                                 accelerator, progress=not args.disable_tqdm)
    if args.text_dataset is not None:
        text = evaluate_text(model, tokenizer, args.text_dataset, window=args.text_window,
                             batch_size=args.text_batch_size, text_column=args.text_column,
                             max_bytes=args.max_text_bytes, accelerator=accelerator)
        result["text"] = {"dataset": args.text_dataset} | text
    if accelerator.is_main_process:
        path = write_evaluation(result, args.output_dir)
        print(f"{results_table(result)}\n{path}")
    accelerator.end_training()
    return result


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading; the evaluation has its own
    args = parse_config(EvalConfig, argv)
    return compare(args) if args.compare else evaluate(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
