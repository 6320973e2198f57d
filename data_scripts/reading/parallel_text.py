"""Translations as documents: aligned pairs, pages without those left in English, and Mallard help pages as text."""

import hashlib
import re
import struct
from xml.etree import ElementTree

# Names of languages in their own words, as they head the lines of aligned documents.
NAMES = {"ar": "العربية", "bn": "বাংলা", "cs": "Čeština", "de": "Deutsch", "en": "English", "es": "Español",
         "fi": "Suomi", "fr": "Français", "hu": "Magyar", "id": "Bahasa Indonesia", "it": "Italiano", "ja": "日本語",
         "ko": "한국어", "nl": "Nederlands", "pl": "Polski", "pt": "Português", "ru": "Русский", "sv": "Svenska",
         "tr": "Türkçe", "uk": "Українська", "ur": "اردو", "vi": "Tiếng Việt", "zh": "中文"}
LONG_LINE = 40   # characters: shorter lines (names, commands) are the same in every language
TEXTS = {"p", "title", "desc", "code", "screen", "subtitle"}  # one block each, with all inside
BOXES = {"item", "td"}  # hold such blocks, or text of their own


def aligned(pairs, first, second, size=2_000):
    """(text in one language, text in the other) pairs as documents of about `size` characters.

    A document reads `English: ...` / `Deutsch: ...`, a blank line between pairs.
    """
    group, length = [], 0
    for one, other in pairs:
        group.append(f"{NAMES.get(first, first)}: {one}\n{NAMES.get(second, second)}: {other}")
        length += len(group[-1])
        if length >= size:
            yield "\n\n".join(group)
            group, length = [], 0
    if group:
        yield "\n\n".join(group)


def line_hashes(text):
    """Hashes of the long lines of a text, to recognise them in another."""
    return {hashlib.blake2b(line.strip().encode(), digest_size=8).digest() for line in text.split("\n")
            if len(line.strip()) >= LONG_LINE}


def untranslated_share(text, english):
    """Share of the characters in long lines that stand in a set of English lines (`line_hashes`)."""
    long_lines = [line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_LINE]
    same = [line for line in long_lines if hashlib.blake2b(line.encode(), digest_size=8).digest() in english]
    return sum(map(len, same)) / max(1, sum(map(len, long_lines)))


def mallard_to_text(source):
    """A Mallard help page as paragraphs; links, credits and comments on the page itself are left out.

    Raises:
        ElementTree.ParseError: no well-formed page.
    """
    kept = []

    def visit(element):
        name = element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""
        if name in ("info", "links", "comment", ""):
            return
        if name in TEXTS or name in BOXES and not any(_holds_blocks(child) for child in element):
            text = "".join(element.itertext())
            text = text.strip("\n") if name in ("code", "screen") else " ".join(text.split())
            if text.strip():
                kept.append(text)
            return
        for child in element:
            visit(child)

    visit(ElementTree.fromstring(re.sub(r"<!DOCTYPE[^\[>]*(\[.*?\])?>", "", source, flags=re.S)))
    return "\n\n".join(kept)


def _holds_blocks(element):
    blocks = (TEXTS | BOXES) - {"code"}  # which may also stand inside a sentence
    return any(isinstance(found.tag, str) and found.tag.rsplit("}", 1)[-1] in blocks for found in element.iter())


def read_catalogue(data):
    """[(original, translation)] of a compiled gettext catalogue (.mo), the header and untranslated entries aside.

    Of a message with a plural the first form is taken, a context before the original is dropped.
    Raises:
        ValueError: no .mo file.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError("not a compiled gettext catalogue: it begins with another magic number")
    if len(data) < 28:
        raise ValueError("a damaged gettext catalogue: shorter than its header")
    count, originals, translations = struct.unpack_from(f"{order}III", data, 8)
    if max(originals, translations) + 8 * count > len(data):
        raise ValueError("a damaged gettext catalogue: its tables end behind the file")
    pairs = []
    for number in range(count):
        texts = []
        for table in (originals, translations):
            length, offset = struct.unpack_from(f"{order}II", data, table + 8 * number)
            texts.append(data[offset:offset + length].split(b"\0")[0].decode("utf-8"))
        original, translation = texts[0].rsplit("\x04", 1)[-1], texts[1]
        if original and translation and original != translation:
            pairs.append((original, translation))
    return pairs
