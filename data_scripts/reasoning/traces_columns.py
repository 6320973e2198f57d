"""Arithmetic with every digit on paper: sums and differences by columns, long multiplication and division.

Each function returns a `Step` whose text ends with "...=value", made of statements about single digits
only: 47+85 becomes "47+85: 7+5=12, 2 carry 1; 4+8+1=13; 1 3 2; 47+85=132". A model has to know the
hundred small sums and to copy. Values are computed from the written digits; `value` of the
functions is what the digits say.

Slips: a forgotten carry or borrow, an off-by-one digit. Their tests are local too (the last digit, the
column where the carry is missing), or invert the operation where there is only one digit.
"""

from data_scripts.reasoning.traces_base import Step


def digits(number):
    """'1 3 2' for 132."""
    return " ".join(str(number))


def signed(number):
    """A number as an operand: negative ones in brackets."""
    return f"({number})" if number < 0 else str(number)


def add(a, b):
    """(Step, a + b) for whole numbers from 0 up."""
    if a < 10 and b < 10:
        total = a + b
        return Step(f"{a}+{b}={total}", f"{a}+{b}={total + 1}", f"{total + 1}-{b}={total + 1 - b}, not {a}"), total
    width = max(len(str(a)), len(str(b)))
    upper, lower = str(a).zfill(width), str(b).zfill(width)
    carry, written, parts, forgotten = 0, "", [], ""
    for place in range(width - 1, -1, -1):
        x, y = int(upper[place]), int(lower[place])
        total = x + y + carry
        said = f"{x}+{y}" + f"+{carry}" * bool(carry) + f"={total}"
        if carry and not forgotten:
            forgotten = f"the column {said} has a carry"
        carry = total // 10 if place else 0
        parts.append(said + (f", {total % 10} carry {carry}" if carry else ""))
        written = (str(total) if place == 0 else str(total % 10)) + written
    value = int(written)
    bad = value + 1
    notice = f"{upper[-1]}+{lower[-1]} ends in {written[-1]}, not in {str(bad)[-1]}"
    if forgotten and value - 10 >= 0 and int(upper[-1]) + int(lower[-1]) >= 10:
        bad, notice = value - 10, forgotten
    head = f"{a}+{b}"
    return Step(f"{head}: {'; '.join(parts)}; {digits(value)}; {head}={value}", f"{head}={bad}", notice), value


def subtract(a, b):
    """(Step, a - b) for a >= b >= 0."""
    assert a >= b >= 0, (a, b)
    head = f"{a}-{b}"
    if a - b < 10 and a < 19 and b < 10:
        value = a - b
        return Step(f"{head}={value}", f"{head}={value + 1}", f"{value + 1}+{b}={value + 1 + b}, not {a}"), value
    upper, lower = str(a), str(b).zfill(len(str(a)))
    borrow, written, parts = 0, "", []
    for place in range(len(upper) - 1, -1, -1):
        x, y = int(upper[place]), int(lower[place])
        need = y + borrow
        lent = 10 if x < need else 0
        left = x + lent - need
        parts.append(f"{x + lent}-{y}" + f"-{borrow}" * bool(borrow) + f"={left}" + ", borrow 1" * bool(lent))
        borrow, written = lent // 10, str(left) + written
    value = int(written)
    bad = value + 10 if int(upper[-1]) < int(lower[-1]) else value + 1
    notice = "one was borrowed from the tens" if bad == value + 10 else (
        f"the last digit is {parts[0].split(',')[0]}, not {str(bad)[-1]}")
    return Step(f"{head}: {'; '.join(parts)}; {digits(value)}; {head}={value}", f"{head}={bad}", notice), value


def combine(a, sign, b):
    """(Step, a + b or a - b) for whole numbers of any sign: the signs are settled first, then columns."""
    value = a + b if sign == "+" else a - b
    other = b if sign == "+" else -b
    head = f"{a}{sign}{signed(b)}"
    if a >= 0 and other >= 0:
        step, found = add(a, other)
    elif a >= 0 and a >= -other:
        step, found = subtract(a, -other)
    elif a >= 0:
        step, found = subtract(-other, a)
        found = -found
    elif other < 0:
        step, found = add(-a, -other)
        found = -found
    elif other >= -a:
        step, found = subtract(other, -a)
    else:
        step, found = subtract(-a, other)
        found = -found
    assert found == value, (a, sign, b)
    if step.text.startswith((head + "=", head + ":")):
        return step, value
    inner = f"-({abs_head(step)})" if found < 0 or (found == 0 and a < 0) else abs_head(step)
    return Step(f"{head}={inner}; {step.text}; {head}={value}", step.slip, step.notice), value


def abs_head(step):
    """'47-5' of '47-5: 7-5=2...' or of '4+3=7'."""
    return step.text.split(":")[0].split("=")[0]


def times_digit(a, d):
    """(text, a * d) for a >= 0 and one digit d, column by column."""
    if a < 10:
        return f"{a}*{d}={a * d}", a * d
    carry, written, parts = 0, "", []
    for place, x in enumerate(reversed(str(a))):
        total = int(x) * d + carry
        last = place == len(str(a)) - 1
        said = f"{x}*{d}={int(x) * d}" + (f", {int(x) * d}+{carry}={total}" if carry else "")
        carry = 0 if last else total // 10
        parts.append(said + (f", {total % 10} carry {carry}" if carry else ""))
        written = (str(total) if last else str(total % 10)) + written
    return f"{'; '.join(parts)}; {digits(int(written))}; {a}*{d}={int(written)}", int(written)


def multiply(a, b):
    """(Steps, a * b) for a, b >= 0: one line for each digit of the shorter factor, then their sum."""
    a, b = (a, b) if len(str(a)) >= len(str(b)) else (b, a)
    if a < 10:
        value = a * b
        bad = value + a if a else value + 1
        return [Step(f"{a}*{b}={value}", f"{a}*{b}={bad}", f"{a}*{b + 1}={bad}" if a else f"0*{b}=0")], value
    steps, partial = [], []
    for place, d in enumerate(reversed(str(b))):
        text, product = times_digit(a, int(d))
        shifted = product * 10 ** place
        if product or len(str(b)) == 1:
            partial.append(shifted)
            last = f"{a % 10}*{d}={a % 10 * int(d)}"
            more = f"; {a}*{int(d) * 10 ** place}={shifted}" if place else ""
            steps.append(Step(text + more, f"{a}*{d}={product + 1}", f"{last} ends in {product % 10}"))
    total = partial[0] if partial else 0
    for other in partial[1:]:
        step, total = add(total, other)
        steps.append(step)
    if len(str(b)) > 1:
        steps.append(Step(f"{a}*{b}={total}"))
    return steps, total


def divide(a, b):
    """(Step, quotient, remainder): long division, the multiples of b that are needed written down."""
    head = f"{a}/{b}"
    if a < b:
        return Step(f"{a}={0}*{b}+{a}"), 0, a
    rest, quotient, parts = 0, "", []
    for d in str(a):
        rest = rest * 10 + int(d)
        if rest < b:
            if quotient:
                parts.append(f"{rest}: 0")
                quotient += "0"
            continue
        count = rest // b
        multiples = " ".join(str(b * i) for i in range(1, count + 1))
        parts.append(f"{rest}: {multiples}, {count} times, {rest}-{b * count}={rest - b * count}")
        quotient += str(count)
        rest -= b * count
    q = int(quotient)
    text = f"{head}: {'; '.join(parts)}; {a}={q}*{b}+{rest}"
    bad = rest + b
    return Step(text, f"{a}={q - 1}*{b}+{bad}", f"the rest {bad} is not below {b}"), q, rest


def count_on(a, sign, b):
    """(Step, a + b or a - b) for one digit b from 1 up: counting from a, each count written down."""
    way = 1 if sign == "+" else -1
    counts = [f"{i} {a + way * i}" for i in range(1, b + 1)]
    value, head = a + way * b, f"{a}{sign}{b}"
    bad = value - way
    return Step(f"{head}: {', '.join(counts)}; {head}={value}", f"{head}={bad}",
                f"{bad} is only {b - 1} away from {a}"), value
