"""Which settings a resumed run must share with the run that it continues.

`describe_run(trainer)` is stored in every checkpoint as `run_config.json`; `check_unchanged` compares
it with the present run and names every difference as field, old, new. The rules:

- Model: every field of the config, apart from bookkeeping (`MODEL_BOOKKEEPING`).
- Data and optimisation: `TRAJECTORY_FIELDS`, as far as the trainer's arguments have them, and the
  number of sequences in an optimizer step.
- `max_steps` / `num_train_epochs` may change under a schedule that does not look ahead
  (`OPEN_ENDED_SCHEDULES`, with warm-up given in steps); under the others the whole curve would
  change, so they count too.
- Another split of the same step over micro-batches and processes, other versions of the libraries
  and another device type are allowed with a warning: the same trajectory up to rounding. Another number of rows in a
  step is refused, with the split that would keep it.
"""

import json

import accelerate
import torch
import transformers

from recipes.parallel_settings import data_parallel_size

MODEL_BOOKKEEPING = {
    "_name_or_path", "_attn_implementation", "_experts_implementation", "_commit_hash", "architectures",
    "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "output_attentions",
    "output_hidden_states", "transformers_version", "use_cache",
}  # fmt: skip
TRAJECTORY_FIELDS = (
    "dataset_name", "text_column", "streaming", "shuffle_rows", "validation_fraction", "sequence_length", "max_length",
    "packing", "seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "label_smoothing_factor", "ema_decay", "bf16", "fp16", "train_sampling_strategy",
    "dataloader_drop_last", "ignore_data_skip",
)  # fmt: skip
# Of recipes/optimizers.py, where they act. FusedAdamW and torch's AdamW go on with each other's runs.
MUON_FIELDS = ("muon_learning_rate", "muon_momentum", "muon_adjust_lr")
COMPRESSION_FIELDS = (
    "gradient_compression", "gradient_compression_start", "powersgd_rank", "top_k_fraction", "top_k_bits",
    "top_k_block",
)  # fmt: skip
LENGTH_FIELDS = ("max_steps", "num_train_epochs")
OPEN_ENDED_SCHEDULES = {"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"}


def describe_run(trainer):
    """{"model", "training", "split", "versions"}: plain JSON values."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    training = {name: getattr(args, name) for name in TRAJECTORY_FIELDS if hasattr(args, name)}
    if getattr(args, "streaming", False):
        training |= {"dataloader_num_workers": args.dataloader_num_workers}
    if getattr(args, "optimizer", None) == "muon":
        training |= {"optimizer": "muon"} | {name: getattr(args, name) for name in MUON_FIELDS}
    if getattr(args, "gradient_compression", "none") != "none":
        training |= {name: getattr(args, name) for name in COMPRESSION_FIELDS}
    if getattr(args, "stochastic_rounding", False):
        training |= {"stochastic_rounding": True}
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    looks_ahead = schedule not in OPEN_ENDED_SCHEDULES or 0 < args.warmup_steps < 1
    if looks_ahead:
        training |= {"max_steps": args.max_steps}
        if args.max_steps <= 0:
            training |= {"num_train_epochs": args.num_train_epochs}
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel_size(args)
    training |= {"sequences_per_step": step} | (trainer.resume_guard or {})
    config = model.config.to_dict() if hasattr(model, "config") else {}
    weights = next(model.parameters())
    run = {
        "model": {k: v for k, v in config.items() if k not in MODEL_BOOKKEEPING} | {"dtype": str(weights.dtype)},
        "training": training,
        "split": {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "device": args.device.type,
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }
    return json.loads(json.dumps(run, default=lambda value: str(getattr(value, "value", value))))


def _differences(old, new):
    missing = "(not set)"
    fields = sorted(set(old) | set(new))
    return [
        f"{name}: {json.dumps(old.get(name, missing))} -> {json.dumps(new.get(name, missing))}"
        for name in fields
        if old.get(name, missing) != new.get(name, missing)
    ]


def keep_step(rows, split):
    """How a step of `rows` rows is kept on the processes of `split` (of `describe_run`), as text."""
    processes, batch = split["processes"], split["per_device_train_batch_size"]
    if rows % processes:
        fitting = [number for number in range(1, rows + 1) if rows % number == 0]
        shown = ", ".join(map(str, fitting[:12])) + (", ..." if len(fitting) > 12 else "")
        return f"{processes} processes cannot share {rows} rows; launch one of {shown}"
    of_process = rows // processes
    batch = max(size for size in range(1, min(batch, of_process) + 1) if of_process % size == 0)  # no more memory
    return (f"keep {rows} rows with per_device_train_batch_size={batch}, gradient_accumulation_steps="
            f"{of_process // batch} on {processes} {'processes' if processes > 1 else 'process'}")


def _step_line(old, new):
    """What `sequences_per_step` is made of, saved and now, and how to keep it."""
    def made_of(run):
        split = run.get("split") or dict.fromkeys(new["split"], "?")
        return (f"{run['training']['sequences_per_step']} (per_device_train_batch_size="
                f"{split['per_device_train_batch_size']} x gradient_accumulation_steps="
                f"{split['gradient_accumulation_steps']} x {split['processes']} processes)")

    return (f"rows of an optimizer step: {made_of(old)} -> {made_of(new)}; "
            f"{keep_step(old['training']['sequences_per_step'], new['split'])}")


def check_unchanged(old, new, allowed, checkpoint):
    """Lines to warn about. Raises ValueError when the trajectory would change and `allowed` is false."""
    changed = [f"model config, {line}" for line in _differences(old.get("model", {}), new["model"])] + _differences(
        old.get("training", {}), new["training"]
    )
    known = old.get("training", {}).get("sequences_per_step")
    changed = [_step_line(old, new) if known and line.startswith("sequences_per_step:") else line for line in changed]
    if changed and not allowed:
        raise ValueError(
            f"cannot resume from {checkpoint} with another configuration (field: saved -> now):\n  "
            + "\n  ".join(changed)
            + "\nRestore these values, start afresh in another --output_dir, or pass --allow_config_change "
            "to continue with the new values"
        )
    warnings = [f"configuration changed, as allowed: {line}" for line in changed]
    for group in ("split", "versions"):
        lines = _differences(old.get(group, {}), new[group])
        warnings += [f"{line}: losses will agree up to rounding, not bit for bit" for line in lines]
    return warnings
