"""Reinforcement learning inside a run folder: safe checkpoints and speed, samples with rewards, the end of a run."""

import math

from transformers import TrainerCallback

from recipes.logging_callbacks import eval_record, write_run_config
from recipes.recipe_trainer import RecipeTrainerMixin, RolloutMeterMixin
from recipes.rewards import completion_text
from recipes.rl_setup import causal_lm, optimizer_steps_of_rollout
from recipes.run_results import conclude, save_average, text_table
from recipes.stage_results import evaluate_after, save_merged, sizes_of
from recipes.value_head import without_value_head

SAMPLES = 4  # completions of a rollout that a record of samples shows


class RecipeRLMixin(RolloutMeterMixin, RecipeTrainerMixin):
    """Put before `PPOTrainer` or `R1GRPOTrainer`: checkpoints that survive a kill, tokens/s (of prompts and
    completions, once an epoch of a rollout), tracked rewards."""

    def __init__(self, model, args, **kwargs):
        given, args.reward_weights = args.reward_weights, args.all_weights  # tracked rewards weigh nothing
        try:
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.reward_weights = given
        self.start_metering()


# ---------------------------------------------------------------- samples


def _prompt_text(prompt):
    return prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)


def _number(value):
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


class CompletionCallback(TrainerCallback):
    """Writes the latest completions with their rewards, every `steps` optimizer steps and at the last one."""

    def __init__(self, trainer, log, steps):
        self.trainer, self.log, self.steps = trainer, log, steps

    def samples(self):
        """[{"prompt", "completion", "rewards": {name: number or None}}] that the trainer has kept."""
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


def announce_run(trainer, facts, stage, more):
    """Print and store commit, sizes, rewards, device and the resolved config; `more`: rows of the stage."""
    args, model = trainer.args, causal_lm(trainer.model)
    if not trainer.is_world_process_zero():
        return
    weighted = ", ".join(f"{weight:g} x {name}" for name, weight in zip(args.rewards, args.all_weights))
    sizes = sizes_of(trainer.model) | more | {
        "rewards": weighted + (f"; tracked: {', '.join(args.track_rewards)}" if args.track_rewards else ""),
        "rollout": f"{args.generation_batch_size} completions of at most {args.max_completion_length} tokens, "
        f"{args.num_generations} of a prompt, {optimizer_steps_of_rollout(args)} optimizer steps",
        "router replay": trainer.replay_line(),
        "training prompts": facts["training"],
        "held-out prompts": facts.get("held out", "none"),
    }
    content = write_run_config(args, model, args.output_dir, {"stage": stage, "sizes": sizes, "data": facts})
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    print(text_table(rows), flush=True)


def _held_out_rewards(trainer):
    """{"reward": mean of the weighted sum, "rewards": {name: mean}} of the answers to the held-out prompts; None where
    no answer could be judged."""
    found = eval_record(trainer.state.global_step, trainer.evaluate(metric_key_prefix="final"))
    return {"reward": found.get("eval reward"), "rewards": found["eval rewards"]}


def finish_run(trainer, before, stage):
    """Evaluate, save, write eval.json and report.html, print results. Returns the content of eval.json."""
    args, results = trainer.args, {"stage": stage, "step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        results["held_out_rewards"] = _held_out_rewards(trainer)
    trainer.save_model()
    save_average(trainer)
    if args.eval_tasks:
        results["tasks"] = evaluate_after(trainer, before)
    if not trainer.is_world_process_zero():
        return results
    if args.lora_rank and args.merge_adapter:
        with without_value_head(causal_lm(trainer.accelerator.unwrap_model(trainer.model))):
            ids = trainer.processing_class("What is 2 + 3?")["input_ids"]
            results["merged_logits_difference"] = save_merged(trainer, ids)
    return trainer.push_results(conclude(args.output_dir, results))
