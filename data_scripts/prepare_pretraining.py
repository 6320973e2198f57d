"""Make a packed pretraining data set: sources -> mixture -> held-out split -> tokenizer -> files.

    python -m data_scripts.prepare_pretraining --output_dir data/tiny --size tiny
    python -m data_scripts.prepare_pretraining --output_dir data/mine --source mine=./my_texts
    python -m data_scripts.prepare_pretraining --output_dir data/mixed --max_tokens 50000000 \\
        --source web=HUB/NAME --source code=built-in --mixture web=80,code=20
    python -m data_scripts.prepare_pretraining --output_dir data/small --corpus data/clean --vocab_size 32768 \\
        --mixture text=57,text.anarchism=3,code=20,multilingual=15,mathematics=5 --temperature 2 --max_epochs 4,gcide=1

The default mixture is 60 % English, 20 % code, 15 % Chinese and 5 % mathematics, in per cent of
tokens, all from what the installation ships or has. Exact duplicates are removed; documents are held
out for validation; training documents that share an n-gram with a held-out one are dropped
(`overlap.py`). A finished data set of the same settings is not made again.

With `--corpus` the sources are the folders that `clean_corpus` writes (`corpus_packing.py`).
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import re
from array import array
from pathlib import Path

import numpy
from tqdm.auto import tqdm

from data_scripts import overlap
from data_scripts import sources as source_module
from data_scripts.packing import packed_writer
from data_scripts.packing.mixture import CURRICULA, DEFAULT_EPOCHS, interleave, parse_epochs
from data_scripts.train_tokenizer import load_tokenizer, train_tokenizer
from recipes.encoding import encode_documents
from recipes.text_files import ReadReport

logger = logging.getLogger(__name__)

DEFAULT_MIXTURE = {"text": 60.0, "code": 20.0, "multilingual": 15.0, "mathematics": 5.0}
# tiny: a CPU test of the whole way. nano: as many tokens as the built-in sources give.
SIZES = {"tiny": {"vocab_size": 4_096, "max_tokens": 2_500_000, "validation_fraction": 0.02},
         "nano": {"vocab_size": 8_192, "max_tokens": None, "validation_fraction": 0.02}}
# Before there is a tokenizer, tokens are estimated from bytes (4,096 to 16,384 ids: 2.0 to 4.4 measured).
BYTES_PER_TOKEN = 3.3
MOST_BYTES_PER_TOKEN = 8   # reading stops here when max_tokens is given; 130k ids reach about 5
HELD_OUT_RESERVE = 1.3     # held-out bytes beyond the estimate, so that the shares can be met
TOKENIZER_BYTES = 50_000_000
CHUNK = 512                # documents encoded at a time


@dataclasses.dataclass
class Settings:
    """Everything that decides the output; kept in the manifest."""

    mixture: dict
    sources: dict
    vocab_size: int | None
    max_tokens: int | None
    validation_fraction: float
    tokenizer_folder: str | None
    allow_repeats: bool
    text_column: str
    errors: str
    seed: int
    tokens_per_file: int
    keep_overlaps: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        total = sum(self.mixture.values())
        if not math.isclose(total, 100, abs_tol=0.01):
            raise ValueError(f"mixture {_show(self.mixture)} sums to {total:g}, must be 100 (per cent of tokens)")
        if any(share <= 0 for share in self.mixture.values()):
            raise ValueError(f"mixture {_show(self.mixture)}: every share must be above 0; leave a source out instead")
        for kind in self.mixture:
            if not re.fullmatch(r"[\w.-]+", kind):
                raise ValueError(f"source name {kind!r} must consist of letters, digits, '_', '.' and '-'; "
                                 "the location goes behind '='")
        unused = set(self.sources) - set(self.mixture)
        if unused:
            raise ValueError(f"source {sorted(unused)[0]!r} has no share in mixture {_show(self.mixture)}; "
                             "add it there or drop the --source")
        for kind in self.keep_overlaps:
            if kind not in self.mixture:
                raise ValueError(f"keep_overlaps names {kind!r}, which has no share in mixture {_show(self.mixture)}")
        if not 0 <= self.validation_fraction < 0.5:
            raise ValueError(f"validation_fraction={self.validation_fraction} must lie in [0, 0.5)")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.allow_repeats and self.max_tokens is None:
            raise ValueError("allow_repeats needs max_tokens: repeats would never end without it")
        if self.tokens_per_file < 1:
            raise ValueError(f"tokens_per_file={self.tokens_per_file} must be at least 1")
        self.shares = {kind: share / 100 for kind, share in self.mixture.items()}

    def fingerprint(self):
        inputs = {kind: source_module.identity(kind, self.sources.get(kind, "built-in")) for kind in self.mixture}
        if self.tokenizer_folder:
            inputs["tokenizer"] = packed_writer.file_sha256(Path(self.tokenizer_folder) / "tokenizer.json")
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "keep_overlaps" or value}
        content = json.dumps([packed_writer.VERSION, settings, inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _show(mixture):
    return ",".join(f"{kind}={share:g}" for kind, share in mixture.items())


def parse_mixture(text):
    """'text=60,code=40' -> {'text': 60.0, 'code': 40.0}."""
    mixture = {}
    for part in text.split(","):
        kind, equals, share = part.strip().partition("=")
        if kind in mixture:
            raise ValueError(f"mixture {text!r} names {kind!r} twice; give it one share")
        try:
            mixture[kind] = float(share)
        except ValueError:
            raise ValueError(f"mixture {text!r}: {part.strip()!r} is not NAME=PERCENT, as in text=60,code=40") from None
    return mixture


def resolve_mixture(mixture, sources):
    """The given mixture; else 100 % of a single given source; else the default."""
    if mixture:
        return dict(mixture)
    if len(sources) == 1 and next(iter(sources)) not in DEFAULT_MIXTURE:
        return {next(iter(sources)): 100.0}
    if set(sources) <= set(DEFAULT_MIXTURE):
        return dict(DEFAULT_MIXTURE)
    raise ValueError(f"sources {', '.join(sources)} need shares: pass --mixture, for instance "
                     + _show({kind: round(100 / len(sources), 1) for kind in sources}))


def read_sources(settings, work, progress):
    """Read every source into a spool, without exact duplicates.

    Returns:
        spools {kind: TextSpool}, orders {kind: array of indices, shuffled by the seed},
        duplicates {kind: count}, skipped {kind: ReadReport}.
    """
    spools, orders, duplicates, skipped, seen = {}, {}, {}, {}, packed_writer.KeySet()
    for kind, share in settings.shares.items():
        location = settings.sources.get(kind, "built-in")
        enough = math.inf if settings.max_tokens is None else share * settings.max_tokens * MOST_BYTES_PER_TOKEN
        enough *= 1 + settings.validation_fraction * HELD_OUT_RESERVE
        spool, keys, duplicates[kind] = packed_writer.TextSpool(work / f"{kind}.texts"), array("Q"), 0
        skipped[kind] = ReadReport()
        documents = source_module.open_source(
            kind, location, seed=settings.seed, text_column=settings.text_column,
            errors=settings.errors, report=skipped[kind])
        for document in tqdm(documents, desc=f"read {kind}", unit=" documents", disable=not progress):
            key = int.from_bytes(overlap.digest(document.text, settings.seed)[:8], "big")
            if not seen.add(key):
                duplicates[kind] += 1
                continue
            keys.append(key)
            spool.append(document.text)
            if spool.total() >= enough:
                break
        if skipped[kind].skipped:
            logger.warning("source %r: %d inputs were skipped, the first: %s", kind, skipped[kind].skipped,
                           skipped[kind].examples[0])
        if not keys:
            raise ValueError(f"source {kind!r} ({location}) gave no documents at all"
                             + (f": {duplicates[kind]} duplicate an earlier source" if duplicates[kind] else "")
                             + (f"; {skipped[kind].skipped} were skipped, the first: {skipped[kind].examples[0]}"
                                if skipped[kind].skipped else "") + "; check its location or leave it out")
        # The digests are salted with the seed: sorting by them is a shuffle that any machine repeats.
        spools[kind] = spool
        orders[kind] = numpy.argsort(numpy.frombuffer(keys, numpy.uint64))
    return spools, orders, duplicates, skipped


def hold_out(settings, spools, orders):
    """Split each source's order into (held out, training) by documents; sizes follow the mixture."""
    if settings.validation_fraction == 0:
        return {kind: [] for kind in orders}, orders
    estimate = min(spools[kind].total() / BYTES_PER_TOKEN / share for kind, share in settings.shares.items())
    if settings.max_tokens is not None:
        estimate = min(estimate, settings.max_tokens) if not settings.allow_repeats else estimate
    held_out, training = {}, {}
    for kind, share in settings.shares.items():
        if len(orders[kind]) < 2:
            raise ValueError(f"source {kind!r} has a single document, so none can be held out; cut it into "
                             "several files or lines, or pass --validation_fraction 0")
        wanted = share * estimate * settings.validation_fraction * BYTES_PER_TOKEN * HELD_OUT_RESERVE
        count, size = 0, 0
        while size < wanted and count < len(orders[kind]) - 1:
            size += spools[kind].size(orders[kind][count])
            count += 1
        held_out[kind], training[kind] = orders[kind][:count], orders[kind][count:]
    return held_out, training


def drop_overlaps(spools, held_out, training, progress, keep=()):
    """Remove training documents that share an n-gram with a held-out one, across all sources but those of `keep`."""
    index = overlap.NgramIndex()
    for kind, documents in held_out.items():
        for document in documents if kind not in keep else ():
            index.add(spools[kind][document])
    kept, dropped = {}, {}
    for kind, documents in training.items():
        if kind in keep:
            kept[kind], dropped[kind] = list(documents), 0
            continue
        bar = tqdm(documents, desc=f"compare {kind}", unit=" documents", disable=not progress)
        kept[kind] = [document for document in bar if not index.overlaps(spools[kind][document])]
        dropped[kind] = len(documents) - len(kept[kind])
        if not kept[kind]:
            raise ValueError(f"source {kind!r}: all {len(documents)} training documents share an n-gram with a "
                             "held-out one, so nothing is left to train on; its documents repeat one another: "
                             "make them distinct, or pass --validation_fraction 0")
        if dropped[kind] > len(documents) / 4:
            logger.warning("source %r: %d of %d training documents share an n-gram with a held-out one and were "
                           "dropped; its documents repeat one another", kind, dropped[kind], len(documents))
    return kept, dropped


def make_tokenizer(settings, spools, training, progress):
    """The given tokenizer, or one learned from training documents in the mixture's proportions."""
    if settings.tokenizer_folder:
        return load_tokenizer(settings.tokenizer_folder)
    sizes = {kind: sum(map(spools[kind].size, documents)) for kind, documents in training.items()}
    total = min(TOKENIZER_BYTES, *(sizes[kind] / share for kind, share in settings.shares.items()))

    def texts():
        for kind, share in settings.shares.items():
            size = 0
            for document in training[kind]:
                if size >= share * total:
                    break
                size += spools[kind].size(document)
                yield spools[kind][document]

    return train_tokenizer(texts(), settings.vocab_size, show_progress=progress)


def encode(settings, tokenizer, spools, selected, split, wanted, work, progress):
    """Encode each source's documents in order until its part of `wanted` tokens (None: all) is reached."""
    dtype = packed_writer.token_dtype(len(tokenizer))
    encoded = {}
    for kind, documents in selected.items():
        spool = encoded[kind] = packed_writer.TokenSpool(work / f"{kind}.{split}.tokens", dtype)
        enough = math.inf if wanted is None else math.ceil(settings.shares[kind] * wanted)
        with tqdm(total=len(documents), desc=f"encode {split} {kind}", unit=" documents", disable=not progress) as bar:
            for start in range(0, len(documents), CHUNK):
                chunk = documents[start:start + CHUNK]
                for document, ids in zip(chunk, encode_documents(tokenizer, [spools[kind][d] for d in chunk])):
                    spool.append(ids, spools[kind].size(document))
                bar.update(len(chunk))
                if spool.tokens() >= enough:
                    break
    return encoded


def plan_total(settings, encoded):
    """(tokens to write, sources that are too short). Without repeats the shortest source sets the total."""
    possible = {kind: encoded[kind].tokens() / share for kind, share in settings.shares.items()}
    total = min(possible.values())
    if settings.max_tokens is not None:
        total = settings.max_tokens if settings.allow_repeats else min(total, settings.max_tokens)
    # Without max_tokens only the source that ends first is worth naming.
    wanted = settings.max_tokens or total
    short = {kind: {"available": encoded[kind].tokens(), "wanted": math.ceil(share * wanted)}
             for kind, share in settings.shares.items() if encoded[kind].tokens() < math.floor(share * wanted)}
    for kind, counts in short.items():
        missing = counts["wanted"] - counts["available"]
        logger.warning(
            "source %r has %s of %s tokens wanted, %s too few: %s", kind, f"{counts['available']:,}",
            f"{counts['wanted']:,}", f"{missing:,}",
            f"it is repeated {counts['wanted'] / counts['available']:.1f} times" if settings.allow_repeats else
            f"the total is capped at {int(total):,} tokens; add text, lower its share, or pass --allow_repeats")
    return total, short


def write_split(settings, encoded, documents, split, total, folder, progress):
    """Interleave the sources so that every stretch has the mixture, up to `total` tokens; manifest entry.

    `documents` {kind: all that were read}: an epoch, of which `encoded` may hold only the part that is wanted.
    """
    dtype = next(iter(encoded.values())).dtype
    writer = packed_writer.SplitWriter(folder, split, dtype, settings.shares, settings.tokens_per_file)
    position, written = dict.fromkeys(encoded, 0), 0

    def write_next(kind):
        if position[kind] >= len(encoded[kind]) and not settings.allow_repeats:
            return None
        place = position[kind] % len(encoded[kind])
        ids = encoded[kind][place]
        writer.append(ids, encoded[kind].bytes[place], kind)
        position[kind] += 1
        bar.update(len(ids))
        return len(ids)

    with tqdm(total=int(total), desc=f"write {split}", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for count in interleave(settings.shares, write_next) if total > 0 else ():
            written += count
            if written >= total:
                break
    entry = writer.close()
    for kind in encoded:
        entry["sources"][kind]["epochs"] = round(position[kind] / len(documents[kind]), 4)
    return entry


def _build(settings, fingerprint, folder, progress):
    work = folder / "work"
    work.mkdir()
    spools, orders, duplicates, skipped = read_sources(settings, work, progress)
    held_out, training = hold_out(settings, spools, orders)
    training, overlaps = drop_overlaps(spools, held_out, training, progress, settings.keep_overlaps)
    tokenizer = make_tokenizer(settings, spools, training, progress)
    tokenizer.save_pretrained(folder / "tokenizer")

    encoded = encode(settings, tokenizer, spools, training, "train", settings.max_tokens, work, progress)
    total, short = plan_total(settings, encoded)
    splits = {"train": write_split(settings, encoded, training, "train", total, folder, progress)}
    if settings.validation_fraction:
        encoded = encode(settings, tokenizer, spools, held_out, "validation", None, work, progress)
        most = min(encoded[kind].tokens() / share for kind, share in settings.shares.items())
        once = dataclasses.replace(settings, allow_repeats=False)  # no document counts twice in an evaluation
        splits["validation"] = write_split(once, encoded, held_out, "validation", most, folder, progress)
    manifest = {
        "format": packed_writer.FORMAT, "version": packed_writer.VERSION,
        "dtype": "uint16" if len(tokenizer) <= 65_536 else "uint32",
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_sha256": packed_writer.file_sha256(folder / "tokenizer" / "tokenizer.json"),
        "seed": settings.seed, "arguments": dataclasses.asdict(settings), "fingerprint": fingerprint,
        "sources": list(settings.mixture), "splits": splits,
        "removed": {"duplicates": duplicates, "overlaps": overlaps,
                    "skipped": {kind: report.skipped for kind, report in skipped.items()}},
        "short_sources": short,
        "locations": {kind: settings.sources.get(kind, "built-in") for kind in settings.mixture},
        "licences": {kind: source_module.LICENCES[kind] if settings.sources.get(kind, "built-in") == "built-in" else
                     "see its source" for kind in settings.mixture},
    }
    for spool in spools.values():
        spool.close()
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    packed_writer.write_manifest(folder, manifest)
    return manifest


def prepare(output_dir, *, size="tiny", mixture=None, sources=None, max_tokens=None, vocab_size=None,
            tokenizer_folder=None, validation_fraction=None, allow_repeats=False, text_column="text",
            errors="strict", seed=0, tokens_per_file=2**27, keep_overlaps=(), overwrite=False, progress=True):
    """Make the data set, or find it finished; return its manifest.

    Args:
        size: preset of SIZES for vocab_size, max_tokens and validation_fraction where these are None.
            A given `sources` takes max_tokens from the preset only when all are built in.
        mixture: {kind: per cent of tokens}; sources: {kind: "built-in", path or Hub name}.
        max_tokens: of the training split; the split ends with the document that passes it.
        validation_fraction: held-out tokens as a share of training tokens, about; 0 holds none out.
        tokens_per_file: a file is closed before it would pass this many.
        keep_overlaps: sources that are not compared with held-out documents: those whose documents share wordings by
            construction, such as problems of a task, and are kept apart in another way.
        overwrite: make it again even if it is finished.
    Raises:
        ValueError: impossible settings or unusable input, naming the field and the way out.
        OSError: a full disk; an earlier data set in output_dir is then intact.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; known sizes are {', '.join(SIZES)}")
    preset, sources = SIZES[size], dict(sources or {})
    if max_tokens is None and all(location == "built-in" for location in sources.values()):
        max_tokens = preset["max_tokens"]
    settings = Settings(
        mixture=resolve_mixture(mixture, sources), sources=sources, max_tokens=max_tokens,
        vocab_size=None if tokenizer_folder else vocab_size or preset["vocab_size"],
        validation_fraction=preset["validation_fraction"] if validation_fraction is None else validation_fraction,
        tokenizer_folder=None if tokenizer_folder is None else str(tokenizer_folder), allow_repeats=allow_repeats,
        text_column=text_column, errors=errors, seed=seed, tokens_per_file=tokens_per_file,
        keep_overlaps=list(keep_overlaps))
    if tokenizer_folder:
        load_tokenizer(tokenizer_folder)  # fail before the work, not after it
    fingerprint = settings.fingerprint()
    finished = None if overwrite else packed_writer.read_finished(output_dir, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output_dir)
        return finished
    with packed_writer.build_beside(output_dir) as folder:
        return _build(settings, fingerprint, folder, progress)


def summary(manifest):
    """The manifest as a few lines of text."""
    lines = []
    for split, entry in manifest["splits"].items():
        lines.append(f"{split}: " + ", ".join(f"{entry[key]:,} {key}" for key in ("tokens", "documents", "bytes")))
        for kind, counts in entry["sources"].items():
            share = 100 * counts["tokens"] / entry["tokens"]
            rate = counts["bytes"] / max(1, counts["tokens"])  # a source may have no document in a small split
            lines.append(f"  {kind:14} {counts['tokens']:>12,} tokens {share:5.1f} % "
                         f"{counts['documents']:>9,} documents {rate:5.2f} bytes/token "
                         f"{counts['epochs']:6.2f} epochs")
    for what, counts in manifest["removed"].items():
        lines.append(f"removed as {what}: " + ", ".join(f"{kind} {count:,}" for kind, count in counts.items()))
    return "\n".join(lines)


# Of the two ways to give sources, the one that each of these belongs to.
CORPUS_ONLY = ("temperature", "max_epochs", "curriculum", "curriculum_window", "when_short", "validation_tokens",
               "workers")
SOURCES_ONLY = ("sources", "allow_repeats", "text_column", "errors", "keep_overlaps")


def _prepare_from_arguments(arguments, parser):
    """Call what the arguments are for; refuse those that would have no effect."""
    corpus, folder = arguments.pop("corpus"), arguments.pop("output_dir")
    for name in SOURCES_ONLY if corpus else CORPUS_ONLY:
        if arguments.pop(name) != (dict() if name == "sources" else parser.get_default(name)):
            raise ValueError(f"--{name.removesuffix('s') if name == 'sources' else name} "
                             + ("has no effect with --corpus" if corpus else "needs --corpus")
                             + ("; sources are repeated up to --max_epochs there" if name == "allow_repeats" else ""))
    if not corpus:
        return prepare(folder, **arguments)
    from data_scripts.packing.corpus_packing import prepare_corpus

    preset = SIZES[arguments.pop("size")]
    for name in ("vocab_size", "validation_fraction"):
        arguments[name] = preset[name] if arguments[name] is None else arguments[name]
    arguments["max_epochs"] = parse_epochs(arguments["max_epochs"] or [])
    return prepare_corpus(folder, corpus, mixture_shares=arguments.pop("mixture"), **arguments)


def add_corpus_arguments(parser):
    parser.add_argument("--corpus", metavar="FOLDER", help="pack the sources below this folder (of clean_corpus)")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="sources of a kind share it by tokens ** (1 / temperature) (default: %(default)s)")
    parser.add_argument("--max_epochs", action="append", metavar="N|SOURCE=N,...",
                        help=f"most passes over a source (default: {DEFAULT_EPOCHS:g})")
    parser.add_argument("--curriculum", choices=CURRICULA, default="none",
                        help="easy documents first: short ones, or by metadata difficulty, else rare words "
                             "(default: %(default)s)")
    parser.add_argument("--curriculum_window", type=float, default=0.1,
                        help="share of a source within which neighbours are mixed (default: %(default)s)")
    parser.add_argument("--when_short", choices=("cap", "error"), default="cap",
                        help="a mixture that cannot be met caps the total, or stops (default: %(default)s)")
    parser.add_argument("--validation_tokens", type=int, default=1_000_000,
                        help="most held-out tokens, about (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes; any number gives the same bytes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the data set; replaced as a whole")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="preset (default: %(default)s)")
    parser.add_argument("--source", action="append", default=[], metavar="KIND=LOCATION",
                        help="repeatable: a name of your choice and a file, folder or Hub data set (NAME or "
                             f"NAME:CONFIGURATION), or one of {', '.join(source_module.BUILT_IN)}=built-in")
    parser.add_argument("--mixture", help=f"per cent of tokens (default: {_show(DEFAULT_MIXTURE)}); with --corpus "
                        "also KIND.SOURCE=PERCENT for a single source")
    parser.add_argument("--max_tokens", type=int, help="training tokens (default: the preset's; own sources: all)")
    parser.add_argument("--vocab_size", type=int, help="of the tokenizer to train (default: the preset's)")
    parser.add_argument("--from_folder", dest="tokenizer_folder", help="use this tokenizer unchanged")
    parser.add_argument("--validation_fraction", type=float, help="held-out share of tokens (default: 0.02)")
    parser.add_argument("--allow_repeats", action="store_true", help="repeat sources that are too short")
    parser.add_argument("--text_column", default="text", help="column with the text (default: %(default)s)")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict",
                        help="what to do with unreadable files and lines: stop, or leave out and count")
    parser.add_argument("--keep_overlaps", nargs="+", default=[], metavar="KIND",
                        help="sources not compared with held-out documents, as theirs share wordings by construction")
    parser.add_argument("--seed", type=int, default=0, help="of order, split and problems (default: %(default)s)")
    parser.add_argument("--tokens_per_file", type=int, default=2**27)
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is finished")
    add_corpus_arguments(parser)
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pairs = [entry.partition("=") for entry in arguments.pop("source")]
        if any(not (kind and location) for kind, _, location in pairs):
            raise ValueError("--source takes KIND=LOCATION, for instance --source mine=./texts")
        arguments["sources"] = {kind: location for kind, _, location in pairs}
        if len(arguments["sources"]) < len(pairs):
            raise ValueError(f"two --source have one name ({', '.join(sorted(kind for kind, _, _ in pairs))}); give "
                             "each a name of its own, or put the files into one folder")
        arguments["mixture"] = parse_mixture(arguments["mixture"]) if arguments["mixture"] else None
        manifest = _prepare_from_arguments(arguments, parser)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(manifest))


if __name__ == "__main__":
    main()
