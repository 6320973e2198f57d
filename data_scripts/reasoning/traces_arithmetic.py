"""Solvers for sums, products, equations and word problems. See `traces_base.py` for what they return."""

import ast
import math
import re
from decimal import Decimal
from itertools import pairwise

from data_scripts.reasoning.traces_base import NoProcedure, Step, Working
from data_scripts.reasoning.traces_columns import add, combine, count_on, divide, multiply, signed, times_digit

PLACES = {1: "tenths", 2: "hundredths", 3: "thousandths", 4: "ten-thousandths"}
MOST_FLIPS = 12  # rows of Pascal's triangle that are written down


def find(pattern, problem):
    """The groups of a pattern in the prompt; a prompt that is worded otherwise has no procedure."""
    match = re.search(pattern, problem.prompt, re.DOTALL)
    if not match:
        raise NoProcedure(f"not worded as expected: {problem.prompt[:80]!r}")
    return match.groups()


def _running(terms, signs):
    """Steps and total of a chain, from left to right; the last step undone is the check."""
    total, steps, before = terms[0], [], terms[0]
    for sign, term in zip(signs, terms[1:]):
        before = total
        step, total = combine(total, sign, term)
        steps.append(step)
    undone = "-" if signs[-1] == "+" else "+"
    return steps, total, f"{total}{undone}{signed(terms[-1])}={before}"


def chain_sum(problem):
    expression, = find(r"problem: ([-+0-9 ]+) =", problem)
    parts = expression.split()
    terms, signs = [int(term) for term in parts[::2]], parts[1::2]
    if len(terms) == 2 and 0 <= terms[0] < 10 and 0 < terms[1] < 10:
        # One small sum is all that is asked: counting can be learned from few of them, facts cannot.
        step, total = count_on(terms[0], signs[0], terms[1])
        undone = "-" if signs[0] == "+" else "+"
        return Working(f"work out {expression}", [step], str(total), f"{total}{undone}{terms[1]}={terms[0]}")
    steps, total, check = _running(terms, signs)
    return Working(f"work out {expression}", steps, str(total), check)


def decimal_chain_sum(problem):
    expression, = find(r"problem: ([-+0-9. ]+) =", problem)
    parts = expression.split()
    decimals = max(len(term.partition(".")[2]) for term in parts[::2])
    if not decimals:
        terms = [int(term) for term in parts[::2]]
        steps, total, check = _running(terms, parts[1::2])
        return Working(f"work out {expression}", steps, str(total), check)
    terms = [int(Decimal(term).scaleb(decimals)) for term in parts[::2]]
    steps, total, check = _running(terms, parts[1::2])
    whole = "".join(a + b for a, b in zip([""] + parts[1::2], map(str, terms)))
    answer = str(Decimal(total).scaleb(-decimals))
    unit = PLACES.get(decimals, f"units of {Decimal(1).scaleb(-decimals)}")
    steps = [Step(f"in {unit}: {whole}"), *steps, Step(f"{total} {unit} are {answer}")]
    return Working(f"work out {expression}", steps, answer, f"in {unit} {check}")


def _evaluate(node, steps):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, steps)
        if not isinstance(node.operand, ast.Constant):
            steps.append(Step(f"-({value})={-value}"))
        return -value
    left, right = _evaluate(node.left, steps), _evaluate(node.right, steps)
    if isinstance(node.op, (ast.Add, ast.Sub)):
        step, value = combine(left, "+" if isinstance(node.op, ast.Add) else "-", right)
        steps.append(step)
        return value
    if isinstance(node.op, ast.Mult):
        found, value = multiply(abs(left), abs(right))
        steps += found
        sign = "*"
    else:
        if right == 0 or left % right:
            raise NoProcedure("a quotient that is no whole number")
        step, value, _ = divide(abs(left), abs(right))
        steps.append(step)
        sign = "/"
    if left < 0 or right < 0:
        value = value if (left < 0) == (right < 0) else -value
        same = "the signs are the same" if (left < 0) == (right < 0) else "the signs differ"
        steps.append(Step(f"{same}: {left}{sign}{signed(right)}={value}", f"{left}{sign}{signed(right)}={-value}", same)
                     if value else Step(f"{left}{sign}{signed(right)}=0"))
    return value


def basic_arithmetic(problem):
    expression, = find(r"Calculate (.*)\.$", problem)
    steps = []
    value = _evaluate(ast.parse(expression, mode="eval").body, steps)
    return Working(f"work out {expression}", steps or [Step(str(value))], str(value))


def products(problem):
    a, b = map(int, find(r"multiplication: (\d+) \* (\d+)\.", problem))
    steps, value = multiply(a, b)
    ends = f"{a % 10}*{b % 10}={a % 10 * (b % 10)} ends in {value % 10} as {value} does"
    return Working(f"multiply {a} by {b}", steps, str(value), ends)


def simple_equations(problem):
    left, right = find(r"(?::|equation:|satisfies:) (\S.*) = (-?\d+)$", problem)
    letter = "".join(sorted(set(re.findall("[a-z]", left))))
    if len(letter) != 1:  # the package's "0 = 0" among them
        raise NoProcedure("no equation in one unknown")
    factor, rest = 0, 0
    for sign, term in re.findall(r"(^|[+-]) ?([^ ]+)", left):
        way = -1 if sign == "-" else 1
        if letter in term:
            factor += way * int(term.partition("*")[0] if "*" in term else term.replace(letter, "1"))  # also "-a"
        else:
            rest += way * int(term)
    right, name = int(right), f"{abs(factor)}*{letter}" if abs(factor) != 1 else letter
    steps, value = [], right
    if factor > 0 and rest:
        sign = "-" if rest > 0 else "+"
        step, value = combine(right, sign, abs(rest))
        steps += [Step(f"{name}={right}{sign}{abs(rest)}"), step]
    elif factor < 0:
        step, value = combine(rest, "-", right)
        steps += [Step(f"{name}={rest}-{signed(right)}"), step]
    if not factor or value % factor:
        raise NoProcedure("no whole solution")
    result = value // abs(factor)
    if abs(factor) != 1:
        step, _, _ = divide(abs(value), abs(factor))
        steps += [Step(f"{letter}={value}/{abs(factor)}"), step]
    steps.append(Step(f"{letter}={result}"))
    filled = re.sub(rf"\b{letter}\b", signed(result), left).replace(" ", "")
    return Working(f"find {letter} in {left} = {right}", steps, str(result), f"{filled}={right}")


def simple_geometry(problem):
    sides, = map(int, find(r"(\d+)(?: sides|-gon)", problem))
    angles = [int(Decimal(text)) for text in re.findall(r"(-?\d+\.\d)°", problem.prompt)]
    triangles, partial = multiply(180, sides - 2)
    steps = [Step(f"{sides} sides: the angles sum to 180*{sides - 2}"), *triangles]
    known = angles[0]
    for angle in angles[1:]:
        step, known = add(known, angle)
        steps.append(step)
    step, value = combine(partial, "-", known)
    return Working("find the angle that is missing", [*steps, step], str(value), f"{known}+{signed(value)}={partial}")


def leg_counting(problem):
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # legs of one animal, by name

    listed, = find(r"if you have (.*)\?", problem)
    steps, total = [], None
    for number, name in (entry.split(" ", 1) for entry in listed.split(", ")):
        name = name if name in ANIMALS else name.removesuffix("s")
        legs = ANIMALS[name]
        text, product = times_digit(legs, int(number)) if int(number) < 10 else multiply(legs, int(number))
        if not isinstance(text, str):
            steps, text = [*steps, *text[:-1]], text[-1].text
        short = f"{legs}*{number}={product}"
        wrong = product + (legs or 1)
        steps.append(Step(f"{name} {legs} legs: {text}", f"{legs}*{number}={wrong}",
                          f"{legs}*{int(number) + 1}={wrong}" if legs else f"nothing times {number} is 0"))
        assert text.endswith(short) or int(number) >= 10
        if total is None:
            total = product
        else:
            step, total = add(total, product)
            steps.append(step)
    return Working(f"count the legs of {listed}", steps, str(total))


def _rule(shown):
    """(what the rule is, tests of it, the next number) of a sequence, or None. The simplest that fits."""
    pairs = list(pairwise(shown))
    gaps = [b - a for a, b in pairs]
    if len(set(gaps)) == 1:
        return f"add {signed(gaps[0])}", [f"{b}-{signed(a)}={gaps[0]}" for a, b in pairs], "+", gaps[0]
    if all(a and b % a == 0 for a, b in pairs) and len({b // a for a, b in pairs}) == 1:
        factor = pairs[0][1] // pairs[0][0]
        return f"times {factor}", [f"{a}*{signed(factor)}={b}" for a, b in pairs], "*", factor
    triples = list(zip(shown, shown[1:], shown[2:]))
    if all(a + b == c for a, b, c in triples):
        return "add the two before", [f"{a}+{signed(b)}={c}" for a, b, c in triples], "fibonacci", shown[-2]
    if all(b == a // 2 for a, b in pairs):
        return "halve, rounding down", [f"{a}/2 gives {b}" for a, b in pairs], "half", 2
    if pairs[0][0] != pairs[1][0] and gaps[0] and gaps[1] % gaps[0] == 0:
        factor = gaps[1] // gaps[0]
        rest = pairs[0][1] - factor * pairs[0][0]
        if abs(factor) > 1 and all(b == a * factor + rest for a, b in pairs):
            return f"times {factor}, then add {signed(rest)}", [
                f"{a}*{signed(factor)}+{signed(rest)}={b}" for a, b in pairs], "affine", (factor, rest)
    return None


def _wrong_rule(shown):
    """A rule that does not fit, and the two terms that show it: the first difference, or another where all are one."""
    pairs = list(pairwise(shown))
    gap = shown[1] - shown[0]
    a, b = next(((a, b) for a, b in pairs if b - a != gap), pairs[0])
    wrong = gap if b - a != gap else gap + 1
    return f"add {signed(wrong)}", f"{b}-{signed(a)}={b - a}"


def number_sequence(problem):
    shown = [int(term) for term in find(r"^([-0-9, ]+), \?$", problem)[0].split(", ")]
    rule = _rule(shown)
    if rule is None:
        raise NoProcedure("no rule of the few that are tried")
    said, tests, kind, value = rule
    last = shown[-1]
    if kind in ("+", "fibonacci"):
        step, answer = combine(last, "+", value)
        closing = [step]
    elif kind == "half":
        answer = last // 2
        closing = [Step(f"{last}/2 gives {answer}")]
    else:
        factor, rest = value if kind == "affine" else (value, 0)
        found, product = multiply(abs(last), abs(factor))
        answer = last * factor
        assert abs(answer) == product
        closing = found + [Step(f"{last}*{signed(factor)}={answer}")] * (min(last, factor) < 0)
        if rest:
            step, answer = combine(answer, "+", rest)
            closing.append(step)
    if str(answer) != problem.reference:  # few terms can follow two rules: -1, -2, -3, -5, -8 do
        raise NoProcedure("another rule fits too")
    first = Step(f"{said}: {', '.join(tests)}", *_wrong_rule(shown))
    return Working(f"continue {', '.join(map(str, shown))}", [first, *closing], str(answer))


def coin_flip(problem):
    kind, heads, flips = find(r"(exactly|at least) (\d+) heads in (\d+)", problem)
    heads, flips = int(heads), int(flips)
    if flips > MOST_FLIPS:
        raise NoProcedure(f"more than {MOST_FLIPS} rows")
    powers = " ".join(str(2 ** i) for i in range(1, flips + 1))
    rows = [" ".join(str(math.comb(n, k)) for k in range(n + 1)) for n in range(1, flips + 1)]
    slip = (f"outcomes: {2 * flips}", "each flip doubles them") if flips > 2 else ("", "")
    steps = [Step(f"outcomes: {powers}", *slip),
             Step("ways: " + "; ".join(rows))]
    wanted = [heads] if kind == "exactly" else list(range(heads, flips + 1))
    ways = math.comb(flips, wanted[0])
    steps.append(Step(f"{heads} heads: {ways}"))
    for more in wanted[1:]:
        step, ways = add(ways, math.comb(flips, more))
        steps.append(step)
    answer = f"{ways}/{2 ** flips}"
    return Working(f"find the chance of {kind} {heads} heads in {flips} flips", [*steps, Step(answer)], answer)


SOLVERS = {"chain_sum": chain_sum, "decimal_chain_sum": decimal_chain_sum, "basic_arithmetic": basic_arithmetic,
           "products": products, "simple_equations": simple_equations, "simple_geometry": simple_geometry,
           "leg_counting": leg_counting, "number_sequence": number_sequence, "coin_flip": coin_flip}
