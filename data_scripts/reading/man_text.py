"""Manual pages (troff with the `man` macros) to plain text, for reading by a model rather than on a terminal.

Paragraphs become one line each; what a tag (`.TP`, `.IP`) or `.RS` indents is indented by four spaces; examples and
tables keep their lines; fonts are dropped. Source: man(7), groff_char(7), tbl(1). Of conditionals the branch for
terminals (`n`) is taken. Equations (`.EQ`) and the definitions of macros are left out, and so are macros not known.
"""

import re

CHARACTERS = {
    "aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "dq": '"', "bu": "•", "em": "—", "en": "–", "hy": "-",
    "ha": "^", "ti": "~", "rs": "\\", "sl": "/", "bv": "|", "br": "|", "ul": "_", "ga": "`", "aa": "´", "co": "©",
    "rg": "®", "tm": "™", "de": "°", "+-": "±", "mu": "×", "di": "÷", "<=": "≤", ">=": "≥", "!=": "≠", "==": "≡",
    "->": "→", "<-": "←", "ua": "↑", "da": "↓", "if": "∞", "pd": "∂", "sr": "√", "12": "½", "14": "¼", "34": "¾",
    "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "/o": "ø", "/O": "Ø", "oA": "Å", "oa": "å", ":a": "ä",
    ":o": "ö", ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü", "'e": "é", "`e": "è", "'a": "á", "`a": "à", "'o": "ó",
    "'i": "í", "'u": "ú", "^a": "â", "^e": "ê", "^i": "î", "^o": "ô", "~n": "ñ", ",c": "ç", "Po": "£", "Eu": "€",
    "sc": "§", "ps": "¶", "dg": "†", "dd": "‡", "**": "*", "pl": "+", "mi": "−", "eq": "=", "sh": "#", "at": "@",
    "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩", "Do": "$", "ct": "¢", "*a": "α", "*b": "β",
    "*p": "π", "*m": "μ", "*W": "", "no": "¬", "mo": "∈", "fm": "′", "sd": "″", "..": "¨", "rh": "→", "lh": "←",
}
STRINGS = {"Aq": "'", 'L"': '"', 'R"': '"', "C`": "", "C'": "", "--": "--", "lq": "“", "rq": "”", "Tm": "™", "R": "®",
           "PI": "π", "C+": "C++"}
ESCAPE = re.compile(r"""\\(?:
    (?P<font>[fFmM](?:\(..|\[[^]]*\]|.))
  | (?P<size>s(?:[-+]?\d{1,2}|\([-+]?\d\d|[-+]?\[[^]]*\]|[-+]?'[^']*'))
  | (?P<motion>[hvwlLoxDNbXRS]'[^']*' | [kngV](?:\(..|\[[^]]*\]|.) | [zud])
  | \*(?:\((?P<string2>..)|\[(?P<stringn>[^]]*)\]|(?P<string1>.))
  | \((?P<char2>..) | \[(?P<charn>[^]]*)\]
  | (?P<one>.)
)""", re.X | re.S)
ONE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "'", "`": "`", ".": ".", "_": "_"}
SILENT = set("&|^/,%:c{})!?ap")  # zero width, or hints to the formatter
JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}  # fonts alternate, no space between the arguments
SPACED = {"B", "I", "SM", "SB", "R", "CW", "b"}
BEGIN_CODE, END_CODE = {"nf", "EX", "Vb", "CS"}, {"fi", "EE", "Ve", "CE"}


class NotText(ValueError):
    """A page that has no text to take; the message is the reason to count it under."""


def unescape(text):
    """troff's escapes as the characters they stand for; fonts, sizes and motions vanish."""
    def one(match):
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind.startswith("string"):
            return STRINGS.get(value, "")
        if kind.startswith("char"):
            code = re.fullmatch(r"u([0-9A-F]{4,6})", value)
            return chr(int(code[1], 16)) if code and int(code[1], 16) < 0x110000 else CHARACTERS.get(value, "")
        if kind == "one":
            return ONE.get(value, "" if value in SILENT else value)
        return ""
    return ESCAPE.sub(one, text)


def arguments(text):
    """The arguments of a macro call: separated by spaces, which quotes or a backslash protect."""
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+|\\$)', text)
    return [unescape(quoted.replace('""', '"') or bare) for quoted, bare in found]


def _logical_lines(source):
    """Lines without comments and macro definitions; `\\` at a line's end joins it with the next."""
    ending = None
    for line in re.sub(r"(?<!\\)\\\n", "", source).split("\n"):
        control = re.match(r"[.'][ \t]*(\S*)[ \t]*(\S*)", line)
        name = control[1] if control else ""
        if ending is not None:
            ending = None if line.strip() == ending else ending
        elif name in ("de", "de1", "am", "ig"):
            # `.de NAME END` is over at `.END`, by default `..`
            words = line.split()
            ending = "." + (words[2] if len(words) > 2 and name != "ig" else words[1] if name == "ig" and len(words) > 1
                            else ".")
        elif not re.match(r"[.'][ \t]*(\\\"|$)|'''", line):
            yield re.sub(r"(?<!\\)((?:\\\\)*)\\[\"#].*", r"\1", line)


def _taken(lines):
    """The lines of the branches that a terminal takes of `.if`, `.ie` and `.el`."""
    lines, last = iter(lines), True
    for line in lines:
        match = re.match(r"[.'][ \t]*(if|ie|el)\b[ \t]*(.*)", line)
        if not match:
            yield line
            continue
        name, rest = match.groups()
        if name == "el":
            taken = not last
        else:
            condition, _, rest = rest.partition(" ")
            taken = condition in ("n", "!t")
            last = taken if name == "ie" else last
        block = [rest.replace("\\{", "", 1)]
        depth = rest.count("\\{") - rest.count("\\}")
        while depth > 0 and (more := next(lines, None)) is not None:
            depth += more.count("\\{") - more.count("\\}")
            block.append(more)
        if taken:
            yield from _taken(line.replace("\\}", "") for line in block if line.strip(" \\"))


def _table_rows(lines):
    """Rows of a tbl table, up to its `.TE`: cells joined by tabs, format lines and rules left out."""
    separator, in_format, block = "\t", True, None
    for line in lines:
        if line.startswith(".TE"):
            return
        if in_format or line.startswith(".T&"):
            tab = re.search(r"tab ?\((.)\).*;", line)
            separator = tab[1] if tab else separator
            in_format = not line.rstrip().endswith(".")
        elif block is not None:
            block += [line] if not line.startswith("T}") else []
            if line.startswith("T}"):
                text = " ".join(part if part[0] not in ".'" else " ".join(arguments(part[1:])[1:])
                                for part in block if part)
                block, line = None, text + line[2:]
                if line.endswith("T{"):
                    block = [line[:-2]]
                else:
                    yield "\t".join(unescape(cell.strip()) for cell in line.split(separator))
        elif line.endswith("T{"):
            block = [line[:-2]]
        elif not re.fullmatch(r"[_=]?|\..*|\\\^", line.strip()):
            yield "\t".join(unescape(cell.strip()) for cell in line.split(separator))


class _Page:
    """The text so far: finished lines, and the paragraph being filled."""

    def __init__(self):
        self.lines, self.words, self.filled = [], [], True
        self.base, self.indent, self.tag = 0, 0, False
        self.mark, self.link = "", ""

    def flush(self, blank=False):
        if self.words:
            # Chinese and Japanese are written without spaces, so a line's end is none there either.
            wide = r"[\u3000-\u9fff\uff00-\uffef]"
            text = re.sub(f"(?<={wide})\n(?={wide})", "", "\n".join(self.words))
            self.lines.append(" " * (self.base + self.indent) + self.mark + text.replace("\n", " "))
            self.words, self.mark = [], ""
        if blank and self.lines and self.lines[-1]:
            self.lines.append("")

    def add(self, text):
        """A line of text, escapes resolved."""
        if self.tag:
            self.lines.append(" " * self.base + text.strip())
            self.tag, self.indent = False, 4
        elif not self.filled:
            self.lines.append((" " * (self.base + self.indent) + text).rstrip())
        elif text.strip():
            if text[0] == " ":
                self.flush()
            self.words.append(text.strip())

    def heading(self, text):
        self.flush(blank=True)
        self.base = self.indent = 0
        self.lines += [text, ""] if text else []

    def item(self, parts):
        """`.IP`: a bullet or number stays beside its text, a longer tag gets a line of its own."""
        self.flush(blank=True)
        tag = parts[0].strip() if parts else ""
        self.indent = 4
        if len(tag) > 3:
            self.lines.append(" " * self.base + tag)
        elif tag:
            self.indent, self.mark = 0, tag + " "

    def macro(self, name, rest):
        parts = arguments(rest)
        if name in JOINED and parts:
            self.add("".join(parts))
        elif name in SPACED and parts:
            self.add(" ".join(parts))
        elif name in ("SH", "SS"):
            self.heading(" ".join(parts))
        elif name in ("PP", "LP", "P", "HP"):
            self.flush(blank=True)
            self.indent = 0
        elif name in ("TP", "TQ"):
            self.flush(blank=name == "TP" and not self.tag)
            self.tag, self.indent = True, 0
        elif name == "IP":
            self.item(parts)
        elif name in BEGIN_CODE or name in END_CODE:
            self.flush(blank=True)
            self.filled = name in END_CODE
        elif name in ("RS", "RE"):
            self.flush()
            self.base = self.base + 4 if name == "RS" else max(0, self.base - 4)
            self.indent = 0
        elif name in ("br", "ti"):
            self.flush()
        elif name in ("sp", "Sp", "bp", "YS"):
            self.flush(blank=True)
        elif name in ("UR", "MT", "URL"):
            self.link = parts[0] if parts else ""
        elif name in ("UE", "ME"):
            self.add(f"<{self.link}>" + (parts[0] if parts else ""))
        elif name in ("OP", "SY"):
            self.add(f"[{' '.join(parts)}]" if name == "OP" else " ".join(parts))


def man_to_text(source):
    """The text of a manual page.

    Raises:
        NotText: a page that only points to another (`.so`), or one in the `mdoc` macros, which are not read here.
    """
    if re.search(r"(?m)^\.(Dd|Dt)\b", source):
        raise NotText("mdoc pages")
    page, lines, heading_next, in_equation = _Page(), _taken(_logical_lines(source)), None, False
    for line in lines:
        control = re.match(r"[.'][ \t]*([A-Za-z0-9]+)[ \t]*(.*)", line)
        name, rest = control.groups() if control else (None, "")
        if name in ("EQ", "EN"):
            in_equation = name == "EQ"
        elif in_equation or line[:1] in (".", "'") and not control:
            continue
        elif name == "so":
            raise NotText("pages that only point to another")
        elif name == "TS":
            page.flush(blank=True)
            page.lines += [" " * (page.base + page.indent) + row for row in _table_rows(lines)] + [""]
        elif name in ("SH", "SS") and not rest.strip():
            heading_next = True
        elif heading_next:
            page.heading(" ".join(arguments(rest)) if control else unescape(line).strip())
            heading_next = False
        elif control:
            page.macro(name, rest)
        elif line.strip():
            page.add(unescape(line))
        elif page.filled:
            page.flush(blank=True)
        else:
            page.lines.append("")
    page.flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(page.lines)).strip("\n")
