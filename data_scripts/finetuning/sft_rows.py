"""The built-in conversations of `prepare_sft.py`: worked traces and dialogues, as rows by split."""

import logging
import random
from collections import Counter
from itertools import islice

from tqdm.auto import tqdm

from data_scripts.finetuning.sft_sources import with_blocks
from data_scripts.reasoning.dialogues import dialogues
from data_scripts.reasoning.traces import SOLVERS, NoProcedure, content, make, pick_style
from recipes.task_base import mix_seed
from recipes.tasks import get_task

logger = logging.getLogger(__name__)

BUILT_IN = {"traces": "worked by this project's code; problems by reasoning-gym (Apache-2.0)",
            "dialogues": "written by this project's code; problems by reasoning-gym (Apache-2.0)"}
DEFAULT_LEVELS = (1, 2, 3)
SPARE = 2  # problems taken beyond those wanted, as a multiple: some have no procedure, some are too long


def parse_tasks(text):
    """'chain_sum:1-3,gcd:2,lcm' -> {"chain_sum": [1, 2, 3], "gcd": [2], "lcm": [1, 2, 3]}.

    Raises:
        ValueError: for a task without worked traces, or levels that it does not have.
    """
    if isinstance(text, dict):
        return text
    tasks = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, levels = part.partition(":")
        if name not in SOLVERS:
            raise ValueError(f"task {name!r} has no worked traces; tasks that have are {', '.join(sorted(SOLVERS))}")
        known = get_task(name).levels
        low, _, high = levels.partition("-")
        if levels and not (low.isdigit() and (high or low).isdigit()):
            raise ValueError(f"tasks: {part!r} must be NAME, NAME:LEVEL or NAME:LOW-HIGH")
        wanted = list(range(int(low), int(high or low) + 1)) if levels else [d for d in DEFAULT_LEVELS if d in known]
        if not wanted or set(wanted) - set(known):
            raise ValueError(f"tasks: {part!r} asks for levels that {name} does not have; it has {list(known)}")
        tasks[name] = sorted({*tasks.get(name, []), *wanted})
    if not tasks:
        raise ValueError("tasks is empty; name at least one, as in chain_sum:1")
    return tasks


def trace_rows(name, level, split, count, settings, left_out):
    """Up to `count` rows of one task and level.

    The first pass tells every problem once; where problems are fewer than rows, up to `repeats` passes tell
    them again in other styles and answer forms. The held-out part is told once.
    """
    task, rows, seen = get_task(name), [], set()
    problems = list(islice(task.stream(split, settings.seed, level), count * SPARE))
    for turn in range(settings.repeats if split == "train" else 1):
        for problem in problems:
            if len(rows) >= count:
                return rows
            rng = random.Random(mix_seed("trace", settings.seed, name, problem.metadata["key"], turn))
            try:
                found = make(problem, rng, pick_style(rng, settings.voices, settings.check, settings.backtrack))
            except NoProcedure as reason:
                left_out["no procedure"] += turn == 0
                logger.debug("%s: %s", name, reason)
                continue
            text = content(found.reasoning, found.answer)
            if len(text) > settings.max_characters or len(problem.prompt) > settings.max_characters:
                left_out["too long"] += 1
            elif (problem.prompt, text) not in seen:
                seen.add((problem.prompt, text))
                rows.append({"messages": [{"role": "user", "content": problem.prompt},
                                          {"role": "assistant", "content": text}],
                             "task": name, "difficulty": level, "style": found.style, "key": problem.metadata["key"]})
    return rows


def built_in_rows(source, settings, progress):
    """({"train": rows, "test": rows}, counts of what was left out) of a built-in source."""
    left_out, rows = Counter(), {"train": [], "test": []}
    if source == "dialogues":
        for split, count in (("train", settings.dialogues), ("test", settings.dialogues // 20)):
            for row in dialogues(settings.seed, split, settings.tasks, count, settings.max_characters):
                row["messages"] = with_blocks(row["messages"], settings.direct_answers)
                rows[split].append(row)
        return rows, {"fewer than asked for": settings.dialogues - len(rows["train"])}
    pairs = [(name, level) for name, levels in settings.tasks.items() for level in levels]
    for name, level in tqdm(pairs, desc="traces", unit=" levels", disable=not progress):
        rows["test"] += trace_rows(name, level, "test", settings.test_problems, settings, left_out)
        rows["train"] += trace_rows(name, level, "train", settings.problems, settings, left_out)
    held_out = {row["key"] for row in rows["test"]}
    assert not any(row["key"] in held_out for row in rows["train"])
    return rows, dict(left_out)
