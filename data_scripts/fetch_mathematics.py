"""Fetch mathematics: manuals of computer algebra, formal proofs with their comments, worked problems.

    python -m data_scripts.fetch_mathematics --output_dir data/raw [--only worked ...] [--packages data/packages]

The worked problems are those of `worked_mathematics.py`, training side only: none of them is asked by an evaluation.
Metamath's proofs keep hypotheses, statement, comment and the names of the theorems used; the letters that encode how
these are put together are left out.
"""

import hashlib
import re

from data_scripts.fetch_chinese import grouped
from data_scripts.reading.fetching import Source, decode
from data_scripts.reading.fetching import main as fetch_main
from data_scripts.reading.markup_text import html_to_text
from data_scripts.reading.packages import members
from data_scripts.reasoning.worked_mathematics import worked_problems

PROBLEMS = 130_000   # drawn: about 12 M characters without the repetitions
PER_DOCUMENT = 8     # problems
INDEX_PAGE = re.compile(r"/(genindex[^/]*|search|py-modindex|index|maxima(_toc|_singlepage|_\d+_abt)?)\.html$")
# One pass over a Metamath file: a comment, the start or end of a block, or a labelled or unlabelled statement.
METAMATH = re.compile(r"\$\((?P<comment>.*?)\$\)|(?P<open>\$\{)|(?P<close>\$\})"
                      r"|(?:(?P<label>[\w.-]+)\s+)?\$(?P<kind>[acdefpv])\s(?P<body>.*?)\$\.", re.S)
CREDIT = re.compile(r"\s*\((?:Contributed|Revised|Proof shortened|Proof modification|New usage|Shortened)\b[^()]*"
                    r"(?:\([^()]*\)[^()]*)*\)")


def pages(pattern, strip):
    def documents(packages, left_out):
        for path, data in members(packages[0], [pattern], left_out):
            if INDEX_PAGE.search(path):
                left_out["index pages"] += 1
                continue
            text = html_to_text(decode(data))
            yield path.removeprefix(strip), re.sub(r"(?m)^Categories: .*· *\n?", "", text)
    return documents


def _comment(text):
    """A Metamath comment as a paragraph; a section's title keeps its words."""
    text = re.sub(r"[=#*-]{4,}|[-=]{2,}(?=\s)", " ", CREDIT.sub("", text))
    return re.sub(r" ([.,;:)])", r"\1", " ".join(re.sub(r"~ (\S+)", r"\1", text.replace("`", "")).split()))


def theorem_text(label, kind, body, comment, hypotheses, grammar=frozenset()):
    """One definition or theorem as text; `grammar` holds the labels that build formulas, no steps of a proof."""
    statement, _, proof = body.partition("$=")
    used = re.match(r"\s*\(([^)]*)\)", proof)
    lines = [comment] if comment else []
    lines += [f"Hypothesis {name}: {' '.join(hypothesis.split())}" for name, hypothesis in hypotheses]
    word = "Theorem" if kind == "p" else "Axiom" if label.startswith("ax-") else "Definition"
    lines.append(f"{word} {label}: {' '.join(statement.split())}")
    steps = [name for name in used[1].split() if name not in grammar] if used else []
    if steps:
        lines.append("Proof from: " + ", ".join(steps))
    return "\n".join(lines)


def metamath_texts(source, left_out):
    """The axioms, definitions and theorems of a Metamath file as texts, with section titles before them."""
    comment, scopes, grammar = "", [[]], set()
    for match in METAMATH.finditer(source):
        if match["comment"] is not None:
            comment = _comment(match["comment"])
            if re.search(r"[=#*-]{20,}", match["comment"]) and comment:
                yield comment
                comment = ""
        elif match["open"]:
            scopes.append([])
        elif match["close"]:
            scopes.pop()
        elif match["kind"] == "e":
            scopes[-1].append((match["label"], match["body"]))
        elif match["kind"] in "ap" and match["body"].startswith("|-"):
            hypotheses = [known for scope in scopes for known in scope]
            yield theorem_text(match["label"], match["kind"], match["body"], comment, hypotheses, grammar)
            comment = ""
        elif match["kind"] in "ap":
            left_out["syntax statements"] += 1
            grammar.add(match["label"])
            comment = ""


def metamath(packages, left_out):
    for path, data in members(packages[0], ["*/set.mm", "*/iset.mm", "*/nf.mm", "*/ql.mm", "*/hol.mm"], left_out):
        name = path.rsplit("/", 1)[1]
        for number, text in enumerate(grouped(metamath_texts(decode(data), left_out), 4_000)):
            yield f"{name}#{number}", text


def worked(packages, left_out):
    """Problems with their working, several of them in a document; one that came before is counted."""
    seen, group = set(), []
    for name, problem in worked_problems(0, PROBLEMS):
        key = hashlib.blake2b(problem.encode(), digest_size=8).digest()
        if key in seen:
            left_out["the same problem again"] += 1
            continue
        seen.add(key)
        group.append(problem)
        if len(group) == PER_DOCUMENT:
            yield name, "\n".join(group)
            group = []
    if group:
        yield name, "\n".join(group)


def _source(name, licence, origin, packages, documents):
    return Source(name, "mathematics", ("en",), licence, origin, packages, documents)


SOURCES = [
    _source("worked-mathematics", "problems by reasoning-gym (Apache-2.0), working by this project",
            "arithmetic and puzzles with their working, training side of the tasks", (), worked),
    _source("metamath", "public domain (CC0), parts GPL-2+", "Metamath's databases: theorems, comments, proofs",
            (("debian", "metamath-databases"),), metamath),
    _source("sagemath", "CC-BY-SA-3.0", "SageMath's reference and tutorials", (("debian", "sagemath-doc"),),
            pages("usr/share/doc/sagemath/html/en/*.html", "usr/share/doc/sagemath/html/en/")),
    _source("maxima", "GPL-2+", "Maxima's manual", (("debian", "maxima-doc"),),
            pages("usr/share/doc/maxima-doc/html/maxima_*.html", "usr/share/doc/maxima-doc/html/")),
]


def main(argv=None):
    fetch_main("fetch_mathematics", SOURCES, __doc__, argv)


if __name__ == "__main__":
    main()
