"""The two ends of a run: what is printed and written before training, and after it."""

import json
from pathlib import Path

from recipes.checkpoint_files import write_atomically
from recipes.ema import EMACallback
from recipes.logging_callbacks import METRICS_FILE, read_metrics, write_run_config
from recipes.reporting import result_rows, text_baselines, write_report
from recipes.sizing import count_parameters

BASELINE_ROWS = 512  # held-out rows that the reference values are computed on


def text_table(rows):
    """[(name, value)] as lines with the values below each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _labels(rows, count):
    """The tokens that are predicted in the first `count` rows, one list a row."""
    wanted = (rows[index]["labels"] for index in range(min(count, len(rows))))
    return [labels[labels.ne(-100)].tolist() for labels in wanted]


def _baselines(trainer):
    """Bits per byte of the held-out text without a model (see `text_baselines`)."""
    validation, train, tokenizer = trainer.eval_dataset, trainer.train_dataset, trainer.processing_class
    if validation is None:
        return {}
    tokens = _labels(validation, BASELINE_ROWS)
    seen = _labels(train, 8 * BASELINE_ROWS) if hasattr(train, "__len__") else []
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return text_baselines(texts, tokens, seen, trainer.model.config.vocab_size)


def announce_run(trainer, info):
    """Print and store commit, sizes, device and the resolved config."""
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    counts = count_parameters(trainer.model.config)
    sizes = {
        "parameters": f"{counts.total:,}",
        "active parameters per token": f"{counts.active:,}",
        "FLOPs per training token": f"{trainer.flops_per_token / 1e9:.4f} G",
        "tokens per optimizer step": f"{args.tokens_per_step:,}",
        "device peak": "unknown"
        if trainer.peak_flops is None
        else f"{trainer.peak_flops / 1e12:.3f} TFLOP/s ({trainer.peak_source})",
    }
    facts = {"sizes": sizes, "baselines": _baselines(trainer), "data": info}
    content = write_run_config(args, trainer.model, args.output_dir, facts)
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    print(text_table(rows), flush=True)


def _evaluation(trainer, prefix):
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    sources = {k.removeprefix(f"{prefix}_bits_per_byte_"): v for k, v in metrics.items() if "_bits_per_byte_" in k}
    return {name: metrics[f"{prefix}_{name}"] for name in ("bits_per_byte", "loss", "bytes")} | {"sources": sources}


def save_average(trainer, evaluate=None):
    """Saves the averaged weights, where the run has an `EMACallback`, in `ema/`; `evaluate()` is called on them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EMACallback):
            with callback.applied(model):
                if evaluate is not None and trainer.eval_dataset is not None:
                    evaluate()
                if trainer.args.should_save:
                    trainer._save(str(Path(trainer.args.output_dir) / "ema"))


def conclude(output_dir, results):
    """Write eval.json and report.html, print the results, return them: the end of every stage."""
    folder = Path(output_dir)
    write_atomically(folder / "eval.json", json.dumps(results, indent=1))
    report = write_report(folder)
    rows = result_rows(read_metrics(folder / METRICS_FILE), results, {})
    print(text_table([*rows, ("model", output_dir), ("report", str(report))]), flush=True)
    return results


def finish_run(trainer):
    """Evaluate, save the weights (and their average in `ema/`), write eval.json and report.html, print results."""
    args, results = trainer.args, {"step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        results["weights"] = _evaluation(trainer, "final")
        if trainer.expert_loads:
            results["expert_load"] = trainer.expert_loads
    trainer.save_model()
    save_average(trainer, lambda: results.update(ema=_evaluation(trainer, "ema")))
    if not trainer.is_world_process_zero():
        return results
    return trainer.push_results(conclude(args.output_dir, results))
