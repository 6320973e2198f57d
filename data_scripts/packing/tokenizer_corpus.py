"""What a tokenizer is learned from and compared on: pieces of the documents below a corpus folder.

Documents are cut into pieces of up to 32,768 characters, after a line end where there is one. A hash of the piece's
source, document and number decides, so that any machine and order of reading gives the same:

    held out    about 1 % of the pieces: `compare_tokenizers.py` reads them, `train_tokenizer.py` never does
    learned     of the others as many as the source's part of `max_bytes` asks for

The mixture gives every kind its per cent of the bytes; inside a kind sources have parts in proportion to
size ** (1 / temperature), so that a small source is heard beside a large one. A source that is too small gives all it
has and the others of its kind take over; a kind that is too small is reported and lowers the total.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from data_scripts.packing.mixture import allocate

PIECE = 32_768       # characters
HELD_OUT = 0.01      # share of the pieces
TEMPERATURE = 2.0


@dataclass
class Part:
    """One source of a corpus: how much there is and how much of it is wanted (bytes)."""

    folder: Path
    source: str
    kind: str
    languages: list
    bytes: int
    wanted: float = 0.0


def _document_folder():
    """The module of that name; here and not above, since it needs a package that other uses do without."""
    try:
        from data_scripts import document_folder
    except ModuleNotFoundError as error:
        raise ValueError(f"--corpus needs the package {error.name}: pip install -e '.[corpus]'") from error
    return document_folder


def corpus_parts(corpus):
    """The sources below a folder, by name.

    Raises:
        FileNotFoundError: there is no folder of documents there.
        ValueError: a folder is damaged, or two call their source the same.
    """
    corpus = Path(corpus)
    folders = _document_folder().source_folders(corpus) if corpus.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"no folder of documents below {corpus}: --corpus takes what clean_corpus.py or the "
                                "fetch_*.py scripts write, one folder a source")
    manifests = {folder: _document_folder().read_folder_manifest(folder) for folder in folders}
    names = [facts["source"] for facts in manifests.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"two folders below {corpus} call their source {max(names, key=names.count)!r}; keep one")
    return [Part(folder, facts["source"], facts["kind"], list(facts.get("languages") or []), facts["bytes"])
            for folder, facts in manifests.items()]


def content_fingerprints(corpus):
    """{source: what changes when its content does}."""
    return {part.source: _document_folder().content_fingerprint(part.folder) for part in corpus_parts(corpus)}


def _number(*parts):
    """A number in [0, 1) decided by the parts."""
    digest = hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2 ** 64


def cut(text, longest=PIECE):
    """Pieces of at most `longest` characters, after a line end where possible; joined they are the text."""
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start + longest // 2, start + longest) + 1 or start + longest
        yield text[start:end]
        start = end
    if text[start:] or not text:
        yield text[start:]


def pieces(part):
    """Yield (piece, language, whether it is held out, its place) of a source, in order."""
    for document in _document_folder().read_documents(part.folder):
        language = document["metadata"].get("language") or "unknown"
        for number, piece in enumerate(cut(document["text"])):
            place = (part.source, document["id"], number)
            yield piece, language, _number("held out", *place) < HELD_OUT, place


def held_out(part):
    """Yield (piece, language) that no tokenizer of ours has learned from."""
    return ((piece, language) for piece, language, is_held_out, _ in pieces(part) if is_held_out)


def plan(parts, mixture, max_bytes, temperature=TEMPERATURE):
    """Set what is wanted of each part; return {kind: {"wanted", "available"}} of the kinds that are too small.

    Args:
        mixture: {kind: per cent of the bytes}, 100 in all; kinds without a share are not learned from.
        max_bytes: of all pieces together; None: as much as the mixture allows.
    """
    if abs(sum(mixture.values()) - 100) > 0.01 or min(mixture.values()) <= 0:
        raise ValueError(f"mixture {mixture} must have shares above 0 that sum to 100 (per cent of bytes)")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; 1 takes sources by their size")
    available = {kind: sum(part.bytes for part in parts if part.kind == kind) * (1 - HELD_OUT) for kind in mixture}
    missing = [kind for kind in mixture if not available[kind]]
    if missing:
        raise ValueError(f"mixture asks for {missing[0]!r}, of which the corpus has nothing; its kinds are "
                         f"{', '.join(sorted({part.kind for part in parts}))}")
    possible = min(available[kind] / share * 100 for kind, share in mixture.items())
    asked = possible if max_bytes is None else max_bytes
    total = min(possible, asked)
    for kind, share in mixture.items():
        members = [part for part in parts if part.kind == kind]
        given = allocate(share / 100 * total, {part.source: part.bytes ** (1 / temperature) for part in members},
                         {part.source: part.bytes for part in members})
        for part in members:
            part.wanted = given[part.source]
    return {kind: {"wanted": round(share / 100 * asked), "available": round(available[kind])}
            for kind, share in mixture.items() if share / 100 * asked > available[kind] * 1.001}


def learned_texts(parts, seed=0, taken=None):
    """Yield the pieces to learn from; bounded by what `plan` set, in memory by one document.

    Args:
        taken: a dict that receives {source: bytes}.
    """
    taken = {} if taken is None else taken
    for part in parts:
        if not part.wanted:
            continue
        taken[part.source], chance = 0, part.wanted / (part.bytes * (1 - HELD_OUT))
        for piece, _, is_held_out, place in pieces(part):
            if is_held_out or _number("learned", seed, *place) >= chance:
                continue
            taken[part.source] += len(piece.encode("utf-8", "surrogatepass"))
            yield piece
