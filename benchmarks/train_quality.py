"""Minutes of training to a held-out bits per byte: our mixture, the library's, our dense model of equal active size.

All three see the same packed rows in the same order with the same learning rates (linear warm-up, then constant, so
that a point of a curve does not depend on when its run was to end), without MTP. Ours and the dense one train through
the parts of `recipes/pretrain.py`; the library's class under `Trainer` with `bf16=True` and its defaults otherwise,
torch's fused AdamW included. Changed model fields change the mixture, and with it its dense twin.
The clock runs from the first step on (compilation included) and stands still during evaluations.
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback, set_seed

from benchmarks.train_cases import OURS_ONLY, ROOT, synchronize
from benchmarks.train_losses import curve_figure, markov_rows
from benchmarks.train_recipe import write_packed_rows
from recipes.pretrain_config import apply_dotted

RUNS = ("ours", "library", "dense")
KEPT = ("sequence_length", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "adam_beta1",
        "adam_beta2", "weight_decay", "max_grad_norm", "seed")  # fmt: skip


def dense_twin(fields):
    """The fields of a model without experts whose feed-forward layers are as large, in all, as what a token passes."""
    layers, dense = fields["num_hidden_layers"], fields["first_k_dense_replace"]
    chosen = fields["num_experts_per_tok"] + (fields.get("n_shared_experts") or 0)
    router = fields["n_routed_experts"] / 3  # its weights, as rows of the three matrices
    sparse = fields["moe_intermediate_size"] * chosen + router
    mean = (dense * fields["intermediate_size"] + (layers - dense) * sparse) / layers
    return fields | {"n_routed_experts": None, "intermediate_size": 8 * round(mean / 8)}


class QualityClock(TrainerCallback):
    """Training seconds without evaluations, and (seconds, step, tokens, bits per byte) of each evaluation.

    Ends the run when `minutes` of training are over or `target` is reached, with an evaluation. `evaluated(points)` is
    called after each.
    """

    def __init__(self, device, tokens_per_step, minutes, target=None, evaluated=lambda points: None):
        self.device, self.tokens_per_step, self.evaluated = device, tokens_per_step, evaluated
        self.limit, self.target = 60 * minutes, target
        self.seconds, self.started, self.points = 0.0, None, []

    def on_train_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seconds + time.perf_counter() - self.started >= self.limit:
            control.should_training_stop = control.should_evaluate = True
        if control.should_evaluate:
            synchronize(self.device)
            self.seconds += time.perf_counter() - self.started

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        found = metrics["eval_bits_per_byte"]
        self.points.append((round(self.seconds, 2), state.global_step, state.global_step * self.tokens_per_step, found))
        if self.target is not None and found <= self.target:
            control.should_training_stop = True
        self.evaluated(self.points)
        self.started = time.perf_counter()


def given_settings(job):
    """(the job's config file with the changes of job["recipe"] to model_config, the other arguments of job["recipe"]):
    a dense twin is made of the model as it is meant, not changed after it."""
    given = yaml.safe_load(Path(ROOT / job["config"]).read_text())
    given["model_config"] |= job["fields"]
    left = apply_dotted(given, list(job.get("recipe", [])))
    if "--model_config" in left:
        raise ValueError("--recipe.model_config: change single fields, e.g. --recipe.model_config.hidden_size 256; the "
                         f"others are those of {job['config']}")
    return given, left


def quality_settings(job, data, output):
    """(settings of the recipe, for a run that its clock ends; arguments of `recipes/pretrain.py` to lay over them)."""
    given, left = given_settings(job)
    fields = {key: value for key, value in given["model_config"].items() if key not in OURS_ONLY}
    balance = {key: given["model_config"][key] for key in OURS_ONLY[2:] if key in given["model_config"]}
    if job["run"] == "dense":
        fields, balance = dense_twin(fields), {}
    elif job["run"] == "library":
        balance, left = {}, [*left, "--optimizer", "torch"]  # what Trainer takes; ours keeps copies for our layers
    settings = {
        **{key: given[key] for key in KEPT if key in given}, "output_dir": str(output), "dataset_name": str(data),
        "model_config": fields | balance | {"num_nextn_predict_layers": 0, "mtp_loss_coef": 0.0},
        "max_steps": 1_000_000, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": job["warmup"],
        "logging_steps": 10, "eval_strategy": "steps", "eval_steps": job["eval_steps"], "save_strategy": "no",
        "sample_prompts": [], "report_to": "none", "disable_tqdm": True, "use_cpu": job["device"] == "cpu",
        "max_validation_tokens": job["validation_tokens"],
    }  # fmt: skip
    return settings, left


def library_trainer(args, tokenizer):
    """The library's class on the recipe's rows: `Trainer`'s own step, bits per byte from its logits."""
    from benchmarks.train_cases import library_model
    from recipes.data import PackingCollator, load_pretraining_data
    from recipes.logging_callbacks import RunLogCallback
    from recipes.pretrain_trainer import MODEL_INPUTS, PretrainTrainer

    class LibraryTrainer(PretrainTrainer):
        def _evaluate_batch(self, model, batch, source_count):
            batch = self._prepare_inputs(batch)
            inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch and name != "labels"}
            with torch.no_grad(), self.accelerator.autocast():
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            losses = torch.stack([torch.nn.functional.cross_entropy(row.float(), labels, reduction="none")
                                  for row, labels in zip(logits, batch["labels"][:, 1:])])  # fmt: skip
            sources, losses = batch["sources"][:, 1:].flatten(), losses.flatten().double()
            kept = sources >= 0
            sums = torch.zeros(source_count, 2, dtype=torch.float64, device=losses.device)
            return sums.index_add_(0, sources[kept], torch.stack([losses, torch.ones_like(losses)], dim=1)[kept])

    train, validation, _ = load_pretraining_data(
        args.dataset_name, tokenizer, args.sequence_length, seed=args.seed,
        max_validation_tokens=args.max_validation_tokens,
    )  # fmt: skip
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = special | {"vocab_size": len(tokenizer)} | args.model_config
    model = library_model({name: value for name, value in fields.items() if name not in OURS_ONLY})
    trainer = LibraryTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=validation, data_collator=PackingCollator(),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.add_callback(RunLogCallback(args.output_dir, show_bar=False))
    return trainer


def synthetic_data(folder, job):
    """A packed Markov stream: a token counts as a byte, so bits per byte are bits per token."""
    vocabulary = given_settings(job)[0]["model_config"]["vocab_size"]
    rows = markov_rows(vocabulary, 600, 128, job["seed"]).numpy()
    write_packed_rows(folder, vocabulary, 128, {"train": rows[:560], "validation": rows[560:]})
    return folder


def measure_quality(job, say=print):
    """One line: the curve of one of the three runs. Said at each evaluation, so that a process that dies leaves it."""
    from recipes.model_loading import build_model, load_tokenizer
    from recipes.pretrain import build_trainer
    from recipes.pretrain_config import PretrainConfig, parse_config
    from recipes.sizing import count_parameters

    output = sys.stdout
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        folder = Path(folder)
        data = job.get("dataset") or synthetic_data(folder / "data", job)
        path = folder / "config.yaml"
        settings, left = quality_settings(job, data, folder / "run")
        path.write_text(yaml.safe_dump(settings))
        args = parse_config(PretrainConfig, ["--config", str(path), *left])
        set_seed(args.seed)
        tokenizer = load_tokenizer(args)
        if job["run"] == "library":
            trainer = library_trainer(args, tokenizer)
        else:
            trainer = build_trainer(args, build_model(args, tokenizer), tokenizer)
        counts = count_parameters(trainer.model.config)

        def evaluated(points):
            line = {"variant": job["variant"], **quality_line(job, counts, points)}
            say(json.dumps(line), file=output, flush=True)

        clock = QualityClock(job["device"], args.tokens_per_step, job["minutes"], job.get("target"), evaluated)
        trainer.add_callback(clock)
        trainer.train()
    return quality_line(job, counts, clock.points)


def quality_line(job, counts, points):
    seconds, steps, tokens, _ = points[-1]
    return {
        "run": job["run"], "data": job.get("dataset") or "Markov stream", "parameters": counts.total,
        "active_parameters": counts.active, "minutes": round(seconds / 60, 3), "steps": steps, "tokens": tokens,
        "tokens_per_second": round(tokens / seconds), "best_bits_per_byte": round(min(p[3] for p in points), 4),
        "settings": job.get("recipe", []), "points": points,
    }  # fmt: skip


def minutes_to(points, target):
    """Training minutes until a curve is at `target` bits per byte, between two evaluations by their line; or None."""
    before = None
    for seconds, _, _, found in points:
        if found <= target:
            if before is None or before[1] == found:
                return seconds / 60
            share = (before[1] - target) / (before[1] - found)
            return (before[0] + share * (seconds - before[0])) / 60
        before = (seconds, found)
    return None


def compare_quality(lines, target=None):
    """{"target", run: minutes}; without a target, the best value that every run reached."""
    found = [line for line in lines if "points" in line]
    if not found:
        return {"variant": "quality", "error": "no run finished"}
    target = max(line["best_bits_per_byte"] for line in found) if target is None else target
    minutes = {line["run"]: minutes_to(line["points"], target + 5e-5) for line in found}
    return {"variant": "quality", "target_bits_per_byte": target,
            "minutes_to_target": {run: None if value is None else round(value, 3) for run, value in minutes.items()},
            "clock": "training only: evaluations, start-up and data excluded, the first step included"}  # fmt: skip


def quality_table(lines, result):
    speed = f"{'tokens/s':>9} {'minutes':>8} {'best b/byte':>11} {'to target':>9}"
    rows = [f"{'run':8} {'parameters':>13} {'active':>12} {speed}"]
    for line in (line for line in lines if "points" in line):
        reached = result["minutes_to_target"][line["run"]]
        rows.append(f"{line['run']:8} {line['parameters']:13,} {line['active_parameters']:12,} "
                    f"{line['tokens_per_second']:9,} {line['minutes']:8.2f} {line['best_bits_per_byte']:11.4f} "
                    f"{'-' if reached is None else format(reached, '9.2f'):>9}")  # fmt: skip
    return "\n".join(rows)


def quality_figure(lines):
    series = {line["run"]: [([p[0] / 60 for p in line["points"]], [p[3] for p in line["points"]])]
              for line in lines if "points" in line}  # fmt: skip
    return curve_figure(series, "minutes of training", "held-out bits per byte")
