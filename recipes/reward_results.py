"""The two ends of a reward model's run: what is printed and written before training, and after it."""

import json
from pathlib import Path

from recipes.checkpoint_files import write_atomically
from recipes.logging_callbacks import METRICS_FILE, read_metrics, write_run_config
from recipes.reporting import result_rows, write_report
from recipes.reward_plots import REWARDS_FILE
from recipes.run_results import text_table
from recipes.stage_results import save_merged, sizes_of

STAGES = {"preference": "reward", "process": "process_reward"}


def announce_run(trainer, facts):
    """Print and store commit, sizes, device and the resolved config."""
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    sizes = sizes_of(trainer.model) | {"training": facts["training"][0]}
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    content = write_run_config(
        args, model, args.output_dir, {"stage": STAGES[args.kind], "sizes": sizes, "data": facts}
    )
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    rows += [("held out", line) for line in facts.get("held out", [])[:1]]
    rows += [(f"data, {part}", line) for part in ("training", "held out") for line in facts.get(part, [])[1:]]
    print(text_table(rows), flush=True)


def data_baselines(dataset_name):
    """{source, or "source: kind": {rule: accuracy without a model}} of the data's manifest.json; empty without one."""
    file = Path(dataset_name).expanduser() / "manifest.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("baselines", {}) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def held_out_rows(trainer):
    """One row for each held-out pair or solution: what the figures of the report are drawn from."""
    rows, scores = trainer.eval_dataset, trainer.held_out_scores
    if trainer.args.kind == "process":
        labels = [[label for label in row if label != -100] for row in rows["step_labels"]]
        columns = {"probabilities": scores, "labels": labels}
    else:
        columns = {"chosen": [pair[0] for pair in scores], "rejected": [pair[1] for pair in scores]}
        columns |= {name: rows[name] for name in ("chosen_tokens", "rejected_tokens")}
    columns |= {name: rows[name] for name in ("problem", "source", "kind")}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def finish_run(trainer):
    """Evaluate, save, write eval.json and report.html, print results. Returns the content of eval.json."""
    args = trainer.args
    results = {"stage": STAGES[args.kind], "step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        trainer.evaluate(metric_key_prefix="final")
        results["process" if args.kind == "process" else "preferences"] = trainer.held_out
        if baselines := data_baselines(args.dataset_name):
            results["data_baselines"] = baselines
        if args.kind == "preference":  # for whoever compares or normalises rewards: see reward_scoring.py
            config = getattr(trainer.model, "get_base_model", lambda: trainer.model)().config
            config.reward_mean, config.reward_std = (trainer.held_out["reward"][name] for name in ("mean", "std"))
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return results
    folder = Path(args.output_dir)
    if trainer.eval_dataset is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held_out_rows(trainer))
        write_atomically(folder / REWARDS_FILE, lines)
    if args.lora_rank and args.merge_adapter:
        first = trainer.train_dataset[0]
        results["merged_logits_difference"] = save_merged(trainer, first.get("chosen_ids") or first["input_ids"])
    write_atomically(folder / "eval.json", json.dumps(results, indent=1))
    report = write_report(folder)
    rows = result_rows(read_metrics(folder / METRICS_FILE), results, {})
    print(text_table([*rows, ("model", args.output_dir), ("report", str(report))]), flush=True)
    return trainer.push_results(results)
