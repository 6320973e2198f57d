"""The page of a pipeline: a row for each stage, accuracy over stages, student and teacher, curves, experts, samples.

Read from the stages' folders (eval.json, metrics.jsonl, manifest.json, completions), so that it is right for a stage
of an earlier call as well, and for one that a launcher ran.
"""

import html
import json
from collections import Counter
from itertools import islice
from pathlib import Path

from matplotlib import pyplot as plt

from recipes.checkpoint_files import write_atomically
from recipes.distill_plots import distill_rows, distill_section
from recipes.eval_report import figures_grid, grid, pick_examples
from recipes.eval_scores import macro_average
from recipes.eval_tables import model_rows, settings_differences, task_names, with_interval
from recipes.evaluation import COMPLETIONS, read_completions
from recipes.expert_loads import balance_plot, favourite_rows, group_counts
from recipes.logging_callbacks import METRICS_FILE, read_metrics
from recipes.pipeline_graph import states_of
from recipes.report_page import COLORS, facts_table, figure_svg, page, plot
from recipes.reward_plots import UNITS
from recipes.rl_plots import reward_plot
from recipes.sizing import format_duration

REPORT_FILE = "report.html"
SAMPLES, LONGEST_SAMPLE = 3, 1_200  # of a stage; characters
OVER_TIME = (("length", "tokens of a completion"), ("reflection words", "reflection words of a completion"))


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _metrics(folder):
    return read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []


# ---------------------------------------------------------------- figures of a stage


def evaluations(folder):
    """{"before", "after"}: the tasks' results in a stage's eval.json, as far as they are there."""
    content = _read_json(Path(folder) / "eval.json")
    found = content.get("tasks") if isinstance(content, dict) else None
    ends = {"after": content} if found and "overall" in content else found  # the first: recipes/eval.py
    if not isinstance(ends, dict):  # a file of a command of one's own may hold anything
        return {}
    return {end: ends[end] for end in ("before", "after") if _is_result(ends.get(end))}


def _is_result(value):
    """Whether this is what an evaluation on tasks writes."""
    if not isinstance(value, dict) or not isinstance(value.get("tasks"), dict):
        return False
    parts = [*value["tasks"].values(), value.get("overall")]
    return len(parts) > 1 and all(isinstance(part, dict) and "pass@1" in part for part in parts)


def read_scores(folder):
    """{task: {"value", "low", "high"}} of pass@1 in the end, with "mean of tasks" where there are several."""
    result = evaluations(folder).get("after")
    if result is None:
        return {}
    scores = {name: task["pass@1"] for name, task in result["tasks"].items()}
    return scores | ({"mean of tasks": result["overall"]["pass@1"]} if len(scores) > 1 else {})


def outcome(folder):
    """What a stage came to, in words: pass@1, else bits per byte, pairs told apart or samples kept; "" without one."""
    folder = Path(folder)
    scores = read_scores(folder)
    if scores:
        best = scores.get("mean of tasks") or next(iter(scores.values()))
        return with_interval(best)
    content, manifest = _read_json(folder / "eval.json"), _read_json(folder / "manifest.json")
    if not (isinstance(content, dict) and isinstance(manifest, dict)):
        return ""
    if bits := content.get("weights", {}).get("bits_per_byte"):
        return f"{bits:.2f} bits per byte"
    if pairs := content.get("preferences", {}).get("accuracy"):
        return f"pairs told apart: {with_interval(pairs)}"
    if (accepted := manifest.get("acceptance")) is not None:
        return f"{accepted:.0%} of samples kept"
    return ""


def size_of(record):
    """The bytes of a stage's outputs, checkpoints not counted."""
    outputs = record.get("outputs")
    return f"{sum(outputs.values()) / 1e6:,.1f} MB" if outputs else "-"


def amount(folder):
    """How much a stage trained on or made, in words."""
    folder = Path(folder)
    tokens = sum(record.get("tokens", 0) for record in _metrics(folder) if record.get("kind") == "train")
    if tokens:
        return f"{tokens:,} tokens"
    manifest = _read_json(folder / "manifest.json")
    train = manifest.get("splits", {}).get("train", {})
    for name, unit in (("tokens", "tokens"), ("rows", "rows")):
        if count := train.get(name, manifest.get(name)):
            return f"{count:,} {unit}"
    result = evaluations(folder).get("after")
    return f"{sum(task['problems'] for task in result['tasks'].values()):,} problems" if result else ""


def stage_results(graph, home, branch=None):
    """[result with the stage's "name"] in order; a start model without one gets the "before" of the stage after it."""
    found, names = {}, [name for name in graph.stages if graph.in_branch(name, branch)]
    for name in names:
        if home.records.get(name, {}).get("state") != "done":
            continue
        ends = evaluations(home.path / name)
        if "after" in ends:
            found[name] = ends["after"]
        starts = [r.stage for flag, r in graph.stages[name].references(graph.names) if flag == "model_name_or_path"]
        for start in starts if "before" in ends else ():
            found.setdefault(start, ends["before"])
    return [found[name] | {"name": _label(graph.stages[name])} for name in names if name in found]


def _label(stage):
    """A stage's name in figures; an evaluation says of what."""
    model = stage.inputs.get("model_name_or_path")
    return f"{stage.name} of {model}" if stage.kind == "eval" and model else stage.name


# ---------------------------------------------------------------- parts of the page


def _text(value):
    return html.escape(str(value))


def overview(graph, home):
    """(header, rows): a row a stage, what one looks for first; the flags of inputs stand in the commands."""
    rows, states = [], states_of(graph, home)
    for name, stage in graph.stages.items():
        record = home.records.get(name, {})
        reads = ["/".join(filter(None, (reference.stage, reference.rest)))
                 for _, reference in stage.references(graph.names)
                 if reference.stage or "/" in reference.rest or reference.rest.startswith("hub:")]
        branches = f" [{', '.join(stage.branches)}]" if stage.branches else ""
        rows.append([
            f"{name}{branches}", states[name], format_duration(record["seconds"]) if "seconds" in record else "-",
            outcome(home.path / name) or "-", amount(home.path / name) or "-", ", ".join(dict.fromkeys(reads)) or "-",
            stage.config.name if stage.config else stage.module or stage.kind, size_of(record),
        ])  # fmt: skip
    branch = " [branch]" if graph.branch_names() else ""
    header = [f"stage{branch}", "state", "time", "pass@1 %, or else", "trained on, made", "reads", "config", "output"]
    return header, rows


def _error_bars(figures):
    return [[100 * (f["value"] - f["low"]) for f in figures], [100 * (f["high"] - f["value"]) for f in figures]]


def accuracy_plot(results):
    """SVG: pass@1 over stages, a line a task and the mean of the tasks that all stages were asked, with intervals."""
    figure, axes = plt.subplots(figsize=(max(6.2, 1.3 * len(results)), 4.0), layout="constrained")
    names = task_names(results)
    lines = {name: [(place, result["tasks"][name]["pass@1"]) for place, result in enumerate(results)
                    if name in result["tasks"]] for name in names}  # fmt: skip
    common = [name for name in names if len(lines[name]) == len(results)]
    if len(common) > 1:
        lines[f"mean of {len(common)} tasks"] = [
            (place, macro_average([result["tasks"][name]["pass@1"] for name in common]))
            for place, result in enumerate(results)
        ]
    for index, (name, points) in enumerate(lines.items()):
        is_mean = name not in names
        shift = 0 if is_mean else 0.24 * ((index + 0.5) / len(names) - 0.5)  # bars at one place are told apart
        axes.errorbar([place + shift for place, _ in points], [100 * f["value"] for _, f in points],
                      yerr=_error_bars([f for _, f in points]), label=name, marker="o", markersize=3, capsize=2,
                      color="black" if is_mean else COLORS[index % len(COLORS)],
                      linestyle=("-", "--", ":", "-.")[0 if is_mean else index // len(COLORS) % 4],
                      linewidth=2.4 if is_mean else 1.2, elinewidth=0.7)  # fmt: skip
    axes.set_xticks(range(len(results)), [result["name"] for result in results])
    axes.set_ylabel("pass@1, %")
    highest = max(100 * figure["high"] for points in lines.values() for _, figure in points)
    axes.set_ylim(-0.03 * highest - 0.1, min(103, 1.1 * highest + 0.1))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure_svg(figure)


def _accuracy_section(graph, home):
    body = ""
    for branch in graph.branch_names() or [None]:
        results = stage_results(graph, home, branch)
        if not results:
            continue
        title = "Accuracy over stages" + (f": branch {branch}" if branch else "")
        caption = "Strict pass@1 on held-out problems with 95 % intervals, in the order in which stages run. "
        caption += "A model that no stage evaluated has the "
        caption += "figures that the stage after it took before training."
        body += f"<h2>{_text(title)}</h2>" + figures_grid([(accuracy_plot(results), caption)])
        notes = ["Brackets: 95 % intervals over problems."]
        notes += [f"Differs between stages: {line}." for line in settings_differences(results)]
        body += f"<section>{grid(*model_rows(results))}<p class=note>{_text(' '.join(notes))}</p></section>"
    return body


def _distillation_section(graph, home):
    """Student beside teacher: accuracy and the share kept, sizes, speeds."""
    body = ""
    for name in graph.stages:
        evaluation = _read_json(home.path / name / "eval.json")
        if isinstance(evaluation, dict) and (rows := distill_rows(evaluation)):
            facts = [row for row in rows if "share of" not in row[0]] if distill_section(evaluation) else rows
            body += distill_section(evaluation) or f"<h2>Student and teacher: {_text(name)}</h2>"
            body += f"<section>{facts_table(facts)}</section>"
    return body


def _series(records, name):
    points = [(record["step"], record[name]) for record in records
              if isinstance(record.get(name), (int, float)) and "step" in record]  # fmt: skip
    return [list(column) for column in zip(*points)] if points else None


def _losses_section(graph, home):
    """The loss of each stage that is taught, in training and held out; that of RL says nothing by itself."""
    made = []
    for name, stage in graph.stages.items():
        records = _metrics(home.path / name)
        train, evals = ([r for r in records if r.get("kind") == kind] for kind in ("train", "eval"))
        key = next((key for key in ("next-token loss", "loss") if _series(train, key)), None)
        if key is None or any("reward" in record for record in train):
            continue
        found = (("training", _series(train, key)), ("held out", _series(evals, "eval loss")))
        curves = [(label, *series) for label, series in found if series]
        caption = f"{name}: {key} in training" + (" and on held-out data." if len(curves) > 1 else ".")
        made.append((plot(curves, UNITS.get(stage.kind, "nats per token")), caption))
    return f"<h2>Losses</h2>{figures_grid(made)}" if made else ""


def _curves_section(graph, home):
    """Rewards by stage; lengths and reflection words of all stages that sample."""
    made, series = [], {name: [] for name, _ in OVER_TIME}
    for name in graph.stages:
        train = [record for record in _metrics(home.path / name) if record.get("kind") == "train"]
        if any("reward" in record for record in train):
            caption = f"{name}: mean reward of the completions, in training and on held-out prompts."
            made.append((reward_plot(_metrics(home.path / name)), caption))
        for key, _ in OVER_TIME:
            series[key] += [(name, *points)] if (points := _series(train, key)) else []
    for key, label in OVER_TIME:
        if series[key]:
            stages = ", ".join(name for name, *_ in series[key])
            made.append((plot(series[key], label), f"{label.capitalize()}, mean of a rollout: {stages}."))
    return f"<h2>Reinforcement learning</h2>{figures_grid(made)}" if made else ""


def _expert_section(graph, home):
    """The spread of tokens over experts: in training by stage, and of held-out text by kind."""
    curves, made, tables = [], [], ""
    for name in graph.stages:
        points = _series(_metrics(home.path / name), "load max/mean")
        curves += [(name, *points)] if points else []
        evaluation = _read_json(home.path / name / "eval.json")
        if isinstance(evaluation, dict) and (table := evaluation.get("expert_load")):
            kinds = group_counts(table, {})
            made.append((balance_plot(kinds), f"{name}: largest over mean load by layer, of held-out text."))
            tables += f"<section><p class=note>{_text(name)}: where text is sent most, in times the expert's even "
            tables += f"share.</p>{facts_table(favourite_rows(kinds))}</section>"
    if curves:
        svg = plot(curves, "expert load, max / mean", [("even", 1.0)])
        made.insert(0, (svg, "Load of the least even layer in training, by stage."))
    return f"<h2>Experts</h2>{figures_grid(made)}{tables}" if made else ""


def _cut(text):
    text = str(text)
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} ..."


def _row_sample(row):
    """(note, prompt, text) of a line of a data set."""
    turns = row.get("messages") or [*(row.get("prompt") or []), *(row.get("chosen") or [])]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        answer = "\n".join(turn["content"] for turn in turns[1:])
        return row.get("source") or row.get("task") or "row", turns[0]["content"], answer
    return "row", "", row.get("text") or json.dumps(row, ensure_ascii=False)


def samples_of(folder):
    """[(note, prompt, completion)] of a stage, two or three that one can read: answers, samples, or rows of data."""
    folder = Path(folder)
    rows = next((found for place in (folder / "eval_after", folder)
                 if (found := read_completions(place / COMPLETIONS))), [])  # fmt: skip
    if rows:
        shown = [row for chosen in pick_examples(rows, 2).values() for row in chosen][:SAMPLES]
        return [(f"{row['task']}, {row['outcome']}, reference {row['reference']}", row["prompt"], row["completion"])
                for row in shown]  # fmt: skip
    records = [record for record in _metrics(folder) if record.get("kind") == "samples"]
    if records:
        return [(f"step {records[-1]['step']}", sample["prompt"], sample["completion"])
                for sample in records[-1]["samples"][:SAMPLES]]  # fmt: skip
    if (folder / "train.jsonl").is_file():
        with open(folder / "train.jsonl", encoding="utf-8") as lines:
            return [_row_sample(json.loads(line)) for line in islice(lines, 2)]
    return []


def _samples_section(graph, home):
    body = ""
    for name in graph.stages:
        shown = samples_of(home.path / name)
        parts = "".join(f"<p class=note>{_text(note)}</p><pre><span class=prompt>{_text(_cut(prompt))}</span>\n"
                        f"{_text(_cut(completion))}</pre>" for note, prompt, completion in shown)  # fmt: skip
        opened = " open" if (home.path / name / "eval_after").is_dir() else ""  # a model that answers
        body += f"<details class=card{opened}><summary>{_text(name)}</summary>{parts}</details>" if parts else ""
    return f"<h2>Samples</h2>{body}" if body else ""


def _links(graph, home):
    found = [name for name in graph.stages if (home.path / name / REPORT_FILE).is_file()]
    links = ", ".join(f"<a href='{_text(name)}/report.html'>{_text(name)}</a>" for name in found)
    return f"<p class=note>Pages of the stages, with curves, settings and samples: {links}</p>" if links else ""


def _commands(graph, home):
    rows = [(name, home.records[name].get("command", "")) for name in graph.stages if name in home.records]
    errors = [(name, record["error"]) for name, record in home.records.items()
              if record.get("state") == "failed" and name in graph.stages]  # fmt: skip
    failed = f"<h2>Failed</h2><section>{facts_table(errors)}</section>" if errors else ""
    body = f"<details><summary>each stage alone</summary>{facts_table(rows)}</details>"
    return failed + (f"<h2>Commands</h2><section>{body}</section>" if rows else "")


def build_report(graph, home):
    """The page as text; `home`: the `PipelineFolder`."""
    seconds = sum(record.get("seconds", 0) for name, record in home.records.items() if name in graph.stages)
    states = Counter(states_of(graph, home).values())
    others = "".join(f", {count} {state}" for state, count in states.items() if state != "done")
    body = (f"<h1>{_text(graph.title)}</h1><p class=note>{states['done']} of {len(graph.stages)} stages are "
            f"done{others}; {format_duration(seconds)} in all.</p><h2>Stages</h2>"
            f"<section>{grid(*overview(graph, home))}{_links(graph, home)}</section>")  # fmt: skip
    for part in (_accuracy_section, _distillation_section, _losses_section, _curves_section, _expert_section,
                 _samples_section, _commands):  # fmt: skip
        body += part(graph, home)
    return page(_text(graph.title), body)


def write_report(graph, home):
    """report.html of the pipeline's folder; returns its path."""
    write_atomically(home.path / REPORT_FILE, build_report(graph, home))
    return home.path / REPORT_FILE
