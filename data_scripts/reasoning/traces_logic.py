"""Solvers for families, syllogisms, the calendar and countdown. See `traces_base.py` for what they return.

Where the package's reference is not what its own statements imply (it takes the gender of the wrong
person for nieces, calls the child-in-law by the parent's word, accepts syllogisms with an undistributed
middle term), the derived answer differs from it and the problem gets no trace.
"""

import datetime
import re
from itertools import permutations

from data_scripts.reasoning.traces_arithmetic import find
from data_scripts.reasoning.traces_base import NoProcedure, Step, Working
from recipes.task_answers import evaluate_expression

# (word for a man, word for a woman) of what one person is to another.
RELATED = {"parent": ("father", "mother"), "child": ("son", "daughter"), "spouse": ("husband", "wife"),
           "sibling": ("brother", "sister"), "grandparent": ("grandfather", "grandmother"),
           "parent's sibling": ("uncle", "aunt"), "sibling's child": ("nephew", "niece")}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")
QUANTIFIERS = {"All": (True, False), "No": (True, True), "Some": (False, False), "Some not": (False, True)}
MOST_TRIED = 5  # expressions that countdown shows before the one that works


def _same_as_reference(problem, answer, why):
    if answer.casefold() != problem.reference.casefold():
        raise NoProcedure(why)


def _read_family(story):
    """{person: spouse}, {child: [parents]} of the story's sentences."""
    spouses, parents, couple = {}, {}, ()
    for sentence in re.findall(r"[^.]+", story):
        married = re.search(r"(\w+) is married to (\w+)", sentence)
        if married:
            couple = married.groups()
            spouses.update({couple[0]: couple[1], couple[1]: couple[0]})
            continue
        for child in re.split(r", | and ", sentence.split(" called ")[1]):
            parents[child.strip()] = list(couple)
    return spouses, parents


def _is_woman(person, spouses):
    from reasoning_gym.graphs.family_relationships import FamilyRelationshipsConfig

    config = FamilyRelationshipsConfig()
    men, women = set(config.male_names), set(config.female_names)
    for name, flip in ((person, False), (spouses.get(person), True)):
        if (name in men) != (name in women):
            return (name in women) != flip
    raise NoProcedure(f"{person} may be a man or a woman")


def _kinship(one, other, spouses, parents):
    """(what `one` is to `other`, the facts that show it)."""
    def fact(child):
        return f"{child} is a child of {' and '.join(parents[child])}"
    mine, theirs = parents.get(one, []), parents.get(other, [])
    if one in theirs:
        return "parent", [fact(other)]
    if other in mine:
        return "child", [fact(one)]
    if spouses.get(one) == other:
        return "spouse", [f"{one} is married to {other}"]
    if mine and mine == theirs:
        return "sibling", [fact(one), fact(other)]
    for parent in theirs:
        above = parents.get(parent, [])
        if one in above:
            return "grandparent", [fact(other), fact(parent)]
        if mine and mine == above:
            return "parent's sibling", [fact(other), fact(parent), fact(one)]
    for parent in mine:
        if theirs and theirs == parents.get(parent, []):
            return "sibling's child", [fact(one), fact(parent), fact(other)]
    raise NoProcedure("a relation by marriage")


def family_relationships(problem):
    story, question = problem.prompt.split("\n\n")
    one, other = re.search(r"is (\w+) (?:to|related to) (\w+)", question).groups()
    spouses, parents = _read_family(story)
    kind, facts = _kinship(one, other, spouses, parents)
    woman = _is_woman(one, spouses)
    answer, opposite = RELATED[kind][woman], RELATED[kind][not woman]
    _same_as_reference(problem, answer, "the reference names the relation from the other side")
    who = f"{one} is a {'woman' if woman else 'man'}"
    mutual = kind in ("spouse", "sibling")  # then the other way round is true as well
    turned = ("", "") if mutual else (f"{other} is {one}'s {kind}", "it is the other way round")
    steps = [*map(Step, facts), Step(f"{one} is {other}'s {kind}", *turned),
             Step(f"{who}: {answer}", f"{one} is the {opposite}", who)]
    return Working(f"say what {one} is to {other}", steps, answer)


def _statement(text):
    match = re.fullmatch(r"(All|No|Some) (\w+) are (not )?(\w+)", text)
    if not match:
        raise NoProcedure(f"not worded as expected: {text!r}")
    return match[1] + " not" * bool(match[3]), match[2], match[4]


def _broken_rule(first, second, conclusion):
    """The first rule of the syllogism that is broken, in words; None if it is valid."""
    quantifiers = [statement[0] for statement in (first, second, conclusion)]
    middle, = set(first[1:]) & set(second[1:])
    def spread(statement, term):  # does the statement speak of all that the term names?
        return QUANTIFIERS[statement[0]][statement[1:].index(term)]
    negative = [quantifier in ("No", "Some not") for quantifier in quantifiers]
    some = [quantifier.startswith("Some") for quantifier in quantifiers]
    if negative[0] and negative[1]:
        return "two negative premises give nothing"
    if negative[2] and not (negative[0] or negative[1]):
        return "a negative conclusion needs a negative premise"
    if not negative[2] and (negative[0] or negative[1]):
        return "a negative premise gives no positive conclusion"
    if (some[0] or some[1]) and not some[2]:
        return "a premise with some gives no conclusion about all"
    if not spread(first, middle) and not spread(second, middle):
        return f"no premise speaks of all {middle}"
    for term in conclusion[1:]:
        if spread(conclusion, term) and not spread(first if term in first else second, term):
            return f"the conclusion speaks of all {term}, the premise does not"
    return None


def syllogism(problem):
    one, two, three = find(r"1\. (.*)\n2\. (.*)\n\n.*that:\n(.*)\?", problem)
    first, second, conclusion = map(_statement, (one, two, three))
    goal = f"see whether {three[0].lower() + three[1:]} follows"
    middle = set(first[1:]) & set(second[1:])
    if set(conclusion[1:]) in (set(first[1:]), set(second[1:])):
        place, premise = (1, first) if set(conclusion[1:]) == set(first[1:]) else (2, second)
        rules = {"No": ("No",), "All": ("Some",), "Some": ("Some",)}.get(premise[0], ())
        valid = conclusion[0] in rules and conclusion[1:] == premise[:0:-1]
        may = f"{premise[0].lower()} may be turned into {rules[0].lower()}" if rules else "some not cannot be turned"
        reason = [Step(f"only statement {place} has {premise[1]} and {premise[2]}"),
                  Step(f"{may}, the conclusion says {conclusion[0].lower()}")]
    else:
        broken = _broken_rule(first, second, conclusion)
        valid = broken is None
        reason = [Step(f"{middle.pop()} links both statements"), Step(broken or "no rule is broken")]
    answer = "Yes" if valid else "No"
    _same_as_reference(problem, answer, "the reference follows another rule")
    forms = ", ".join(statement[0].lower() for statement in (first, second))
    last = Step(f"{'it follows' if valid else 'it does not follow'}: {answer}",
                f"{'it does not follow' if valid else 'it follows'}", reason[-1].text)
    return Working(goal, [Step(f"premises: {forms}; conclusion: {conclusion[0].lower()}"), *reason, last], answer)


def _leap(year):
    tests = [(400, True), (100, False), (4, True)]
    steps = []
    for divisor, leap in reversed(tests):
        rest = year % divisor
        steps.append(Step(f"{year}={year // divisor}*{divisor}+{rest}", f"{year} is a multiple of {divisor}",
                          f"the rest is {rest}") if rest else Step(f"{year}={year // divisor}*{divisor}+0"))
        if rest:
            return steps, not leap
    return steps, True


def _walk(day, days):
    """Steps from a weekday over a number of days, whole weeks taken out first."""
    rest, way = abs(days) % 7, 1 if days > 0 else -1
    names = [DAYS[(DAYS.index(day) + way * i) % 7] for i in range(rest + 1)]
    weeks = abs(days) // 7
    steps = [Step(f"{abs(days)}={weeks}*7+{rest}")] if weeks else []
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    wrong = DAYS[(DAYS.index(names[-1]) + way) % 7]
    where = "on" if way > 0 else "back"
    walked = Step(f"{where}: {listed}", f"{rest} days {where} is {wrong}", f"that is {rest + 1} days")
    return [*steps, walked], names[-1]


def calendar_arithmetic(problem):
    text = problem.prompt
    leap = re.search(r"(\d{4}) is a leap year|Is (\d{4}) a leap year", text)
    if leap:
        year = int(leap[1] or leap[2])
        steps, is_leap = _leap(year)
        answer = "Yes" if is_leap else "No"
        said = f"{'a' if is_leap else 'no'} leap year"
        return Working(f"see whether {year} is a leap year", [*steps, Step(said)], answer)
    start = re.search(r"(\w+day), \w+ \d+, \d+", text)
    count = re.search(r"(\d+)[- ]days?\b", text)
    if start and count and " to " not in text and "between" not in text.lower():
        back = re.search(r"ago|backward|before", text)
        days = int(count[1])
        steps, answer = _walk(start[1], -days if back else days)
        return Working(f"find the day {days} days {'before' if back else 'after'} {start[1]}", steps, answer)
    dated = re.search(rf"({'|'.join(MONTHS)}) (\d+), (\d{{4}})", text)
    numeric = re.search(r"for (\d\d)/(\d\d)/(\d{4})", text)
    if not (dated or numeric) or re.search(r"business|how many|count|between", text, re.IGNORECASE):
        raise NoProcedure("a kind of question about dates that is not worked out here")
    month = MONTHS.index(dated[1]) + 1 if dated else int(numeric[1])
    day, year = (int(dated[2]), int(dated[3])) if dated else (int(numeric[2]), int(numeric[3]))
    return _weekday_of(year, month, day)


def _weekday_of(year, month, day):
    """From the first of January over the months' lengths, seven by seven."""
    first = DAYS[datetime.date(year, 1, 1).weekday()]
    steps, total = [Step(f"{year} begins on {first}")], 0
    for place in range(1, month):
        length = (datetime.date(year + place // 12, place % 12 + 1, 1) - datetime.date(year, place, 1)).days
        total, before = (total + length) % 7, total
        steps.append(Step(f"{MONTHS[place - 1]} {length}: {before}+{length % 7}={before + length % 7}"
                          + f", over 7: {total}" * (before + length % 7 >= 7)))
    if day > 1:
        steps.append(Step(f"{day}-1={day - 1}, {total}+{day - 1}={total + day - 1}"))
    walked, answer = _walk(first, total + day - 1) if total + day > 1 else ([], first)
    return Working(f"find the weekday of {MONTHS[month - 1]} {day}, {year}", steps + walked, answer)


def _combinations(numbers):
    """Expressions in which each number comes once, with their values: from left to right, and a sum in brackets."""
    for order in permutations(numbers):
        for signs in _signs(len(order) - 1):
            text, value = str(order[0]), order[0]
            for sign, number in zip(signs, order[1:]):
                if sign == "/" and (number == 0 or value % number):
                    break
                value = {"+": value + number, "-": value - number, "*": value * number,
                         "/": value // number if number else 0}[sign]
                text = (f"({text})" if sign in "*/" and re.search(r"[+-]", text) else text) + f"{sign}{number}"
            else:
                yield text, value


def _signs(count):
    if count == 0:
        return [()]
    return [(sign, *rest) for sign in "+-*/" for rest in _signs(count - 1)]


def countdown(problem):
    numbers, target = problem.metadata["numbers"], problem.metadata["target"]
    tried, found = [], None
    for text, value in _combinations(numbers):
        if value == target:
            found = text
            break
        tried.append(f"{text}={value}")
    if found is None or evaluate_expression(found)[0] != target:
        raise NoProcedure("no expression from left to right")
    # The nearest misses that came before; all of them would be long, and a model cannot know how many there are.
    shown = tried if len(tried) <= MOST_TRIED else tried[-MOST_TRIED:]
    steps = [Step(f"{entry}, not {target}") for entry in shown] + [Step(f"{found}={target}, yes")]
    return Working(f"make {target} of {', '.join(map(str, numbers))}", steps, found)


SOLVERS = {"family_relationships": family_relationships, "syllogism": syllogism,
           "calendar_arithmetic": calendar_arithmetic, "countdown": countdown}
