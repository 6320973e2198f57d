"""Solvers for divisors, fractions, bases, bits and primes. See `traces_base.py` for what they return."""

import re

from data_scripts.reasoning.traces_arithmetic import find
from data_scripts.reasoning.traces_base import NoProcedure, Step, Working
from data_scripts.reasoning.traces_columns import add, digits, divide, multiply

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
LONGEST_RANGE = 150  # numbers that a sieve is written down for


def _euclid(a, b):
    """Steps and greatest common divisor: divide, then go on with the divisor and the rest."""
    a, b, steps = max(a, b), min(a, b), []
    while b > 1:
        step, _, rest = divide(a, b)
        steps.append(step)
        a, b = b, rest
    return steps, 1 if b == 1 else a


def _listed(problem):
    numbers = [int(number) for number in re.findall(r"\d+", find(r"these numbers: ([\d, ]+)", problem)[0])]
    return numbers, " and ".join(map(str, numbers))


def _chain(numbers, combine_two):
    steps, result = [], numbers[0]
    for number in numbers[1:]:
        more, result = combine_two(result, number)
        steps += more
    return steps, result


def _divisor(a, b):
    steps, result = _euclid(a, b)
    return [*steps, Step(f"gcd {result}")], result


def gcd(problem):
    numbers, said = _listed(problem)
    steps, result = _chain(numbers, _divisor)
    check = ", ".join(f"{number}={result}*{number // result}" for number in numbers)
    return Working(f"find the greatest common divisor of {said}", steps, str(result), check)


def _multiple(a, b):
    steps, common = _euclid(a, b)
    step, share, _ = divide(a, common)
    product, result = multiply(share, b)
    return [*steps, Step(f"gcd {common}; {a}/{common}*{b}"), step, *product, Step(f"lcm {result}")], result


def lcm(problem):
    numbers, said = _listed(problem)
    steps, result = _chain(numbers, _multiple)
    check = ", ".join(f"{result}={number}*{result // number}" for number in numbers)
    return Working(f"find the least common multiple of {said}", steps, str(result), check)


def fraction_simplification(problem):
    above, below = map(int, find(r"fraction (\d+)/(\d+)", problem))
    steps, common = _euclid(above, below)
    steps.append(Step(f"gcd {common}"))
    answer = f"{above}/{below}"
    if common > 1:
        (upper, top, _), (lower, bottom, _) = divide(above, common), divide(below, common)
        steps += [upper, lower]
        answer = f"{top}/{bottom}"
    steps.append(Step(answer))
    return Working(f"simplify {above}/{below}", steps, answer, f"{answer.replace('/', ' and ')} times {common}: "
                   f"{above} and {below}" if common > 1 else "no common divisor")


def count_bits(problem):
    number, = map(int, find(r"of the number (\d+)\?", problem))
    # Halving digit by digit: each digit of the half hangs on one digit and on whether the one before was odd.
    steps, left, ones = [Step(f"{number}: {digits(number)}")], number, 0
    while left:
        odd, half = left % 2, left // 2
        ones += odd
        last = left % 10
        steps.append(Step(f"half {digits(half)} rest {odd}, ones {ones}", f"half {digits(half)} rest {1 - odd}",
                          f"{last} is {'odd' if odd else 'even'}"))
        left = half
    return Working(f"count the ones of {number} in binary", steps, str(ones), f"binary {digits(f'{number:b}')}")


def _meaning(digit):
    """What a letter stands for, as a step."""
    return [Step(f"{digit} is {LETTERS.index(digit)}")] * digit.isalpha()


def base_conversion(problem):
    names = {"binary": 2, "hexadecimal": 16}
    source, text, target = find(r"convert the (base-\d+|binary|hexadecimal) number (\w+) to (\S+)$", problem)
    base, aim = (names.get(name) or int(name.removeprefix("base-")) for name in (source, target))
    steps, value = _meaning(text[0]) * (len(text) > 1), LETTERS.index(text[0])
    if base != 10:
        for letter in text[1:]:
            more, product = multiply(value, base)
            digit, (step, value) = LETTERS.index(letter), add(product, LETTERS.index(letter))
            steps += [*more, *_meaning(letter), *[step] * bool(digit)]
        steps.append(Step(f"{' '.join(text)} is {value}"))
    value, written = int(text, base), ""
    if aim == 10:
        return Working(f"write {text} of base {base} in base 10", steps, str(value))
    left = value
    while left:
        step, left, rest = divide(left, aim)
        written = LETTERS[rest] + written
        steps.append(step._replace(text=f"{step.text}; digit {LETTERS[rest]}"))
    steps.append(Step(f"upwards: {' '.join(written)}; {written}",
                      f"downwards: {' '.join(written[::-1])}" if written != written[::-1] else "",
                      "the last rest is the first digit"))
    return Working(f"write {text} of base {base} in base {aim}", steps, written)


def count_primes(problem):
    low, high = map(int, find(r"between (\d+) and (\d+)", problem))
    if high - low > LONGEST_RANGE:
        raise NoProcedure("a long range")
    left, gone = [n for n in range(max(low, 2), high + 1) if n == 2 or n % 2], None
    def row(numbers):
        return " ".join(map(str, numbers)) or "none"
    steps = [Step("1 is no prime")] * (low == 1) + [Step(f"{'2 or ' * (2 in left)}odd: {row(left)}")]
    for prime in (3, 5, 7, 11, 13, 17, 19):
        if prime * prime > high:
            break
        out = [n for n in left if n % prime == 0 and n > prime]
        gone = gone or (out and (out[0], prime))
        left = [n for n in left if n not in out]
        if out:
            steps.append(Step(f"not {prime}: out {row(out)}"))
    counted = ", ".join(f"{place} {n}" for place, n in enumerate(left, 1)) or "none"
    wrong = (f"{gone[0]} is prime", f"{gone[0]}={gone[1]}*{gone[0] // gone[1]}") if gone else ("", "")
    steps.append(Step(f"left: {counted}", *wrong))
    return Working(f"count the primes from {low} to {high}", steps, str(len(left)))


SOLVERS = {"gcd": gcd, "lcm": lcm, "fraction_simplification": fraction_simplification, "count_bits": count_bits,
           "base_conversion": base_conversion, "count_primes": count_primes}
