"""Pairs from outside: files, folders and Hub data sets of preferences, and k samples of a policy with their verdicts.

Understood without a mapping, for `chosen` and `rejected`:

| they hold                              | the prompt                                                               |
|----------------------------------------|--------------------------------------------------------------------------|
| an answer as text, or one message      | `prompt` (or question, instruction, input): text or messages             |
| whole conversations as messages        | what both share, which must be all but the last message                  |
| text with "Human:" and "Assistant:"    | the same                                                                 |

Scores of both sides, or a column `margin`, become the margin. `--columns NAME:chosen=good,rejected=bad` maps others.
"""

import hashlib
import math
import random
import re
from collections import Counter

from data_scripts.finetuning.rejection_rules import normalised
from data_scripts.finetuning.sft_sources import problem_side, with_blocks
from data_scripts.row_files import read_rows
from recipes.conversations import FOLLOWS, as_messages
from recipes.task_base import split_of
from recipes.tasks import TASKS
from recipes.text_files import BadInput

FIELDS = {"prompt": ("prompt", "question", "instruction", "input"), "chosen": ("chosen",), "rejected": ("rejected",),
          "margin": ("margin",), "score_chosen": ("score_chosen", "chosen_score"),
          "score_rejected": ("score_rejected", "rejected_score"), "problem": ("problem", "prompt_id")}
SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
ORDERS = ("random", "hardest")


def parse_columns(text):
    """'chosen=good,rejected=bad' -> {"chosen": "good", "rejected": "bad"}."""
    columns = {}
    for part in filter(None, text.split(",")):
        field, _, column = part.strip().partition("=")
        if field not in FIELDS or not column:
            raise ValueError(f"columns {text!r}: {part.strip()!r} must be FIELD=COLUMN, with FIELD one of "
                             f"{', '.join(FIELDS)}")
        columns[field] = column
    return columns


def _column(row, field, columns, needed=False):
    if field in columns and columns[field] not in row:
        raise ValueError(f"no column {columns[field]!r} for {field}; columns present: {', '.join(row)}")
    names = (columns[field],) if field in columns else FIELDS[field]
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if needed and value is None:
        raise ValueError(f"no column for {field}; columns present: {', '.join(row) or 'none'}; name it with --columns "
                         f"{field}=COLUMN")
    return value


def _turns(value, field):
    """Messages of a side or prompt: from messages, from text with speakers, or None for plain text."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        turns = as_messages(value, field)
    elif isinstance(value, str) and SPEAKERS.match(value):
        parts = SPEAKERS.split(value)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    elif isinstance(value, str):
        return None
    else:
        raise BadInput(f"{field} is a {type(value).__name__}, expected text or messages")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _check_turns(prompt, sides):
    for field, turns in (("prompt", prompt), *sides.items()):
        if any(not isinstance(turn["content"], str) or not turn["content"].strip() for turn in turns):
            raise BadInput(f"{field} is empty")
    previous = None
    for turn in [*prompt, sides["chosen"][0]]:
        if turn["role"] not in FOLLOWS[previous]:
            raise BadInput(f"a turn of role {turn['role']!r} follows {previous or 'the beginning'}; expected "
                           f"{' or '.join(FOLLOWS[previous])}")
        previous = turn["role"]
    if sides["rejected"][0]["role"] != "assistant" or previous != "assistant":
        raise BadInput("chosen and rejected must be the assistant's")
    if sides["chosen"] == sides["rejected"]:
        raise BadInput("chosen and rejected are the same")


def to_pair(row, columns):
    """(prompt messages, chosen, rejected: a message in a list each) of a row.

    Raises:
        ValueError: naming what is missing, empty or the same, or where the sides stop sharing a prompt.
    """
    sides = {field: _column(row, field, columns, needed=True) for field in ("chosen", "rejected")}
    prompt = _column(row, "prompt", columns)
    turns = {field: _turns(value, field) for field, value in sides.items()}
    if (turns["chosen"] is None) != (turns["rejected"] is None):
        raise BadInput("one of chosen and rejected is text, the other messages")
    if turns["chosen"] is None:
        turns = {field: [{"role": "assistant", "content": value}] for field, value in sides.items()}
    if not all(turns.values()):
        raise BadInput("chosen or rejected is empty")
    if max(map(len, turns.values())) > 1:
        shared = [found[:-1] for found in turns.values()]
        if shared[0] != shared[1]:
            raise BadInput("chosen and rejected do not share a prompt: all of their messages but the last must be the "
                           "same")
        prompt, turns = shared[0], {field: found[-1:] for field, found in turns.items()}
    elif prompt is None:
        raise ValueError(f"no column for prompt; columns present: {', '.join(row)}; name it with --columns "
                         "prompt=COLUMN, or give whole conversations in chosen and rejected")
    else:
        prompt = _turns(prompt, "prompt") or [{"role": "user", "content": prompt}]
    _check_turns(prompt, turns)
    return prompt, turns["chosen"], turns["rejected"]


def _number(value, field):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInput(f"{field}={value!r} is no finite number")
    return float(value)


def _margin(row, columns):
    margin = _column(row, "margin", columns)
    if margin is not None:
        return {"margin": _number(margin, "margin")}
    scores = [_column(row, field, columns) for field in ("score_chosen", "score_rejected")]
    if None in scores:
        return {}
    difference = _number(scores[0], "score_chosen") - _number(scores[1], "score_rejected")
    if difference < 0:
        raise BadInput(f"the chosen side has the lower score ({scores[0]} below {scores[1]})")
    return {"margin": difference}


def digest(text):
    return hashlib.sha256(normalised(text).encode("utf-8", "replace")).hexdigest()[:16]


def outside_pairs(name, location, columns, settings, report):
    """Yield rows of a location, each checked; the problem is the first question where no column names it.

    Raises:
        ValueError: for the first bad row with errors="strict"; with "skip" they are counted in `report`.
    """
    for place, row in read_rows(location):
        try:
            if isinstance(row, BadInput):
                raise row
            prompt, chosen, rejected = to_pair(row, columns or {})
            problem = _column(row, "problem", columns or {})
            asked = next(turn["content"] for turn in prompt if turn["role"] == "user")
            found = {"prompt": with_blocks(prompt, settings.direct_answers),
                     "chosen": with_blocks(chosen, settings.direct_answers),
                     "rejected": with_blocks(rejected, settings.direct_answers) if "<think>" not in
                     chosen[0]["content"] else rejected,
                     "problem": str(problem) if problem is not None else f"{name}|{digest(asked)}",
                     "source": name, "kind": name, **_margin(row, columns or {})}
            repr(found).encode("utf-8")  # half a surrogate pair cannot be written
        except ValueError as error:
            message = str(error) if str(error).startswith(place) else f"{place}: {error}"
            if settings.errors == "strict":
                raise ValueError(f"{message}; repair the row or pass --errors skip") from error
            report.add(message)
            continue
        if max(len(turn["content"]) for turn in [*prompt, *chosen, *rejected]) > settings.max_characters:
            report.too_long += 1
            continue
        yield found


# ---------------------------------------------------------------- samples of a policy


def _sample(place, row):
    """A row of samples.jsonl, with its score: the given one, else 1 for a right and 0 for a wrong answer."""
    if isinstance(row, BadInput):
        raise row
    prompt, text = row.get("prompt"), row.get("text")
    if not prompt or not text or row.get("score", row.get("correct")) is None:
        raise ValueError(f"{place}: a sample needs prompt, text and correct (or score); it has {', '.join(row)}. Files "
                         "of rejection_sampling made before prompts were kept lack them: sample again")
    turns = _turns(prompt, "prompt") or [{"role": "user", "content": prompt}]
    score = _number(row["score"] if row.get("score") is not None else float(row["correct"]), f"{place}: score")
    return {**row, "prompt": turns, "score": score, "key": row.get("key") or turns[-1]["content"],
            "task": row.get("task") or ""}


def _best_pairs(rows, settings, rng):
    """(better, worse) of one problem's samples, at most `pairs_per_problem`, as different samples as possible.

    A refused sample (malformed, unfinished) is never the better one. "hardest" first pairs the wrong answers that the
    policy finds likeliest a token with the right ones that it finds unlikeliest.
    """
    rows = list({normalised(row["text"]): row for row in rows}.values())
    rng.shuffle(rows)
    pairs = [(a, b) for a in rows for b in rows if a["score"] > b["score"] and a.get("reason") is None]
    if settings.order == "hardest":
        def likely(row):
            return row.get("log_prob", 0.0) / max(row.get("tokens", 1), 1)
        pairs.sort(key=lambda pair: likely(pair[0]) - likely(pair[1]))
    taken, used = [], Counter()
    while pairs and len(taken) < settings.pairs_per_problem:
        best = min(pairs, key=lambda pair: used[id(pair[0])] + used[id(pair[1])])  # the first of the least used
        used.update(map(id, best))
        taken.append(best)
        pairs.remove(best)
    return taken


def sample_pairs(location, settings):
    """({"train": rows, "test": rows}, counts): right against wrong samples of the same problem.

    A problem on a task's test side goes to the test part; of the others `test_share` does.
    """
    problems, left_out, rows = {}, Counter(), {"train": [], "test": []}
    for place, row in read_rows(location):
        found = _sample(place, row)
        problems.setdefault((found["task"], found["key"]), []).append(found)
    scores = {row["score"] for found in problems.values() for row in found}
    graded = not scores <= {0.0, 1.0}
    for (task, key), found in problems.items():
        rng = random.Random(f"{settings.seed}|{task}|{key}")
        pairs = _best_pairs(found, settings, rng)
        left_out["problems without a right and a wrong sample"] += not pairs
        side = problem_side(task, key) if task in TASKS else "train"
        side = split_of(f"samples {key}", settings.test_share) if side == "train" else side
        for better, worse in pairs:
            margin = {"margin": better["score"] - worse["score"]} if graded else {}
            rows[side].append({
                "prompt": better["prompt"], "chosen": [{"role": "assistant", "content": better["text"].strip()}],
                "rejected": [{"role": "assistant", "content": worse["text"].strip()}],
                "problem": f"{task}|{key}", "source": "samples", "kind": task or "samples", **margin})
    if not rows["train"] and not rows["test"]:
        raise ValueError(f"from_samples={str(location)!r}: none of {len(problems)} problems has a right and a wrong "
                         "sample; sample more of each problem, or problems of another difficulty")
    return rows, left_out
