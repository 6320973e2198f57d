"""SFT data from a model's own right answers: sample k, keep the verified and well-formed, with provenance.

    python -m data_scripts.rejection_sampling --model_name_or_path runs/grpo --tasks chain_sum:1-2 gcd:1 \\
        --problems 200 --samples 8 --keep_per_problem 2 --output_dir data/rs
    python -m data_scripts.prepare_sft --output_dir data/sft_2 --source own=data/rs/train.jsonl

Problems come from the tasks' training split, or from --source (rows with prompt or messages, reference, task,
and key where the task's key is not the prompt); a row on the test side is an error. What is kept and why
the rest is not: `rejection_rules.py`. Source of the method: DeepSeek-R1 (arXiv:2501.12948, Sec. 2.3.3).

The folder gets samples.jsonl (every completion with its verdict, as it comes), train.jsonl (rows of
`prepare_sft.py` with provenance beside them) and manifest.json (acceptance by task, reasons of refusal). An
interrupted run goes on where it was; its samples, and so the result, are those of an uninterrupted one.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
from collections import Counter
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_deepseek_r1  # noqa: F401  (registers the model type deepseek_r1)
from data_scripts.finetuning.rejection_rules import CHOICES, REASONS, Rules, refusal, take, whole_text
from data_scripts.finetuning.sft_sources import problem_key, problem_side
from data_scripts.row_files import read_rows
from recipes.checkpoint_files import hash_file, write_atomically
from recipes.conversations import as_messages, check_conversation, read_json
from recipes.evaluation import model_fingerprint, parse_task, read_completions
from recipes.logging_callbacks import git_commit
from recipes.sampling import SamplingSettings, sample_completions
from recipes.task_base import Problem
from recipes.tasks import get_task
from recipes.text_files import BadInput

logger = logging.getLogger(__name__)

SAMPLES, STATE, TRAIN, MANIFEST = "samples.jsonl", "samples.state.json", "train.jsonl", "manifest.json"
CHUNK = 64  # problems sampled between two writes of the file


def task_problems(tasks, count, seed, folder=None):
    """Training problems of each task and level, up to `count` each; a level may have fewer."""
    problems = []
    for text in tasks:
        name, levels = parse_task(text)
        task = get_task(name, folder)
        for level in levels or task.levels:
            found = list(islice(task.stream("train", seed, level), count))
            if len(found) < count:
                logger.warning("%s:%d has only %d distinct training problems", name, level, len(found))
            problems += found
    return problems


def source_problems(location, folder=None):
    """The problems of a file, folder or Hub data set.

    Raises:
        ValueError: naming the row, for missing fields, an unknown task, or a problem on the test side.
    """
    problems = []
    for number, (place, row) in enumerate(read_rows(location)):
        if isinstance(row, BadInput):
            raise row
        try:
            turns = as_messages(row.get("prompt") if isinstance(row.get("prompt"), list) else row.get("messages") or [])
            asked = next((turn["content"] for turn in turns if turn["role"] == "user"), None)
            prompt = row["prompt"] if isinstance(row.get("prompt"), str) else asked
            reference = row.get("reference") if row.get("reference") is not None else row.get("answer")
            if not prompt or reference is None or not row.get("task"):
                raise ValueError(f"prompt (or messages), reference and task are needed; it has {', '.join(row)}")
            task, metadata = get_task(row["task"], folder), dict(read_json(row.get("metadata"), "metadata") or {})
            metadata["key"] = problem_key(task.name, row.get("key") or metadata.get("key"), prompt)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        given = None if task.generated else metadata.get("split_given")  # of a set with official parts
        if (given or problem_side(task.name, metadata["key"])) == "test":
            raise ValueError(f"{place} is on the test side of task {task.name}: {str(metadata['key'])[:100]!r} may not "
                             "be trained on; leave the row out")
        metadata.setdefault("difficulty", row.get("difficulty", 0))
        problems.append(Problem(row["task"], number, prompt, str(reference), metadata))
    if not problems:
        raise ValueError(f"source {location!r} has no problem")
    return problems


def render(tokenizer, problem):
    """(token ids, whether the prompt ends inside `<think>`)."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set one with recipes.chat_format.set_chat_template")
    text = tokenizer.apply_chat_template([{"role": "user", "content": problem.prompt}], tokenize=False,
                                         add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"], text.rstrip().endswith("<think>")


def checkpoint_facts(location, model):
    """What says which weights these were: step, commit on the Hub, and a hash of the weights."""
    state = Path(location) / "trainer_state.json"
    step = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.is_file() else None
    return {"model": str(location), "step": step, "hub_commit": getattr(model.config, "_commit_hash", None),
            "weights": model_fingerprint(model)}


def _resume(folder, facts):
    """Samples that are there already, by (task, key, sample)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is None and (folder / SAMPLES).exists():
        raise ValueError(f"{folder} holds {SAMPLES} without {STATE}: it is unknown what they are of; take another "
                         "output_dir or remove the file")
    differing = [name for name in facts if before is not None and before.get(name) != facts[name]]
    if differing:
        raise ValueError(f"{folder} holds samples of another run; different: {', '.join(differing)}. Take another "
                         "output_dir, or pass --overwrite to start afresh")
    write_atomically(path, json.dumps(facts, indent=1))
    rows = read_completions(folder / SAMPLES)
    write_atomically(folder / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {(row["task"], row["key"], row["sample"]): row for row in rows}


def draw_samples(model, tokenizer, problems, settings, rules, folder, facts, progress=True):
    """Samples of all problems with their verdicts, by (task, key, sample); written as they come."""
    done = _resume(folder, facts)
    waiting = [problem for problem in problems
               if any((problem.task, problem.metadata["key"], i) not in done for i in range(settings.samples))]
    bar = tqdm(total=len(waiting) * settings.samples, desc="sample", unit="completion", disable=not progress)
    with bar, open(folder / SAMPLES, "a", encoding="utf-8") as file:
        for start in range(0, len(waiting), CHUNK):
            chunk = waiting[start:start + CHUNK]
            rendered = [render(tokenizer, problem) for problem in chunk]
            keys = [f"{problem.task}|{problem.metadata['key']}" for problem in chunk]
            found = sample_completions(model, tokenizer, [ids for ids, _ in rendered], settings, keys)
            for problem, (_, opened), completions in zip(chunk, rendered, found):
                for row in judged(problem, opened, completions, rules):
                    place = (row["task"], row["key"], row["sample"])
                    if place not in done:
                        done[place] = row
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update(len(completions))
            file.flush()
    return done


def judged(problem, opened, completions, rules):
    task = get_task(problem.task)
    for sample, completion in enumerate(completions):
        reason, verdict = refusal(completion, opened, task, problem, rules)
        yield {"task": problem.task, "difficulty": problem.metadata["difficulty"], "key": problem.metadata["key"],
               "prompt": problem.prompt, "sample": sample, "text": whole_text(completion.text, opened),
               "reason": reason, "correct": verdict.correct, "answer": verdict.answer,
               "log_prob": round(completion.log_prob, 4),  # what the other rows of a batch change is smaller
               "tokens": len(completion.token_ids), "finished": completion.finished}


def select(problems, samples, settings, rules, facts):
    """Rows of the data set and figures by task: {task: Counter}."""
    rows, figures = [], {}
    for problem in problems:
        found = [samples[problem.task, problem.metadata["key"], i] for i in range(settings.samples)]
        tally = figures.setdefault(f"{problem.task}:{problem.metadata['difficulty']}", Counter())
        tally.update(problems=1, samples=len(found), correct=sum(row["correct"] for row in found))
        tally.update(row["reason"] for row in found if row["reason"])
        accepted = [row for row in found if row["reason"] is None]
        taken, duplicates = take(accepted, rules, f"{settings.seed}|{problem.task}|{problem.metadata['key']}")
        tally.update(accepted=len(accepted), duplicates=duplicates, taken=len(taken), solved=bool(accepted))
        tally.update({"over the cap": len(accepted) - duplicates - len(taken)})
        for row in taken:
            messages = [{"role": "user", "content": problem.prompt},
                        {"role": "assistant", "content": row["text"].strip()}]
            check_conversation(messages)
            rows.append({
                "messages": messages, "source": "rejection_sampling", "task": problem.task,
                "difficulty": problem.metadata["difficulty"], "style": "sampled", "key": problem.metadata["key"],
                "model": facts["checkpoint"]["model"], "checkpoint": json.dumps(facts["checkpoint"]),
                "sampling": json.dumps(facts["sampling"]), "seed": settings.seed, "sample": row["sample"],
                "verdict": "correct", "answer": row["answer"], "reference": problem.reference,
                "log_prob": row["log_prob"]})
    return rows, figures


def table(figures):
    """Acceptance and reasons of refusal by task, as text."""
    columns = ("problems", "samples", "correct", *REASONS, "accepted", "duplicates", "over the cap", "taken", "solved")
    width = max(map(len, figures), default=4) + 1
    lines = ["task".ljust(width) + " ".join(name.rjust(max(7, len(name))) for name in columns)]
    for task, tally in {**figures, "all": sum(figures.values(), Counter())}.items():
        lines.append(task.ljust(width) + " ".join(f"{tally[name]:,}".rjust(max(7, len(name))) for name in columns))
    return "\n".join(lines)


def run(model, tokenizer, problems, settings, rules, output_dir, location="model", overwrite=False, progress=True):
    """Sample, judge, select and write; returns the manifest.

    Raises:
        ValueError: samples of other settings in the folder, or nothing accepted (the samples stay for a look).
    """
    folder = Path(output_dir)
    if overwrite:
        for name in (SAMPLES, STATE, TRAIN, MANIFEST):
            (folder / name).unlink(missing_ok=True)
    sampling = {name: value for name, value in dataclasses.asdict(settings).items() if name != "batch_size"}
    problems = list({(p.task, p.metadata["key"]): p for p in problems}.values())  # levels may share problems
    asked = hashlib.sha256(json.dumps([[p.task, p.metadata["key"], p.prompt] for p in problems]).encode()).hexdigest()
    facts = {"checkpoint": checkpoint_facts(location, model), "sampling": json.loads(json.dumps(sampling)),
             "rules": dataclasses.asdict(rules), "problems": asked}
    samples = draw_samples(model, tokenizer, problems, settings, rules, folder, facts, progress)
    rows, figures = select(problems, samples, settings, rules, facts)
    print(table(figures))
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / TRAIN, data)
    total = sum(figures.values(), Counter())
    manifest = {**facts, "code": git_commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "rows": len(rows), "sha256": hash_file(folder / TRAIN),
                "acceptance": total["accepted"] / max(total["samples"], 1),
                "tasks": {name: {**tally, "acceptance": tally["accepted"] / tally["samples"]}
                          for name, tally in figures.items()}}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    if not rows:
        raise ValueError(f"none of {total['samples']} samples was accepted ("
                         + ", ".join(f"{total[reason]} {reason}" for reason in REASONS if total[reason])
                         + f"); see {folder / SAMPLES}, take easier tasks, more samples or a better model")
    return manifest


def load(options):
    """(model, tokenizer) on the device: float32 on a CPU, bfloat16 on a GPU that has it."""
    on_gpu = torch.cuda.is_available() and not options.use_cpu
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    source = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=dtype, **source)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_name_or_path or options.model_name_or_path, **source)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--tokenizer_name_or_path", help="default: the model's")
    parser.add_argument("--revision")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=[], help="names with levels if wanted: chain_sum:1-2 gcd:1")
    parser.add_argument("--tasks_folder", help="where fetched tasks have their files (default: data/tasks)")
    parser.add_argument("--source", help="problems of your own instead: .jsonl, .parquet, folder or Hub name")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--problems", type=int, default=100, help="of each task and level (default: %(default)s)")
    parser.add_argument("--problem_seed", type=int, default=0)
    for name, default in (("samples", 8), ("max_new_tokens", 512), ("top_k", 0), ("seed", 0), ("batch_size", 32),
                          ("keep_per_problem", 2), ("max_characters", 4_000)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    for name, default in (("temperature", 1.0), ("top_p", 1.0), ("max_repetition", 0.2), ("max_foreign", 0.05)):
        parser.add_argument(f"--{name}", type=float, default=default, help="default: %(default)s")
    parser.add_argument("--choose", choices=CHOICES, default="random", help="which of the accepted ones are taken")
    parser.add_argument("--overwrite", action="store_true", help="drop the samples that are there")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    def picked(kind):
        return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)
                       if hasattr(options, field.name)})
    try:
        if bool(options.tasks) == bool(options.source):
            raise ValueError("give either --tasks or --source")
        problems = source_problems(options.source, options.tasks_folder) if options.source else task_problems(
            options.tasks, options.problems, options.problem_seed, options.tasks_folder)
        model, tokenizer = load(options)
        run(model, tokenizer, problems, picked(SamplingSettings), picked(Rules), options.output_dir,
            options.model_name_or_path, options.overwrite)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
