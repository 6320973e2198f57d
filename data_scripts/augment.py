"""Add differently worded copies of user turns to a set for fine-tuning: synonyms, back-translation, syntax.

    python -m data_scripts.augment --input data/sft/train.jsonl --output data/sft_aug \\
        --synonyms 0.3 --back_translation 0.1 --syntax 0.2 --seed 0 --show 5

A rate is the share of rows that are tried; each gives at most one copy of each kind. Only the user's side is changed,
never an answer or its reasoning, and in it nothing that could be an operand (`augment_protected.py`). The originals are
kept (`augmentation` null), each followed by its copies, which carry

    augmentation = {"kind", "of", "changes": [{"turn", "rule", "from", "to"}], "source", "licence"}

and the original's key (its first question where it has none), so that a copy lies on the original's side of every
split. Held-out rows are refused; a test.jsonl beside the input is passed on unchanged, and no copy may ask what it
asks.
WordNet comes from `--wordnet FOLDER`, else from Debian's package wordnet-base; back-translation needs Apertium.
"""

import argparse
import hashlib
import json
import logging
import random
import re
import shutil
from collections import Counter
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from data_scripts.augmentation.augment_english import WordNet, WordPairs, find_wordnet
from data_scripts.augmentation.augment_protected import operands, other_texts, replaced, user_texts, words_of
from data_scripts.augmentation.augment_synonyms import Synonyms
from data_scripts.augmentation.augment_syntax import Syntax
from data_scripts.augmentation.augment_translation import BackTranslation, check_installed
from data_scripts.finetuning.sft_sources import problem_side
from data_scripts.packing import packed_writer
from data_scripts.row_files import HELD_OUT, read_rows
from recipes.tasks import TASKS

logger = logging.getLogger(__name__)

FORMAT, VERSION = "augmented-rows", 2
OURS = re.compile(r"manifest\.json|(train|test)\.jsonl|original_manifest\.json")
KINDS = ("synonyms", "back_translation", "syntax")
CHUNK = 2_000          # rows in memory at a time
ENGLISH_BYTES = 30_000_000  # of the input and --english, from which word pairs are counted
ENGLISH = 0.6          # share of a text's words that WordNet or the English at hand must know
EXAMPLES = 20          # of each kind, in the manifest
_PLACES = {}           # of a worker process: what rows are changed with


# ---- one row

def normal(text):
    return " ".join(text.casefold().split())


def key_of(row):
    """What the row asks: its key, else its first user's text."""
    return row.get("key") or user_texts(row)[0][1]


def is_held_out(row):
    metadata = row.get("metadata")
    split = row.get("split") or (metadata.get("split") if isinstance(metadata, dict) else None)
    return isinstance(split, str) and bool(HELD_OUT.match(split.lower())) or \
        row.get("task") in TASKS and bool(row.get("key")) and problem_side(row["task"], row["key"]) == "test"


def taboo_of(row, paths):
    """Words that stay: those of the answer, and of a generated problem's key unless the key is the whole question."""
    taboo = set().union(*map(words_of, other_texts(row, paths)))
    key, question = row.get("key"), user_texts(row)[0][1]
    if isinstance(key, str) and normal(key) != normal(question):
        taboo |= words_of(key)
    return taboo


def is_english(text, pairs):
    words = words_of(text)
    letters = sum(character.isalpha() for character in text)
    ascii_letters = sum(character.isalpha() and character.isascii() for character in text)
    return bool(words) and ascii_letters >= 0.9 * letters and \
        sum(pairs.words[word.replace("’", "'")] > 0 for word in words) >= ENGLISH * len(words)


def draw(seed, kind, row, number):
    """A generator of its own for each row and kind: workers and other rows do not matter."""
    return random.Random(f"{seed}|{kind}|{number}|{key_of(row)}")


def augmented(row, number, kind, changer, pairs, seed):
    """(a changed copy, None) or (None, why there is none)."""
    texts = user_texts(row)
    rng = draw(seed, kind, row, number)
    rng.random()  # the one that chose the row
    paths = {path for path, _ in texts}
    taboo, copy, changes, reasons = taboo_of(row, paths), row, [], []
    for turn, (path, text) in enumerate(texts):
        if not is_english(text, pairs):
            reasons.append("not English")
            continue
        if kind != "syntax" and not any(map(str.isupper, text)):
            reasons.append("no capitals, so that names cannot be told")
            continue
        changer.greets = turn == 0
        found = changer.variant(text, taboo, rng)
        if found is None:
            reasons += getattr(changer, "reasons", None) or ["nothing to change"]
            continue
        if operands(found[0]) != operands(text):
            reasons.append("operands would change")
            continue
        copy = replaced(copy, path, found[0])
        changes += [{"turn": turn, **change} for change in found[1]]
    if not changes:
        return None, reasons[0] if reasons else "no user's text"
    of = key_of(row)
    return {**copy, "key": of, "augmentation": {"kind": kind, "of": of, "changes": changes, "source": changer.source,
                                                "licence": changer.licence}}, None


def chosen(row, number, kind, rate, seed):
    return rate > 0 and draw(seed, kind, row, number).random() < rate


def copies_of(job, seed):
    """(copies, [(kind, reason)]) of one (number, row, kinds)."""
    number, row, kinds = job
    copies, refused = [], []
    for kind in kinds:
        changers, pairs = _PLACES["changers"], _PLACES["pairs"]
        changer = Syntax(lists=not row.get("task")) if kind == "syntax" else changers[kind]
        copy, reason = augmented(row, number, kind, changer, pairs, seed)
        if copy is None:
            refused.append((kind, reason))
        else:
            copies.append(copy)
    return copies, refused


# ---- a set

def check_input(path, force):
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"input={str(path)!r} is no file; name the training rows, as in data/sft/train.jsonl")
    if HELD_OUT.match(path.name.lower()) and not force:
        raise ValueError(f"input={path.name!r} is held out by its name: an evaluation must stay as it was written; "
                         "name the training file, or pass --force for a set that is none")
    return path


def rows_of(path, force):
    """Yield the rows of a file.

    Raises:
        ValueError: a row is broken, is held out, or is a copy already.
    """
    for place, row in read_rows(path):
        if isinstance(row, Exception):
            raise ValueError(f"{row}; repair the row")
        if row.get("augmentation"):
            raise ValueError(f"{place} is an augmented copy already: take the set that it was made from")
        if not force and is_held_out(row):
            raise ValueError(f"{place} is held out (its split, or the side of its task's problem, is test): an "
                             "evaluation must stay as it was written; take the row out, or pass --force")
        try:
            user_texts(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield row


def held_out_questions(path):
    """What the rows of a set for evaluation ask first."""
    questions = set()
    for place, row in read_rows(path):
        if isinstance(row, Exception):
            raise ValueError(f"{row}; repair the row, or move the file away from the input")
        try:
            questions.add(normal(user_texts(row)[0][1]))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return questions


@lru_cache(maxsize=1)
def shipped_pairs():
    """Word pairs of the English that this package ships."""
    from data_scripts.sources import open_source

    return WordPairs(document.text for document in open_source("text"))


def english_texts(path, english, wordnet):
    """What word pairs are counted in beside the shipped English: WordNet's glosses, the input itself, and --english."""
    if wordnet is not None:
        yield from wordnet.glosses
    sources = [(text for _, row in read_rows(path) if isinstance(row, dict) for text in other_texts(row, set()))]
    if english:
        from data_scripts.packing.tokenizer_corpus import corpus_parts, pieces
        sources.append(piece for part in corpus_parts(english) if part.kind == "text" for piece, *_ in pieces(part))
    for source in sources:
        size = 0
        for text in source:
            size += len(text)
            if size > ENGLISH_BYTES:
                break
            yield text


def prepare_changers(rates, path, english, wordnet_path):
    """{kind: what changes rows}; loaded once, before the workers are started, which then share it."""
    if rates["back_translation"]:
        check_installed()
    needed = rates["synonyms"] or rates["back_translation"]
    wordnet = WordNet(find_wordnet(wordnet_path)) if needed else None
    pairs = WordPairs(english_texts(path, english, wordnet)).merged(shipped_pairs())
    changers = {}
    if rates["synonyms"]:
        changers["synonyms"] = Synonyms(wordnet, pairs)
    if rates["back_translation"]:
        changers["back_translation"] = BackTranslation(wordnet, pairs)
    _PLACES.update(changers=changers, pairs=pairs)


def chunks_of(rows, rates, seed):
    """Yield lists of jobs (number, row, kinds chosen); the sentences to translate are sent chunk by chunk."""
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, CHUNK)):
        jobs = [(number, row, [kind for kind in KINDS if chosen(row, number, kind, rates[kind], seed)])
                for number, row in chunk]
        translator = _PLACES["changers"].get("back_translation")
        if translator:
            translator.prepare([text for _, row, kinds in jobs if "back_translation" in kinds
                                for _, text in user_texts(row)])
        yield jobs


def results_of(jobs, seed, workers):
    if workers <= 1:
        return [copies_of(job, seed) for job in jobs]
    with get_context("fork").Pool(workers) as pool:  # after the translations: the workers see them
        return pool.map(partial(copies_of, seed=seed), jobs, chunksize=50)


def write_rows(path, rows, rates, seed, workers, held_out, progress):
    """Write originals and copies; return the counts."""
    tried, made, refused, rules = Counter(), Counter(), {kind: Counter() for kind in KINDS}, Counter()
    examples, originals = {kind: [] for kind in KINDS}, 0
    with open(path, "w", encoding="utf-8", newline="\n") as file, \
            tqdm(desc="augment", unit=" rows", disable=not progress) as bar:
        for jobs in chunks_of(rows, rates, seed):
            for (_, row, kinds), (copies, reasons) in zip(jobs, results_of(jobs, seed, workers)):
                originals += 1
                tried.update(kinds)
                # Loaders take a file's columns from its first rows.
                original = {**row, "key": row.get("key"), "augmentation": None}
                file.write(json.dumps(original, ensure_ascii=False) + "\n")
                for kind, reason in reasons:
                    refused[kind][reason] += 1
                known = {normal(user_texts(row)[0][1])}
                for copy in copies:
                    kind, asked = copy["augmentation"]["kind"], normal(user_texts(copy)[0][1])
                    if asked in held_out or len(user_texts(row)) == 1 and asked in known:
                        refused[kind]["asks what a held-out row asks" if asked in held_out else "same as another"] += 1
                        continue
                    known.add(asked)
                    made[kind] += 1
                    rules.update(f"{kind}/{change['rule']}" for change in copy["augmentation"]["changes"])
                    if len(examples[kind]) < EXAMPLES:
                        examples[kind].append(example(row, copy))
                    file.write(json.dumps(copy, ensure_ascii=False) + "\n")
            bar.update(len(jobs))
    return {"originals": originals, "copies": dict(made), "tried": dict(tried), "rules": dict(rules),
            "refused": {kind: dict(counts.most_common()) for kind, counts in refused.items() if counts},
            "examples": {kind: found for kind, found in examples.items() if found}}


def example(row, copy):
    changed = [turn for turn, (before, after) in enumerate(zip(user_texts(row), user_texts(copy))) if before != after]
    return {"before": user_texts(row)[changed[0]][1], "after": user_texts(copy)[changed[0]][1],
            "changes": copy["augmentation"]["changes"]}


def fingerprint_of(path, rates, seed, english, wordnet, force):
    """What decides the output. The number of workers does not."""
    content = [VERSION, packed_writer.file_sha256(path), rates, seed, force,
               str(wordnet and Path(wordnet).resolve()), None]
    if english:
        from data_scripts.packing.tokenizer_corpus import content_fingerprints
        content[-1] = content_fingerprints(english)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_finished(folder, fingerprint):
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    train = Path(folder) / "train.jsonl"
    same = (manifest.get("format"), manifest.get("version"), manifest.get("fingerprint")) == (FORMAT, VERSION,
                                                                                              fingerprint)
    return manifest if same and train.is_file() and packed_writer.file_sha256(train) == manifest["sha256"] else None


def augment(input, output, *, synonyms=0.0, back_translation=0.0, syntax=0.0, seed=0, workers=1, wordnet=None,
            english=None, force=False, overwrite=False, progress=True):
    """Make the set, or find it finished; return its manifest.

    Args:
        synonyms, back_translation, syntax: shares of the rows that are tried.
        wordnet: folder of WordNet's files, or above it. english: corpus folder for more word pairs.
        force: also where rows are held out.
    Raises:
        ValueError: impossible settings, unusable or held-out rows, something not installed.
    """
    rates = {"synonyms": synonyms, "back_translation": back_translation, "syntax": syntax}
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate} must lie in [0, 1]: it is the share of rows that are tried")
    if not any(rates.values()):
        raise ValueError("nothing to do: pass --synonyms, --back_translation or --syntax above 0")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    path = check_input(input, force)
    fingerprint = fingerprint_of(path, rates, seed, english, wordnet, force)
    finished = None if overwrite else read_finished(output, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output)
        return finished
    beside = path.with_name("test.jsonl")
    held_out = held_out_questions(beside) if beside.is_file() else set()
    for _ in rows_of(path, force):  # refusals come before the work
        pass
    prepare_changers(rates, path, english, wordnet)
    with packed_writer.build_beside(output, OURS, "an augmented set") as folder:
        counts = write_rows(folder / "train.jsonl", rows_of(path, force), rates, seed, workers, held_out, progress)
        if beside.is_file():
            shutil.copyfile(beside, folder / "test.jsonl")
        if (original := path.with_name("manifest.json")).is_file():
            shutil.copyfile(original, folder / "original_manifest.json")
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "input": path.name,
                    "input_sha256": packed_writer.file_sha256(path), "rates": rates, "seed": seed,
                    "sha256": packed_writer.file_sha256(folder / "train.jsonl"),
                    "sources": {"synonyms": [Synonyms.source, Synonyms.licence], "syntax": [Syntax.source,
                                                                                            Syntax.licence],
                                "back_translation": [BackTranslation.source, BackTranslation.licence]}, **counts}
        packed_writer.write_manifest(folder, manifest)
    return manifest


def summary(manifest, show=0):
    """The manifest as lines that one can read."""
    lines = [f"{manifest['originals']:,} originals kept, {sum(manifest['copies'].values()):,} copies added"]
    for kind in KINDS:
        if kind not in manifest["tried"]:
            continue
        lines.append(f"{kind}: {manifest['tried'][kind]:,} rows tried, {manifest['copies'].get(kind, 0):,} copies")
        refused = manifest["refused"].get(kind, {})
        if refused:
            lines.append("  not made: " + ", ".join(f"{reason} {count:,}" for reason, count in refused.items()))
        for found in manifest["examples"].get(kind, [])[:show]:
            lines += [f"  - {' '.join(found['before'].split())[:200]}", f"  + {' '.join(found['after'].split())[:200]}"]
    lines += ["changes: " + ", ".join(f"{rule} {count:,}" for rule, count in manifest["rules"].items())]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="training rows (.jsonl, .jsonl.gz, .parquet) with messages, "
                        "prompt and completion, question and answer, or text")
    parser.add_argument("--output", required=True, help="folder for the set; replaced as a whole")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=float, default=0.0, metavar="RATE",
                            help="share of rows tried (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on them")
    parser.add_argument("--wordnet", help="folder that holds WordNet's data.noun, itself or below")
    parser.add_argument("--english", help="corpus folder whose English widens what is taken for natural")
    parser.add_argument("--show", type=int, default=0, help="examples of each kind to print")
    parser.add_argument("--force", action="store_true", help="also rows that are held out")
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is finished")
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    show = arguments.pop("show")
    try:
        manifest = augment(arguments.pop("input"), arguments.pop("output"), **arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(manifest, show))


if __name__ == "__main__":
    main()
