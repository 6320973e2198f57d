"""Prompts of reinforcement learning: read, checked, measured in tokens, split into training and held-out ones.

A row has `prompt`: a text, or messages that end with the user's; further columns reach the reward functions. The
columns that `data_scripts/prepare_prompts.py` writes (task, index, question, reference, metadata) let
`recipes/rewards.py` verify a completion.
"""

import hashlib
import json

from trl.data_utils import is_conversational

from recipes.conversations import as_messages
from recipes.rl_setup import prompt_budget
from recipes.sft_data import read_splits


def _prompts(rows, where):
    """The rows with `prompt` as text or as messages.

    Raises:
        ValueError: for no rows, no column `prompt`, both formats in one set, or a prompt that is empty or an answer.
    """
    if not len(rows):
        raise ValueError(f"{where} holds no rows")
    if "prompt" not in rows.column_names:
        raise ValueError(
            f"{where} has no column prompt, only {', '.join(rows.column_names)}; prompts are made by "
            "python -m data_scripts.prepare_prompts"
        )
    kinds, given = {}, rows["prompt"][:]
    for place, prompt in enumerate(given):
        kinds.setdefault("text" if isinstance(prompt, str) else "messages", place)
        _check_prompt(prompt, f"{where}, row {place}")
    if len(kinds) > 1:
        text, messages = kinds["text"], kinds["messages"]
        raise ValueError(
            f"{where} mixes formats: row {text} has a text as prompt, row {messages} messages; bring one form"
        )
    if "messages" in kinds:
        messages = [as_messages(prompt, "prompt") for prompt in given]
        if messages != given:  # other spellings
            rows = rows.remove_columns("prompt").add_column("prompt", messages)
    return rows


def _check_prompt(prompt, where):
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty")
        return
    try:
        messages = as_messages(prompt, "prompt")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"{where}: a prompt must end with the user's message, this one ends with {last!r}")
    if not (messages[-1]["content"] or "").strip():
        raise ValueError(f"{where}: the last message is empty")


def prompt_lengths(prompts, tokenizer, template_kwargs=None):
    """Tokens of each prompt, rendered as the trainer does."""
    if not is_conversational({"prompt": prompts[0]}):
        return [len(ids) for ids in tokenizer(text=list(prompts))["input_ids"]]
    ids = tokenizer.apply_chat_template(
        conversation=list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True,
        **(template_kwargs or {}),
    )["input_ids"]  # fmt: skip
    return list(map(len, ids))


def fitting(rows, tokenizer, limit, where, template_kwargs=None):
    """(rows whose prompt has at most `limit` tokens, line that says what was left out). `limit` None: all.

    Raises:
        ValueError: if none is left, naming the longest and the shortest.
    """
    lengths = prompt_lengths(rows["prompt"], tokenizer, template_kwargs)
    keep = [place for place, length in enumerate(lengths) if limit is None or length <= limit]
    if not keep:
        raise ValueError(
            f"{where}: all {len(lengths)} prompts are longer than max_prompt_length={limit} tokens (shortest "
            f"{min(lengths)}, longest {max(lengths)}); raise max_prompt_length"
        )
    dropped = len(lengths) - len(keep)
    line = f"{len(keep):,} prompts, {max(lengths[place] for place in keep)} tokens at most"
    if dropped:
        line += f"; {dropped:,} longer than max_prompt_length={limit} left out (longest {max(lengths)})"
    return (rows.select(keep) if dropped else rows), line


def hold_out_prompts(rows, share, seed):
    """(training rows, held-out rows): rows with the same prompt stay together."""

    def side(prompt):
        text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(f"{seed}|{text}".encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    held_out = [side(prompt) for prompt in rows["prompt"]]
    return (rows.select([place for place, out in enumerate(held_out) if not out]),
            rows.select([place for place, out in enumerate(held_out) if out]))  # fmt: skip


VERIFIED = {"accuracy", "length_group", "length_cosine"}  # rewards that judge nothing without a verifier


def _check_verifiers(rewards, rows, where):
    """ValueError where only verified answers count and no row can be verified: nothing would be learned."""
    verified = "task" in rows.column_names and any(task is not None for task in rows["task"])
    if set(rewards) <= VERIFIED and not verified:
        raise ValueError(
            f"rewards={', '.join(rewards)}, but no row of {where} has a task that verifies its answer; make prompts "
            "with python -m data_scripts.prepare_prompts --tasks, or name a reward that judges every completion"
        )


def build_prompts(args, tokenizer, model_config=None):
    """(training prompts, held-out prompts or None, facts for config.yaml).

    Raises:
        ValueError: for data that cannot be used; for fewer prompts than one rollout takes.
    """
    template_kwargs, limit = args.chat_template_kwargs, prompt_budget(args, model_config, None)
    try:
        train, held_out = read_splits(args.dataset_name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"dataset_name={args.dataset_name} does not exist; make prompts with "
            f"`python -m data_scripts.prepare_prompts --output_dir {args.dataset_name}`"
        ) from error
    train = _prompts(train, f"{args.dataset_name} (training)")
    if held_out is not None:
        held_out = _prompts(held_out, f"{args.dataset_name} (held out)")
    elif args.validation_fraction:
        train, held_out = hold_out_prompts(train, args.validation_fraction, args.seed)
    facts, found = {"dataset": args.dataset_name}, {"training": train, "held out": held_out}
    for part, rows in found.items():
        if rows is None or not len(rows):
            found[part] = None
            continue
        where = f"{args.dataset_name} ({part})"
        found[part], facts[part] = fitting(rows, tokenizer, limit, where, template_kwargs)
    train, held_out = found["training"], found["held out"]
    needed = args.generation_batch_size // args.num_generations
    if train is None or len(train) < needed:
        raise ValueError(
            f"{len(train) if train is not None else 0} prompts are fewer than the {needed} of one rollout "
            f"(generation_batch_size={args.generation_batch_size} completions / num_generations="
            f"{args.num_generations}); lower per_device_train_batch_size or the micro-batches of a rollout, raise "
            "num_generations, or bring more prompts"
        )
    if held_out is not None and len(held_out) > args.max_eval_prompts:
        held_out = held_out.shuffle(seed=args.seed).select(range(args.max_eval_prompts))
        facts["held out"] += f"; {args.max_eval_prompts} of them are asked"
    _check_verifiers(args.rewards, train, args.dataset_name)
    facts["checksum"] = hashlib.sha256(json.dumps(train["prompt"][:], sort_keys=True).encode()).hexdigest()
    return train, held_out, facts
