"""What the commands of reinforcement learning share: models, trainer with its data, a whole run."""

import copy

from transformers import set_seed

from recipes.adapters import add_adapters, quantization_config
from recipes.checkpoint_files import list_checkpoints
from recipes.ema import EMACallback
from recipes.evaluation import load_problems
from recipes.logging_callbacks import RunLogCallback
from recipes.model_loading import load_causal_lm, load_chat_tokenizer
from recipes.process_start import watched
from recipes.rl_data import build_prompts
from recipes.rl_results import CompletionCallback, finish_run
from recipes.rl_rewards import build_rewards
from recipes.run_results import text_table
from recipes.stage_results import evaluate_before

# What a resumed run must share beyond `resume_guard.TRAJECTORY_FIELDS` and the fields that a stage names.
GUARDED = (
    "rewards", "track_rewards", "reward_weights", "reward_kwargs", "normalise_rewards", "num_generations",
    "max_completion_length", "max_prompt_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "generation_kwargs", "chat_template_kwargs", "epsilon", "epsilon_high", "entropy_coef", "expert_balance",
    "router_replay", "ref_model_name_or_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_groups",
    "lora_target_modules",
)  # fmt: skip


def build_models(args, tokenizer, wants_reference):
    """(policy, with adapters where `lora_rank` asks for them; reference or None: the trainer copies the policy)."""
    policy = load_causal_lm(args, tokenizer, quantization_config(args))
    if args.lora_rank:
        policy = add_adapters(policy, args)
    if args.ref_model_name_or_path is None or not wants_reference:
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


def build_trainer(args, tokenizer, trainer_class, guarded, announce):
    """The trainer with its data, models, rewards and callbacks.

    Args:
        guarded: fields that a resumed run must share besides GUARDED.
        announce: function (trainer, facts of the data) that prints and stores the head of the run.
    """
    rewards = build_rewards(args, tokenizer)
    policy, reference = build_models(args, tokenizer, trainer_class.wants_reference(args))
    train, held_out, facts = build_prompts(args, tokenizer, policy.config.get_text_config())
    if held_out is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value} needs held-out prompts: raise validation_fraction="
            f"{args.validation_fraction}, bring a test split, or set eval_strategy=no"
        )
    trainer = trainer_class(
        model=policy, args=args, reward_funcs=rewards, ref_model=reference, train_dataset=train, eval_dataset=held_out,
        processing_class=tokenizer, callbacks=[EMACallback(args.ema_decay)] if args.ema_decay else [],
    )  # fmt: skip
    names = (*GUARDED, *guarded)
    trainer.resume_guard = {"train_data": facts["checksum"]} | {name: getattr(args, name) for name in names}
    log = RunLogCallback(args.output_dir, show_bar=not args.disable_tqdm, announce=lambda: announce(trainer, facts))
    trainer.add_callback(log)
    trainer.add_callback(CompletionCallback(trainer, log, args.sample_steps))
    return trainer


def resumes(args):
    """Whether the run goes on from a checkpoint."""
    wanted = str(args.resume_from_checkpoint or "").lower()
    if wanted in ("", "false"):
        return False
    return wanted != "auto" or bool(list_checkpoints(args.output_dir))


def run_stage(args, stage, build, before_first_step=None):
    """A whole run with parsed settings. Returns the content of eval.json.

    Args:
        build: function (args, tokenizer) -> trainer.
        before_first_step: function (trainer), not called for a run that is resumed.
    """
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
    trainer = build(args, tokenizer)
    if not args.resume_from_checkpoint:
        trainer.require_fresh_output_dir()  # now, and not after the evaluation
    with watched(trainer, trainer.resume_guard):
        if before_first_step is not None and not resumes(args):
            before_first_step(trainer)
        before = evaluate_before(trainer)
        trainer.train()
        return finish_run(trainer, before, stage)
