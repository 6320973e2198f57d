"""Solvers for words, lists and strings. See `traces_base.py` for what they return."""

import ast

from data_scripts.reasoning.traces_arithmetic import find
from data_scripts.reasoning.traces_base import NoProcedure, Step, Working


def spelled(word):
    return " ".join(word)


def letter_counting(problem):
    letter, text = find(r'the letter "(.)" appear in the text: "(.*)"\?$', problem)
    if letter.isdigit():  # its running count would read as a false equation
        raise NoProcedure("a digit is counted")
    steps, count = [], 0
    for word in text.split():
        letters, before = [], count
        for other in word:
            hit = other.lower() == letter.lower()
            count += hit
            letters.append(f"{other}={count}" if hit else other)
        slip = (f"{word} has no {letter}", f"{spelled(word)} has {letter}") if count > before else ("", "")
        steps.append(Step(f"{word}: {' '.join(letters)}", *slip))
    steps.append(Step(f"total {count}"))
    return Working(f'count the letter {letter} in "{text}"', steps, str(count))


def spell_backward(problem):
    word, = find(r"-> nus\): (\S+)$", problem)
    back, slip = word[::-1], ("", "")
    if len(back) > 2 and back[1] != back[2]:
        slip = (f"backward: {spelled(back[0] + back[2] + back[1] + back[3:])}",
                f"before {back[0]} stands {back[1]}")
    steps = [Step(f"{word}: {spelled(word)}"), Step(f"backward: {spelled(back)}", *slip), Step(back)]
    return Working(f"spell {word} backward", steps, back, f"{back} backward: {spelled(word)}")


def word_sequence_reversal(problem):
    words = find(r"list of words: (.*)$", problem)[0].split(", ")
    back, slip = list(enumerate(words, 1))[::-1], ("", "")
    if len(words) > 2 and words[-2] != words[-1]:
        slip = (f"last is {words[-2]}", f"{len(words)} {words[-1]} stands after {words[-2]}")
    steps = [Step(", ".join(f"{place} {word}" for place, word in enumerate(words, 1))),
             Step(", ".join(f"{place} {word}" for place, word in back), *slip)]
    answer = ", ".join(word for _, word in back)
    return Working(f"reverse {', '.join(words)}", steps, answer, f"first {back[0][1]}, last {back[-1][1]}")


def _before(one, other):
    """Why one word stands before another in ASCII order: the first letters that differ."""
    for place, (a, b) in enumerate(zip(one, other)):
        if a != b:
            same = one[:place]
            capital = " (capitals first)" if a.isupper() and b.islower() else ""
            return f"{same}{a}<{same}{b}{capital}"
    return f"{one} is a beginning of {other}"


def word_sorting(problem):
    order, listed = find(r"words in (ascending|descending) order \(.*?list: (.*)$", problem)
    left, chosen = listed.split(", "), []
    steps = [Step("first letters: " + ", ".join(f"{word} {word[0]}" for word in left))]
    what, pick = ("first", min) if order == "ascending" else ("last", max)
    while left:
        word = pick(left)
        others = [other for other in left if other != word]
        near = pick(others) if others else None
        why = near and (_before(word, near) if order == "ascending" else _before(near, word))
        slip = (f"{what} is {near}", f"{why}: {word} goes before it") if near else ("", "")
        left.remove(word)
        chosen.append(word)
        steps.append(Step(f"{what}: {word}" + (f", {why}" if near else ""), *slip))
    answer = ", ".join(chosen)
    return Working(f"sort {listed}, {order}", steps, answer)


def _shift(text, by):
    return "".join(chr((ord(letter) - 65 - by) % 26 + 65) if letter.isalpha() else letter for letter in text)


def caesar_cipher(problem):
    """Shifts are tried on the first word. Which of them gives a word of the language only the reader knows."""
    text, = find(r"cipher text: (.*)\. Provide", problem)
    by = next((shift for shift in range(1, 26) if _shift(text, shift) == problem.reference), None)
    if by is None:
        raise NoProcedure("no shift gives the reference")
    first = text.split()[0]
    tried = [f"{shift} {_shift(first, shift)} {'yes' if shift == by else 'no'}" for shift in range(1, by + 1)]
    steps = [Step(f"{first} back by {', '.join(tried)}")]
    for word in text.split():
        plain = _shift(word, by)
        pairs = ", ".join(f"{a} {b}" for a, b in zip(word, plain))
        wrong = _shift(word[0], by - 1)
        steps.append(Step(f"{word}: {pairs}; {plain}", f"{word[0]} gives {wrong}",
                          f"{wrong} is {by - 1} back from {word[0]}, not {by}"))
    return Working(f"undo the shift of {text}", steps, _shift(text, by))


def _shown(number):
    return number.removesuffix(".0")


def number_sorting(problem):
    order, listed = find(r"in (ascending|descending) order: ([-0-9., ]+)\n", problem)
    left, chosen, steps = listed.split(", "), [], []
    what, pick = ("smallest", min) if order == "ascending" else ("largest", max)
    while left:
        number = pick(left, key=float)
        others = [other for other in left if float(other) != float(number)]
        sign = "<" if order == "ascending" else ">"
        slip = (f"{what} {_shown(others[0])}", f"{_shown(number)}{sign}{_shown(others[0])}") if others else ("", "")
        steps.append(Step(f"{what} of {' '.join(map(_shown, left))}: {_shown(number)}", *slip))
        left.remove(number)
        chosen.append(number)
    check = sign.join(map(_shown, chosen)) if len(set(map(float, chosen))) == len(chosen) else ""
    return Working(f"sort {listed}, {order}", steps, str(chosen), check)


def number_filtering(problem):
    action, side, limit, listed = find(r"^(Keep|Remove) all numbers (larger|smaller) than (\S+) in this list: (\[.*\])",
                                       problem)
    numbers, kept, steps = ast.literal_eval(listed), [], []
    for number in numbers:
        sign = "=" if float(number) == float(limit) else ">" if float(number) > float(limit) else "<"
        hit = sign == (">" if side == "larger" else "<")
        keep = hit == (action == "Keep")
        kept += [number] * keep
        wrong = {">": "<", "<": ">", "=": ">"}[sign]
        steps.append(Step(f"{number}{sign}{limit} {'keep' if keep else 'drop'}", f"{number}{wrong}{limit}",
                          "they are equal" if sign == "=" else f"{limit}{wrong}{number}"))
    steps.append(Step("kept: " + (", ".join(kept) or "none")))
    return Working(f"{action.lower()} what is {side} than {limit} in {', '.join(numbers)}", steps, str(kept))


def binary_alternation(problem):
    string, = find(r"alternating: ([01]+)$", problem)
    zeros, ones, steps = string.count("0"), string.count("1"), []
    running, counted = {"0": 0, "1": 0}, []
    for bit in string:
        running[bit] += 1
        counted.append(f"{bit}:{running[bit]}")
    steps.append(Step(" ".join(counted), f"zeros {zeros + 1}", f"counted again there are {zeros}"))
    steps.append(Step(f"zeros {zeros}, ones {ones}"))
    if abs(zeros - ones) > 1:
        steps.append(Step(f"{max(zeros, ones)}-{min(zeros, ones)}={abs(zeros - ones)}, more than 1: impossible"))
        return Working(f"make {string} alternate", steps, "-1")
    starts = [bit for bit, often in (("0", zeros), ("1", ones)) if often >= max(zeros, ones)]
    swaps = []
    for start in starts:
        aim = (start + ("1" if start == "0" else "0")) * len(string)
        marks = [f"{a}{b}" + "x" * (a != b) for a, b in zip(string, aim)]
        wrong = sum(a != b for a, b in zip(string, aim))
        swaps.append(wrong // 2)
        steps.append(Step(f"begin {start}: {' '.join(marks)}; {wrong} x, {wrong // 2} swaps"))
    if len(swaps) == 2:
        steps.append(Step(f"smaller of {swaps[0]} and {swaps[1]}: {min(swaps)}"))
    return Working(f"make {string} alternate", steps, str(min(swaps)))


SOLVERS = {"letter_counting": letter_counting, "spell_backward": spell_backward,
           "word_sequence_reversal": word_sequence_reversal, "word_sorting": word_sorting,
           "number_sorting": number_sorting, "number_filtering": number_filtering,
           "binary_alternation": binary_alternation, "caesar_cipher": caesar_cipher}
