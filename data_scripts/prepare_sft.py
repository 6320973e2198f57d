"""Make a set of conversations for SFT: worked traces, small dialogues, your files or Hub data sets.

    python -m data_scripts.prepare_sft --output_dir data/sft_tiny --size tiny
    python -m data_scripts.prepare_sft --output_dir data/mine --tasks chain_sum:1-3,gcd --problems 2000
    python -m data_scripts.prepare_sft --output_dir data/mixed --size nano --source chats=./chats.jsonl \\
        --source numina=HUB/NAME --columns numina:question=problem,answer=solution \\
        --mixture traces=70,chats=20,numina=10

Writes train.jsonl, test.jsonl and manifest.json. A row has `messages` in TRL's format (assistant turns as
"<think>\\n...\\n</think>\\n\\nanswer"), and source, task, difficulty, style, key. test.jsonl is for the loss on
held-out problems: a row whose problem belongs to a task lies on the side that the task's own split says, other
rows are split by a hash of their key (or first question). What a held-out row asks is left out of training,
whatever source it comes from. A finished set of the same settings is not made again.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import platform
import random
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from data_scripts.finetuning.sft_rows import BUILT_IN, built_in_rows
from data_scripts.finetuning.sft_settings import SIZES, Settings, with_preset
from data_scripts.finetuning.sft_sources import RowReport, conversations, parse_columns, problem_side
from data_scripts.packing import packed_writer
from data_scripts.prepare_pretraining import parse_mixture
from data_scripts.reasoning.traces import VOICE_SHARES
from recipes.conversations import check_conversation
from recipes.task_base import split_of
from recipes.tasks import TASKS

logger = logging.getLogger(__name__)

FORMAT, VERSION = "conversations", 1
SPLITS = ("train", "test")
OURS = re.compile(r"manifest\.json|(train|test)\.jsonl")
ROW = ("messages", "source", "task", "difficulty", "style", "key")


def key_of(row):
    """What a row asks: its key, else its first question."""
    return row["key"] or next(message["content"] for message in row["messages"] if message["role"] == "user")


def side_of(row, test_share):
    """The split that a row belongs to: the task's, where the row names a task's problem."""
    return problem_side(row["task"], row["key"]) if row["task"] in TASKS else split_of(key_of(row), test_share)


def asks(row):
    """What must not be on both sides: the keys of a row's problems and its (first) question."""
    question = row.get("question") or next(turn["content"] for turn in row["messages"] if turn["role"] == "user")
    return {*row.get("keys", [key_of(row)]), " ".join(question.casefold().split())}


def outside_rows(name, settings, report):
    """{"train": rows, "test": rows} of a file, folder or Hub data set."""
    rows = {split: [] for split in SPLITS}
    for row in conversations(settings.sources[name], settings.columns.get(name) or settings.columns.get(""),
                             settings.errors, report, settings.direct_answers, settings.max_characters):
        rows[side_of(row, settings.test_share)].append(row)
    if not rows["train"]:
        skipped = f"; {report.skipped} were skipped, the first: {report.examples[0]}" if report.skipped else ""
        raise ValueError(f"source {name!r} ({settings.sources[name]}) gave no training conversation" + skipped
                         + (f"; {report.too_long} have more than max_characters={settings.max_characters}"
                            if report.too_long else ""))
    return rows


def gather(settings, progress):
    """Rows of every source and what was left out: {source: {split: rows}}, {source: counts}."""
    found, left_out = {}, {}
    for name, location in settings.sources.items():
        if location == "built-in":
            found[name], left_out[name] = built_in_rows(name, settings, progress)
        else:
            report = RowReport()
            found[name] = outside_rows(name, settings, report)
            left_out[name] = {"skipped": report.skipped, "too long": report.too_long, "examples": report.examples}
        for rows in found[name].values():
            for row in rows:
                row["source"] = name
    return found, left_out


def without_repeats(found, left_out):
    """Remove conversations that are the same word for word, the earlier source keeping its own."""
    seen = set()
    for name, splits in found.items():
        for split in ("test", "train"):
            kept = []
            for row in splits[split]:
                digest = hashlib.sha256(json.dumps(row["messages"], ensure_ascii=False).encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    kept.append(row)
            left_out[name]["duplicates"] = left_out[name].get("duplicates", 0) + len(splits[split]) - len(kept)
            splits[split] = kept


def without_held_out(found, left_out):
    """Remove training rows that ask what a held-out row asks; sources may name the same problem differently."""
    held_out = set().union(*(asks(row) for splits in found.values() for row in splits["test"]))
    for name, splits in found.items():
        kept = [row for row in splits["train"] if not asks(row) & held_out]
        left_out[name]["held out"] = len(splits["train"]) - len(kept)
        splits["train"] = kept


def mix(found, settings):
    """Rows of each split in the order of the file: shuffled, and cut to the mixture's shares if there is one."""
    mixed = {}
    for split in SPLITS:
        rows = {name: list(splits[split]) for name, splits in found.items() if splits[split]}
        for name, part in rows.items():
            random.Random(f"{settings.seed} {split} {name}").shuffle(part)
        if settings.mixture and rows:
            possible = {name: len(part) / settings.mixture[name] for name, part in rows.items()}
            scarce = min(possible, key=possible.get)
            rows = {name: part[:max(1, round(possible[scarce] * settings.mixture[name]))]
                    for name, part in rows.items()}
            if split == "train":
                logger.info("mixture: source %r with its %d conversations sets the total", scarce, len(rows[scarce]))
        mixed[split] = [row for part in rows.values() for row in part]
        random.Random(f"{settings.seed} {split}").shuffle(mixed[split])
    return mixed


def assert_disjoint(mixed):
    """No problem and no first question on both sides."""
    train, test = (set().union(*map(asks, mixed[split])) for split in SPLITS)
    common = train & test
    assert not common, f"{len(common)} problems are in both splits, for instance {min(common)[:200]!r}"


def write_split(rows, path):
    """Write one file; returns its manifest entry."""
    tally = {name: Counter() for name in ("sources", "styles")}
    tasks, problems, size = {}, {}, 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            check_conversation(row["messages"])
            line = json.dumps({name: row[name] for name in ROW}, ensure_ascii=False) + "\n"
            file.write(line)
            size += len(line.encode("utf-8"))
            tally["sources"][row["source"]] += 1
            tally["styles"][row["style"] or "none"] += 1
            if row["task"]:
                label = f"{row['task']}:{row['difficulty']}"
                tasks[label] = tasks.get(label, 0) + 1
                problems.setdefault(label, set()).add(row["key"])
    return {"rows": len(rows), "bytes": size, "sha256": packed_writer.file_sha256(path),
            **{name: dict(sorted(counts.items())) for name, counts in tally.items()},
            "tasks": {label: {"rows": tasks[label], "problems": len(problems[label])} for label in sorted(tasks)}}


def read_finished(folder, fingerprint):
    """The manifest of a finished set made with these settings whose files are intact, else None."""
    manifest = packed_writer.manifest_made_with(folder, FORMAT, VERSION, fingerprint)
    if manifest is None:
        return None
    files = {split: Path(folder) / f"{split}.jsonl" for split in SPLITS}
    intact = all(file.is_file() and packed_writer.file_sha256(file) == manifest["splits"][split]["sha256"]
                 for split, file in files.items())
    return manifest if intact else None


def source_licences(settings, found):
    entries = {}
    for name, location in settings.sources.items():
        given = sorted({row["licence"] for rows in found[name].values() for row in rows if row.get("licence")})
        entries[name] = {"location": location, "licence": BUILT_IN[name] if location == "built-in" else
                         "; ".join(given) or "not stated by the source: look it up"}
    return entries


def prepare(output_dir, *, size="tiny", tasks=None, problems=None, test_problems=None, dialogues=None, repeats=None,
            sources=None, columns=None, mixture=None, voices=None, check=None, backtrack=None,
            direct_answers="empty_block", max_characters=1_200, test_share=0.05, errors="strict", seed=0,
            overwrite=False, progress=True):
    """Make the set, or find it finished; return its manifest.

    Args:
        size: preset of SIZES for the arguments from tasks to repeats, voices, check and backtrack, where None.
        tasks: "name:levels,..." as `parse_tasks` reads it; problems: rows for each task and level, at most.
        repeats: how many differently told traces one problem may have, where a level has few problems.
        sources: {name: "built-in", path or Hub name}; None for the built-in ones.
        columns: {source, or "" for all: {our field: its column}}; mixture: {source: per cent}; None takes all rows.
        voices, check, backtrack: shares of the styles, see `traces.py`.
        max_characters: of the longest turn; longer ones are left out and counted.
    Raises:
        ValueError: impossible settings or an unusable row, naming the place and the way out.
    """
    preset = with_preset(size, {
        "tasks": tasks, "problems": problems, "test_problems": test_problems, "dialogues": dialogues,
        "repeats": repeats, "voices": voices, "check": check, "backtrack": backtrack})
    settings = Settings(
        **preset, sources=dict(sources or dict.fromkeys(BUILT_IN, "built-in")), columns=columns or {}, mixture=mixture,
        direct_answers=direct_answers, max_characters=max_characters, test_share=test_share, errors=errors, seed=seed)
    fingerprint = settings.fingerprint()
    finished = None if overwrite else read_finished(output_dir, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output_dir)
        return finished
    with packed_writer.build_beside(output_dir, OURS, "a set of conversations") as folder:
        found, left_out = gather(settings, progress)
        without_repeats(found, left_out)
        without_held_out(found, left_out)
        mixed = mix(found, settings)
        assert_disjoint(mixed)
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "seed": seed,
                    "arguments": dataclasses.asdict(settings), "sources": source_licences(settings, found),
                    "versions": {"python": platform.python_version(), "reasoning-gym": version("reasoning-gym")},
                    "splits": {split: write_split(mixed[split], folder / f"{split}.jsonl") for split in SPLITS},
                    "left_out": left_out}
        packed_writer.write_manifest(folder, manifest)
    return manifest


def summary(manifest):
    """The manifest as a table."""
    train, test = (manifest["splits"][split] for split in SPLITS)
    lines = [f"{'task:level':28} {'train rows':>10} {'problems':>9} {'test':>5}"]
    for label, counts in train["tasks"].items():
        lines.append(f"{label:28} {counts['rows']:>10,} {counts['problems']:>9,} "
                     f"{test['tasks'].get(label, {}).get('rows', 0):>5,}")
    for split, entry in manifest["splits"].items():
        lines.append(f"{split}: {entry['rows']:,} conversations, {entry['bytes']:,} bytes; "
                     + ", ".join(f"{name} {count:,}" for name, count in entry["sources"].items()))
    styles = Counter({style: count for style, count in train["styles"].items() if style.split("+")[0] in VOICE_SHARES})
    lines.append("styles: " + ", ".join(f"{style} {count:,}" for style, count in styles.most_common()))
    for name, counts in manifest["left_out"].items():
        said = ", ".join(f"{count:,} {why}" for why, count in counts.items() if isinstance(count, int) and count)
        lines += [f"left out of {name}: {said}"] if said else []
    return "\n".join(lines)


def parse_pairs(entries, what):
    pairs = [entry.partition("=") for entry in entries]
    if any(not (name and value) for name, _, value in pairs):
        raise ValueError(f"--{what} takes NAME=LOCATION, for instance --{what} mine=./chats.jsonl, or "
                         f"{next(iter(BUILT_IN))}=built-in")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--{what} names {max(names, key=names.count)!r} twice; give each source a name of its own")
    return {name: value for name, _, value in pairs}


def parse_column_options(entries, sources):
    """['numina:question=problem'] -> {"numina": {...}}; without a name before ':' for all sources."""
    columns = {}
    for entry in entries:
        name, colon, mapping = entry.partition(":")
        named = colon and "=" not in name
        columns[name if named else ""] = parse_columns(mapping if named else entry)
    return columns if "" not in columns else {**{name: columns[""] for name in sources if sources[name] != "built-in"},
                                              **{name: value for name, value in columns.items() if name}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the set; replaced as a whole")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="preset (default: %(default)s)")
    parser.add_argument("--tasks", help="name[:level[-level]],...; without levels 1-3 (default: the preset's)")
    parser.add_argument("--problems", type=int, help="rows for each task and level, at most")
    parser.add_argument("--test_problems", type=int, help="held-out rows for each task and level")
    parser.add_argument("--dialogues", type=int, help="conversations of several turns")
    parser.add_argument("--repeats", type=int, help="traces of one problem, where a level has few problems")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=LOCATION",
                        help=f"repeatable: {', '.join(BUILT_IN)}=built-in, or a name of your choice and a .jsonl or "
                             "Parquet file, a folder, or a Hub data set. Built-in sources that a --mixture leaves out "
                             "or --only_given drops are not made")
    parser.add_argument("--only_given", action="store_true", help="without the built-in sources unless they are given")
    parser.add_argument("--columns", action="append", default=[], metavar="[NAME:]FIELD=COLUMN,...",
                        help="where a source has our fields: messages, question, answer, reasoning, system")
    parser.add_argument("--mixture", help="per cent of conversations, NAME=PERCENT,... (default: all rows)")
    parser.add_argument("--voices", help="shares of terse, prose, numbered, as terse=70,prose=15,numbered=15 "
                        "(these and the next two: the preset's)")
    parser.add_argument("--check", type=float, help="share of traces that end with a check")
    parser.add_argument("--backtrack", type=float, help="share with a step gone wrong and mended")
    parser.add_argument("--direct_answers", choices=("empty_block", "bare"), default="empty_block",
                        help="answers without reasoning get an empty block, or nothing, before them")
    parser.add_argument("--max_characters", type=int, default=1_200, help="of one turn (default: %(default)s)")
    parser.add_argument("--test_share", type=float, default=0.05, help="held-out share of rows that belong to no task")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict", help="what to do with bad rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is finished")
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        given, only = parse_pairs(arguments.pop("source"), "source"), arguments.pop("only_given")
        mixture = parse_mixture(arguments.pop("mixture")) if arguments["mixture"] else arguments.pop("mixture")
        built_in = {} if only else {name: "built-in" for name in BUILT_IN if mixture is None or name in mixture}
        sources = {**built_in, **given}
        if not sources:
            raise ValueError("no sources: --only_given without --source")
        voices = parse_mixture(arguments.pop("voices")) if arguments["voices"] else arguments.pop("voices")
        columns = parse_column_options(arguments.pop("columns"), sources)
        manifest = prepare(arguments.pop("output_dir"), sources=sources, mixture=mixture, voices=voices,
                           columns=columns, **arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(manifest))


if __name__ == "__main__":
    main()
