"""A cleaned corpus -> packed data set: what `prepare_pretraining --corpus` does.

    manifest = prepare_corpus("data/small", "data/clean", vocab_size=32_768, workers=2)

The passes over the documents are in `corpus_documents.py`, shares and order in `mixture.py`, the format in
`packed_writer.py`. Memory does not grow with the texts, only by about 60 bytes for each document; disk: the tokens
twice while the files are written.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import numpy
from tqdm.auto import tqdm

from data_scripts import document_folder
from data_scripts.packing import corpus_documents, mixture, packed_writer
from data_scripts.packing.corpus_documents import DUPLICATE, HELD_OUT, OVERLAP, TRAIN
from data_scripts.train_tokenizer import load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_MIXTURE = {"text": 60.0, "code": 20.0, "multilingual": 15.0, "mathematics": 5.0}
TOKENIZER_BYTES = 50_000_000
VALIDATION_TOKENS = 1_000_000


@dataclasses.dataclass
class Settings:
    """Everything that decides the output; kept in the manifest."""

    corpus: str
    mixture: dict
    max_epochs: dict
    temperature: float
    curriculum: str
    curriculum_window: float
    max_tokens: int | None
    when_short: str
    vocab_size: int | None
    tokenizer_folder: str | None
    validation_fraction: float
    validation_tokens: int
    seed: int
    tokens_per_file: int

    def __post_init__(self):
        rules = (
            ("temperature", 0 < self.temperature < math.inf, "above 0; 1 keeps the sources' own sizes"),
            ("curriculum", self.curriculum in mixture.CURRICULA, f"one of {', '.join(mixture.CURRICULA)}"),
            ("curriculum_window", 0 <= self.curriculum_window <= 1, "in [0, 1], a share of each source"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("when_short", self.when_short in ("cap", "error"), "cap or error"),
            ("validation_fraction", 0 <= self.validation_fraction < 0.5, "in [0, 0.5)"),
            ("validation_tokens", self.validation_tokens >= 1, "at least 1; --validation_fraction 0 holds none out"),
            ("tokens_per_file", self.tokens_per_file >= 1, "at least 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")

    def fingerprint(self, sources):
        inputs = {s.name: [s.kind, document_folder.content_fingerprint(s.folder)] for s in sources.values()}
        if self.tokenizer_folder:
            inputs["tokenizer.json"] = packed_writer.file_sha256(Path(self.tokenizer_folder) / "tokenizer.json")
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "corpus"}
        epochs = sorted((name or "", value) for name, value in self.max_epochs.items())
        content = json.dumps([packed_writer.VERSION, settings | {"max_epochs": epochs}, inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def arguments(self):
        return dataclasses.asdict(self) | {"max_epochs": {n or "others": v for n, v in self.max_epochs.items()}}


def _groups(settings, sources):
    """The mixture's groups and the sources that are in one of them."""
    unknown = sorted(set(settings.max_epochs) - set(sources) - {None}, key=str)
    if unknown:
        raise ValueError(f"max_epochs names {unknown[0]!r}; sources in the corpus: {', '.join(sources)}")
    groups = mixture.make_groups(settings.mixture, {s.name: s.kind for s in sources.values()})
    used = {name for _, members in groups.values() for name in members}
    for name in sorted(set(sources) - used):
        logger.warning("source %r (kind %s) has no share in mixture %s and is left out", name, sources[name].kind,
                       mixture.show(settings.mixture))
    return groups, {name: source for name, source in sources.items() if name in used}


def _plan(settings, groups, tokens, max_tokens):
    return mixture.plan(groups, tokens, settings.max_epochs, settings.temperature, max_tokens)


def _split(settings, groups, sources, work, workers):
    """Hold documents out and drop what overlaps with them; nothing with validation_fraction 0. Counts of n-grams."""
    if not settings.validation_fraction:
        return {"held_out": 0, "too_common": 0}
    guess = {s.name: s.bytes.sum() / corpus_documents.BYTES_PER_TOKEN for s in sources.values()}
    total, given, _ = _plan(settings, groups, guess, settings.max_tokens)
    part = min(settings.validation_fraction, settings.validation_tokens / total)
    corpus_documents.hold_out(sources, {name: part * tokens for name, tokens in given.items()})
    return corpus_documents.drop_overlaps(sources, work, workers)


def _tokenizer(settings, groups, sources, progress):
    """The given tokenizer, or one learned from training documents in the mixture's proportions."""
    if settings.tokenizer_folder:
        return load_tokenizer(settings.tokenizer_folder)
    sizes = {s.name: int(s.bytes[s.where(TRAIN)].sum()) for s in sources.values()}
    _, wanted, _ = mixture.plan(groups, sizes, {None: 1.0}, settings.temperature, TOKENIZER_BYTES)
    return train_tokenizer(corpus_documents.sample_texts(sources, wanted), settings.vocab_size, show_progress=progress)


def _check_short(settings, total, short):
    for line in mixture.describe_short(short, total, settings.max_epochs):
        if settings.when_short == "error":
            raise ValueError(f"the mixture cannot be met: {line}")
        logger.warning("the total is capped: %s", line)


def _cursor(settings, source, wanted):
    """Yield indices of training documents, epoch after epoch, until they have `wanted` tokens.

    An epoch that is not read to its end takes documents at random, not its easiest ones.
    """
    documents = source.where(TRAIN)
    for epoch in itertools.count():
        tokens = source.tokens[documents].sum()
        if wanted < tokens:
            drawn = documents[mixture.epoch_order(source.keys[documents], epoch)]
            documents = drawn[:int(numpy.searchsorted(numpy.cumsum(source.tokens[drawn]), wanted)) + 1]
        difficulty = None if source.difficulty is None else source.difficulty[documents]
        yield from documents[mixture.epoch_order(source.keys[documents], epoch, difficulty, settings.curriculum_window)]
        wanted -= tokens
        if wanted <= 0:
            return


def _write(settings, sources, readers, split, shares, cursors, total, folder, progress):
    """Interleave documents by `shares`, up to `total` tokens; the split's entry of the manifest."""
    dtype = next(iter(readers.values())).dtype
    writer = packed_writer.SplitWriter(folder, split, dtype, list(sources), settings.tokens_per_file)
    written = 0

    def write_next(name):
        index = next(cursors[name], None)
        if index is None:
            return None
        ids = readers[name][index]
        writer.append(ids, int(sources[name].bytes[index]), name)
        bar.update(len(ids))
        return len(ids)

    with tqdm(total=int(total), desc=f"write {split}", unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for count in mixture.interleave(shares, write_next):
            written += count
            if written >= total:
                break
    return writer.close()


def _write_splits(settings, groups, sources, readers, folder, progress):
    """(splits, short, tokens of one epoch by source): both splits written below `folder`."""
    tokens = {s.name: int(s.tokens[s.where(TRAIN)].sum()) for s in sources.values()}
    total, given, short = _plan(settings, groups, tokens, settings.max_tokens)
    _check_short(settings, total, short)
    cursors = {name: _cursor(settings, source, given[name]) for name, source in sources.items()}
    splits = {"train": _write(settings, sources, readers, "train", given, cursors, total, folder, progress)}
    for name, counts in splits["train"]["sources"].items():
        counts["epochs"] = round(counts["tokens"] / tokens[name], 4)
    held_out = {s.name: s.where(HELD_OUT) for s in sources.values() if (s.role == HELD_OUT).any()}
    if held_out:
        orders = {n: places[mixture.epoch_order(sources[n].keys[places], 0)] for n, places in held_out.items()}
        shares = {name: int(sources[name].tokens[places].sum()) for name, places in held_out.items()}
        cursors = {name: iter(order) for name, order in orders.items()}
        splits["validation"] = _write(settings, sources, readers, "validation", shares, cursors, sum(shares.values()),
                                      folder, progress)
        for name, counts in splits["validation"]["sources"].items():
            counts["epochs"] = 1.0 if name in shares else 0.0
    return splits, short, tokens


def _manifest(settings, sources, tokenizer, folder, fingerprint, splits, short, tokens):
    facts = {name: source.manifest for name, source in sources.items()}
    count = {role: {name: int((source.role == role).sum()) for name, source in sources.items()}
             for role in (DUPLICATE, OVERLAP)}
    return {
        "format": packed_writer.FORMAT, "version": packed_writer.VERSION,
        "dtype": "uint16" if len(tokenizer) <= 65_536 else "uint32",
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_sha256": packed_writer.file_sha256(folder / "tokenizer" / "tokenizer.json"),
        "seed": settings.seed, "arguments": settings.arguments(), "fingerprint": fingerprint,
        "curriculum": settings.curriculum, "sources": list(sources), "splits": splits,
        "kinds": {name: source.kind for name, source in sources.items()},
        "languages": {name: fact.get("languages", []) for name, fact in facts.items()},
        "licences": {name: fact.get("licence", "see its source") for name, fact in facts.items()},
        "origins": {name: fact.get("origin", "") for name, fact in facts.items()},
        "packages": {name: fact.get("packages", []) for name, fact in facts.items()},
        "locations": {name: source.folder.name for name, source in sources.items()},
        "epoch_tokens": tokens, "removed": {"duplicates": count[DUPLICATE], "overlaps": count[OVERLAP]},
        "short_sources": short,
    }


def _build(settings, sources, groups, fingerprint, folder, work, workers, progress):
    corpus_documents.scan(sources, settings, workers)
    for source in sources.values():
        if not (source.role == TRAIN).any():
            raise ValueError(f"source {source.name!r}: all {len(source.role):,} documents duplicate an earlier "
                             "source's; leave it out of the corpus")
    ngrams = _split(settings, groups, sources, work, workers)
    if (work / "tokenizer").is_dir():  # of a killed run
        tokenizer = load_tokenizer(work / "tokenizer")
    else:
        tokenizer = _tokenizer(settings, groups, sources, progress)
        tokenizer.save_pretrained(work / "tokenizer.partial")
        (work / "tokenizer.partial").rename(work / "tokenizer")
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    readers = corpus_documents.encode(sources, tokenizer, work, workers)
    corpus_documents.set_difficulty(sources, readers, settings.curriculum, len(tokenizer), workers)
    splits, short, tokens = _write_splits(settings, groups, sources, readers, folder, progress)
    for reader in readers.values():
        reader.close()
    manifest = _manifest(settings, sources, tokenizer, folder, fingerprint, splits, short, tokens)
    manifest["ngrams"] = ngrams
    packed_writer.write_manifest(folder, manifest)
    return json.loads(json.dumps(manifest))


@contextlib.contextmanager
def _work_folder(output_dir, fingerprint):
    """A hidden folder that only a kill leaves behind; the next run with these settings finds it, others remove it."""
    output_dir = Path(output_dir).absolute()
    work = output_dir.with_name(f".{output_dir.name}.work-{fingerprint[:16]}")
    for other in output_dir.parent.glob(f".{output_dir.name}.work-*"):
        if other != work:
            shutil.rmtree(other)
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "tokenizer.partial", ignore_errors=True)
    try:
        yield work
    except Exception:
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def prepare_corpus(output_dir, corpus, *, mixture_shares=None, max_epochs=None, temperature=1.0, curriculum="none",
                   curriculum_window=0.1, max_tokens=None, when_short="cap", vocab_size=32_768, tokenizer_folder=None,
                   validation_fraction=0.02, validation_tokens=VALIDATION_TOKENS, seed=0, tokens_per_file=2**27,
                   workers=1, overwrite=False, progress=True):
    """Pack a folder of document folders, or find it packed; return the manifest.

    Args:
        corpus: a folder whose sub-folders are sources (`document_folder.py`), or one source's folder.
        mixture_shares: {kind or kind.source: per cent of tokens}; default 60/20/15/5 over the kinds, or 100 % of the
            only kind there is.
        max_epochs, temperature, curriculum, curriculum_window, max_tokens: see `mixture.py`.
        when_short: a mixture that cannot be met caps the total with a warning, or is an error.
        validation_fraction: of the training tokens, by source at least LEAST_HELD_OUT bytes and at most a tenth, in
            all about `validation_tokens` at most; 0 holds none out.
        workers: processes; the bytes are the same for any number.
    Raises:
        ValueError: impossible settings or unusable input, naming the field and the way out.
        OSError: a full disk; an earlier data set in output_dir is then intact.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    sources = corpus_documents.find_sources(corpus)
    kinds = sorted({source.kind for source in sources.values()})
    shares = dict(mixture_shares or ({kinds[0]: 100.0} if len(kinds) == 1 else DEFAULT_MIXTURE))
    settings = Settings(
        corpus=str(corpus), mixture=shares, max_epochs=dict(max_epochs or {None: mixture.DEFAULT_EPOCHS}),
        temperature=temperature, curriculum=curriculum, curriculum_window=curriculum_window, max_tokens=max_tokens,
        when_short=when_short, vocab_size=None if tokenizer_folder else vocab_size,
        tokenizer_folder=None if tokenizer_folder is None else str(tokenizer_folder),
        validation_fraction=validation_fraction, validation_tokens=validation_tokens, seed=seed,
        tokens_per_file=tokens_per_file)
    groups, sources = _groups(settings, sources)
    if tokenizer_folder:
        load_tokenizer(tokenizer_folder)  # fail before the work, not after it
    fingerprint = settings.fingerprint(sources)
    finished = None if overwrite else packed_writer.read_finished(output_dir, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output_dir)
        return finished
    with packed_writer.build_beside(output_dir) as folder, _work_folder(output_dir, fingerprint) as work, \
            corpus_documents.Workers(workers, work, progress) as pool:
        return _build(settings, sources, groups, fingerprint, folder, work, pool, progress)
