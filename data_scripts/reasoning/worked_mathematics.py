"""Short arithmetic and puzzle documents with their working, from reasoning-gym's generators.

Each generator below is wrapped by a function that writes the steps a person would write and derives
the answer from them; the document is kept only if the package's own verifier gives that answer
exactly 1.0. Problems on the test side of the tasks' split (`recipes/task_puzzles.py`) are skipped: what a
problem asks decides the side, not how it is worded, so that a model pretrained on these documents can be
evaluated on the tasks. Question texts are ours and short: the generators' long instructions would repeat the
same n-grams in every document, and the overlap check of the split would then drop all of them.

Left out on purpose: `game_of_life_halting` (its verifier accepts every answer), `prime_factorization`
(its verifier raises on non-numeric answers), boxnet, graph_color, propositional_logic, rubiks_cube,
rush_hour (entries without an answer), and tasks whose questions are longer than a small context.
"""

import math
from decimal import Decimal
from itertools import count

from recipes.task_puzzles import PUZZLE_TASKS


def _running_total(expression, number):
    """'12 + 5 - 3' -> (['12 + 5 = 17', '17 - 3 = 14'], '14')."""
    parts = expression.split()
    total, steps = number(parts[0]), []
    for sign, term in zip(parts[1::2], parts[2::2]):
        result = total + number(term) if sign == "+" else total - number(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    return steps, str(total)


def chain_sum(meta):
    steps, answer = _running_total(meta["expression"], int)
    return f"What is {meta['expression']}?", steps, answer


def decimal_chain_sum(meta):
    steps, answer = _running_total(meta["expression"], Decimal)
    return f"Work out {meta['expression']}.", steps, answer


def products(meta):
    left, right = (int(part) for part in meta["expression"].split(" * "))
    # Long multiplication: one partial product for each digit of the right factor, largest first.
    digits = [int(d) * 10 ** i for i, d in enumerate(reversed(str(right))) if d != "0"][::-1]
    partial = [left * value for value in digits]
    steps = [f"{left} * {value} = {product}" for value, product in zip(digits, partial)]
    if len(partial) > 1:
        steps.append(" + ".join(map(str, partial)) + f" = {sum(partial)}")
    return f"Multiply {left} by {right}.", steps, str(sum(partial))


def _euclid(a, b):
    a, b, steps = max(a, b), min(a, b), []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return steps, a


def gcd(meta):
    a, b = meta["numbers"]
    steps, result = _euclid(a, b)
    return f"Find the greatest common divisor of {a} and {b}.", steps, str(result)


def lcm(meta):
    a, b = meta["numbers"]
    steps, divisor = _euclid(a, b)
    result = a * b // divisor
    steps += [f"the greatest common divisor is {divisor}", f"{a} * {b} / {divisor} = {result}"]
    return f"Find the least common multiple of {a} and {b}.", steps, str(result)


def fraction_simplification(meta):
    top, bottom = meta["numerator"], meta["denominator"]
    steps, divisor = _euclid(top, bottom)
    steps += [f"{top} / {divisor} = {top // divisor}", f"{bottom} / {divisor} = {bottom // divisor}"]
    return f"Simplify {top}/{bottom}.", steps, f"{top // divisor}/{bottom // divisor}"


def leg_counting(meta):
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # legs of one animal, by name

    counts = meta["animals"]
    legs = {name: number * ANIMALS[name] for name, number in counts.items()}
    steps = [f"{name}: {number} * {ANIMALS[name]} = {legs[name]}" for name, number in counts.items()]
    steps.append(" + ".join(map(str, legs.values())) + f" = {sum(legs.values())}")
    listed = ", ".join(f"{name} x {number}" for name, number in counts.items())
    return f"How many legs have these animals together: {listed}?", steps, str(sum(legs.values()))


def number_sorting(meta):
    descending = meta["direction"] == "descending"
    left, result, steps = list(meta["original_numbers"]), [], []
    while left:
        chosen = (max if descending else min)(left, key=float)
        left.remove(chosen)
        result.append(chosen)
        steps.append(f"take {chosen}")
    order = "largest first" if descending else "smallest first"
    return f"Sort, {order}: {', '.join(meta['original_numbers'])}.", steps, str(result)


def letter_counting(meta):
    letter, words = meta["target_letter"], meta["span"]
    counts = [word.lower().count(letter.lower()) for word in words]
    steps = [f"{word}: {count}" for word, count in zip(words, counts) if count]
    return f'Count the letter "{letter}" in "{" ".join(words)}".', steps or ["none"], str(sum(counts))


def spell_backward(meta):
    word = meta["word"]
    steps = ["letters: " + "-".join(word), "reversed: " + "-".join(reversed(word))]
    return f'Spell "{word}" backward.', steps, word[::-1]


def base_conversion(meta):
    value, base = meta["decimal_value"], meta["target_base"]
    steps, digits, left = [], "", value
    while left or not digits:
        digits = "0123456789abcdef"[left % base] + digits
        steps.append(f"{left} = {left // base} * {base} + {left % base}")
        left //= base
    steps.insert(0, f"in base 10 it is {value}")
    question = f"Write the base-{meta['source_base']} number {meta['source_repr']} in base {base}."
    return question, steps, digits


def count_bits(meta):
    bits = f"{meta['number']:b}"
    return f"How many ones has {meta['number']} in binary?", [f"binary: {' '.join(bits)}"], str(bits.count("1"))


def number_sequence(meta):
    *shown, last = meta["sequence"]
    return f"Continue: {', '.join(map(str, shown))}, ...", [f"rule: {meta['rule']}"], str(last)


# Settings keep numbers small enough for a model of a few million parameters to learn from.
TASKS = {
    "chain_sum": (chain_sum, {"max_terms": 4, "max_digits": 3}),
    "decimal_chain_sum": (decimal_chain_sum, {"max_terms": 3, "max_digits": 2, "max_decimal_places": 2}),
    "products": (products, {"max_digits": 3}),
    "gcd": (gcd, {}),
    "lcm": (lcm, {}),
    "fraction_simplification": (fraction_simplification, {"max_value": 100, "max_factor": 20, "styles": ("plain",)}),
    "leg_counting": (leg_counting, {"min_animals": 2, "max_animals": 4}),
    "number_sorting": (number_sorting, {"max_numbers": 6, "max_decimals": 1}),
    "letter_counting": (letter_counting, {"max_words": 8}),
    "spell_backward": (spell_backward, {}),
    "base_conversion": (base_conversion, {}),
    "count_bits": (count_bits, {"max_n": 1023}),
    "number_sequence": (number_sequence, {}),
}


def render(question, steps, answer):
    return f"Question: {question}\n" + "\n".join(steps) + f"\nAnswer: {answer}\n"


def _documents(name, seed):
    """Yield (name#index, document) of one task without end, training problems only."""
    import reasoning_gym

    solve, settings = TASKS[name]
    dataset = reasoning_gym.create_dataset(name, size=1, seed=seed, **settings)
    for index in count():  # an entry depends on seed + index alone; `size` only bounds loops over the data set
        entry = dataset[index]
        task = PUZZLE_TASKS[name]
        if task.split_of(task.candidate(entry)) != "train":
            continue
        question, steps, answer = solve(entry["metadata"])
        if dataset.score_answer(answer, entry) == 1.0:
            yield f"{name}#{index}", render(question, steps, answer)


def worked_problems(seed, limit):
    """Yield (name, document) for `limit` problems, the tasks taking turns; `seed` fixes all of them.

    Raises:
        ModuleNotFoundError: if reasoning-gym is missing, naming the way to install it.
    """
    try:
        import reasoning_gym  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the source 'mathematics' needs reasoning-gym: `pip install reasoning-gym`, "
                                  "or leave it out: --mixture text=65,code=20,multilingual=15") from error
    # Another seed for each task: with one seed several of them draw the same numbers.
    streams = [_documents(name, seed + 1_000_003 * place) for place, name in enumerate(TASKS)]
    for _ in range(math.ceil(limit / len(TASKS))):
        for stream in streams:
            yield next(stream)
