"""Data of reward models: preference pairs, or solutions with a label for each step, as the tokens that a policy writes.

A prompt is rendered with the chat template's generation prompt, and what follows is a completion with its end token:
prompt and completion are tokenised apart, as they are when a policy is sampled. A pair in which either side reasons
has a prompt that ends inside `<think>`, on both sides; one in which neither does has not.

| kind         | columns                                                                                             |
|--------------|-----------------------------------------------------------------------------------------------------|
| `preference` | `chosen`, `rejected` (one assistant message, or text); `prompt` (messages or text; without it both  |
|              | are conversations with the same beginning); `margin`, `problem`, `source`, `kind` if there are any  |
| `process`    | `prompt`, `completions` (the steps), `labels` (whether each is right); `problem`, `source`, `kind`  |
"""

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError

from recipes.conversations import as_messages, check_conversation
from recipes.reward_rendering import opening_text, reasons, render_steps, render_texts
from recipes.sft_data import ROWS_PER_WORKER, hold_out, read_splits

OVERLONG = ("drop", "shorten_prompt", "error")
LEAST_PROMPT = 16  # tokens of a prompt that must be left for a shortened row to be worth training on


@dataclass(frozen=True)
class RewardEncoding:
    """How rows become token ids; fields as in `RewardRecipeConfig`."""

    kind: str
    max_length: int
    overlong: str = "drop"
    errors: str = "strict"
    use_margin: bool = True
    step_separator: str = "\n"


@dataclass
class RewardReport:
    """What became of the rows."""

    unit: str
    rows: int = 0
    tokens: int = 0
    problems: int = 0
    counts: Counter = field(default_factory=Counter)
    first_error: str | None = None

    def lines(self):
        """For the run's log."""
        text = [f"{self.rows:,} {self.unit} of {self.problems:,} problems, {self.tokens:,} tokens"]
        text += [f"{count:,} {self.unit}: {status}" for status, count in self.counts.most_common() if status != "kept"]
        return text + ([f"first error: {self.first_error}"] if self.first_error else [])


# ---------------------------------------------------------------- rows


def shorten(prompt_ids, longest_completion, tokenizer, encoding):
    """(prompt ids that fit before the longest completion or None, status). The completions are never cut."""
    excess = len(prompt_ids) + longest_completion - encoding.max_length
    if excess <= 0:
        return prompt_ids, "kept"
    if encoding.overlong == "error":
        raise ValueError(
            f"{len(prompt_ids) + longest_completion} tokens exceed max_length={encoding.max_length}; raise it, or set "
            "overlong to drop or shorten_prompt"
        )
    begin = [tokenizer.bos_token_id] if prompt_ids[0] == tokenizer.bos_token_id else []
    if encoding.overlong == "shorten_prompt" and len(prompt_ids) - excess >= LEAST_PROMPT + len(begin):
        return begin + prompt_ids[len(begin) + excess :], "beginning of the prompt left out to fit max_length"
    return None, "left out: longer than max_length"


def _need(row, names, kind):
    missing = [name for name in names if row.get(name) is None]
    if missing:
        have = ", ".join(name for name, value in row.items() if value is not None)
        raise ValueError(
            f"column {missing[0]} is missing (found: {have}); a {kind} set has {', '.join(names)}: "
            "python -m data_scripts.prepare_preferences makes one, from a set with other columns too"
        )


def _as_prompt(prompt):
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt
    messages = as_messages(prompt, "prompt")
    check_conversation([*messages, {"role": "assistant", "content": "answer"}])
    return messages


def read_pair(row):
    """(prompt, chosen, rejected) of a row: the prompt as messages or text, the sides as one message or text."""
    _need(row, ("chosen", "rejected"), "preference")
    sides = [
        row[side] if isinstance(row[side], str) else as_messages(row[side], side) for side in ("chosen", "rejected")
    ]
    if row.get("prompt") is not None:
        return _as_prompt(row["prompt"]), *sides
    if str in map(type, sides):
        raise ValueError("column prompt is missing, and the sides are texts: where each completion begins is unknown")
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected begin with different prompts; give a column prompt, or mend the row")
    return _as_prompt(sides[0][:-1]), sides[0][-1:], sides[1][-1:]


def _margin(row):
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise ValueError(f"margin={margin!r} must be a finite number; leave it out (null) where there is none")
    return float(margin)


def problem_of(row):
    """What a row is split by: its `problem`, else its prompt."""
    if row.get("problem") is not None:
        return str(row["problem"])
    prompt = row.get("prompt")
    prompt = row.get("chosen", [])[:-1] if prompt is None else prompt
    return hashlib.sha256(str(prompt).encode("utf-8", "replace")).hexdigest()[:16]


def pair_texts(row, tokenizer, encoding):
    """(prompt as text, whether it takes special tokens, text of both completions, margin) of a row.

    Raises:
        ValueError: for columns that are missing or wrong.
    """
    prompt, *sides = read_pair(row)
    margin = _margin(row) if encoding.use_margin else 0.0
    thinking = any(map(reasons, sides))
    opening = opening_text(tokenizer, prompt, thinking)
    texts = [render_texts(tokenizer, prompt, completion, thinking, opening=opening)[1] for completion in sides]
    return opening, isinstance(prompt, str), texts, margin


def pair_ids(prompt_ids, chosen, rejected, margin, tokenizer, encoding):
    """One row of the training set: ids of both sides, the prompt included, and tokens of both completions.

    Raises:
        ValueError: for sides that are the same.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same; leave the pair out, it prefers nothing")
    prompt_ids, status = shorten(prompt_ids, max(len(chosen), len(rejected)), tokenizer, encoding)
    fits = prompt_ids is not None
    return {
        "chosen_ids": prompt_ids + chosen if fits else [], "rejected_ids": prompt_ids + rejected if fits else [],
        "chosen_tokens": len(chosen), "rejected_tokens": len(rejected), "margin": margin, "status": status,
        "tokens": 2 * len(prompt_ids) + len(chosen) + len(rejected) if fits else 0,
    }  # fmt: skip


def token_ids(tokenizer, texts, special=False):
    """Ids of each text; what `tokenizer(texts)` gives, without the offsets that take a quarter of its time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if special or not texts or not hasattr(backend, "encode_batch_fast"):
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_pairs(rows, tokenizer, encoding):
    """Rows of the training set, or the error of a row in its place: tokenised together, a third faster."""
    found = [_attempt(pair_texts, row, tokenizer, encoding) for row in rows]
    good = [parts for parts in found if not isinstance(parts, Exception)]
    prompts = {
        special: iter(token_ids(tokenizer, [parts[0] for parts in good if parts[1] == special], special))
        for special in (False, True)
    }
    sides = iter(token_ids(tokenizer, [text for parts in good for text in parts[2]]))
    for place, parts in enumerate(found):
        if not isinstance(parts, Exception):
            ids = next(prompts[parts[1]]), next(sides), next(sides)
            found[place] = _attempt(pair_ids, *ids, parts[3], tokenizer, encoding)
    return found


def encode_steps(row, tokenizer, encoding):
    """One row of a process set: `input_ids`, and `step_labels` 1 (right) or 0 at each step's last token, else -100.

    Raises:
        ValueError: for columns that are missing or wrong, and for steps that end in the same token.
    """
    _need(row, ("prompt", "completions", "labels"), "process")
    prompt, steps, right = _as_prompt(row["prompt"]), row["completions"], row["labels"]
    if not steps or len(steps) != len(right):
        raise ValueError(f"{len(steps)} completions (steps) have {len(right)} labels; each step needs one")
    if any(label not in (0, 1) for label in right):  # True and False too
        raise ValueError(f"labels={right!r:.80} must be true (right) or false for each step")
    prompt_ids, ids, ends = render_steps(tokenizer, prompt, steps, encoding.step_separator)
    labels = [-100] * len(ids)
    for end, label in zip(ends, right):
        labels[end] = int(label)
    prompt_ids, status = shorten(prompt_ids, len(labels), tokenizer, encoding)
    fits = prompt_ids is not None
    ids = prompt_ids + ids if fits else []
    labels = [-100] * len(prompt_ids) + labels if fits else []
    return {"input_ids": ids, "step_labels": labels, "status": status, "tokens": len(ids)}


def _attempt(function, *arguments):
    """Its result, or the exception that a bad row raises."""
    try:
        return function(*arguments)
    except (ValueError, TypeError, KeyError, TemplateError) as error:
        return error


def encode_solutions(rows, tokenizer, encoding):
    """Rows of a process set, or the error of a row in its place."""
    return [_attempt(encode_steps, row, tokenizer, encoding) for row in rows]


ENCODERS = {"preference": (encode_pairs, "chosen_ids", "pairs"),
            "process": (encode_solutions, "input_ids", "solutions")}  # fmt: skip
IDS, NUMBER, TEXT = List(Value("int64")), Value("int64"), Value("string")
COLUMNS = {
    "preference": {"chosen_ids": IDS, "rejected_ids": IDS, "chosen_tokens": NUMBER, "rejected_tokens": NUMBER,
                   "margin": Value("float64")},
    "process": {"input_ids": IDS, "step_labels": IDS},
}  # fmt: skip
COMMON = {"problem": TEXT, "source": TEXT, "kind": TEXT, "status": TEXT, "tokens": NUMBER}


# ---------------------------------------------------------------- data sets


def _encode_batch(batch, indices, tokenizer, encoding, where, code_version):
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    found = ENCODERS[encoding.kind][0](rows, tokenizer, encoding)
    empty = {name: [] if kind is IDS else 0 for name, kind in COLUMNS[encoding.kind].items()}
    for place, (index, example) in enumerate(zip(indices, found)):
        if isinstance(example, Exception):
            message = f"{where}, row {index}: {example}"
            if encoding.errors == "strict":
                raise ValueError(f"{message} (errors=skip leaves such rows out and counts them)") from example
            found[place] = empty | {"status": f"bad row|{message}", "tokens": 0}
    for example, row in zip(found, rows):
        source = str(row.get("source") or "all")
        example |= {"problem": problem_of(row), "source": source, "kind": str(row.get("kind") or source)}
    return {name: [example[name] for example in found] for name in found[0]}


def encode_rows(rows, tokenizer, encoding, where, workers=None):
    """(encoded data set, RewardReport).

    Raises:
        ValueError: under `errors="strict"` for the first bad row, naming it; if no row is left.
    """
    if workers is None and len(rows) >= 2 * ROWS_PER_WORKER:
        workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    # `datasets` would hand out what older code had cached.
    files = (Path(__file__), Path(__file__).with_name("reward_rendering.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    encoded = rows.map(
        _encode_batch, batched=True, with_indices=True, batch_size=256, num_proc=workers, desc=f"encoding {where}",
        remove_columns=rows.column_names, features=Features(COLUMNS[encoding.kind] | COMMON),
        fn_kwargs={"tokenizer": tokenizer, "encoding": encoding, "where": where, "code_version": code},
    )  # fmt: skip
    _, ids, unit = ENCODERS[encoding.kind]
    report = RewardReport(unit)
    for status in encoded["status"] if len(encoded) else ():
        kind, _, message = status.partition("|")
        report.counts[kind] += 1
        report.first_error = report.first_error or message or None
    if len(encoded):
        encoded = encoded.filter(lambda found: [bool(row) for row in found], input_columns=ids, batched=True)
    if not len(encoded):
        raise ValueError(f"{where}: no {unit} are left ({'; '.join(report.lines()[1:]) or 'the set is empty'})")
    report.rows, report.tokens, report.problems = len(encoded), sum(encoded["tokens"]), len(set(encoded["problem"]))
    encoded = encoded.remove_columns(["status", "tokens"])
    if "margin" in encoded.column_names and not any(encoded["margin"]):
        encoded = encoded.remove_columns("margin")
    return encoded, report


def split_rows(name, share, seed):
    """(training rows, held-out rows or None) of a data set: by its own split, else by problem."""
    train, held_out = read_splits(name, maker="data_scripts.prepare_preferences")
    if held_out is None and share and len(train):
        problems = Dataset.from_dict({"key": list(map(problem_of, train)), "place": range(len(train))})
        train, held_out = (train.select(part["place"]) for part in hold_out(problems, share, seed))
    return train, held_out if held_out is not None and len(held_out) else None


def without_trained(held_out, train):
    """(held-out rows whose problem is in no training row, number of those left out)."""
    trained = set(train["problem"])
    kept = [place for place, problem in enumerate(held_out["problem"]) if problem not in trained]
    return held_out.select(kept), len(held_out) - len(kept)


def checksum(encoded):
    """SHA-256 over all rows, in order: what a resumed run must find unchanged."""
    digest, names = hashlib.sha256(), sorted(encoded.column_names)
    for row in encoded.select_columns(names):
        digest.update(repr([row[name] for name in names]).encode())
    return digest.hexdigest()
