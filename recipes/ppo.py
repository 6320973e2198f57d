"""PPO: a fine-tuned model -> one that is rewarded more, by rules, functions or reward models.

    accelerate launch recipes/ppo.py --config recipes/configs/ppo_tiny.yaml [--key value]

Every key is a field of `PPORecipeConfig` (`--help`). A run folder holds config.yaml (resolved), metrics.jsonl,
checkpoints that resume exactly, the policy as a plain causal LM (with LoRA the adapter, and the model with it merged in
`merged/`), value_head.safetensors, eval.json with the accuracy on held-out problems before and after, and report.html.
"""

import copy
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from transformers import set_seed

from recipes.adapters import add_adapters, quantization_config
from recipes.ema import EMACallback
from recipes.evaluation import load_problems
from recipes.logging_callbacks import RunLogCallback
from recipes.model_loading import load_causal_lm, load_chat_tokenizer
from recipes.ppo_config import PPORecipeConfig
from recipes.ppo_data import build_prompts
from recipes.ppo_results import CompletionCallback, RecipePPOTrainer, announce_run, finish_run
from recipes.ppo_rewards import build_rewards
from recipes.pretrain_config import parse_config
from recipes.run_results import text_table
from recipes.stage_results import evaluate_before

# What a resumed run must share beyond `resume_guard.TRAJECTORY_FIELDS`.
GUARDED = (
    "rewards", "track_rewards", "reward_weights", "reward_kwargs", "normalise_rewards", "num_generations",
    "num_ppo_epochs", "num_mini_batches", "max_completion_length", "max_prompt_length", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs", "gamma", "lam", "vf_coef",
    "cliprange_value", "epsilon", "epsilon_high", "entropy_coef", "kl_coef", "kl_estimator", "kl_target",
    "kl_horizon", "whiten_rewards", "whiten_advantages", "truncated_completions", "missing_eos_penalty",
    "expert_balance", "value_function", "value_model_name_or_path", "value_learning_rate", "value_trunk_gradient",
    "ref_model_name_or_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_groups", "lora_target_modules",
)  # fmt: skip


def build_models(args, tokenizer):
    """(policy, with adapters where `lora_rank` asks for them; reference or None: the trainer copies the policy)."""
    policy = load_causal_lm(args, tokenizer, quantization_config(args))
    if args.lora_rank:
        policy = add_adapters(policy, args)
    if args.ref_model_name_or_path is None or not args.kl_coef:
        return policy, None
    settings = copy.copy(args)
    settings.model_name_or_path = args.ref_model_name_or_path
    try:
        return policy, load_causal_lm(settings, tokenizer)
    except OSError as error:
        raise ValueError(
            f"ref_model_name_or_path={args.ref_model_name_or_path} cannot be loaded ({error}); leave it out, and the "
            "policy as it is at the start is the reference"
        ) from error


def build_trainer(args, tokenizer):
    """The trainer with its data, models, rewards and callbacks."""
    rewards = build_rewards(args, tokenizer)
    policy, reference = build_models(args, tokenizer)
    train, held_out, facts = build_prompts(args, tokenizer, policy.config.get_text_config())
    if held_out is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value} needs held-out prompts: raise validation_fraction="
            f"{args.validation_fraction}, bring a test split, or set eval_strategy=no"
        )
    trainer = RecipePPOTrainer(
        model=policy, args=args, reward_funcs=rewards, ref_model=reference, train_dataset=train, eval_dataset=held_out,
        processing_class=tokenizer, callbacks=[EMACallback(args.ema_decay)] if args.ema_decay else [],
    )  # fmt: skip
    trainer.resume_guard = {"train_data": facts["checksum"]} | {name: getattr(args, name) for name in GUARDED}
    log = RunLogCallback(args.output_dir, show_bar=not args.disable_tqdm, announce=lambda: announce_run(trainer, facts))
    trainer.add_callback(log)
    trainer.add_callback(CompletionCallback(trainer, log, args.sample_steps))
    return trainer


def run(args):
    """A whole run with parsed settings. Returns the content of eval.json."""
    set_seed(args.seed)
    tokenizer = load_chat_tokenizer(args)
    if args.dry_run:
        facts = build_prompts(args, tokenizer)[2]
        names = [reward.__name__ for reward in build_rewards(args, tokenizer)]
        rows = [(part, facts[part]) for part in ("training", "held out") if part in facts]
        print(text_table([*rows, *zip(names, (f"weight {weight:g}" for weight in args.all_weights))]))
        return None
    if args.eval_tasks:
        load_problems(args.task_evaluation())  # too few problems, or no files: said now, not after training
    trainer = build_trainer(args, tokenizer)
    if not args.resume_from_checkpoint:
        trainer.require_fresh_output_dir()  # now, and not after the evaluation
    before = evaluate_before(trainer)
    trainer.train()
    return finish_run(trainer, before)


def main(argv=None):
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training has its own
    return run(parse_config(PPORecipeConfig, argv))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
