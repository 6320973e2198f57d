"""Short procedural tasks by reasoning-gym's generators, chosen for small models, with verifiers of our own.

Questions and answers are the package's. The verdict is ours wherever an answer is unique, since not
all of the package's scores can be trusted: `coin_flip` gives 1.0 to every prefix of the answer ("0"
for 0.3125), `game_of_life_halting` to everything, `prime_factorization` raises on words, countdown
reads an answer by a parser that evaluates it. Where several answers are right and nothing is evaluated
(`shortest_path`) the package's score decides, and only 0.99 and above is correct.

Left out besides these: tasks without a reference answer (boxnet, graph_color, propositional_logic,
rubiks_cube, rush_hour), tasks whose questions depend on today's date (time_intervals) or on the
process's string hashes (isomorphic_strings, ransom_note: they draw from a set, so one seed gives
other problems in the next process), and those that are long or slow.

Difficulty: each row of PUZZLES turns a level 1..5 into the generator's settings, from one digit or
three words upwards; level 5 stays below the package's defaults where those are beyond small models.
"""

import json
import re
from fractions import Fraction
from functools import cache
from itertools import count

from recipes.task_answers import evaluate_expression, plain, read_boolean, read_fraction, read_number
from recipes.task_base import UNPARSABLE, WORDED, Candidate, Task, Verdict, mix_seed

ENOUGH = 0.99
CHUNK = 10_000  # items of one generator, made one at a time; then another seed follows


def _expression(meta):
    return meta["expression"].replace(" ", "")


def _product(meta):
    return "*".join(sorted(meta["expression"].split(" * "), key=int))


def _numbers(label):
    return lambda meta: f"{label} {sorted(meta['numbers'])}"


def _animals(meta):
    return "legs " + str(sorted(meta["animals"].items()))


def _equation(meta):  # level 1 has 300 equations; in other letters and words they are worth asking again
    return re.sub(rf"\b{meta['variable']}\b", "x", meta["equation"]).replace(" ", "") + WORDED + meta["question"]


def _angles(meta):
    return f"angles {meta['n_sides']} {sorted(meta['known_angles'])}"


def _calendar(meta):
    wording = ("question", "source_dataset", "source_index", "difficulty")
    asked = {name: value for name, value in meta.items() if name not in wording}
    return "calendar " + json.dumps(asked, sort_keys=True)


def _family(meta):  # the story is told in one way, the question asked in several
    return f"{meta['question'].partition(STORY_END)[0]} {meta['person1']} to {meta['person2']}"


STORY_END = "\n\n"
CALENDAR = ["weekday_offset", "is_leap_year", "weekday_of_date", "count_days", "count_business_days"]

# name: (kind, level -> settings, metadata -> key or None for the question itself). The key says what a
# problem asks, whatever words the generator wraps it in.
PUZZLES = {
    "basic_arithmetic": ("number", lambda d: dict(min_terms=2, max_terms=1 + d, max_digits=(d + 1) // 2), _expression),
    "chain_sum": ("number", lambda d: dict(min_terms=2, max_terms=1 + d, min_digits=1 + d // 3,
                                           max_digits=(d + 2) // 2), _expression),
    "products": ("number", lambda d: dict(min_digits=(d + 1) // 2, max_digits=1 + d // 2), _product),
    "simple_equations": ("number", lambda d: dict(min_terms=2, max_terms=2 + d // 3, max_value=10 * d,
                                                  operators=("+", "-") if d < 2 else ("+", "-", "*"),
                                                  operators_weights=[.5, .5] if d < 2 else [.4, .4, .2]), _equation),
    "gcd": ("number", lambda d: dict(min_value=2, max_value=60 * 2 ** (d - 1), max_numbers=2 + d // 4),
            _numbers("gcd")),
    "lcm": ("number", lambda d: dict(min_value=2, max_value=12 * d, max_numbers=2 + d // 4), _numbers("lcm")),
    "count_bits": ("number", lambda d: dict(max_n=4 ** (d + 3)), lambda meta: f"bits {meta['number']}"),
    "decimal_chain_sum": ("number", lambda d: dict(max_terms=1 + d, max_digits=(d + 2) // 2,
                                                   max_decimal_places=(d + 1) // 2), _expression),
    "fraction_simplification": ("fraction", lambda d: dict(max_value=10 * 3 ** (d - 1), max_factor=5 * d,
                                                           styles=("plain",)),
                                lambda meta: f"{meta['numerator']}/{meta['denominator']}"),
    "gsm_symbolic": ("number", lambda d: {}, None),  # one level: the package refuses others
    "leg_counting": ("number", lambda d: dict(min_animals=d, max_animals=1 + d, max_instances=3 * d), _animals),
    "number_sequence": ("number", lambda d: dict(max_complexity=(d + 1) // 2, min_terms=5, max_value=20 * d,
                                                 min_value=-20 * (d - 1)), None),
    "number_sorting": ("text", lambda d: dict(min_numbers=2 + d // 2, max_numbers=2 + d, max_decimals=d // 3,
                                              min_value=-100.0 if d > 2 else 0.0, max_value=20.0 * d), None),
    "number_filtering": ("text", lambda d: dict(min_numbers=2 + d // 2, max_numbers=2 + d, max_decimals=d // 3,
                                                min_value=-100.0 if d > 2 else 0.0, max_value=20.0 * d), None),
    "letter_counting": ("number", lambda d: dict(min_words=2 * d, max_words=3 * d), None),
    "spell_backward": ("text", lambda d: dict(min_word_len=2 + d, max_word_len=3 + d),
                       lambda meta: f"spell {meta['word']}"),
    "word_sorting": ("text", lambda d: dict(min_words=2 + d // 2, max_words=2 + d), None),
    "word_sequence_reversal": ("text", lambda d: dict(min_words=2, max_words=2 + d), None),
    "caesar_cipher": ("text", lambda d: dict(min_words=2, max_words=2 + d, max_rotation=min(25, 5 * d)), None),
    "base_conversion": ("text", lambda d: dict(max_base=(2, 8, 10, 16, 16)[d - 1] if d > 1 else 10, min_value=2,
                                               max_value=4 ** (d + 1)),
                        lambda meta: f"{meta['source_repr']} in base {meta['source_base']} as {meta['target_base']}"),
    "binary_alternation": ("number", lambda d: dict(min_n=2 + 2 * d, max_n=4 + 4 * d), lambda meta: meta["string"]),
    "count_primes": ("number", lambda d: dict(max_n=15 * 2 ** d), lambda meta: f"primes {meta['start']}-{meta['end']}"),
    "family_relationships": ("text", lambda d: dict(min_family_size=2 + d, max_family_size=3 + d), _family),
    "syllogism": ("boolean", lambda d: dict(invalid_ratio=0.5, inversion_probability=0.1 * d, allow_no=True,
                                            allow_some=d > 2, allow_some_not=d > 3), None),
    "coin_flip": ("number", lambda d: dict(min_trials=2, max_trials=4 + 4 * d), None),
    "simple_geometry": ("number", lambda d: dict(max_sides=2 + d), _angles),
    "calendar_arithmetic": ("text", lambda d: dict(tasks=CALENDAR[:d], offset_upper_bound=10 * d * d), _calendar),
    "largest_island": ("number", lambda d: dict(min_rows=2 + d, max_rows=3 + d, min_cols=2 + d, max_cols=3 + d,
                                                min_num_islands=1, max_num_islands=1 + d // 2, min_island_size=2,
                                                max_island_size=2 + 2 * d), lambda meta: f"island {meta['grid']}"),
    "shortest_path": ("text", lambda d: dict(min_rows=2 + d // 2, max_rows=2 + d, min_cols=2 + d // 2, max_cols=2 + d,
                                             p_blocked=0.3), lambda meta: f"path {meta['matrix']}"),
    "mini_sudoku": ("lines", lambda d: dict(min_empty=2 * d, max_empty=2 * d), lambda meta: f"sudoku {meta['puzzle']}"),
    "countdown": ("expression", lambda d: dict(min_numbers=2 + d // 2, max_numbers=2 + d // 2, max_value=10 * d,
                                               min_target=5, max_target=30 * d),
                  lambda meta: f"countdown {sorted(meta['numbers'])} {meta['target']}"),
}


# Answers whose letters' case matters, and answers that are lists (brackets and quotes do not matter).
CASE_MATTERS = {"spell_backward", "word_sorting", "word_sequence_reversal"}
LISTS = {"number_sorting", "number_filtering", "word_sorting", "word_sequence_reversal"}
APPROXIMATE = {"coin_flip": Fraction(1, 10 ** 8)}  # relative: its references are rounded to ten digits
KEPT = {"countdown": ("numbers", "target"), "shortest_path": ("matrix",)}  # metadata that verifiers need


def _read_list(text):
    parts = [plain(part.strip(" []'\"")) for part in text.split(",")]
    numbers = [read_number(part) if part[-1:].isdigit() else None for part in parts]
    return [part if number is None else number for part, number in zip(parts, numbers)]


class PuzzleTask(Task):
    """One of reasoning-gym's generators with our settings, keys and verdicts."""

    source, licence = "reasoning-gym 0.1.25", "Apache-2.0"
    difficulty_means = "sizes of numbers, words and grids, number of steps"

    def __init__(self, name):
        super().__init__(name)
        self.kind, self.settings, self.key = PUZZLES[name]
        if not self.settings(1):
            self.levels = (1,)

    def candidates(self, seed, level):
        import reasoning_gym

        for chunk in count():
            dataset = reasoning_gym.create_dataset(self.name, size=CHUNK, seed=mix_seed(seed, chunk),
                                                   **self.settings(level))
            for index in range(CHUNK):
                entry = dataset[index]
                yield self.candidate(entry)

    def candidate(self, entry):
        """The package's entry as a Candidate; also tells on which side of the split an entry lies."""
        question = entry["question"].strip()
        meta = {**entry["metadata"], "question": question}
        key = self.key(meta) if self.key else question
        extra = {name: meta[name] for name in KEPT.get(self.name, ())}
        return Candidate(question, str(entry["answer"]), str(key), extra)

    def verify(self, answer, problem):
        return getattr(self, f"_verify_{self.kind}")(answer, problem)

    def _verify_number(self, answer, problem):
        value, gold = read_number(answer), read_number(problem.reference)
        if value is None:
            return UNPARSABLE
        near = abs(gold) * APPROXIMATE.get(self.name, 0)
        return Verdict(abs(value - gold) <= near, True, str(value))

    def _verify_fraction(self, answer, problem):
        value = read_fraction(answer)
        return UNPARSABLE if value is None else Verdict(value == read_fraction(problem.reference), True,
                                                        "{}/{}".format(*value))

    def _verify_boolean(self, answer, problem):
        value = read_boolean(answer)
        return UNPARSABLE if value is None else Verdict(value == read_boolean(problem.reference), True, str(value))

    def _verify_lines(self, answer, problem):
        return Verdict(answer.split() == problem.reference.split(), True, answer)

    def _verify_expression(self, answer, problem):
        found = evaluate_expression(answer.partition("=")[0])
        if found is None:
            return UNPARSABLE
        value, used = found
        meta = problem.metadata
        return Verdict(value == meta["target"] and sorted(used) == sorted(meta["numbers"]), True, answer)

    def _verify_text(self, answer, problem):
        if self.name == "shortest_path":
            score = _scorer(self.name).score_answer(" ".join(answer.replace(",", " ").lower().split()), {
                "answer": problem.reference, "metadata": problem.metadata})
            return Verdict(score >= ENOUGH, True, answer)
        gold, given = problem.reference, answer
        if self.name not in CASE_MATTERS:
            gold, given = gold.casefold(), given.casefold()
        read = _read_list if self.name in LISTS else plain
        return Verdict(read(given) == read(gold), True, answer)


@cache
def _scorer(name):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


PUZZLE_TASKS = {name: PuzzleTask(name) for name in PUZZLES}
