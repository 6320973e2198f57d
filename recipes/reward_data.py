"""Data of reward models: preference pairs, or solutions with a label for each step, as the tokens that a policy writes.

A prompt is rendered with the chat template's generation prompt, and what follows is a completion with its end token:
prompt and completion are tokenised apart, as they are when a policy is sampled. A pair in which either side reasons
has a prompt that ends inside `<think>`, on both sides; one in which neither does has not.

| kind         | columns                                                                                             |
|--------------|-----------------------------------------------------------------------------------------------------|
| `preference` | `chosen`, `rejected` (one assistant message, or text); `prompt` (messages or text; without it both  |
|              | are conversations with the same beginning); `margin`, `problem`, `source` if there are any          |
| `process`    | `prompt`, `completions` (the steps), `labels` (whether each is right); `problem`, `source`          |
"""

import bisect
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Features, List, Value
from jinja2 import TemplateError

from recipes.conversations import CLOSE, OPEN, as_messages, check_conversation
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


# ---------------------------------------------------------------- rendering


def content_of(completion):
    """The text of a completion: a text, or a list with one assistant message.

    Raises:
        ValueError: for anything else, and for a completion without text.
    """
    if not isinstance(completion, str):
        messages = as_messages(completion, "completion")
        if len(messages) != 1 or messages[0]["role"] != "assistant" or not isinstance(messages[0]["content"], str):
            raise ValueError(f"a completion must be one assistant message with text, got {completion!r:.120}")
        completion = messages[0]["content"]
    if not completion.strip():
        raise ValueError("a completion is empty")
    return completion


def reasons(completion):
    """Whether a completion, text or message, holds reasoning, finished or not."""
    if isinstance(completion, str):
        return OPEN in completion or CLOSE in completion
    message = completion[-1]
    return bool(message.get("reasoning_content")) or reasons(message["content"] or "")


def _generated(opening, content):
    """What a policy writes after `opening`: the content without the tag that the prompt has already."""
    if opening.rstrip().endswith(OPEN) and content.lstrip().startswith(OPEN):
        return content.lstrip().removeprefix(OPEN).lstrip()
    return content


def opening_text(tokenizer, prompt, thinking):
    """The text up to where a policy begins to write."""
    if isinstance(prompt, str):
        return prompt
    form = {} if thinking else {"thinking": False}
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **form)


def render_texts(tokenizer, prompt, completion, thinking=None, finished=True, opening=None):
    """(prompt text up to where a policy begins, what it writes then, with the end token if `finished`).

    A completion in messages is a turn of a conversation, brought into form by the chat template; a text is what a model
    wrote. `thinking`: whether the prompt ends inside the reasoning, where the template knows the word. None: where a
    message reasons, and for text. `opening`: what `opening_text` gives, if known.
    """
    end, written = tokenizer.eos_token, isinstance(completion, str)
    if thinking is None:
        thinking = written or reasons(completion)
    if opening is None:
        opening = opening_text(tokenizer, prompt, thinking)
    text = _generated(opening, content_of(completion)) if not isinstance(prompt, str) else content_of(completion)
    if not written and not isinstance(prompt, str):
        whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        if whole.startswith(opening):
            text = whole[len(opening) :]
    text = text[: text.rindex(end)] if end in text else text  # some templates write a line end after it
    return opening, text + (end if finished else "")


def render(tokenizer, prompt, completion, thinking=None, finished=True):
    """(ids of the prompt, ids of the completion) of what `render_texts` gives."""
    opening, text = render_texts(tokenizer, prompt, completion, thinking, finished)
    prompt_ids = tokenizer(opening, add_special_tokens=isinstance(prompt, str))["input_ids"]
    return prompt_ids, tokenizer(text, add_special_tokens=False)["input_ids"]


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


# ---------------------------------------------------------------- rows


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
    sides = [row[side] if isinstance(row[side], str) else as_messages(row[side], side) for side in ("chosen", "rejected")]
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


def encode_pair(row, tokenizer, encoding):
    """One row of the training set: ids of both sides, the prompt included, and tokens of both completions.

    Raises:
        ValueError: for columns that are missing or wrong, and for sides that are the same.
    """
    prompt, *sides = read_pair(row)
    margin = _margin(row) if encoding.use_margin else 0.0
    thinking = any(map(reasons, sides))
    opening = opening_text(tokenizer, prompt, thinking)
    texts = [render_texts(tokenizer, prompt, completion, thinking, opening=opening)[1] for completion in sides]
    prompt_ids = tokenizer(opening, add_special_tokens=isinstance(prompt, str))["input_ids"]
    chosen, rejected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same; leave the pair out, it prefers nothing")
    prompt_ids, status = shorten(prompt_ids, max(len(chosen), len(rejected)), tokenizer, encoding)
    fits = prompt_ids is not None
    return {
        "chosen_ids": prompt_ids + chosen if fits else [], "rejected_ids": prompt_ids + rejected if fits else [],
        "chosen_tokens": len(chosen), "rejected_tokens": len(rejected), "margin": margin, "status": status,
        "tokens": 2 * len(prompt_ids) + len(chosen) + len(rejected) if fits else 0,
    }  # fmt: skip


def step_ends(text, steps):
    """The place in `text` behind the last character of each step (none of them white space).

    Raises:
        ValueError: for an empty step, and for one that the chat template has changed.
    """
    ends, place = [], 0
    for number, step in enumerate(steps):
        wanted = step.strip()
        if not number and wanted.startswith(OPEN) and not text.startswith(OPEN):
            wanted = wanted.removeprefix(OPEN).strip()
        if not wanted:
            raise ValueError(f"step {number} is empty; join it with its neighbour")
        found = text.find(wanted, place)
        if found < 0:
            raise ValueError(f"step {number} is not in the rendered completion: the chat template changes it: {wanted!r:.80}")
        place = found + len(wanted)
        ends.append(place)
    return ends


def render_steps(tokenizer, prompt, steps, separator="\n"):
    """(ids of the prompt, ids of the completion, the place in the latter of each step's last token).

    Raises:
        ValueError: for steps that end in the same token; see `step_ends`.
    """
    content = separator.join(steps)
    completion = content if isinstance(prompt, str) else [{"role": "assistant", "content": content}]
    opening, text = render_texts(tokenizer, prompt, completion)
    prompt_ids = tokenizer(opening, add_special_tokens=isinstance(prompt, str))["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, places = [start for start, _ in tokens["offset_mapping"]], []
    for end in step_ends(text, steps):
        places.append(bisect.bisect_left(starts, end) - 1)
        if len(places) > 1 and places[-1] == places[-2]:
            raise ValueError(f"two steps end in one token ({text[starts[places[-1]]:end]!r}); join them")
    return prompt_ids, tokens["input_ids"], places


def encode_steps(row, tokenizer, encoding):
    """One row of a process set: `input_ids`, and `step_labels` 1 (right) or 0 at the last token of each step, else -100.

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


ENCODERS = {"preference": (encode_pair, "chosen_ids", "pairs"), "process": (encode_steps, "input_ids", "solutions")}
IDS, NUMBER, TEXT = List(Value("int64")), Value("int64"), Value("string")
COLUMNS = {
    "preference": {"chosen_ids": IDS, "rejected_ids": IDS, "chosen_tokens": NUMBER, "rejected_tokens": NUMBER,
                   "margin": Value("float64")},
    "process": {"input_ids": IDS, "step_labels": IDS},
}  # fmt: skip
COMMON = {"problem": TEXT, "source": TEXT, "status": TEXT, "tokens": NUMBER}


# ---------------------------------------------------------------- data sets


def _encode_batch(batch, indices, tokenizer, encoding, where, code_version):
    encode, found = ENCODERS[encoding.kind][0], []
    for place, index in enumerate(indices):
        row = {name: values[place] for name, values in batch.items()}
        try:
            example = encode(row, tokenizer, encoding)
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            message = f"{where}, row {index}: {error}"
            if encoding.errors == "strict":
                raise ValueError(f"{message} (errors=skip leaves such rows out and counts them)") from error
            empty = {name: [] if kind is IDS else 0 for name, kind in COLUMNS[encoding.kind].items()}
            example = empty | {"status": f"bad row|{message}", "tokens": 0}
        found.append(example | {"problem": problem_of(row), "source": str(row.get("source") or "all")})
    return {name: [example[name] for example in found] for name in found[0]}


def encode_rows(rows, tokenizer, encoding, where, workers=None):
    """(encoded data set, RewardReport).

    Raises:
        ValueError: under `errors="strict"` for the first bad row, naming it; if no row is left.
    """
    if workers is None and len(rows) >= 2 * ROWS_PER_WORKER:
        workers = min(os.cpu_count() or 1, len(rows) // ROWS_PER_WORKER)
    # `datasets` would hand out what older code had cached.
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
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
    train, held_out = read_splits(name)
    if held_out is None and share and len(train):
        keyed = train.add_column("key", [problem_of(row) for row in train]) if "key" not in train.column_names else train
        train, held_out = (part.select_columns(train.column_names) for part in hold_out(keyed, share, seed))
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
