"""Code that parses, isn't generated or minified, and begins with itself instead of its licence.

Python is parsed by Python (`ast`), JSON by `json`, and C, C++, Go, Rust, JavaScript, TypeScript and Java by
tree-sitter, which never refuses a file but marks what it could not fit in: the share of a file inside such marks is
the measure. Macros make good C fail a parser without a preprocessor, so the limits are per language, from measurement
(README). A language that there is no parser for passes and is counted.
"""

import ast
import json
import re
import warnings

from data_scripts.cleaning.corpus_blocks import DocumentEditor, DocumentFilter, check_share, kind_of
from data_scripts.optional_packages import require

# language: (module, function that gives its grammar)
GRAMMARS = {"c": ("tree_sitter_c", "language"), "cpp": ("tree_sitter_cpp", "language"),
            "go": ("tree_sitter_go", "language"), "rust": ("tree_sitter_rust", "language"),
            "javascript": ("tree_sitter_javascript", "language"), "java": ("tree_sitter_java", "language"),
            "typescript": ("tree_sitter_typescript", "language_typescript"),
            "tsx": ("tree_sitter_typescript", "language_tsx")}
NAMES = {"c++": "cpp", "cxx": "cpp", "golang": "go", "js": "javascript", "jsx": "javascript", "ts": "typescript",
         "py": "python", "python3": "python", "rs": "rust", "h": "c"}
MAX_ERRORS = {"c": 0.05, "cpp": 0.05, "go": 0.01, "rust": 0.05, "javascript": 0.01, "typescript": 0.05, "tsx": 0.05,
              "java": 0.01}
PIECE = re.compile(r"#\d+\Z")  # the identifier of a piece of a long file: its braces lie elsewhere in part
PIECE_ERRORS = 2         # times as many errors are allowed there
MISSING_COST = 10        # bytes that an inserted token counts as
STEPS_PER_BYTE, LEAST_STEPS = 0.3, 5_000  # of tree-sitter's progress: ten times what real files need; seconds would
                                          # differ by machine, and the corpus with them
GENERATED = re.compile(r"(?i)\b(?:code generated\b.{0,80}\bdo not edit|auto-?generated (?:file|code|by)\b|"
                       r"(?:this (?:file|code)|it) (?:was|is|has been) (?:auto(?:matically|-)? ?generated)|"
                       r"generated automatically by|do not edit (?:this file )?(?:by hand|manually))")
GENERATED_WITHIN = 1_000   # characters from the beginning
LONGEST_LINE = 2_000       # characters; a file mostly of longer lines is minified, or data


def plain_language(name):
    """A programming language as it is named here: 'C++' -> 'cpp'."""
    name = str(name or "").lower()
    return NAMES.get(name, name)


def _parses(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes, which are legal
        ast.parse(text)


def _python_error(text):
    try:
        try:
            _parses(text)
        except IndentationError:  # a piece of a long file may begin with the method of a class
            first = next(line for line in text.split("\n") if line.strip())
            levels = range(0, len(first) - len(first.lstrip()), 4)
            if not levels:
                raise
            _parses("".join(" " * level + "if 1:\n" for level in levels) + text)
    except (SyntaxError, ValueError):
        return "python_syntax"
    except (RecursionError, MemoryError):
        return "python_too_deep"
    return None


def _json_error(text):
    try:
        json.loads(text)
    except ValueError:
        return "json_syntax"
    except RecursionError:
        return "json_too_deep"
    return None


class TreeSitter:
    """Parses with tree-sitter; grammars are loaded at first use and not pickled."""

    def __init__(self):
        self._parsers = {}

    def __getstate__(self):
        return {"_parsers": {}}

    def _parser(self, language):
        if language not in self._parsers:
            module, function = GRAMMARS[language]
            library = require("tree_sitter")
            grammar = library.Language(getattr(require(module), function)())
            self._parsers[language] = library.Parser(grammar)
        return self._parsers[language]

    def error_share(self, text, language):
        """Share of the bytes that do not parse, between 0 and 1; None if parsing needs too many steps."""
        source, steps = text.encode("utf-8", "replace"), 0
        most = LEAST_STEPS + STEPS_PER_BYTE * len(source)

        def on_progress(offset, has_error):
            nonlocal steps
            steps += 1
            return steps > most

        parser = self._parser(language)
        try:
            tree = parser.parse(lambda offset, point: source[offset:offset + 65_536], progress_callback=on_progress)
        except ValueError:  # "Parsing failed": stopped
            if steps <= most:
                raise
            parser.reset()  # else the next text would be taken for the rest of this one
            return None
        return min(1.0, _bytes_in_error(tree.root_node) / max(1, len(source)))


def _bytes_in_error(root):
    """Bytes of the tokens that found no place, and MISSING_COST for each token that had to be inserted.

    Not all that lies below an ERROR node: one brace behind an #ifdef makes the root of a good C file an ERROR, with its
    functions well parsed below it.
    """
    total, waiting = 0, [(root, False)]
    while waiting:
        node, lost = waiting.pop()
        if node.is_missing:
            total += MISSING_COST
        elif lost and not node.child_count:
            total += node.end_byte - node.start_byte
        elif node.is_error or node.has_error:
            waiting.extend((child, node.is_error) for child in node.children)
    return total


class CodeParsesFilter(DocumentFilter):
    """Drops code that does not parse, says that it is generated, or is minified.

    Args:
        max_errors: largest share of a file that may not parse, one number for all languages or {language: share};
            None: MAX_ERRORS. Python and JSON parse or do not.
        generated: whether files that call themselves generated stay.
    The language is metadata["language"], as the source names it.
    """

    name = "code"

    def __init__(self, max_errors=None, generated=False, kinds=("code",), exclusion_writer=None):
        super().__init__(kinds, exclusion_writer)
        if isinstance(max_errors, dict):
            unknown = set(max_errors) - set(GRAMMARS)
            if unknown:
                raise ValueError(f"max_errors names {sorted(unknown)[0]!r}; languages are {', '.join(GRAMMARS)}")
            limits = {**MAX_ERRORS, **max_errors}
        else:
            limits = dict(MAX_ERRORS) if max_errors is None else dict.fromkeys(GRAMMARS, max_errors)
        for name, share in limits.items():
            check_share(f"max_errors of {name}", share)
        self.max_errors, self.generated, self._trees = limits, generated, TreeSitter()

    def judge(self, document):
        text = document.text
        if sum(len(line) for line in text.split("\n") if len(line) > LONGEST_LINE) * 2 > len(text):
            return False, "minified_or_data"
        if not self.generated and GENERATED.search(text, 0, GENERATED_WITHIN):
            return False, "generated"
        language = plain_language(document.metadata.get("language"))
        fault = self.parse_fault(text, language, PIECE_ERRORS if PIECE.search(document.id) else 1)
        return (False, fault) if fault else True

    def parse_fault(self, text, language, factor=1):
        """Why a text is no good code in a language, or None, with `factor` times the limit; others are counted."""
        if language == "python":
            return _python_error(text)
        if language == "json":
            return _json_error(text)
        if language not in GRAMMARS:
            self.stat_update(f"no_parser_{language or 'unnamed'}")
            return None
        share = self._trees.error_share(text, language)
        if language == "c" and (share is None or share > factor * self.max_errors["c"]):
            # C++ bears C's names, headers mostly.
            other = self._trees.error_share(text, "cpp")
            if other is not None and other <= factor * self.max_errors["cpp"]:
                self.stat_update("c_is_cpp")
                return None
        if share is None:
            return f"{language}_too_slow"
        return f"{language}_syntax" if share > factor * self.max_errors[language] else None


# The first comment of a file: block comment, or lines that begin with one of the line comment signs.
FIRST_COMMENT = re.compile(
    r"\A(?P<before>(?:#!.*\n|#.*coding.*\n|<\?.*\n|\s)*)(?P<comment>/\*(?:[^*]|\*(?!/))*\*/[ \t]*\n?|"
    r"(?:[ \t]*(?://|#(?!\s*(?:include|if|define|pragma|!)\b)|--|;;|%).*(?:\n|\Z))+)")
LICENCE = re.compile(r"(?i)licen[cs]e|warrant(?:y|ies)|all rights reserved|redistribut|SPDX-License-Identifier")
COPYRIGHT = re.compile(r"(?i)copyright|\(c\)|©|SPDX-License-Identifier|free software")
LONGEST_HEADER = 8_000


class TrimLicenceHeader(DocumentEditor):
    """Takes the licence comment off the beginning of a code file, which is the same in thousands of files.

    What licence a source has stays in its manifest. The comment goes as a whole, with a description where it holds one.
    """

    name = "licence_headers"

    def edit(self, document):
        if kind_of(document) != "code":
            return {}
        found = FIRST_COMMENT.match(document.text, 0, LONGEST_HEADER)
        if not found or not (LICENCE.search(found["comment"]) and COPYRIGHT.search(found["comment"])):
            return {}
        rest = document.text[found.end():].lstrip("\n")
        if not rest.strip():
            return {"only_a_licence": 1}  # a file that is all licence is left to the other filters
        before = len(document.text)
        document.text = found["before"].lstrip("\n") + rest
        return {"licence_headers": 1, "licence_characters": before - len(document.text)}
