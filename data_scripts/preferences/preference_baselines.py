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
        counts = {field: Counter(word for row in rows for word in words(row[field]))
                  for field in ("chosen", "rejected")}
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


def rules_of(train, test):
    """{rule: difference of the sides of a row}; what can be learned is learned from the training pairs."""
    bayes = UnigramBayes(train)

    def longer(row):
        return len(text_of(row["chosen"])) - len(text_of(row["rejected"]))

    rules = {"longer": longer, "shorter": lambda row: -longer(row),
             "unigram": lambda row: bayes(row["chosen"]) - bayes(row["rejected"])}
    if all("positions" in row for row in test):
        rules["first"] = lambda row: row["positions"][1] - row["positions"][0]
    return rules


def baselines(train, test):
    """{group: {rule: accuracy on the test pairs}}: each source, and each kind of a source as "source: kind".

    A source without training or test pairs has none.
    """
    found = {}
    for source in dict.fromkeys(row["source"] for row in test):
        groups, learned = {source: []}, [row for row in train if row["source"] == source]
        for row in test:
            if row["source"] == source:
                groups[source].append(row)
                if row["kind"] != source:
                    groups.setdefault(f"{source}: {row['kind']}", []).append(row)
        if learned:
            rules = rules_of(learned, groups[source])
            found |= {group: {rule: accuracy(groups[group], difference) for rule, difference in rules.items()}
                      for group in sorted(groups)}
    return found


def table(results):
    """{group: {rule: accuracy}} as text."""
    width = max((len(f"{group}, {rule}") for group, rules in results.items() for rule in rules), default=0)
    width = max(width, len("baseline on test pairs"))
    lines = [f"{'baseline on test pairs':{width}} {'accuracy':>9} {'95 % interval':>17} {'pairs':>7} {'problems':>9}"]
    for group, rules in results.items():
        for rule, found in rules.items():
            lines.append(f"{f'{group}, {rule}':{width}} {found['accuracy']:>9.1%} {found['low']:>8.1%}"
                         f"{found['high']:>9.1%} {found['pairs']:>7,} {found['problems']:>9,}")
    return "\n".join(lines)
