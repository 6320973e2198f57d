"""The figures of eval.json files as rows of text: one model, or several side by side."""

import json
from pathlib import Path

from recipes.eval_scores import macro_average
from recipes.intervals import paired_difference_interval


def read_results(paths):
    """The contents of eval.json files (or of their folders), with names made distinct.

    Raises:
        ValueError: for a file that recipes/eval.py did not write.
    """
    results, names = [], {}
    for path in map(Path, paths):
        path = path / "eval.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"--compare {path}: no such file; name eval.json files or their folders")
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--compare {path} is no JSON ({error}); name eval.json files or their folders") from error
        if not isinstance(result, dict) or "name" not in result or not ("tasks" in result or "text" in result):
            raise ValueError(f"--compare {path} is no result of recipes/eval.py (it has no tasks and no text)")
        names[result["name"]] = count = names.get(result["name"], 0) + 1
        results.append(result | ({"name": f"{result['name']} ({count})"} if count > 1 else {}))
    return results


def percent(value):
    return f"{100 * value:.1f}"


def with_interval(figure):
    """{"value", "low", "high"} -> "62.0 [51.4, 71.6]" in per cent."""
    return f"{percent(figure['value'])} [{percent(figure['low'])}, {percent(figure['high'])}]"


def aligned(header, rows):
    """Rows of text in columns, the first one left, the others right."""
    lines = [list(map(str, line)) for line in [header, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) if not column else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def task_rows(result):
    """(header, rows) of one result: a row a task, then the mean over tasks."""
    samples = max(task["samples"] for task in result["tasks"].values())
    header = ["task", "problems", "pass@1 %", "lenient %"]
    header += [f"pass@{samples} %", f"maj@{samples} %"] if samples > 1 else []
    header += ["format %", "cut off %", "unreadable %", "tokens"]
    rows = []
    for name, task in [*result["tasks"].items(), ("mean of tasks", result["overall"])]:
        row = [name, task.get("problems", ""), with_interval(task["pass@1"]), percent(task["lenient"]["value"])]
        if samples > 1:
            best = task.get("pass@k", {}).get(str(samples))
            row += [with_interval(best) if best else "", with_interval(task["maj@n"])]
        rows.append([*row, *(percent(task[key]) for key in ("format", "truncated", "unparsable")),
                     f"{task['tokens']['mean']:.0f}"])
    return header, rows if len(result["tasks"]) > 1 else rows[:-1]


def text_rows(result):
    """[(label, text)] of held-out text."""
    text = result["text"]
    size = f"{text['documents']:,} documents, {text['bytes']:,} bytes, {text['tokens']:,} tokens"
    rows = [("bits per byte", f"{text['bits_per_byte']:.4f}"), ("perplexity per token", f"{text['perplexity']:,.2f}"),
            ("text", f"{text['dataset']} ({text['split']}), {size}, windows of {text['window']}")]
    if len(text["sources"]) > 1:
        rows += [(f"bits per byte, {name}", f"{value:.4f}") for name, value in text["sources"].items()]
    return rows


def context_note(result):
    """[a sentence] where completions had less room than asked for, else []."""
    share = result["overall"]["shortened"]
    return [f"{percent(share)} % of completions were cut off early: the model's context was full"] if share else []


def results_table(result):
    """What a run prints at its end."""
    parts = []
    if "tasks" in result:
        parts.append(aligned(*task_rows(result)))
        timing = result["timing"]
        parts += context_note(result)
        parts.append(f"{timing['tokens']:,} tokens in {timing['seconds']:.1f} s ({timing['tokens_per_second']:,.0f} "
                     f"tokens/s); calibration error {result['calibration']['ece']:.3f}")
    if "text" in result:
        parts.append("\n".join(f"{label}: {value}" for label, value in text_rows(result)))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- several models


def task_names(results):
    """The tasks of all results, in order of appearance."""
    return list(dict.fromkeys(name for result in results for name in result.get("tasks", ())))


def settings_differences(results):
    """["max_new_tokens: 512, 256"]: settings in which evaluations differ; they are then hard to compare."""
    flat = []
    for result in results:
        settings = dict(result.get("settings") or {})
        if settings:
            sampling = settings.pop("sampling")
            flat.append({"problem_seed": settings.pop("seed"), **settings, **sampling})
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = [f"{name}: {', '.join(str(s.get(name)) for s in flat)}" for name in names
             if any(s.get(name) != flat[0].get(name) for s in flat)]
    texts = {(r["text"]["checksum"], r["text"]["window"]) for r in results if "text" in r}
    return found + ["text or window: bits per byte do not compare"] * (len(texts) > 1)


def paired_differences(results):
    """[{"name", "task", "problems", "value", "low", "high"}]: pass@1 of each result less that of the first.

    Over the problems that both were asked; without any in common, no entry. "all" joins the tasks.
    """
    base, found = results[0].get("per_problem", {}), []
    for result in results[1:]:
        joined = ([], [])
        for task, own in result.get("per_problem", {}).items():
            common = [digest for digest in own if digest in base.get(task, {})]
            values = [own[digest] for digest in common], [base[task][digest] for digest in common]
            joined = joined[0] + values[0], joined[1] + values[1]
            if common:
                found.append({"name": result["name"], "task": task, **_difference(*values)})
        if len({entry["task"] for entry in found if entry["name"] == result["name"]}) > 1:
            found.append({"name": result["name"], "task": "all", **_difference(*joined)})
    return found


def _difference(own, base):
    value, low, high = paired_difference_interval(own, base)
    return {"problems": len(own), "value": value, "low": low, "high": high}


def model_rows(results):
    """(header, rows): a row a task, a column a model; then the mean of the tasks that all have, and bits per byte."""
    rows, names = [], task_names(results)
    for task in names:
        rows.append([task, *(with_interval(result["tasks"][task]["pass@1"]) if task in result.get("tasks", {}) else "-"
                             for result in results)])
    common = [task for task in names if all(task in result["tasks"] for result in results if "tasks" in result)]
    if len(common) > 1:
        means = [with_interval(macro_average([result["tasks"][task]["pass@1"] for task in common]))
                 if "tasks" in result else "-" for result in results]
        label = "mean of tasks" if common == names else f"mean of {len(common)} common tasks"
        rows.append([label, *means])
    if any("text" in result for result in results):
        rows.append(["bits per byte", *(f"{result['text']['bits_per_byte']:.4f}" if "text" in result else "-"
                                        for result in results)])
    return ["pass@1 %", *(result["name"] for result in results)], rows


def difference_rows(results):
    """(header, rows) of `paired_differences`, in percentage points; * where 0 lies outside of the interval."""
    rows = []
    for entry in paired_differences(results):
        sure = "*" if entry["low"] > 0 or entry["high"] < 0 else ""
        rows.append([entry["name"], entry["task"], entry["problems"],
                     f"{100 * entry['value']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]{sure}"])
    return [f"less {results[0]['name']}", "task", "same problems", "points"], rows


def comparison_table(results):
    """What a comparison prints."""
    parts = [aligned(*model_rows(results))]
    header, rows = difference_rows(results)
    if rows:
        parts.append(aligned(header, rows))
    if differences := settings_differences(results):
        parts.append("settings that differ: " + "; ".join(differences))
    return "\n\n".join(parts)
