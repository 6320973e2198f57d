"""What can be known of a pair without understanding it: by length, by place, by single words.

A reward model has to beat these on the same test pairs. Accuracies are means over problems (pairs of one question are
alike), with the intervals of `recipes/intervals.py`; a tie counts one half.
"""

import math
import re
from collections import Counter

from recipes.intervals import mean_interval

WORD = re.compile(r"\w+|[^\w\s]")


def text_of(side):
    return side[0]["content"]


def words(side):
    return WORD.findall(text_of(side).casefold())


class UnigramBayes:
    """Naive Bayes on words: the log-odds of each word between chosen and rejected training sides, add-one smoothed."""

    def __init__(self, rows):
        counts = {field: Counter(word for row in rows for word in words(row[field])) for field in ("chosen", "rejected")}
        known = set().union(*counts.values())
        total = {field: sum(found.values()) + len(known) for field, found in counts.items()}
        self.odds = {word: math.log((counts["chosen"][word] + 1) / total["chosen"])
                     - math.log((counts["rejected"][word] + 1) / total["rejected"]) for word in known}

    def __call__(self, side):
        return sum(self.odds.get(word, 0.0) for word in words(side))


def accuracy(rows, difference):
    """{"accuracy", "low", "high", "pairs", "problems"} of a rule that prefers by the sign of `difference(row)`."""
    problems = {}
    for row in rows:
        value = difference(row)
        problems.setdefault(row["problem"], []).append(0.5 if value == 0 else float(value > 0))
    means = [sum(found) / len(found) for found in problems.values()]
    low, high = mean_interval(means)
    return {"accuracy": sum(means) / len(means), "low": low, "high": high, "pairs": len(rows), "problems": len(means)}


def baselines(train, test):
    """{rule: accuracy on the test pairs}; empty without test pairs."""
    if not test or not train:
        return {}
    bayes = UnigramBayes(train)
    def longer(row):
        return len(text_of(row["chosen"])) - len(text_of(row["rejected"]))
    found = {"longer": accuracy(test, longer), "shorter": accuracy(test, lambda row: -longer(row)),
             "unigram": accuracy(test, lambda row: bayes(row["chosen"]) - bayes(row["rejected"]))}
    if all("positions" in row for row in test):
        found["first"] = accuracy(test, lambda row: row["positions"][1] - row["positions"][0])
    return found


def table(results):
    """{source: {rule: accuracy}} as text."""
    lines = [f"{'baseline on test pairs':24} {'accuracy':>9} {'95 % interval':>17} {'pairs':>7} {'problems':>9}"]
    for source, rules in results.items():
        for rule, found in rules.items():
            lines.append(f"{source + ': ' + rule:24} {found['accuracy']:>9.1%} {found['low']:>8.1%}{found['high']:>9.1%} "
                         f"{found['pairs']:>7,} {found['problems']:>9,}")
    return "\n".join(lines)
