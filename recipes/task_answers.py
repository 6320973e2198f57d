r"""Reading the answer out of a completion, and comparing it with the reference.

Where the answer is looked for, in this order:

1. After the last `</think>`. Without that tag the whole text is the answer or nothing is, by choice of
   the caller; a `<think>` that is never closed is a cut-off trace and holds no answer.
2. The last `\boxed{...}`; the last `<answer>...</answer>`; the last line "Answer: ..." (also "The
   answer is ..."). An explicit answer is taken as it stands: if it cannot be read, nothing else is tried.
3. A fallback for each kind:

| kind          | an answer is                               | fallback without an explicit answer          |
|---------------|--------------------------------------------|----------------------------------------------|
| `number`      | one number: 1,234  -0.5  3/4  12 apples    | the last number in the text                  |
| `fraction`    | a/b as written, or \frac{a}{b}             | the last a/b                                 |
| `boolean`     | true, false, yes or no                     | the last of these words                      |
| `choice`      | a letter, "(B)", "B. text" or the option   | the last "(B)", or a line that begins "B."   |
| `text`        | a line; spaces and end marks do not count  | the last line                                |
| `lines`       | all lines                                  | the whole text                               |
| `expression`  | sums and products of whole numbers         | the last line                                |
| `mathematics` | LaTeX or plain notation                    | the last $...$, else the last number         |
| `code`        | a program                                  | the last fenced block, else the whole text   |

What cannot be read has one outcome everywhere: wrong, and counted as unparsable. Texts are cut before
any pattern sees them, and no pattern backtracks over more than a line.
"""

import ast
import re
from fractions import Fraction

ANSWER_REGION = 20_000  # characters kept from the end of a completion
LONGEST_ANSWER = {"code": 20_000, "lines": 2_000, "text": 2_000, "mathematics": 500}
LONGEST_DEFAULT = 300
LONGEST_NUMBER = 60     # characters of one number

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))"
                    r"(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?(?:\s?/\s?[0-9]+(?![0-9.]))?")
EXPLICIT_LINE = re.compile(r"^.{0,80}?\banswer\b[*_]{0,2}[ \t]*(?::|：|\bis\b:?)[*_]{0,2}", re.I | re.M)
WORDS = {"true": True, "yes": True, "false": False, "no": False}


def answer_region(text, untagged="whole"):
    """The part of a completion in which the answer stands, or None."""
    if not isinstance(text, str):
        return None
    _, tag, after = text.rpartition("</think>")
    if not tag and (untagged == "unparsable" or "<think>" in text):
        return None
    # Spaces before the first line stay: a program's first line may be indented.
    return after[-ANSWER_REGION:].rstrip().lstrip("\r\n") or None


def _last_boxed(text):
    r"""What stands in the last \boxed{...} or \fbox{...} whose braces close."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s?\{", text))[-20:]):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            if depth == 0:
                return text[match.end():place]
    return None


def explicit_answer(region, kind):
    """The marked answer of a region, or None if nothing is marked."""
    boxed = _last_boxed(region)
    if boxed is not None:
        return boxed
    tags = region.rfind("<answer>")
    if tags >= 0:
        return region[tags + 8:].partition("</answer>")[0]
    lines = list(EXPLICIT_LINE.finditer(region))
    if lines:
        rest = region[lines[-1].end():].strip()
        return rest if kind in ("lines", "code") else rest.partition("\n")[0]
    return None


def _last(pattern, text):
    found = None
    for found in re.finditer(pattern, text):
        pass
    return found.group(1) if found else None


def fallback_answer(region, kind):
    """Where an unmarked answer stands, by kind (see the table above)."""
    if kind == "number":
        numbers = [match.group() for match in NUMBER.finditer(region)]
        return numbers[-1] if numbers else None
    if kind == "fraction":
        return _last(r"(\\d?frac\{[0-9]+\}\{[0-9]+\}|-?\b[0-9]+\s?/\s?[0-9]+\b)", region)
    if kind == "boolean":
        return _last(r"(?i)\b(true|false|yes|no)\b", region)
    if kind == "choice":
        return _last(r"(?m)(?:\(|^[*\s]{0,4})([A-J])(?=\)|[.:]|[*\s]{0,4}$)", region) or (
            region if "\n" not in region else None)
    if kind == "mathematics":
        return _last(r"\$\$?([^$]{1,500})\$", region) or _last(r"\\[\[(](.{1,500}?)\\[\])]", region) or (
            region if len(region) <= 60 else fallback_answer(region, "number"))
    if kind == "code":
        fenced = _last(r"(?s)```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)```", region)
        return fenced or region.partition("```python\n")[2] or region
    return region if kind == "lines" else region.splitlines()[-1]


def extract_answer(text, kind, untagged="whole"):
    """The answer as text, or None where there is none or it is too long to be one."""
    region = answer_region(text, untagged)
    if region is None:
        return None
    answer = explicit_answer(region, kind) if kind != "code" or "```" not in region else None
    if answer is None:
        answer = fallback_answer(region, kind)
    if answer is None or len(answer) > LONGEST_ANSWER.get(kind, LONGEST_DEFAULT):
        return None
    return answer.strip("\n") if kind == "code" else undressed(answer) or None


def undressed(answer):
    r"""Without dollar signs, bold marks, \text{...} and a final full stop."""
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf|texttt)\s?\{([^{}]*)\}", r"\1", answer)
    answer = answer.strip().strip("$*`").strip()
    answer = re.sub(r"^\\[(\[]\s*|\s*\\[)\]]$", "", answer).strip()
    return answer[:-1].rstrip("*`$ ") if answer.endswith(".") and not answer.endswith("..") else answer


def read_number(text):
    """The one number in `text` as a Fraction, or None; after an equals sign only what follows counts."""
    text = text.rpartition("=")[2].replace("\u2212", "-").replace("\\,", "").replace("\\$", "")
    text = re.sub(r"\\d?frac\{([0-9]{1,30})\}\{([0-9]{1,30})\}", r"\1/\2", text)
    found = NUMBER.findall(text)
    if len(found) != 1 or len(found[0]) > LONGEST_NUMBER:
        return None
    try:
        return Fraction(re.sub(r"[,\s]", "", found[0])) if "/" not in found[0] else _quotient(found[0])
    except (ValueError, ZeroDivisionError):
        return None


def _quotient(text):
    above, _, below = re.sub(r"[,\s]", "", text).partition("/")
    return Fraction(above) / int(below)


def read_fraction(text):
    """(numerator, denominator) as written, not reduced; or None."""
    match = re.fullmatch(r"(-?)\\d?frac\{(-?[0-9]{1,30})\}\{([0-9]{1,30})\}", text.replace(" ", "")) or re.fullmatch(
        r"()(-?[0-9]{1,30})/([0-9]{1,30})", text.replace(" ", ""))
    if not match:
        return None
    return int(match[1] + match[2]) if match[1] else int(match[2]), int(match[3])


def read_boolean(text):
    words = re.findall(r"[a-z]+", text.casefold())
    return WORDS.get(words[0]) if words and sum(word in WORDS for word in words) == 1 else None


def read_choice(text, options=()):
    """The letter of a choice; `options` are (letter, text) pairs. Two different letters are no choice."""
    letters = [letter for letter, _ in options] or list("ABCDEFGHIJ")
    match = re.match(r"\(([A-Z])\)|([A-Z])(?:[.:)]|$)", text)
    first = match and (match[1] or match[2])
    if first in letters:
        named = re.findall(r"\(([A-Z])\)|\b([A-Z])[.)](?=\s|$)", text)
        return first if {a or b for a, b in named} <= {first} else None
    same = [letter for letter, option in options if plain(option).casefold() == plain(text).casefold()]
    return same[0] if len(same) == 1 else None


def plain(text):
    """One form for spaces and end marks: "a ,b ." -> "a, b"."""
    return re.sub(r"\s*,\s*", ", ", " ".join(text.split())).strip(" .\"'")


def evaluate_expression(text):
    """(value, whole numbers used) of sums, differences, products and quotients; None for anything else.

    The text is parsed into a tree and the tree is walked: nothing in it is ever run.
    """
    if not re.fullmatch(r"[0-9+\-*/() ]{1,200}", text) or "**" in text or "//" in text:
        return None
    used = []

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            return {ast.Add: lambda: left + right, ast.Sub: lambda: left - right,
                    ast.Mult: lambda: left * right, ast.Div: lambda: left / right}[type(node.op)]()
        raise ValueError("not arithmetic")
    try:
        return value(ast.parse(text.strip(), mode="eval").body), used
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None
