"""Turn conversations into plain documents for pretraining: worked problems, as a crawl of the web holds them.

    python -m data_scripts.prepare_sft --output_dir data/sft_nano --size nano
    python -m data_scripts.worked_documents --output_dir data/worked --conversations data/sft_nano
    python -m data_scripts.prepare_pretraining --output_dir data/nano_worked --size nano --max_tokens 2800000 \\
        --source worked=data/worked --keep_overlaps worked \\
        --mixture text=55,code=18,multilingual=14,mathematics=5,worked=8

Reinforcement learning from a base model (R1-Zero) finds nothing to reward unless the base now and then solves a
problem, which it can if its pretraining text had worked ones. A document is one problem, in one of these layouts:

| layout   | text                                                                                         |
|----------|----------------------------------------------------------------------------------------------|
| solution | "Question: ...", "Solution: ...", "Answer: ..."                                              |
| exercise | "Exercise." with the problem under it, the working, and the answer in the last line          |
| dialogue | a student asks, a teacher works it out and says the answer                                   |
| zero     | what chat_templates/deepseek_r1_zero.jinja makes of it, with <think> and <answer> tags       |

There are no chat tokens. `zero` is the exact text of R1-Zero's prompt and of a good completion: `encode_documents` and
the template give the same token ids (`<think>` is one token in both, an added one that is not special; `<answer>` is
spelled in pieces in both). Its answer stands bare in its tags, without "The answer is", as it is compared word for word
there. Its share decides how often a base continues the prompt in the wanted form.

Writes documents.jsonl (text, and task, difficulty, style, key, layout, licence) and manifest.json. Only training-side
problems: a row that names a task lies on the side that the task says, another on that of its hash; what the set's own
test.jsonl asks is left out too. A finished set of the same settings is not made again. Documents of one task share
the wording of the question by construction, hence `--keep_overlaps`.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import random
import re
from collections import Counter
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from data_scripts.finetuning.sft_settings import code_version
from data_scripts.finetuning.sft_sources import RowReport, conversations
from data_scripts.packing import packed_writer
from data_scripts.prepare_pretraining import parse_mixture
from data_scripts.prepare_sft import asks, side_of
from data_scripts.row_files import conversation_files
from recipes.chat_format import FOLDER
from recipes.conversations import split_reasoning
from recipes.evaluation import parse_task
from recipes.task_answers import extract_answer
from recipes.tasks import TASKS, get_task

logger = logging.getLogger(__name__)

FORMAT, VERSION = "worked-documents", 1
OURS = re.compile(r"manifest\.json|documents\.jsonl")
ROW = ("text", "task", "difficulty", "style", "key", "layout", "licence")
SHARES = {"solution": 30.0, "exercise": 30.0, "dialogue": 30.0, "zero": 10.0}


# ---------------------------------------------------------------- layouts


def _solution(question, reasoning, answer):
    working = f"Solution:\n{reasoning}\n\n" if reasoning else ""
    return f"Question: {question}\n\n{working}{answer if answer.startswith('Answer') else f'Answer: {answer}'}"


def _exercise(question, reasoning, answer):
    return "\n\n".join(filter(None, ("Exercise.", question, reasoning, answer)))


def _dialogue(question, reasoning, answer):
    working = f"Let us see.\n{reasoning}\nSo: " if reasoning else ""
    return f"Student: {question}\nTeacher: {working}{answer}"


def _zero(question, reasoning, answer):
    messages = [{"role": "user", "content": question},
                {"role": "assistant", "content": answer, "reasoning_content": reasoning or ""}]
    template = (FOLDER / "deepseek_r1_zero.jinja").read_text(encoding="utf-8")
    # bos and eos are put around every document when it is encoded
    return render_jinja_template([messages], chat_template=template, bos_token="", eos_token="")[0][0]


LAYOUTS = {"solution": _solution, "exercise": _exercise, "dialogue": _dialogue, "zero": _zero}


def bare_answer(answer, task):
    """The answer alone where the task's reading finds it in tags as it finds it in the text, else the whole text."""
    kind = get_task(task).kind
    bare = extract_answer(answer, kind)
    return bare if bare is not None and extract_answer(f"<answer>\n{bare}\n</answer>", kind) == bare else answer


def document_of(row, layout):
    """The text of a conversation of one question in a layout. An empty block of reasoning counts as none."""
    question, answer = (message["content"].strip() for message in row["messages"])
    reasoning, answer = split_reasoning(answer)
    if layout == "zero" and row["task"] in TASKS:
        answer = bare_answer(answer, row["task"])
    return LAYOUTS[layout](question, reasoning, answer)


def pick_layout(shares, seed, row):
    """A layout by `shares`, decided by the row and the seed alone: the same wherever the row stands."""
    return random.Random(f"{seed} {row['messages']}").choices(list(shares), list(shares.values()))[0]


# ---------------------------------------------------------------- settings


@dataclasses.dataclass
class Settings:
    """Everything that decides the output; kept in the manifest."""

    conversations: str
    layouts: dict
    tasks: list
    documents: int | None
    max_characters: int
    test_share: float
    errors: str
    seed: int

    def __post_init__(self):
        unknown = [name for name in self.layouts if name not in LAYOUTS]
        if unknown:
            raise ValueError(f"layouts names {unknown[0]!r}; known are {', '.join(LAYOUTS)}")
        if any(share < 0 for share in self.layouts.values()) or not sum(self.layouts.values()) > 0:
            raise ValueError(f"layouts={self.layouts} must give shares of at least 0, one of them above 0")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents={self.documents} must be at least 1, or left out for all")
        if self.max_characters < 1:
            raise ValueError(f"max_characters={self.max_characters} must be at least 1")
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test_share={self.test_share} must lie in [0, 1]")
        if self.errors not in ("strict", "skip"):
            raise ValueError(f"errors={self.errors!r} must be 'strict' or 'skip'")
        self.levels = {}
        for entry in self.tasks:
            name, levels = parse_task(entry)
            self.levels[name] = set(levels or get_task(name).levels)

        self.files = self._files()

    def _files(self):
        """(training files of the conversations, test.jsonl beside them where there is one, else None)."""
        root = Path(self.conversations).expanduser()
        if not root.exists():
            raise ValueError(f"conversations={self.conversations} does not exist; make it with python -m "
                             "data_scripts.prepare_sft, or name a .jsonl or Parquet file or a folder of these")
        held_out = (root if root.is_dir() else root.parent) / "test.jsonl"
        return conversation_files(root), held_out if held_out.is_file() else None

    def fingerprint(self):
        train, held_out = self.files
        read = [packed_writer.file_sha256(path) for path in [*train, *filter(None, [held_out])]]
        code = [Path(__file__), FOLDER / "deepseek_r1_zero.jinja"]
        code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
        content = json.dumps([dataclasses.asdict(self), read, code, code_version()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


# ---------------------------------------------------------------- rows


def refusal(row, settings, held_out):
    """Why a conversation gives no document, or None."""
    if [message["role"] for message in row["messages"]] != ["user", "assistant"]:
        return "not one question and one answer"
    if settings.levels and row["difficulty"] not in settings.levels.get(row["task"], ()):
        return "another task or level"
    if side_of(row, settings.test_share) != "train":
        return "test side"
    return "asked in test.jsonl" if asks(row) & held_out else None


def gather(settings):
    """(rows in the order of the file, counts of what was left out)."""
    _, held_out_file = settings.files
    held_out = set()
    for row in conversations(held_out_file, errors="skip") if held_out_file else ():
        held_out |= asks(row)
    report, left_out, rows, seen = RowReport(), Counter(), [], set()
    for row in conversations(settings.conversations, errors=settings.errors, report=report,
                             longest=settings.max_characters):
        reason = refusal(row, settings, held_out)
        if reason is None:
            layout = pick_layout(settings.layouts, settings.seed, row)
            text = document_of(row, layout)
            reason = "the same document" if text in seen else None
        if reason:
            left_out[reason] += 1
            continue
        seen.add(text)
        rows.append({"text": text, "layout": layout, **{name: row[name] for name in ROW if name in row}})
    random.Random(f"{settings.seed} documents").shuffle(rows)
    left_out.update({"skipped": report.skipped, "too long": report.too_long})
    if settings.documents is not None:
        left_out["more than documents"] = max(0, len(rows) - settings.documents)
    if not rows:
        raise ValueError(f"conversations={settings.conversations} gave no document: left out were "
                         + ", ".join(f"{count} {why}" for why, count in left_out.items() if count))
    return rows[:settings.documents], dict(left_out)


def write_documents(rows, path):
    """Write the file; returns its manifest entry."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in ROW}, ensure_ascii=False) + "\n")
    tasks = Counter(f"{row['task']}:{row['difficulty']}" if row["task"] else "none" for row in rows)
    layouts = Counter(row["layout"] for row in rows)
    return {"documents": len(rows), "characters": sum(len(row["text"]) for row in rows), "bytes": path.stat().st_size,
            "sha256": packed_writer.file_sha256(path), "layouts": dict(sorted(layouts.items())),
            "tasks": dict(sorted(tasks.items()))}


def provenance(settings, rows):
    """Where the conversations came from: the set's own manifest where it has one, and the rows' licences."""
    path = Path(settings.conversations).expanduser() / "manifest.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {name: found[name] for name in ("format", "fingerprint", "seed", "sources", "versions") if name in found}
    licences = sorted({row["licence"] for row in rows} - {""})
    return {"location": settings.conversations, "made_by": kept,
            "licences": licences or ["that of the conversations"]}


def read_finished(folder, fingerprint):
    """The manifest of a finished set made with these settings whose file is intact, else None."""
    manifest, path = packed_writer.manifest_made_with(folder, FORMAT, VERSION, fingerprint), None
    if manifest is not None:
        path = Path(folder) / "documents.jsonl"
        if path.is_file() and packed_writer.file_sha256(path) == manifest["documents"]["sha256"]:
            return manifest
    return None


def prepare(output_dir, *, conversations, layouts=None, tasks=(), documents=None, max_characters=1_200,
            test_share=0.05, errors="strict", seed=0, overwrite=False):
    """Make the set, or find it finished; return its manifest.

    Args:
        conversations: a set of `prepare_sft`, or any file or folder that it can read.
        layouts: {layout: share}; None for SHARES. tasks: "name[:levels]" entries to keep; empty for all rows.
        documents: at most so many, drawn by the seed; max_characters: of a turn, longer ones are left out.
        test_share: the held-out share of rows that belong to no task, as in `prepare_sft`.
    Raises:
        ValueError: impossible settings, an unusable row, or nothing left, with the way out.
    """
    shares = {name: float(share) for name, share in (layouts or SHARES).items()}
    settings = Settings(conversations=str(conversations), layouts=shares, tasks=list(tasks), documents=documents,
                        max_characters=max_characters, test_share=test_share, errors=errors, seed=seed)
    fingerprint = settings.fingerprint()
    finished = None if overwrite else read_finished(output_dir, fingerprint)
    if finished is not None:
        logger.info("%s is finished and intact: nothing to do", output_dir)
        return finished
    with packed_writer.build_beside(output_dir, OURS, "a set of documents") as folder:
        rows, left_out = gather(settings)
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "seed": seed,
                    "arguments": dataclasses.asdict(settings), "provenance": provenance(settings, rows),
                    "documents": write_documents(rows, folder / "documents.jsonl"), "left_out": left_out}
        packed_writer.write_manifest(folder, manifest)
    return manifest


def summary(manifest):
    entry = manifest["documents"]
    lines = [f"{entry['documents']:,} documents, {entry['characters']:,} characters; "
             + ", ".join(f"{name} {count:,}" for name, count in entry["layouts"].items()),
             ", ".join(f"{name} {count:,}" for name, count in entry["tasks"].items())]
    said = ", ".join(f"{count:,} {why}" for why, count in manifest["left_out"].items() if count)
    return "\n".join(lines + ([f"left out: {said}"] if said else []))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the set; replaced as a whole")
    parser.add_argument("--conversations", required=True, help="a set of prepare_sft, .jsonl, Parquet, folder")
    parser.add_argument("--layouts", help="shares, as solution=30,exercise=30,dialogue=30,zero=10 (the default)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME[:LEVELS]", help="only these (default: all)")
    parser.add_argument("--documents", type=int, help="at most so many (default: all)")
    parser.add_argument("--max_characters", type=int, default=1_200, help="of one turn (default: %(default)s)")
    parser.add_argument("--test_share", type=float, default=0.05, help="held-out share of rows that belong to no task")
    parser.add_argument("--errors", choices=("strict", "skip"), default="strict", help="what to do with bad rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="make it again even if it is finished")
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments["layouts"] = parse_mixture(arguments["layouts"]) if arguments["layouts"] else None
        manifest = prepare(arguments.pop("output_dir"), **arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(manifest))


if __name__ == "__main__":
    main()
