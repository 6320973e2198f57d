"""The two ends of a fine-tuning run: what is printed, evaluated and written before training, and after it."""

import json
import shutil
from pathlib import Path

import torch

from recipes.checkpoint_files import write_atomically
from recipes.evaluation import evaluate_tasks
from recipes.logging_callbacks import METRICS_FILE, read_metrics, write_run_config
from recipes.reporting import result_rows, write_report
from recipes.run_results import text_table
from recipes.sft_trainer import causal_lm


def announce_run(trainer, facts):
    """Print and store commit, sizes, device and the resolved config."""
    args, model = trainer.args, causal_lm(trainer.model)
    if not trainer.is_world_process_zero():
        return
    parameters = list(trainer.model.parameters())
    total, trained = (sum(p.numel() for p in parameters if p.requires_grad >= wanted) for wanted in (False, True))
    mtp = getattr(model, "trains_mtp", False)
    sizes = {
        "parameters": f"{total:,}",
        "trained parameters": f"{trained:,} ({trained / total:.2%})",
        "multi-token prediction": f"trained, weight {model.config.mtp_loss_coef}" if mtp else "not trained",
        "examples": facts["training"][0],
        "packed rows": f"{len(trainer.train_dataset):,} of up to {args.max_length} tokens",
    }
    content = write_run_config(args, model, args.output_dir, {"stage": "sft", "sizes": sizes, "data": facts})
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    rows += [("data", line) for part in ("training", "held out") for line in facts.get(part, [])[1:]]
    print(text_table(rows), flush=True)


# ---------------------------------------------------------------- accuracy on tasks


def _evaluate(trainer, name, afresh):
    args, folder = trainer.args, Path(trainer.args.output_dir) / f"eval_{name}"
    if afresh and trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with trainer.speed.paused(), trainer.compute_loss_context_manager():
        return evaluate_tasks(
            trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, args.task_evaluation(),
            output_dir=str(folder), name=name, accelerator=trainer.accelerator,
            progress=not args.disable_tqdm,
        )  # fmt: skip


def evaluate_before(trainer):
    """The tasks' results before training, once a run: a resumed run finds them on disk."""
    if not (trainer.args.eval_tasks and trainer.args.eval_before):
        return None
    return _evaluate(trainer, "before", afresh=trainer.args.overwrite_output_dir)


# ---------------------------------------------------------------- the end


@torch.no_grad()
def _save_merged(trainer):
    """The model with its adapter merged, in `merged/`; returns the largest difference of its logits."""
    args, tokenizer, model = trainer.args, trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"][:64]], device=model.device)
    expected = model(input_ids=ids).logits.float()
    merged = model.merge_and_unload()
    difference = (merged(input_ids=ids).logits.float() - expected).abs().max().item()
    folder = Path(args.output_dir) / "merged"
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return difference


def finish_run(trainer, before):
    """Evaluate, save, write eval.json and report.html, print results. Returns the content of eval.json."""
    args, results = trainer.args, {"stage": "sft", "step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate(metric_key_prefix="final")
        results["held_out"] = {name: metrics[f"final_{name}"] for name in ("loss", "token_accuracy", "tokens")}
    trainer.save_model()
    if args.eval_tasks:
        trained = trainer.state.global_step > trainer.first_step  # else the answers of a killed evaluation still hold
        results["tasks"] = ({"before": before} if before else {}) | {"after": _evaluate(trainer, "after", trained)}
    if not trainer.is_world_process_zero():
        return results
    if args.lora_rank and args.merge_adapter:
        results["merged_logits_difference"] = _save_merged(trainer)
    write_atomically(Path(args.output_dir) / "eval.json", json.dumps(results, indent=1))
    report = write_report(args.output_dir)
    rows = result_rows(read_metrics(Path(args.output_dir) / METRICS_FILE), results, {})
    print(text_table([*rows, ("model", args.output_dir), ("report", str(report))]), flush=True)
    return results
