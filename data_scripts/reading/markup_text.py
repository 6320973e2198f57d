"""HTML, reStructuredText and Vim's help to plain text; manual pages are in `man_text.py`.

HTML goes through resiliparse, which keeps lists, tables and preformatted code and finds the main content; the
navigation of the manuals' own layouts, which it takes for content, is removed before. Sources in reStructuredText stay
nearly as they are: directives, labels and comments go, what they mark stays.
"""

import re

from data_scripts.optional_packages import require

# Navigation, search boxes and permanent links in the layouts of Sphinx, DocBook, rustdoc, mdBook, Qt, Drupal, Haddock.
NOT_CONTENT = (
    "script", "style", "nav", "footer", "noscript", "button", "[role=navigation]", "[role=search]", ".navheader",
    ".navfooter", ".navbar", ".nav", ".sphinxsidebar", ".related", ".headerlink", ".viewcode-link", ".prev-next-area",
    ".prev-next-bottom", ".bd-sidebar", ".bd-toc", ".breadcrumbs", ".breadcrumb", ".docnav", ".page-links", ".selflink",
    ".book-navigation", ".tagline", ".menu", ".navigationbar", ".sidebar", ".chlinktop", ".chlinkprevnexttop",
    ".chlinkprevnextbot", ".chlinkbot", "#menu-bar", "#sidebar",
    ".nav-wrapper", ".nav-wide-wrapper", ".linkicon", "#package-header", "#footer",
    "#footer-text", ".sk-sidebar-toc-wrapper", ".sphx-glr-footer", ".sphx-glr-download-link-note", ".toc-btn",
    ".mini_nav", ".footer-bar", "#toctitle", ".toc",
)


def tidy(text):
    """No spaces at line ends, at most one blank line, cells of a table apart by one tab."""
    text = re.sub(r"(?<![ \t\xa0\u200b])[ \t\xa0\u200b]+(?=\n|$)", "", text)
    text = re.sub(r"(?<=\S) *\t[\t \xa0]*(?=\S)", "\t", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def html_to_text(html, remove=(), main_content=True):
    """The main text of a page; code blocks keep their lines.

    Args:
        remove: CSS selectors of elements that are no content, beside those of `NOT_CONTENT`.
        main_content: leave out what resiliparse's rules take for navigation and adverts.
    """
    parse = require("resiliparse.parse.html", "reading HTML")
    extract = require("resiliparse.extract.html2text", "reading HTML")
    # The types of arguments stand right beside their names in Sphinx's pages.
    html = re.sub(r'<span class="classifier">', r"<span> : ", html)
    # Formulas that were made into pictures have their LaTeX as alternative text.
    html = re.sub(r'<img class="math[^>]*?alt="([^"]*)"[^>]*>', r"$\1$", html)
    tree = parse.HTMLTree.parse(html)
    # From the last to the first, so that no element goes before those inside it.
    for element in reversed(list(tree.document.query_selector_all(", ".join((*NOT_CONTENT, *remove))))):
        if element.tag not in ("html", "body"):
            element.decompose()
    return tidy(extract.extract_plain_text(tree, main_content=main_content, alt_texts=False, links=False,
                                           form_fields=False, noscript=False, preserve_formatting=True))


# Directives that go with their block; that begin a note; whose block is code; of which only the block stays. Of all
# others, the description of a function for instance, the argument stays too.
DROPPED = {"toctree", "index", "contents", "image", "raw", "highlight", "highlightlang", "module", "currentmodule",
           "include", "literalinclude", "kernel-doc", "kernel-figure", "kernel-render", "tabularcolumns", "role",
           "default-domain", "default-role", "meta", "sectionauthor", "moduleauthor", "codeauthor", "autosummary",
           "autoclass", "autofunction", "automodule", "automethod", "plot", "figure", "graphviz", "uml", "cmake-module",
           "testsetup", "testcleanup", "py:currentmodule", "py:module", "program", "audit-event-table", "kernel-feat",
           "kernel-abi", "kernel-include", "title", "rst-class", "date"}
ADMONITIONS = {"note": "Note", "warning": "Warning", "seealso": "See also", "tip": "Tip", "hint": "Hint",
               "important": "Important", "caution": "Caution", "danger": "Danger", "attention": "Attention",
               "versionadded": "New in version", "versionchanged": "Changed in version",
               "deprecated": "Deprecated since version", "deprecated-removed": "Deprecated since version",
               "impl-detail": "Implementation detail"}
CODE = {"code-block", "code", "sourcecode", "literal-block", "ipython", "doctest", "testcode", "testoutput", "ipython3",
        "console", "productionlist"}
UNMARKED = {"parsed-literal", "math", "table", "list-table", "csv-table", "flat-table", "cssclass", "compound", "only",
            "glossary", "hlist", "highlights", "pull-quote", "line-block", "tabs", "tab", "code-tab", "container"}
DIRECTIVE = re.compile(r"( *)\.\. +([\w:-]+?) ?::(?: +(.*))?$")
NUMBERED = {"pep": "PEP ", "rfc": "RFC ", "issue": "issue ", "ticket": "ticket ", "cve": "CVE-"}


def _inline(text):
    """Roles, links and literals as the words they show; they may run over a line's end."""
    text = re.sub(r":(pep|rfc|issue|ticket|cve):`(\d[\d-]*)`", lambda m: NUMBERED[m[1]] + m[2], text)
    text = re.sub(r":[a-zA-Z][\w:+.-]{0,60}:`!?~?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", text)  # :role:`text <target>`
    text = re.sub(r":[a-zA-Z][\w:+.-]{0,60}:`<?([^`>]*)>?`", r"\1", text)
    text = re.sub(r"``(.+?)``", "\0\\1\0", text, flags=re.S)                           # ``literal``
    text = re.sub(r"`([^`<]+?)\s*<([^`>]+)>`__?", r"\1 (\2)", text)                    # `text <link>`_
    text = re.sub(r"`([^`]+)`__?(?!\w)", r"\1", text)
    text = re.sub(r"(?<=[\w.)]) ?\[[#*\w]+\]_", "", text)                              # footnotes
    return text.replace("\0", "`")


class _Lines:
    """Lines kept; those of prose are gathered, so that what runs over a line's end is seen whole."""

    def __init__(self):
        self.done, self.prose = [], []

    def code(self, line):
        self.done += [_inline("\n".join(self.prose)), line] if self.prose else [line]
        self.prose = []

    def text(self):
        return tidy("\n".join([*self.done, _inline("\n".join(self.prose))]))


def _directive(match, lines, position, kept):
    """Keep what a directive shows; returns (where reading goes on, indentation of its code or None)."""
    indent, name, argument = len(match[1]), match[2].lower(), match[3] or ""
    end = _block_end(lines, position, indent)
    while position < end and re.match(r"\s*:[\w -]+:( |$)", lines[position]):
        position += 1  # options
    if name in DROPPED:
        return end, None
    if name in ADMONITIONS:
        kept.prose.append(" " * indent + f"{ADMONITIONS[name]}: {argument}".rstrip())
    else:
        kept.prose.append("")
        if name not in CODE | UNMARKED and argument:  # .. function:: name(arguments), with what it does below
            kept.prose.append(" " * indent + argument)
    return position, indent if name in CODE else None


def rst_to_text(source):
    """reStructuredText without directives, labels, comments and roles.

    Blocks that are not sentences (`DROPPED`) go; code keeps its lines; notes begin with their name.
    """
    kept, lines, position, literal = _Lines(), source.replace("\0", "").expandtabs(8).split("\n"), 0, None
    while position < len(lines):
        line = lines[position].rstrip()
        position += 1
        indent = len(line) - len(line.lstrip())
        literal = None if line and literal is not None and indent <= literal else literal
        if literal is not None:
            kept.code(line)
        elif match := DIRECTIVE.match(line):
            position, literal = _directive(match, lines, position, kept)
        elif note := re.match(r"( *)\.\. \[[#*\w]+\] (.*)", line):
            kept.prose.append(note[1] + note[2])
        elif re.match(r" *\.\.( |$)", line):  # a comment, a label, a link's target, a substitution
            position = _block_end(lines, position, indent)
        elif line.endswith("::"):
            literal = indent
            kept.prose.append(line[:-1] if line.strip() != "::" else "")
        else:
            kept.prose.append(line)
    return kept.text()


def _block_end(lines, position, indent):
    """The first line from `position` on that does not belong to a block indented deeper than `indent`."""
    end = position
    for number in range(position, len(lines)):
        line = lines[number]
        if line.strip():
            if len(line) - len(line.lstrip()) <= indent:
                break
            end = number + 1
    return end


def vim_help_to_text(source):
    """Vim's help without tags (`*tag*`), modelines and the marks around code."""
    kept = []
    for line in source.split("\n"):
        if re.search(r"\bvim?:.*(tw=|ft=|set )", line):
            continue
        without = re.sub(r"(?:^|(?<![ \t])[ \t]+)\*[^*\s]+\*(?=\s|$)", "", line)
        if without != line and not without.strip():
            continue
        without = re.sub(r"(?<!\S)\|([^|\s]+)\|", r"\1", without)
        without = re.sub(r"(^|\s)[>~]$", r"\1", re.sub(r"^<", " ", without))
        kept.append(without.expandtabs(8).rstrip())
    return tidy("\n".join(kept))
