"""Train a byte-level BPE tokenizer with DeepSeek-R1's special tokens and chat template.

    python -m data_scripts.train_tokenizer --output_dir tokenizer --vocab_size 8192 --source text=./books

Every text is representable (bytes are the alphabet) and decodes to exactly itself. Before merges are
learned the text is split as DeepSeek-V3 splits it: digits in groups of up to three, runs of Chinese
and Japanese script apart, words with the character before them, punctuation, line ends, white space.
Ids: begin, end and padding first (0, 1, 2) as in R1, then bytes and merges, R1's other tokens last.
"""

import argparse
import hashlib
import json
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
END_OF_TURN = "<|EOT|>"
# In R1's order. Not "special" there either: decoding with skip_special_tokens keeps them, so that
# reasoning marks and tool calls can be parsed out of generated text.
MARKS = ("<think>", "</think>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>",
         END_OF_TURN, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
         "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
         "<｜tool▁sep｜>")
PLACE_HOLDER = "<｜place▁holder▁no▁{}｜>"  # R1's way to fill a vocabulary up
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


def main(argv=None):
    from data_scripts.sources import BUILT_IN, open_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write the tokenizer to")
    parser.add_argument("--vocab_size", type=int, default=8192, help="number of ids (default: %(default)s)")
    parser.add_argument("--source", action="append", metavar="KIND[=LOCATION]",
                        help=f"what to learn from, repeatable: {', '.join(BUILT_IN)}, or NAME=file, folder or "
                             "Hub data set (default: all built-in kinds)")
    parser.add_argument("--from_folder", help="take this tokenizer unchanged instead of learning one")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.from_folder:
        tokenizer = load_tokenizer(args.from_folder)
    else:
        pairs = [entry.partition("=") for entry in args.source or BUILT_IN]
        texts = (document.text for kind, _, location in pairs
                 for document in open_source(kind, location or "built-in", seed=args.seed,
                                             text_column=args.text_column, errors=args.errors))
        tokenizer = train_tokenizer(texts, args.vocab_size, show_progress=True)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {len(tokenizer):,} tokens, sha256 {fingerprint(tokenizer)}")


if __name__ == "__main__":
    main()
