"""What a worked trace is made of: steps with their plausible slips, and the voices that tell them.

A solver (`traces_arithmetic.py` and its neighbours) reads a prompt and returns a `Working`: what is
asked, one `Step` after another, the answer that follows from them, a second way to check it. A voice
turns it into text:

    terse      one step a line, nothing else
    prose      the first person, in one paragraph
    numbered   numbered steps under a line that says what is asked

Two features go with any voice: `check` adds the second way at the end, `backtrack` first makes one
step's slip, notices it by a test that the text states, says that it was wrong, and does the step again.
A style is a voice with its features: "terse", "prose+check", "numbered+check+backtrack".
"""

import re
from typing import NamedTuple

VOICES, FEATURES = ("terse", "prose", "numbered"), ("check", "backtrack")
WRONG = "wrong"  # the word that follows every slip before anything else is said

# A sign between two operands: compact in the terse voice (a space before a digit is a token), spaced in the others.
OPERATOR = re.compile(r"(?<=[\w)])(=|[+*/]|-(?![a-z]))(?=[\w(-])")


class NoProcedure(ValueError):
    """This problem has no short procedure here; it gets no trace and is counted."""


class Step(NamedTuple):
    """One line of working. `slip` is a plausible wrong version of it, `notice` the test that shows this."""

    text: str
    slip: str = ""
    notice: str = ""


class Working(NamedTuple):
    """`goal` completes "I have to ..."; `check` states a second way to the answer, or is empty."""

    goal: str
    steps: list
    answer: str
    check: str = ""


def parse_style(style):
    """'prose+check' -> ("prose", {"check"}).

    Raises:
        ValueError: naming the voices and features that exist.
    """
    voice, *features = str(style).split("+")
    if voice not in VOICES or set(features) - set(FEATURES) or len(set(features)) < len(features):
        raise ValueError(f"style={style!r} must be one of {', '.join(VOICES)}, with any of "
                         + ", ".join(f"+{feature}" for feature in FEATURES) + " behind it")
    return voice, set(features)


def spaced(text):
    """'47+85=132' -> '47 + 85 = 132'."""
    return OPERATOR.sub(r" \1 ", text)


def _terse(working, steps, check, rng):
    lines = []
    for step, slips in steps:
        if slips:
            lines.append(f"{step.slip}? {step.notice}, {WRONG}")
        lines.append(step.text)
    return lines + [f"check: {check}"] * bool(check)


BEGIN = ("First,", "To start,", "I begin:")
NEXT = ("Then", "Next,", "After that,", "Now")
OOPS = ("Wait:", "Hmm:", "Stop:")


def _prose(working, steps, check, rng):
    parts = [rng.choice(("I have to {}.", "I am asked to {}.", "So I should {}.")).format(working.goal)]
    for number, (step, slips) in enumerate(steps):
        if slips:
            parts.append(f"I think {spaced(step.slip)}. {rng.choice(OOPS)} {spaced(step.notice)}, "
                         f"so that was {WRONG}. Again: {spaced(step.text)}.")
        else:
            parts.append(f"{rng.choice(NEXT if number else BEGIN)} {spaced(step.text)}.")
    if check:
        parts.append(f"Let me check: {spaced(check)}.")
    return [" ".join(parts + [f"So the answer is {one_line(working.answer)}."])]


def _numbered(working, steps, check, rng):
    lines = [f"To do: {working.goal}."]
    for step, slips in steps:
        if slips:
            lines.append(f"{len(lines)}. {spaced(step.slip)}\n   {WRONG}: {spaced(step.notice)}")
        lines.append(f"{len(lines)}. {'again: ' * slips}{spaced(step.text)}")
    if check:
        lines.append(f"Check: {spaced(check)}.")
    return lines + [f"Result: {one_line(working.answer)}"]


def one_line(answer):
    return answer.replace("\n", " / ")


TELL = {"terse": _terse, "prose": _prose, "numbered": _numbered}


def render(working, rng, style):
    """The reasoning text of a working. Where no step has a slip, or there is no check, that feature is left out.

    Returns:
        (text, style that was really told).
    """
    voice, features = parse_style(style)
    able = [place for place, step in enumerate(working.steps) if step.slip]
    wrong = rng.choice(able) if "backtrack" in features and able else None
    steps = [(step, place == wrong) for place, step in enumerate(working.steps)]
    check = working.check if "check" in features else ""
    told = "+".join([voice] + ["check"] * bool(check) + ["backtrack"] * (wrong is not None))
    return "\n".join(TELL[voice](working, steps, check, rng)).strip(), told


# How the answer is put, by the kind of task; each can be read back by `recipes.task_answers`.
ANSWER_FORMS = {"bare": "{}", "sentence": "The answer is {}.", "boxed": "\\boxed{{{}}}", "label": "Answer: {}"}
BARE_ONLY = ("lines",)  # grids stand alone


def put_answer(answer, kind, form):
    if form not in ANSWER_FORMS:
        raise ValueError(f"answer form {form!r} must be one of {', '.join(ANSWER_FORMS)}")
    return answer if kind in BARE_ONLY else ANSWER_FORMS[form].format(answer)
