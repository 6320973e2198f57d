"""The items of evaluation sets, as texts to look for in a corpus: tasks of recipes/tasks.py, files, Hub data sets."""

import re
from dataclasses import dataclass
from pathlib import Path

from data_scripts.row_files import ENDINGS, READERS, _read_file
from recipes.task_packaged import COMMAND
from recipes.tasks import TASKS, get_task
from recipes.text_files import BadInput

QUESTIONS = ("question", "problem", "prompt", "instruction", "input", "query", "text")
ANSWERS = ("answer", "solution", "reference", "output", "completion", "target", "canonical_solution")
CONTEXTS = ("passage", "context", "article", "story")
ASKED = re.compile(r"\nQuestion: (.*)\? Answer yes or no\.\Z", re.S)


@dataclass(frozen=True)
class Item:
    """One question: `parts` are the texts any of which gives it away, `answer` goes with questions that are short."""

    set: str
    id: str
    parts: tuple
    answer: str = ""


def _task_item(problem):
    options = dict(problem.metadata.get("options") or [])
    parts, answer = [problem.prompt], options.get(problem.reference, problem.reference)
    if options:  # a corpus may hold the question without its options, or with others
        first = next(iter(options))
        parts.append(problem.prompt.rpartition(f"\n{first}. ")[0])
    elif asked := ASKED.search(problem.prompt):
        parts.append(asked[1])
    identifier = str(problem.metadata.get("id") or problem.index)
    return Item(problem.task, identifier, tuple(filter(str.strip, parts)), str(answer))


def task_items(settings):
    """{task: its test items}. Of generated tasks the first `problems`: those that recipes/eval.py asks come first.

    Raises:
        ValueError: fetched tasks whose files are not there, with the command that fetches them.
    """
    names = list(TASKS) if settings.tasks is None else list(settings.tasks)
    found, missing = {}, []
    for name in names:
        task = get_task(name, settings.tasks_dir)
        try:
            if not task.generated and settings.without_packaged:
                continue
            size = settings.problems if task.generated else None
            found[name] = []
            for problem in task.stream("test", settings.problem_seed):
                found[name].append(_task_item(problem))
                if len(found[name]) == size:
                    break
        except FileNotFoundError:
            missing.append(name)
    if missing:
        raise ValueError(f"decontamination needs the fetched evaluation sets {', '.join(missing)}: run `"
                         f"{COMMAND.format(folder=settings.tasks_dir)}`, or pass --without_packaged")
    return found


def locate(location):
    """(file or None, Hub name, configuration, split, column) of NAME[:config[:split[:column]]]."""
    parts = str(location).split(":")
    if Path(parts[0]).expanduser().exists():
        return Path(parts[0]).expanduser(), parts[0], "", "", parts[1] if len(parts) > 1 else ""
    if parts[0].endswith((*READERS, ".csv", ".txt")) or parts[0].startswith((".", "/", "~")):
        raise ValueError(f"benchmark {location!r}: there is no file {parts[0]}")
    if len(parts) > 4 or not parts[0]:
        raise ValueError(f"benchmark {location!r} must be a file, FILE:COLUMN or NAME[:config[:split[:column]]]")
    return None, *(parts + [""] * 3)[:4]


def _rows(location):
    path, name, configuration, split, _ = locate(location)
    if path is not None:
        if path.is_dir() or not path.name.lower().endswith(ENDINGS):
            raise ValueError(f"benchmark {location!r}: {path} must be a file that ends in {', '.join(ENDINGS)}")
        yield from _read_file(path)
        return
    import datasets

    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "test", streaming=True)
        for number, row in enumerate(rows):
            yield f"{location} row {number}", row
    except (OSError, ValueError) as error:  # what datasets raises for names, splits and connections
        raise ValueError(f"benchmark {location!r} cannot be read: {' '.join(str(error).split())[:300]}; name a local "
                         "file if there is no network") from error


def _text(value):
    """A column's text: of a list the texts of its entries, of conversations their contents."""
    if isinstance(value, dict):
        value = value.get("content", list(value.values()))
    if isinstance(value, (list, tuple)):
        return "\n".join(filter(None, map(_text, value)))
    return "" if value is None else str(value)


def benchmark_items(location):
    """The items of one benchmark: the named column, or the question (after its context, and alone).

    Raises:
        ValueError: an unreadable location, a bad row, or no column that is known, naming those present.
    """
    path, column, items = locate(location)[0], locate(location)[-1], []
    for number, (place, row) in enumerate(_rows(location)):
        if isinstance(row, BadInput):
            raise ValueError(f"benchmark {location!r}: {row}")
        name = column or next((name for name in QUESTIONS if _text(row.get(name)).strip()), None)
        if name is None or name not in row:
            raise ValueError(f"benchmark {location!r}: {place} has no column {column or ' or '.join(QUESTIONS)}; "
                             f"present are {', '.join(row)}; name one: {path or 'NAME:config:split'}:COLUMN")
        question = _text(row[name])
        context = next((_text(row[other]) for other in CONTEXTS if other != name and _text(row.get(other))), "")
        answer = next((_text(row[other]) for other in ANSWERS if other != name and row.get(other) is not None), "")
        parts = filter(str.strip, (question, context))
        items.append(Item(str(location), str(row.get("id", number)), tuple(parts), answer))
    if not items:
        raise ValueError(f"benchmark {location!r} has no rows")
    return items


def evaluation_items(settings):
    """{set: [Item]} of all tasks and benchmarks of the settings."""
    found = task_items(settings)
    for location in settings.benchmarks:
        found[str(location)] = benchmark_items(location)
    return found
