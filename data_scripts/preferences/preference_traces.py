"""Pairs and process labels from worked traces: a right one against a wrong one of a realistic kind.

| kind            | the rejected side                                                                           |
|-----------------|---------------------------------------------------------------------------------------------|
| `mistake`       | one step goes wrong and is carried through to a wrong answer (`preference_mistakes.py`)      |
| `other_answer`  | right reasoning, another answer behind it                                                   |
| `other_problem` | a right trace of another problem of the same task and level                                 |
| `unfinished`    | stops in its reasoning, or repeats itself until it is cut off                               |
| `format`        | right in all but that the reasoning is never closed as it should be                         |

The task's verifier has to accept every chosen side and to refuse every rejected one. Both sides are told in one
style, their wordings and answer forms drawn alike. For each kind, tellings are drawn until the longer side is as often
the chosen as the rejected one, so that a length says nothing.
"""

import random
import re
from collections import Counter
from itertools import islice

from data_scripts.finetuning.sft_rows import SPARE
from data_scripts.preferences.preference_mistakes import make_mistake
from data_scripts.reasoning.traces import ANSWER_SHARES, NoProcedure, content, make, pick_style, solve
from data_scripts.reasoning.traces_base import put_answer, render
from recipes.task_base import mix_seed
from recipes.tasks import get_task

TELLINGS = 6  # drawn for a pair until its lengths do not widen the imbalance
CUT, CIRCLES = (0.3, 0.9), (1.05, 1.6)  # length of unfinished reasoning, as a share of the whole
WRONG_TAGS = ("", "<think>", "</ think>", "</thinking>", "</thought>", "<end>", "</think")


def _form(rng):
    return rng.choices(list(ANSWER_SHARES), list(ANSWER_SHARES.values()))[0]


def _told(problem, working, rng, style):
    """An assistant turn of a working, right or wrong."""
    answer = put_answer(working.answer, get_task(problem.task).kind, _form(rng))
    return content(render(working, rng, style)[0], answer)


def mistake(problem, other, rng, style):
    return _told(problem, make_mistake(problem, rng).working, rng, style)


def other_answer(problem, other, rng, style):
    wrong = make_mistake(problem, rng).working.answer
    return content(make(problem, rng, style).reasoning, put_answer(wrong, get_task(problem.task).kind, _form(rng)))


def other_problem(problem, other, rng, style):
    found = make(other, rng, style)
    return content(found.reasoning, found.answer)


def unfinished(problem, other, rng, style):
    """Cut off: early, or after going round in circles."""
    reasoning = make(problem, rng, style).reasoning
    if rng.random() < 0.5:
        return f"<think>\n{reasoning[:max(1, int(len(reasoning) * rng.uniform(*CUT)))].rstrip()}"
    lines = re.split(r"(?<=\n)|(?<=\. )", reasoning + "\n")
    circle = "".join(lines[rng.randrange(max(1, len(lines) - 1)):]) or reasoning
    longest = int(len(reasoning) * rng.uniform(*CIRCLES)) + 12
    return "<think>\n" + (reasoning + "\n" + circle * (longest // len(circle) + 1))[:longest].rstrip()


def wrong_format(problem, other, rng, style):
    found = make(problem, rng, style)
    return "\n".join(part for part in ("<think>", found.reasoning, rng.choice(WRONG_TAGS), "", found.answer))


KINDS = {"mistake": mistake, "other_answer": other_answer, "other_problem": other_problem, "unfinished": unfinished,
         "format": wrong_format}


class LengthBalance:
    """Chooses among tellings so that the longer side of a pair is as often the chosen one, for each group of pairs."""

    def __init__(self):
        self.longer = Counter()  # group: pairs with a longer chosen side less those with a longer rejected one

    def pick(self, group, tellings):
        """The first of the (chosen, rejected) that does not widen the imbalance, else the last; None without any."""
        pair, sign = None, 0
        for pair in tellings:
            sign = (len(pair[0]) > len(pair[1])) - (len(pair[0]) < len(pair[1]))
            if sign * self.longer[group] <= 0:
                break
        self.longer[group] += sign
        return pair


def tellings(kind, problem, other, rng, settings):
    """Up to TELLINGS (chosen, rejected), each verified right and wrong and within the length limit."""
    task = get_task(problem.task)
    for _ in range(TELLINGS):
        style = pick_style(rng, settings.voices, settings.check, settings.backtrack)
        right = make(problem, rng, style)
        chosen = content(right.reasoning, right.answer)
        try:
            rejected = KINDS[kind](problem, other, rng, right.style)
        except NoProcedure:
            return
        if max(len(chosen), len(rejected)) <= settings.max_characters and not task.score(rejected, problem).correct:
            yield chosen, rejected


def user(problem):
    return [{"role": "user", "content": problem.prompt}]


def solvable(name, level, split, count, settings, left_out):
    """Up to `count` problems with a trace, and one more as the other problem of the last."""
    found = []
    for problem in islice(get_task(name).stream(split, settings.seed, level), count * SPARE + 1):
        try:
            solve(problem)
        except NoProcedure:
            left_out["no procedure"] += 1
            continue
        if len(problem.prompt) > settings.max_characters:
            left_out["too long"] += 1
            continue
        found.append(problem)
        if len(found) > count:
            break
    return found


def trace_pairs(name, level, split, count, settings, balance, left_out):
    """Rows of one task and level: kinds in turn; one that a problem does not allow gives way to the next."""
    problems, rows, turn = solvable(name, level, split, count, settings, left_out), [], 0
    kinds = list(KINDS)
    turn = random.Random(mix_seed("kind", name, level)).randrange(len(kinds))  # levels of few problems differ
    for number, problem in enumerate(problems[:count]):
        rng = random.Random(mix_seed("pair", settings.seed, name, problem.metadata["key"]))
        other = problems[(number + 1) % len(problems)]
        for attempt in range(len(kinds)):
            kind = kinds[(turn + attempt) % len(kinds)]
            pair = balance.pick((kind, split), tellings(kind, problem, other, rng, settings))
            if pair:
                break
        turn += 1
        if not pair:
            left_out["no wrong side"] += 1
            continue
        chosen, rejected = pair
        rows.append({"prompt": user(problem), "chosen": [{"role": "assistant", "content": chosen}],
                     "rejected": [{"role": "assistant", "content": rejected}],
                     "problem": f"{name}|{problem.metadata['key']}", "source": "traces", "kind": kind})
    return rows


def process_steps(problem, rng, style, wrong):
    """(step texts, labels) of a telling; joined by newlines the texts are the assistant turn.

    The steps are the lines of the reasoning, with "<think>" before the first; the answer is the last one. A wrong
    telling uses the words of the right one, so that the first line in which they differ is the mistake.
    """
    seed, kind = rng.random(), get_task(problem.task).kind
    form, working = _form(rng), solve(problem)
    right = render(working, random.Random(seed), style)[0].split("\n")
    if not wrong:
        lines, first = right, len(right) + 1
    else:
        working = make_mistake(problem, rng).working
        lines = render(working, random.Random(seed), style)[0].split("\n")
        first = next((i for i, line in enumerate(lines) if right[i:i + 1] != [line]), len(lines))
    steps = [*lines, "</think>\n\n" + put_answer(working.answer, kind, form)]
    steps[0] = "<think>\n" + steps[0]
    return steps, [place < first for place in range(len(steps))]


def process_rows(name, level, split, count, settings, left_out):
    """Rows in TRL's stepwise format: half of the problems solved rightly, half with one mistake."""
    rows, task = [], get_task(name)
    voices = {voice: share for voice, share in settings.voices.items() if voice != "prose"} or {"terse": 1}
    for problem in solvable(name, level, split, count, settings, left_out)[:count]:
        rng = random.Random(mix_seed("process", settings.seed, name, problem.metadata["key"]))
        wrong = rng.random() < settings.wrong_share
        try:
            steps, labels = process_steps(problem, rng, pick_style(rng, voices, settings.check, 0), wrong)
        except NoProcedure:
            left_out["no wrong side"] += 1
            continue
        text = "\n".join(steps)
        if len(text) > settings.max_characters:
            left_out["too long"] += 1
            continue
        assert task.score(text, problem).correct != wrong, (problem.prompt, text)
        rows.append({"prompt": user(problem), "completions": steps, "labels": labels,
                     "problem": f"{name}|{problem.metadata['key']}", "source": "traces",
                     "kind": "mistake" if wrong else "right"})
    return rows
