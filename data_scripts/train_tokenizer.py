"""Train a byte-level BPE tokenizer with DeepSeek-R1's special tokens and chat template.

    python -m data_scripts.train_tokenizer --output_dir tokenizer --vocab_size 8192 --source text=./books
    python -m data_scripts.train_tokenizer --output_dir tokenizer --vocab_size 65536 --corpus data/clean \\
        --mixture text=60,code=20,multilingual=15,mathematics=5 --max_bytes 200000000

Every text is representable (bytes are the alphabet) and decodes to exactly itself. Before merges are
learned the text is split as DeepSeek-V3 splits it: digits in groups of up to three, runs of Chinese
and Japanese script apart, words with the character before them, punctuation, line ends, white space.
Ids: begin, end and padding first (0, 1, 2) as in R1, then bytes and merges, R1's other tokens last.
Which part of a corpus is learned from: `tokenizer_corpus.py`. Bytes that are no text: `byte_tokens.py`.
"""

import argparse
import hashlib
import json
import resource
import time
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_scripts.packing.tokenizer_corpus import TEMPERATURE, content_fingerprints, corpus_parts, learned_texts, plan

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
END_OF_TURN = "<|EOT|>"
# In R1's order. Not "special" there either: decoding with skip_special_tokens keeps them, so that
# reasoning marks and tool calls can be parsed out of generated text.
MARKS = ("<think>", "</think>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>",
         END_OF_TURN, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
         "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
         "<｜tool▁sep｜>")
PLACE_HOLDER = "<｜place▁holder▁no▁{}｜>"  # R1's way to fill a vocabulary up
RECORD = "learned_from.json"  # beside the tokenizer's files
SMALLEST_VOCAB = 3 + 256 + len(MARKS)
CHAT_TEMPLATE = files("recipes") / "chat_templates" / "deepseek_r1.jinja"

# The three splits of DeepSeek-V3's tokenizer.json (MIT).
SPLITS = (r"\p{N}{1,3}",
          "[一-龥\u3040-ゟ゠-ヿ]+",
          r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
          r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_tokenizer(texts, vocab_size, model_max_length=131_072, show_progress=False):
    """Learn a tokenizer from an iterator of texts.

    Args:
        vocab_size: number of ids, all of them below it; places that the texts gave no merge for are
            filled with R1's place-holder tokens, so `len(tokenizer) == vocab_size` always.
        model_max_length: tokens, stored in the tokenizer for callers that truncate (R1's value).
    Returns:
        PreTrainedTokenizerFast: encoding adds the begin token and no end token, as R1's does.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size={vocab_size} must be at least {SMALLEST_VOCAB}: 256 bytes, "
                         f"3 special tokens and {len(MARKS)} marks of R1")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKS), special_tokens=[BOS, EOS, PAD], show_progress=show_progress,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # sorted: the list's order varies
    backend.train_from_iterator(texts, trainer)
    fill = vocab_size - len(MARKS) - backend.get_vocab_size()
    backend.add_tokens([AddedToken(PLACE_HOLDER.format(i), normalized=False) for i in range(fill)])
    for mark in MARKS:  # one by one: ids follow the order of the calls
        add = backend.add_special_tokens if mark == END_OF_TURN else backend.add_tokens
        add([AddedToken(mark, normalized=False)])
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False),
         processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 0)])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=model_max_length,
        clean_up_tokenization_spaces=False, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    assert len(tokenizer) == vocab_size, (len(tokenizer), vocab_size)
    return tokenizer


def load_tokenizer(folder):
    """An existing tokenizer folder (the real R1 one, say), unchanged; it must have bos and eos tokens."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}: --from_folder takes a folder with a fast tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"the tokenizer in {folder} has no {name}: documents are stored as bos + tokens + eos; "
                             f"set {name} in its tokenizer_config.json")
    return tokenizer


def fingerprint(tokenizer):
    """SHA-256 over what decides the ids: the backend's JSON and the special tokens' names."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.special_tokens_map, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def corpus_texts(corpus, mixture, max_bytes, temperature, seed, taken):
    """Texts of a corpus folder by the mixture; what a kind lacks is said, not made up for by another kind."""
    parts = corpus_parts(corpus)
    for kind, counts in plan(parts, mixture, max_bytes, temperature).items():
        print(f"kind {kind!r}: {counts['wanted']:,} bytes wanted, {counts['available']:,} there: the total is lowered "
              "so that the mixture holds; add sources, lower its share or --max_bytes")
    return learned_texts(parts, seed, taken)


def given_sources(args):
    """Texts of the `--source` options, all of each."""
    from data_scripts.sources import BUILT_IN, open_source

    pairs = [entry.partition("=") for entry in args.source or BUILT_IN]
    return (document.text for kind, _, location in pairs
            for document in open_source(kind, location or "built-in", seed=args.seed,
                                        text_column=args.text_column, errors=args.errors))


def make_parser():
    from data_scripts.sources import BUILT_IN

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write the tokenizer to")
    parser.add_argument("--vocab_size", type=int, default=8192, help="number of ids (default: %(default)s)")
    parser.add_argument("--source", action="append", metavar="KIND[=LOCATION]",
                        help=f"what to learn from, repeatable: {', '.join(BUILT_IN)}, or NAME=file, folder or "
                             "Hub data set (default: all built-in kinds)")
    parser.add_argument("--corpus", help="folder of folders of documents to learn from, instead of --source")
    parser.add_argument("--mixture", default="text=60,code=20,multilingual=15,mathematics=5",
                        help="of --corpus, per cent of bytes by kind (default: %(default)s)")
    parser.add_argument("--max_bytes", type=int, default=200_000_000,
                        help="of --corpus, learned from at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE,
                        help="of --corpus: sources of a kind by size ** (1 / temperature) (default: %(default)s)")
    parser.add_argument("--from_folder", help="take this tokenizer unchanged instead of learning one")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def settings_of(args):
    """What decides a tokenizer learned from a corpus: kept beside it, so that a finished one is not made again."""
    return {"vocab_size": args.vocab_size, "mixture": args.mixture, "max_bytes": args.max_bytes,
            "temperature": args.temperature, "seed": args.seed, "corpus": content_fingerprints(args.corpus)}


def learn(args):
    """The tokenizer that the options ask for, and its record (None unless learned from a corpus)."""
    if args.from_folder:
        return load_tokenizer(args.from_folder), None
    if not args.corpus:
        return train_tokenizer(given_sources(args), args.vocab_size, show_progress=True), None
    from data_scripts.prepare_pretraining import parse_mixture

    taken, start = {}, time.perf_counter()
    texts = corpus_texts(args.corpus, parse_mixture(args.mixture), args.max_bytes, args.temperature, args.seed, taken)
    tokenizer = train_tokenizer(texts, args.vocab_size, show_progress=True)
    return tokenizer, {"settings": settings_of(args), "learned_bytes": taken, "bytes": sum(taken.values()),
                       "seconds": round(time.perf_counter() - start, 1),
                       "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                       "tokenizer_sha256": fingerprint(tokenizer)}


def is_finished(args):
    """Whether the folder holds the tokenizer that these options give, by its record."""
    path = Path(args.output_dir) / RECORD
    if not args.corpus or args.from_folder or not path.is_file():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["settings"] == settings_of(args) and \
        record["tokenizer_sha256"] == fingerprint(load_tokenizer(args.output_dir))


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.corpus and (args.source or args.from_folder):
            raise ValueError("--corpus, --source and --from_folder exclude one another; pass one of them")
        if is_finished(args):
            print(f"{args.output_dir} is finished: nothing to do")
            return
        tokenizer, record = learn(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    tokenizer.save_pretrained(args.output_dir)
    if record:
        (Path(args.output_dir) / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(f"learned from {record['bytes']:,} bytes of {len(record['learned_bytes'])} sources in "
              f"{record['seconds']:.0f} s, peak memory {record['peak_megabytes']:,} MB")
    print(f"{args.output_dir}: {len(tokenizer):,} tokens, sha256 {fingerprint(tokenizer)}")


if __name__ == "__main__":
    main()
