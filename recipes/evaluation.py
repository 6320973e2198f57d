"""Evaluation of a model in memory: verified tasks, and held-out text (`evaluate_text`).

    settings = EvaluationSettings(["chain_sum", "gcd:1-3"], problems=100,
                                  sampling=SamplingSettings(temperature=0.6, samples=4))
    result = evaluate_tasks(model, tokenizer, settings, output_dir="runs/eval")
    result["overall"]["pass@1"]                               # {"value", "low", "high"}: 95 % interval

With an output folder every completion is a line of `completions.jsonl` as soon as it is scored: an interrupted
evaluation goes on where it was, with any number of processes and any batch size. What a completion is does not
depend on these (`recipes.sampling`), nor do the figures (`recipes.eval_scores`).
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from recipes.checkpoint_files import write_atomically
from recipes.eval_scores import row_place, score_row, summarise_tasks
from recipes.eval_text import evaluate_text
from recipes.sampling import (
    Request,
    SamplingSettings,
    complete_requests,
    context_length,
    end_token_ids,
    token_budget,
    whole_model,
)
from recipes.task_base import Problem
from recipes.tasks import get_task

__all__ = ["EvaluationSettings", "SamplingSettings", "clear_completions", "evaluate_tasks", "evaluate_text",
           "load_problems", "parse_task", "read_completions", "render_prompt"]

CONFIG_DETAILS = ("use_cache", "dtype", "transformers_version", "_name_or_path")  # a model is the same without them
COMPLETIONS, STATE = "completions.jsonl", "completions.state.json"
PLAIN_PROMPT, PLAIN_STOP = "Question: {question}\nAnswer:", "\nQuestion:"


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked, how it is put and what counts.

    Attributes:
        tasks: names of `recipes.tasks`, with difficulties if wanted: "gcd", "gcd:3", "gcd:1-3".
        problems: of each task, shared evenly by its difficulties; `seed` chooses them.
        difficulties: for tasks named without. None: all of a task's, in turn.
        prompt_format: "chat" (the tokenizer's template) or "plain" ("Question: ... Answer:", for base models;
            a completion then ends where the next question would begin).
        thinking: asks the template for a prompt that ends inside `<think>`, where it knows the word.
        strict: an answer in a wrong format is wrong (see `recipes.eval_scores`).
    """

    tasks: list
    split: str = "test"
    seed: int = 0
    problems: int = 100
    difficulties: list | None = None
    prompt_format: str = "chat"
    system_prompt: str | None = None
    thinking: bool = True
    strict: bool = True
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    tasks_folder: str | None = None

    def __post_init__(self):
        if not self.tasks or isinstance(self.tasks, str):
            raise ValueError(f"tasks={self.tasks!r} must be a list of task names, e.g. ['chain_sum', 'gcd:1-3']")
        if self.problems < 1:
            raise ValueError(f"problems={self.problems} must be at least 1")
        if self.prompt_format not in ("chat", "plain"):
            raise ValueError(f"prompt_format={self.prompt_format!r} must be 'chat' or 'plain'")
        if len(set(self.difficulties or ())) < len(self.difficulties or ()):
            raise ValueError(f"difficulties={self.difficulties} names one twice; leave it out once")
        names = [parse_task(text)[0] for text in self.tasks]
        for name in names:
            get_task(name)
            if names.count(name) > 1:
                raise ValueError(f"tasks names {name!r} more than once; give one range of difficulties, "
                                 f"for instance {name}:1-3")

    def facts(self):
        """Everything that decides the result: the settings without those that only decide its speed."""
        facts = json.loads(json.dumps(asdict(self)))
        del facts["sampling"]["batch_size"], facts["tasks_folder"]
        return facts


def parse_task(text):
    """"gcd:1-3" -> ("gcd", [1, 2, 3]); "gcd" -> ("gcd", None)."""
    name, colon, levels = str(text).partition(":")
    low, dash, high = levels.partition("-")
    if not colon:
        return name, None
    if not low.isdigit() or (dash and not high.isdigit()) or int(high or low) < int(low):
        raise ValueError(f"task {text!r}: after the colon stands one difficulty or a range, as in gcd:3 or gcd:1-3")
    return name, list(range(int(low), int(high or low) + 1))


def load_problems(settings):
    """[(task, Problem)] in a fixed order: `problems` of each task, the same for every model."""
    found = []
    for text in settings.tasks:
        name, levels = parse_task(text)
        levels, task = settings.difficulties if levels is None else levels, get_task(name, settings.tasks_folder)
        if levels is None:
            found += [(task, p) for p in task.problems(settings.split, settings.seed, None, settings.problems)]
            continue
        for place, level in enumerate(levels):
            size = settings.problems // len(levels) + (place < settings.problems % len(levels))
            found += [(task, p) for p in task.problems(settings.split, settings.seed, level, size)]
    return found


def render_prompt(tokenizer, problem, settings):
    """(text, token ids, whether it ends inside `<think>`) of a problem's prompt."""
    if settings.prompt_format == "plain":
        head = f"{settings.system_prompt}\n\n" if settings.system_prompt else ""
        text = head + PLAIN_PROMPT.format(question=problem.prompt)
        ids = tokenizer(text)["input_ids"]
        return text, ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids, False
    if not tokenizer.chat_template:
        raise ValueError(f"prompt_format='chat' needs a chat template, which the tokenizer {tokenizer.name_or_path!r} "
                         "lacks; use prompt_format='plain', or give one with --chat_template")
    messages = [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
    text = tokenizer.apply_chat_template(  # the two names that templates have for it
        [*messages, {"role": "user", "content": problem.prompt}], tokenize=False, add_generation_prompt=True,
        thinking=settings.thinking, enable_thinking=settings.thinking)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"], text.rstrip().endswith("<think>")


class Unit(NamedTuple):
    """One completion to be had: a sample of a problem."""

    task: object
    problem: Problem
    prompt: str
    opened: bool
    request: Request

    @property
    def place(self):
        return self.problem.task, self.problem.metadata["difficulty"], self.problem.index, self.request.sample


def _units(tokenizer, settings):
    units = []
    for task, problem in load_problems(settings):
        text, ids, opened = render_prompt(tokenizer, problem, settings)
        key = "|".join(map(str, (problem.task, problem.metadata["difficulty"], problem.metadata["key"])))
        units += [Unit(task, problem, text, opened, Request(tuple(ids), key, sample))
                  for sample in range(settings.sampling.samples)]
    return units


# ---------------------------------------------------------------- what is already there


def model_fingerprint(model):
    """A hash of the config and the weights: 64 values of each tensor, so that a step of training changes it."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in CONFIG_DETAILS}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor) and tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().flatten()
            picked = flat[torch.linspace(0, len(flat) - 1, min(64, len(flat)), dtype=torch.float64).long()]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(picked.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(model, tokenizer, units, settings):
    prompts = hashlib.blake2b(digest_size=16)
    for unit in units:
        prompts.update(f"{unit.request.key}|{unit.request.prompt_ids}".encode("utf-8", "surrogatepass"))
    return {"model": model_fingerprint(model), "end_tokens": end_token_ids(model, tokenizer),
            "prompts": prompts.hexdigest(), "settings": settings.facts()}


def read_completions(path):
    """The rows of a file of completions; a last line that a kill cut off, be it in a character, is left out."""
    rows, lines = [], Path(path).read_bytes().split(b"\n") if Path(path).is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is damaged ({error}); remove the line to have that completion "
                                 "made again") from error
    return rows


def _check_state(folder, facts):
    """ValueError unless the folder is new or holds completions of the same model, prompts and settings."""
    path = folder / STATE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is None and (folder / COMPLETIONS).exists():
        raise ValueError(f"{folder} holds {COMPLETIONS} without {path.name}: it is unknown what they are of; take "
                         "another output_dir or remove the file")
    differing = [name for name in facts if before is not None and before.get(name) != facts[name]]
    if "settings" in differing:
        old, new = before["settings"], facts["settings"]
        differing += [f"{name} (was {old.get(name)!r}, is {new[name]!r})" for name in new if old.get(name) != new[name]]
        differing.remove("settings")
    if differing:
        raise ValueError(f"{folder} holds completions of another evaluation; different: {', '.join(differing)}. Take "
                         "another output_dir, restore what has changed, or start afresh with overwrite_output_dir=true")


def _dump(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _merge(folder):
    """All completions in the folder as rows in order, once each, in one file; files of single processes go."""
    files = [folder / COMPLETIONS, *sorted(folder.glob("completions.rank*.jsonl"))]
    rows = {row_place(row): row for path in files for row in read_completions(path)}
    rows = [rows[place] for place in sorted(rows)]
    write_atomically(folder / COMPLETIONS, _dump(rows))
    for path in files[1:]:
        path.unlink()
    return rows


def clear_completions(folder):
    """Remove what an evaluation would resume from; other files stay."""
    folder = Path(folder)
    for path in [folder / STATE, folder / COMPLETIONS, *folder.glob("completions.rank*.jsonl")]:
        path.unlink(missing_ok=True)


def _resume(folder, facts, accelerator):
    """Rows that are there already, the same list on every process; an error is raised on every process."""
    state = [None, None]
    if accelerator is None or accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_state(folder, facts)
            write_atomically(folder / STATE, json.dumps(facts, indent=1))
            state = [_merge(folder), None]
        except (ValueError, OSError) as error:
            state = [None, error]
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(state)
    if state[1] is not None:
        raise state[1]
    return state[0]


# ---------------------------------------------------------------- evaluation


def _check_units(model, units, sampling):
    """What would fail later, at once and on every process: prompts that do not fit, verifiers that cannot run."""
    context = context_length(model)
    for request in {unit.request.prompt_ids: unit.request for unit in units}.values():
        token_budget(request.prompt_ids, sampling, context)
    for task, problem in {unit.problem.task: (unit.task, unit.problem) for unit in units}.values():
        task.score("1", problem)


def _run(model, tokenizer, units, settings, sampling, path, bar):
    """Rows of this process's units; each batch is scored and written as it comes."""
    rows = []

    def keep(found):
        new = [score_row(unit.task, unit.problem, unit.prompt, completion, unit.request.sample, unit.opened,
                         settings.strict) for unit, completion in ((units[place], c) for place, c in found)]
        rows.extend(new)
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(_dump(new))
        bar.update(len(new))

    complete_requests(model, tokenizer, [unit.request for unit in units], sampling, keep)
    return rows


def evaluate_tasks(model, tokenizer, settings, output_dir=None, name="model", accelerator=None, progress=True):
    """Figures of a model on tasks, a dict of JSON values; the same on every process.

    Args:
        output_dir: keeps completions there and resumes from those that are there.
        accelerator: shares the work among its processes; all of them must call this with equal arguments.
    Returns:
        {"name", "settings", "tasks": {task: figures}, "overall", "calibration", "per_problem", "prompt_example",
        "timing"}; figures as `recipes.eval_scores.summarise` makes them. Runs that differ in batch size or
        processes differ in "timing", and where confidence is a log-probability in the last digits of calibration.
    Raises:
        ValueError: an unknown task, a prompt that fills the context, completions of another evaluation.
    """
    model = whole_model(model)
    sampling = settings.sampling
    if settings.prompt_format == "plain":
        sampling = SamplingSettings(**{**asdict(sampling), "stop": (*sampling.stop, PLAIN_STOP)})
    units = _units(tokenizer, settings)
    _check_units(model, units, sampling)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    folder = None if output_dir is None else Path(output_dir)
    before = [] if folder is None else _resume(
        folder, _fingerprint(model, tokenizer, units, settings), accelerator)
    done = {row_place(row) for row in before}
    # By length, dealt out in turn: every process gets prompts of all lengths.
    waiting = sorted((unit for unit in units if unit.place not in done),
                     key=lambda unit: (-len(unit.request.prompt_ids), unit.place))[rank::world]
    path = None if folder is None else folder / (COMPLETIONS if rank == 0 else f"completions.rank{rank}.jsonl")
    started = time.perf_counter()
    with tqdm(total=len(waiting), desc=name, unit="completion", disable=not progress or rank > 0) as bar:
        rows = _run(model, tokenizer, waiting, settings, sampling, path, bar)
    rows = gather_object(rows) if world > 1 else rows
    seconds, tokens = time.perf_counter() - started, sum(row["tokens"] for row in rows)
    rows = sorted(before + rows, key=row_place)
    if folder is not None and rank == 0:
        _merge(folder)
    order = [parse_task(text)[0] for text in settings.tasks]
    rows.sort(key=lambda row: order.index(row["task"]))
    return {"name": name, "settings": settings.facts(), **summarise_tasks(rows), "per_problem": per_problem(rows),
            "prompt_example": units[0].prompt,
            "timing": {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9),
                       "processes": world, "resumed": len(before)}}


def per_problem(rows):
    """{task: {digest of the problem: share of its samples that are right}}: what paired comparisons need."""
    found = {}
    for row in rows:
        digest = hashlib.blake2b(f"{row['difficulty']}|{row['key']}".encode("utf-8", "surrogatepass"), digest_size=6)
        found.setdefault(row["task"], {}).setdefault(digest.hexdigest(), []).append(row["correct"])
    return {task: {digest: sum(rights) / len(rights) for digest, rights in problems.items()}
            for task, problems in found.items()}
