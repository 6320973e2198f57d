"""What augmentation may not touch in a user's text, and the rows' parts that it reads.

A problem must keep its answer, so everything that could be an operand stays as it is: numbers and the word behind them,
quotations, code, formulas, lists in brackets, links, names, what comes after the first colon, and every word that the
answer uses. In a generated problem also what its key names.
"""

import re

OPERANDS = re.compile("|".join((
    r"```.*?(?:```|\Z)", r"`[^`\n]*`", r"\$\$.*?\$\$", r"\$[^$\n]+\$",
    r"\\[A-Za-z]+(?:\{[^{}]*\})*", r"<[^<>\n]*>", r"\[[^\]]*(?:\]|\Z)", r"\{[^}]*(?:\}|\Z)", r"\([^)]*(?:\)|\Z)",
    r'"[^"]*(?:"|\Z)', r"“[^”]*(?:”|\Z)", r"«[^»]*(?:»|\Z)", r"‘[^’]*’", r"(?<!\w)'[^'\n]+'(?!\w)",
    r"(?:https?://|www\.)\S+", r"\S+@\S+", r"(?:^|(?<=\s))[/~.]?[\w.-]*[/_\\][\w./\\-]*",
    r"\S*\d\S*(?:\s+[A-Za-z]+){0,2}",           # a number and what is counted
    r"[^\x00-\x7f‘’“”–—…]+", r"\S*[+*/=<>^|~#%&_@]\S*",
    r"(?<!\d):(?!\d).*\Z", r"(?<=\n\n).*\n.*\n.*\Z",   # after a colon; a block of lines after an empty one
)), re.DOTALL | re.MULTILINE)
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?")
SENTENCE = re.compile(r"[^.?!\n]+(?:[.?!]+(?=\s|\Z)|[.?!]+|(?=\n)|\Z)")
NUMBER_WORDS = frozenset("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                         "fifteen "
                         "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
                         "hundred thousand million billion half third quarter double twice".split())
# Words that decide what a problem asks: order, comparison, quantity, negation, logic, form of the answer.
DECISIVE = NUMBER_WORDS | frozenset(
    "not no never none nor neither nothing all some any only each every both either and or if unless then except "
    "first last second next previous before after above below between inclusive exclusive ascending descending "
    "best better good well worst worse bad larger smaller greater less more most least fewer maximum minimum highest "
    "lowest exactly odd even prime "
    "backward backwards forward reverse reversed left right up down same different other another remaining "
    "sum total difference product ratio average mean median probability percent word words letter letters digit digits "
    "number numbers character characters sentence sentences line lines list table json lowercase uppercase "
    "true false yes who what when where why which how many much because".split())


def protected(text):
    """A bytearray with 1 for every character that must stay."""
    mask = bytearray(len(text))
    for found in OPERANDS.finditer(text):
        mask[found.start():found.end()] = b"\1" * (found.end() - found.start())
    return mask


def names(text):
    """Words that are probably names, in order: a capital inside a sentence, or more than one capital."""
    found = []
    for sentence in SENTENCE.finditer(text):
        for number, match in enumerate(WORD.finditer(sentence[0])):
            word = match[0]
            if word.split("'")[0] != "I" and (word[:1].isupper() and number or sum(map(str.isupper, word)) > 1):
                found.append(word)
    return found


def operands(text):
    """What must be in an augmented text too, in this order: the protected stretches, numbers among them."""
    return [match[0] for match in OPERANDS.finditer(text)]


def words_of(text):
    return {word.lower() for word in WORD.findall(text)}


def difference(before, after):
    """{"from", "to"}: the stretch of words in which two texts differ, up to 160 characters of each."""
    old, new = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    start = next((n for n, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    most = min(len(old), len(new)) - start
    end = next((n for n in range(most) if old[-1 - n] != new[-1 - n]), most)
    return {"from": "".join(old[start:len(old) - end])[:160], "to": "".join(new[start:len(new) - end])[:160]}


# ---- rows

QUESTIONS = ("prompt", "question", "problem", "instruction")


def user_texts(row):
    """[(path into the row, the user's text)]: path is a tuple of keys and indices.

    Raises:
        ValueError: none of the columns that hold a user's text is there, or no turn is a user's.
    """
    for column in ("messages", "conversations", *QUESTIONS):
        value = row.get(column)
        if isinstance(value, str):
            return [((column,), value)]
        if isinstance(value, list):
            turns = [(n, turn, "content" if "content" in turn else "value") for n, turn in enumerate(value)
                     if isinstance(turn, dict)]
            found = [((column, n, name), turn[name]) for n, turn, name in turns
                     if turn.get("role", turn.get("from")) in ("user", "human") and isinstance(turn.get(name), str)]
            if not found:
                raise ValueError(f"{column} holds no turn of a user with plain text; take the row out")
            return found
    if isinstance(row.get("text"), str):
        return [(("text",), row["text"])]
    raise ValueError(f"no user's text in the columns {', '.join(row) or '(none)'}; known are messages, conversations, "
                     f"{', '.join(QUESTIONS)} and text")


def other_texts(row, paths):
    """All text of a row that is not the user's: answers, reasoning, system prompts."""
    found = []

    def walk(value, path):
        if isinstance(value, str):
            if path not in paths:
                found.append(value)
        elif isinstance(value, dict):
            for name, child in value.items():
                walk(child, (*path, name))
        elif isinstance(value, list):
            for number, child in enumerate(value):
                walk(child, (*path, number))

    walk({name: value for name, value in row.items() if name not in ("key", "keys", "id", "source", "task", "style",
                                                                     "licence", "augmentation")}, ())
    return found


def replaced(row, path, text):
    """The row with the text at `path` replaced, everything else shared with the original."""
    if not path:
        return text
    copy = dict(row) if isinstance(row, dict) else list(row)
    copy[path[0]] = replaced(row[path[0]], path[1:], text)
    return copy
