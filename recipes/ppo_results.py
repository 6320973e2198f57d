"""PPO inside a run folder: the trainer with safe checkpoints and speed, samples with rewards, and the end of a run."""

import json
import math
from pathlib import Path

from transformers import TrainerCallback

from recipes.checkpoint_files import write_atomically
from recipes.ema import EMACallback
from recipes.logging_callbacks import METRICS_FILE, read_metrics, write_run_config
from recipes.ppo_setup import causal_lm
from recipes.ppo_trainer import PPOTrainer
from recipes.recipe_trainer import RecipeTrainerMixin
from recipes.reporting import result_rows, write_report
from recipes.rewards import completion_text
from recipes.run_results import text_table
from recipes.stage_results import evaluate_stage, save_merged, sizes_of
from recipes.value_head import without_value_head

SAMPLES = 4  # completions of a rollout that a record of samples shows


class RecipePPOTrainer(RecipeTrainerMixin, PPOTrainer):
    """`PPOTrainer` with checkpoints that survive a kill and tokens/s (of prompts and completions, once a PPO epoch)."""

    def __init__(self, model, args, **kwargs):
        given, args.reward_weights = args.reward_weights, args.all_weights  # tracked rewards weigh nothing
        try:
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.reward_weights = given
        self.start_metering()

    def count_tokens(self, batch):
        return 0  # prompts as text: what becomes of them is counted below

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self.speed.add_tokens(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


# ---------------------------------------------------------------- samples


def _prompt_text(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)


def _number(value):
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


class CompletionCallback(TrainerCallback):
    """Writes completions of the latest rollout with their rewards, every `steps` optimizer steps and at the last one."""

    def __init__(self, trainer, log, steps):
        self.trainer, self.log, self.steps = trainer, log, steps

    def samples(self):
        """[{"prompt", "completion", "rewards": {name: number or None}}] of the trainer's latest rollout."""
        logs = self.trainer._logs
        rewards = {name: list(values) for name, values in logs["rewards"].items()}
        pairs = list(zip(logs["prompt"], logs["completion"]))[:SAMPLES]
        return [
            {
                "prompt": _prompt_text(prompt),
                "completion": completion_text(completion),
                "rewards": {name: _number(values[place]) for name, values in rewards.items()},
            }
            for place, (prompt, completion) in enumerate(pairs)
        ]

    def on_step_end(self, args, state, control, **kwargs):
        due = state.global_step >= state.max_steps or (self.steps and state.global_step % self.steps == 0)
        if not due or not state.is_world_process_zero:
            return
        samples = self.samples()
        if not samples:
            return
        shown = ", ".join(f"{name} {value}" for name, value in samples[0]["rewards"].items())
        self.log.say(f"  sample | {shown} | {' '.join(samples[0]['completion'].split())}")
        self.log.write({"kind": "samples", "step": state.global_step, "samples": samples})


# ---------------------------------------------------------------- the two ends of a run


def announce_run(trainer, facts):
    """Print and store commit, sizes, rewards, device and the resolved config."""
    args, model = trainer.args, causal_lm(trainer.model)
    if not trainer.is_world_process_zero():
        return
    weighted = ", ".join(f"{weight:g} x {name}" for name, weight in zip(args.rewards, args.all_weights))
    rollout = args.generation_batch_size
    sizes = sizes_of(trainer.model) | {
        "value function": args.value_function,
        "rewards": weighted + (f"; tracked: {', '.join(args.track_rewards)}" if args.track_rewards else ""),
        "rollout": f"{rollout} completions of at most {args.max_completion_length} tokens, {args.num_ppo_epochs} PPO "
        f"epochs of {args.num_mini_batches} optimizer steps",
        "training prompts": facts["training"],
        "held-out prompts": facts.get("held out", "none"),
    }
    content = write_run_config(args, model, args.output_dir, {"stage": "ppo", "sizes": sizes, "data": facts})
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    print(text_table(rows), flush=True)


def _held_out_rewards(trainer):
    """{"reward": mean score, each reward's name: its mean} of one completion for each held-out prompt."""
    metrics = trainer.evaluate(metric_key_prefix="final")
    found = {"reward": metrics["eval_reward"]}
    for name, value in metrics.items():
        if name.startswith("eval_rewards/") and name.endswith("/mean"):
            found[name.removeprefix("eval_rewards/").removesuffix("/mean")] = value
    return found


def _save_average(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EMACallback):
            with callback.applied(model):
                trainer._save(str(Path(trainer.args.output_dir) / "ema"))


def finish_run(trainer, before):
    """Evaluate, save, write eval.json and report.html, print results. Returns the content of eval.json."""
    args, results = trainer.args, {"stage": "ppo", "step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        results["held_out_rewards"] = _held_out_rewards(trainer)
    trainer.save_model()
    _save_average(trainer)
    if args.eval_tasks:
        trained = trainer.state.global_step > trainer.first_step  # else the answers of a killed evaluation still hold
        after = evaluate_stage(trainer, "after", trained)
        results["tasks"] = ({"before": before} if before else {}) | {"after": after}
    if not trainer.is_world_process_zero():
        return results
    if args.lora_rank and args.merge_adapter:
        with without_value_head(causal_lm(trainer.accelerator.unwrap_model(trainer.model))):
            ids = trainer.processing_class("What is 2 + 3?")["input_ids"]
            results["merged_logits_difference"] = save_merged(trainer, ids)
    write_atomically(Path(args.output_dir) / "eval.json", json.dumps(results, indent=1))
    report = write_report(args.output_dir)
    rows = result_rows(read_metrics(Path(args.output_dir) / METRICS_FILE), results, {})
    print(text_table([*rows, ("model", args.output_dir), ("report", str(report))]), flush=True)
    return results
