"""From one completion to a row of results, and from rows to figures with intervals.

Two accuracies are kept side by side:

* strict: the format is right and the answer is. Where the prompt ends inside `<think>`, right means exactly
  one `</think>` and an answer after it; elsewhere the whole text is the answer, and thinking marks, if there are
  any, must form one closed block at the beginning.
* lenient: the answer is read from wherever the task finds one, marks or not.

Every figure is a mean over problems, which are the unit of chance (`recipes.intervals`).
"""

import math
from collections import Counter

from recipes.chat_format import CLOSE, OPEN, follows_format
from recipes.intervals import expected_calibration_error, majority, mean_interval, pass_at_k

OUTCOMES = ("correct", "wrong", "unparsable", "malformed", "no closing tag", "truncated")


def has_format(text, opened):
    """Whether a completion has the form of reasoning, then answer; `opened`: the prompt ends inside `<think>`."""
    if opened:
        return OPEN not in text and follows_format(text)
    if OPEN not in text and CLOSE not in text:
        return bool(text.strip())
    return text.lstrip().startswith(OPEN) and follows_format(text)


def score_completion(task, problem, text, opened):
    """(format is right, strict Verdict, lenient Verdict) of a completion."""
    whole = f"{OPEN}\n{text}" if opened else text
    verdict = task.score(whole, problem, untagged="unparsable" if opened else "whole")
    lenient = verdict
    if not verdict.parsed and (opened or OPEN in text or CLOSE in text):
        lenient = task.score(whole.replace(OPEN, "").replace(CLOSE, "\n"), problem, untagged="whole")
    return has_format(text, opened), verdict, lenient


def outcome_of(row, opened):
    """One of OUTCOMES: what a completion came to, the earliest cause first."""
    if row["correct"]:
        return "correct"
    if not row["finished"]:
        return "truncated"
    if opened and CLOSE not in row["completion"]:
        return "no closing tag"
    if not row["format"]:
        return "malformed"
    return "wrong" if row["parsed"] else "unparsable"


def score_row(task, problem, prompt, completion, sample, opened, strict):
    """A line of completions.jsonl."""
    good, verdict, lenient = score_completion(task, problem, completion.text, opened)
    chosen = verdict._replace(correct=verdict.correct and good) if strict else lenient
    counts = chosen.parsed and (good or not strict)  # an answer in a wrong format has no vote in a majority
    row = {
        "task": problem.task, "kind": task.kind, "difficulty": problem.metadata["difficulty"], "index": problem.index,
        "key": problem.metadata["key"], "sample": sample, "prompt": prompt, "completion": completion.text,
        "reference": problem.reference, "answer": chosen.answer if counts else None, "parsed": chosen.parsed,
        "correct": chosen.correct, "lenient": lenient.correct, "format": good, "finished": completion.finished,
        "shortened": completion.shortened, "tokens": len(completion.token_ids),
        "log_prob": round(completion.log_prob, 4), "opened": opened,
    }  # fmt: skip
    return row | {"outcome": outcome_of(row, opened)}


def row_place(row):
    """What identifies a row, and the order of rows."""
    return row["task"], row["difficulty"], row["index"], row["sample"]


def by_problem(rows):
    """Lists of rows of one problem each, its samples in order."""
    groups = {}
    for row in sorted(rows, key=row_place):
        groups.setdefault((row["task"], row["difficulty"], row["index"]), []).append(row)
    return list(groups.values())


# ---------------------------------------------------------------- figures


def measured(values):
    """{"value", "low", "high"}: a mean over problems with its 95 % interval."""
    low, high = mean_interval(values)
    return {"value": math.fsum(values) / len(values), "low": low, "high": high}


def macro_average(parts):
    """The plain mean of several tasks' figures, each task counting the same.

    The interval joins theirs: the squared distances of the lower (upper) bounds add up, as for
    independent estimates. Source: Zou and Donner, Stat. Med. 27 (2008), 1693 (MOVER).
    """
    count, value = len(parts), math.fsum(part["value"] for part in parts) / len(parts)
    below = math.hypot(*(part["value"] - part["low"] for part in parts)) / count
    above = math.hypot(*(part["high"] - part["value"] for part in parts)) / count
    return {"value": value, "low": max(value - below, 0.0), "high": min(value + above, 1.0)}


def vote(samples):
    """(whether the most frequent answer of a problem's samples is right, its share of them)."""
    answer, share = majority([row["answer"] for row in samples])
    return any(row["correct"] for row in samples if row["answer"] == answer), share


def confidences(problems):
    """[(confidence, correct)] of each problem: the majority's share, or with one sample exp(mean log-probability)."""
    pairs = []
    for samples in problems:
        correct, share = vote(samples)
        pairs.append((share, correct) if len(samples) > 1 else (math.exp(min(samples[0]["log_prob"], 0.0)), correct))
    return pairs


def calibration(rows):
    """{"ece", "table", "confidence"}: expected calibration error and its bins (low, high, count, confidence, right)."""
    problems = by_problem(rows)
    pairs = confidences(problems)
    error, table = expected_calibration_error([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    several = max(map(len, problems)) > 1
    return {"ece": error, "table": [list(line) for line in table],
            "confidence": "share of the majority answer" if several else "exp of the mean token log-probability"}


def summarise(rows):
    """The figures of rows: accuracies with intervals, lengths and rates."""
    problems = by_problem(rows)
    samples = min(map(len, problems))
    rights = [sum(row["correct"] for row in group) for group in problems]
    tokens = sorted(row["tokens"] for row in rows)
    found = {"problems": len(problems), "samples": samples}
    found["pass@1"] = measured([right / len(group) for right, group in zip(rights, problems)])
    found["lenient"] = measured([sum(row["lenient"] for row in group) / len(group) for group in problems])
    ks = sorted({samples, *(2 ** power for power in range(samples.bit_length()))})
    found["pass@k"] = {str(k): measured([pass_at_k(len(group), right, k) for right, group in zip(rights, problems)])
                       for k in ks}
    found["maj@n"] = measured([float(vote(group)[0]) for group in problems])
    found["tokens"] = {"mean": math.fsum(tokens) / len(tokens), "median": tokens[len(tokens) // 2], "max": tokens[-1]}
    for name, test in (("format", lambda r: r["format"]), ("truncated", lambda r: not r["finished"]),
                       ("unparsable", lambda r: not r["parsed"]), ("shortened", lambda r: r["shortened"])):
        found[name] = sum(map(test, rows)) / len(rows)
    counts = Counter(row["outcome"] for row in rows)
    found["outcomes"] = {name: counts.get(name, 0) for name in OUTCOMES}
    return found


def summarise_tasks(rows):
    """Figures of each task and difficulty, over all, and calibration."""
    tasks = {}
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == name]
        levels = sorted({row["difficulty"] for row in own})
        tasks[name] = summarise(own) | {"ece": calibration(own)["ece"], "difficulties": {
            str(level): summarise([row for row in own if row["difficulty"] == level]) for level in levels}}
    overall = {"tasks": len(tasks)}
    for name in ("pass@1", "lenient", "maj@n"):
        overall[name] = macro_average([task[name] for task in tasks.values()])
    ks = min((list(task["pass@k"]) for task in tasks.values()), key=len)
    overall["pass@k"] = {k: macro_average([task["pass@k"][k] for task in tasks.values()]) for k in ks}
    for name in ("format", "truncated", "unparsable", "shortened"):
        overall[name] = math.fsum(task[name] for task in tasks.values()) / len(tasks)
    overall["tokens"] = {"mean": math.fsum(task["tokens"]["mean"] for task in tasks.values()) / len(tasks)}
    return {"tasks": tasks, "overall": overall, "calibration": calibration(rows)}
