"""Make a set of prompts for reinforcement learning: problems with what verifies them, or questions of conversations.

    python -m data_scripts.prepare_prompts --output_dir data/prompts --tasks chain_sum:2-3 gcd:1 --train 2000 --test 200
    python -m data_scripts.prepare_prompts --output_dir data/prompts --tasks chain_sum=3 mathematics:1-2=1
    python -m data_scripts.prepare_prompts --output_dir data/asked --from_messages chats.jsonl     # with --tasks: both

Writes train.jsonl, test.jsonl and manifest.json. A row has `prompt` (messages; the question is worded as in the SFT
sets), task, index, question, reference and metadata, from which `recipes/rewards.py` verifies a completion; rows of
conversations have prompt and question only, and a question that a task asks too is the task's. The side of a problem is
the task's own, also where a conversation names its task and key, so that what is evaluated is never trained on. A
finished set of the same settings is not made again.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import random
from collections import Counter
from itertools import islice
from pathlib import Path

from data_scripts.finetuning.sft_settings import code_version
from data_scripts.finetuning.sft_sources import problem_side, to_messages
from data_scripts.packing import packed_writer
from data_scripts.preferences.preference_files import (
    OURS,
    SPLITS,
    asks,
    assert_disjoint,
    read_finished,
    without_held_out,
    write_split,
)
from data_scripts.row_files import read_rows
from data_scripts.sources import identity
from recipes.evaluation import parse_task
from recipes.task_base import split_of
from recipes.tasks import TASKS, get_task
from recipes.text_files import BadInput, ReadReport

logger = logging.getLogger(__name__)

FORMAT = ("prompts", 1)
COLUMNS = ("prompt", "question", "task", "index", "reference", "metadata")


@dataclasses.dataclass
class Settings:
    """Everything that decides the output; kept in the manifest."""

    tasks: list
    train: int
    test: int
    from_messages: str | None
    system: str | None
    tasks_folder: str | None
    max_characters: int
    test_share: float
    errors: str
    seed: int

    def __post_init__(self):
        if not self.tasks and not self.from_messages:
            raise ValueError("give tasks, from_messages or both: there is nothing to ask")
        for name, least in (("train", 1), ("test", 0), ("max_characters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test_share={self.test_share} must lie in [0, 1]")
        if self.errors not in ("strict", "skip"):
            raise ValueError(f"errors={self.errors!r} must be 'strict' or 'skip'")
        if self.system is not None and not self.system.strip():
            raise ValueError("system is empty; leave it out for prompts without a system message")

    def fingerprint(self):
        given = identity("messages", self.from_messages) if self.from_messages else {}
        files = {name: identity("tasks", self.tasks_folder) for name in ["tasks_folder"] if self.tasks_folder}
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        content = json.dumps([dataclasses.asdict(self), given, files, code_version(), code], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def parse_weighted(entries, folder=None):
    """['chain_sum:2-3=3', 'gcd:1'] -> {("chain_sum", 2): 1.5, ("chain_sum", 3): 1.5, ("gcd", 1): 1.0}.

    A task's weight (1 without '=') is shared among its levels; without levels it has all of them.
    Raises:
        ValueError: for an unknown task, a level that it does not have, or a weight that is not above 0.
    """
    weights = {}
    for entry in entries:
        text, equals, weight = entry.partition("=")
        try:
            share = float(weight) if equals else 1.0
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise ValueError(f"tasks: {entry!r} must be NAME[:LEVELS][=WEIGHT] with a number above 0 for WEIGHT")
        name, levels = parse_task(text)
        known = get_task(name, folder).levels
        wanted = list(levels or known)
        if set(wanted) - set(known):
            raise ValueError(f"tasks: {entry!r} asks for levels that {name} does not have; it has {list(known)}")
        for level in wanted:
            weights[name, level] = weights.get((name, level), 0.0) + share / len(wanted)
    return weights


def quotas(weights, total):
    """Whole numbers in the proportion of the weights that sum to `total`: largest remainders are rounded up."""
    exact = {place: total * weight / sum(weights.values()) for place, weight in weights.items()}
    whole = {place: int(number) for place, number in exact.items()}
    for place in sorted(exact, key=lambda p: whole[p] - exact[p])[:total - sum(whole.values())]:
        whole[place] += 1
    return whole


def draw(weights, split, total, settings):
    """(rows, {"task:level": how many fewer than its share}); what a level lacks the others give.

    Raises:
        ValueError: if all levels together have too few problems.
    """
    streams = {(name, level): get_task(name, settings.tasks_folder).stream(split, settings.seed, level)
               for name, level in weights}
    found, seen, open_weights, missing = {place: [] for place in weights}, set(), dict(weights), total
    while missing and open_weights:
        for place, count in quotas(open_weights, missing).items():
            fresh = (problem for problem in streams[place] if len(problem.prompt) <= settings.max_characters
                     and (problem.task, problem.metadata["key"]) not in seen)
            taken = list(islice(fresh, count))
            seen.update((problem.task, problem.metadata["key"]) for problem in taken)
            found[place] += taken
            if len(taken) < count:
                del open_weights[place]
        missing = total - sum(map(len, found.values()))
    if missing:
        raise ValueError(f"{split}={total}: the tasks have only {total - missing} distinct {split} problems of up to "
                         f"{settings.max_characters} characters; ask for fewer, or for more tasks or levels")
    short = {f"{name}:{level}": count - len(found[name, level]) for (name, level), count in
             quotas(weights, total).items() if len(found[name, level]) < count}
    return [row_of(problem, settings) for problems in found.values() for problem in problems], short


def messages_of(question, system):
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]


def row_of(problem, settings):
    """A problem as a row; `problem` is its identity, which the file does not hold."""
    row = problem.to_row()
    question = row.pop("prompt")
    return {"prompt": messages_of(question, settings.system), "question": question, **row,
            "problem": f"{problem.task}|{problem.metadata['key']}", "source": problem.task,
            "kind": f"{problem.task}:{problem.metadata['difficulty']}"}


def asked_rows(settings):
    """({"train": rows, "test": rows}, counts): the first question of each conversation, none twice.

    A row that names a task and a problem's key lies on that problem's side, any other on that of its question's hash.
    """
    rows, report, seen, left_out = {split: [] for split in SPLITS}, ReadReport(), set(), Counter()
    for place, row in read_rows(settings.from_messages):
        try:
            if isinstance(row, BadInput):
                raise row
            given = row.get("prompt")
            if isinstance(given, str) and given.strip():
                turns = [{"role": "user", "content": given}]
            else:
                turns = given if isinstance(given, list) else to_messages(row, {})
            question = next((turn["content"] for turn in turns if turn["role"] == "user"), None)
            if not isinstance(question, str) or not question.strip():
                raise BadInput("no user turn with text")
        except (ValueError, KeyError, TypeError) as error:
            message = str(error) if str(error).startswith(place) else f"{place}: {error}"
            if settings.errors == "strict":
                raise ValueError(f"{message}; repair the row or pass --errors skip") from error
            report.add(message)
            continue
        text = " ".join(question.casefold().split())
        reason = "asked before" if text in seen else "too long" if len(question) > settings.max_characters else None
        if reason:
            left_out[reason] += 1
            continue
        seen.add(text)
        given_system = turns[0]["content"] if turns[0]["role"] == "system" else None
        task, key = row.get("task"), row.get("key")
        named = isinstance(task, str) and task in TASKS and isinstance(key, str) and bool(key)
        rows[problem_side(task, key) if named else split_of(question, settings.test_share)].append({
            "prompt": messages_of(question, settings.system or given_system), "question": question,
            "problem": f"{task}|{key}" if named else text, "source": "messages", "kind": "messages"})
    if not rows["train"]:
        raise ValueError(f"from_messages={settings.from_messages!r} gave no training prompt"
                         + (f"; {report.skipped} rows were skipped, the first: {report.examples[0]}"
                            if report.skipped else ""))
    return rows, {**left_out, "skipped": report.skipped, "examples": report.examples}


def gather(settings):
    """Rows of both splits in the order of the files, and what was left out or is short."""
    rows, left_out = asked_rows(settings) if settings.from_messages else ({split: [] for split in SPLITS}, {})
    if settings.tasks:
        weights, drawn = parse_weighted(settings.tasks, settings.tasks_folder), {}
        for split, total in (("train", settings.train), ("test", settings.test)):
            drawn[split], left_out[f"{split}: fewer than their share"] = draw(weights, split, total, settings)
        known = set().union(*(asks(row) for split in SPLITS for row in drawn[split]))
        for split in SPLITS:
            own = [row for row in rows[split] if not asks(row) & known]
            left_out["asked by a task"] = left_out.get("asked by a task", 0) + len(rows[split]) - len(own)
            rows[split] = own + drawn[split]
    for split in SPLITS:
        random.Random(f"{settings.seed} {split}").shuffle(rows[split])
    left_out["held out"] = without_held_out(rows)
    assert_disjoint(rows)
    return rows, left_out


def prepare(output_dir, *, tasks=(), train=1_000, test=100, from_messages=None, system=None, tasks_folder=None,
            max_characters=2_000, test_share=0.05, errors="strict", seed=0, overwrite=False):
    """Make the set, or find it finished; return its manifest.

    Args:
        tasks: entries as `parse_weighted` reads them; train, test: problems of each split, all tasks together.
        from_messages: conversations (file, folder or Hub name), instead or besides; test_share: their held-out share.
        system: a system message for all prompts; else conversations keep theirs.
    Raises:
        ValueError: impossible settings, too few problems or an unusable row, with the way out.
    """
    settings = Settings(tasks=list(tasks), train=train, test=test, from_messages=from_messages and str(from_messages),
                        system=system, tasks_folder=tasks_folder and str(tasks_folder), max_characters=max_characters,
                        test_share=test_share, errors=errors, seed=seed)
    fingerprint = settings.fingerprint()
    finished = None if overwrite else read_finished(output_dir, FORMAT, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output_dir)
        return finished
    with packed_writer.build_beside(output_dir, OURS, "a prompt set") as folder:
        rows, left_out = gather(settings)
        manifest = {"format": FORMAT[0], "version": FORMAT[1], "fingerprint": fingerprint, "seed": seed,
                    "arguments": dataclasses.asdict(settings), "left_out": left_out,
                    "splits": {split: write_split(rows[split], folder / f"{split}.jsonl", COLUMNS)
                               for split in SPLITS}}
        packed_writer.write_manifest(folder, manifest)
    return manifest


def summary(manifest):
    lines = [f"{split}: {entry['rows']:,} prompts; " + ", ".join(f"{kind} {count:,}" for kind, count
             in entry["kinds"].items()) for split, entry in manifest["splits"].items()]
    return "\n".join(lines + [f"{name}: {counts}" for name, counts in manifest["left_out"].items() if counts])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the set; replaced as a whole")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME[:LEVELS][=WEIGHT]",
                        help="chain_sum:2-3=2 gcd:1; a task's weight (1) is shared among its levels")
    parser.add_argument("--train", type=int, default=1_000, help="problems of all tasks (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="held-out problems (default: %(default)s)")
    parser.add_argument("--from_messages", help="conversations, instead or besides: file, folder or Hub name")
    parser.add_argument("--system", help="a system message for all prompts")
    parser.add_argument("--tasks_folder", help="where fetched tasks have their files (default: data/tasks)")
    parser.add_argument("--max_characters", type=int, default=2_000, help="of a question (default: %(default)s)")
    parser.add_argument("--test_share", type=float, default=0.05, help="held-out share of conversations")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict", help="what to do with bad rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is finished")
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = prepare(arguments.pop("output_dir"), **arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(manifest))


if __name__ == "__main__":
    main()
