"""report.html of an evaluation, or of several side by side: one self-contained file, figures as inline SVG.

    python recipes/eval_report.py RUN_DIR        # makes it again from eval.json and completions.jsonl
"""

import argparse
import html
import json
import logging
import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes import eval_plots as plots
from recipes.checkpoint_files import write_atomically
from recipes.eval_scores import OUTCOMES
from recipes.eval_tables import context_note, difference_rows, model_rows, settings_differences, task_rows, text_rows
from recipes.evaluation import COMPLETIONS, read_completions
from recipes.report_page import facts_table, page

RESULT_FILE, REPORT_FILE = "eval.json", "report.html"
EXAMPLES = 3          # of each outcome, from different tasks where there are several
LONGEST_SHOWN = 4000  # characters of one text
MEANING = {
    "correct": "right answers", "wrong": "readable answers that are wrong", "unparsable": "no answer could be read",
    "malformed": "the answer is not where it belongs (several marks, or nothing after them)",
    "no closing tag": "the reasoning was never closed", "truncated": "cut off at the longest length",
}  # fmt: skip
NOTE_INTERVALS = ("Brackets: 95 % intervals over problems. lenient: the answer counts wherever it stands. cut off: "
                  "ended by length, not by an end token.")
CENTRED = "text-align:center;padding:.3rem .8rem"


def _text(value):
    return html.escape(str(value))


def _cell(value):
    """A figure with its interval in grey beside it; other text as it is."""
    text, bracket, interval = _text(value).partition(" [")
    return f"{text} <span class=note style='white-space:nowrap'>[{interval}</span>" if bracket else text


def grid(header, rows):
    """A table with a header."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div style='overflow-x:auto'><table><tr>{head}</tr>{body}</table></div>"


def figures_grid(pairs):
    return "<div class=plots>" + "".join(f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"
                                         for svg, caption in pairs) + "</div>"


def _section(title, content):
    return f"<h2>{_text(title)}</h2><section>{content}</section>" if content else ""


# ---------------------------------------------------------------- parts of a page


def _confusion(rows):
    """Tables reference x answer of the tasks with letters or yes and no; shade by the share of the row."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows if row["kind"] in ("choice", "boolean")):
        counts = Counter((_label(row["reference"]), _label(row["answer"])) for row in rows if row["task"] == task)
        references = sorted({reference for reference, _ in counts})
        answers = sorted({answer for _, answer in counts} | set(references), key=lambda a: (a == "none", a))
        lines = [f"<tr><th>{_text(task)}</th>" + "".join(
            f"<th style='{CENTRED}'>{_text(answer)}</th>" for answer in answers) + "</tr>"]
        for reference in references:
            total, cells = sum(counts[reference, answer] for answer in answers), ""
            for answer in answers:
                count, color = counts[reference, answer], "47,138,87" if answer == reference else "200,80,46"
                shade = f"background:rgba({color},{0.55 * count / total:.2f})"
                cells += f"<td style='{CENTRED};{shade}'>{count}</td>"
            lines.append(f"<tr><th>{_text(reference)}</th>{cells}</tr>")
        parts.append(f"<table style='width:auto'>{''.join(lines)}</table>")
    note = "<p class=note>Rows: reference. Columns: answer given (none: no valid answer).</p>"
    return note + "".join(parts) if parts else ""


def _label(answer):
    if answer is None:
        return "none"
    text = str(answer).strip()
    return {"true": "yes", "false": "no", "yes": "yes", "no": "no"}.get(text.casefold(), text)


def pick_examples(rows, count=EXAMPLES):
    """{outcome: rows}: the first of each task in turn, so that several tasks are seen."""
    found = {}
    for outcome in OUTCOMES:
        own = [row for row in rows if row["outcome"] == outcome]
        turn = Counter()
        ranked = []
        for row in own:
            ranked.append((turn[row["task"]], len(ranked), row))
            turn[row["task"]] += 1
        if own:
            found[outcome] = [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:count]]
    return found


def _shortened(text):
    if len(text) <= LONGEST_SHOWN:
        return _text(text)
    half = LONGEST_SHOWN // 2
    return f"{_text(text[:half])}<i> ... {len(text) - 2 * half:,} characters ... </i>{_text(text[-half:])}"


def _example(row, is_open):
    """One completion: prompt and reasoning in grey, then the answer."""
    reasoning, tag, answer = row["completion"].rpartition("</think>")
    length = f"{row['tokens']:,} tokens" + ("" if row["finished"] else ", cut off")
    read = "nothing" if row["answer"] is None else row["answer"]
    return (
        f"<details class=card{' open' * is_open}><summary>{_text(row['task'])}, difficulty {row['difficulty']}: "
        f"reference <b>{_text(row['reference'][:80])}</b>, read <b>{_text(str(read)[:80])}</b> ({length})</summary>"
        f"<p class=note>Prompt</p><pre class=prompt>{_shortened(row['prompt'])}</pre><p class=note>Completion</p>"
        f"<pre><span class=prompt>{_shortened(reasoning + tag)}</span>{_shortened(answer)}</pre>"
        f"<p class=note>Reference</p><pre>{_shortened(row['reference'])}</pre></details>"
    )


def _examples(rows):
    parts = []
    for outcome, chosen in pick_examples(rows).items():
        total = sum(row["outcome"] == outcome for row in rows)
        share = f"<span class=note>({total:,} of {len(rows):,})</span>"
        parts.append(f"<h3>{_text(outcome)}: {MEANING[outcome]} {share}</h3>")
        parts += [_example(row, is_open=row is chosen[0]) for row in chosen]
    return "".join(parts)


def _run_facts(result):
    model, device, versions = result["model"], result["device"], result["versions"]
    rows = [("model", model["name_or_path"])]
    rows += [(name, model[name]) for name in ("revision", "commit", "adapter", "gguf_file") if model.get(name)]
    rows += [("parameters", f"{model['parameters']:,}"), ("dtype", model["dtype"]),
             ("device", f"{device['type']} ({device['name']}) x{device['processes']}"), ("date", result["date"]),
             ("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))]
    if "timing" in result:
        timing = result["timing"]
        speed = f"{timing['seconds']:.1f} s, {timing['tokens_per_second']:,.0f} tokens/s, batch size "
        rows.append(("time", speed + f"{result['batch_size']}; {timing['resumed']:,} completions were there before"))
    return facts_table(rows)


def _task_figures(result, rows):
    found = [(plots.accuracy_bars([result]), "pass@1 by task, with 95 % intervals."),
             (plots.outcome_bars(result), "What completions came to, by task.")]
    if any(len(task["difficulties"]) > 1 for task in result["tasks"].values()):
        found.append((plots.difficulty_curves(result), "pass@1 by difficulty, with 95 % intervals."))
    if any(task["samples"] > 1 for task in result["tasks"].values()):
        found.append((plots.pass_at_k_curves(result), "pass@k: at least one of k samples is right."))
    found.append((plots.length_histogram(rows), "Length of completions, right and wrong ones stacked."))
    calibration = result["calibration"]
    caption = f"Calibration over problems; confidence: {calibration['confidence']}. Expected calibration error "
    found.append((plots.reliability(calibration), f"{caption}{calibration['ece']:.3f}. Numbers: problems in a bin."))
    return figures_grid(found)


def build_report(result, rows):
    """The page of one evaluation: `result` as in eval.json, `rows` of completions.jsonl."""
    name = _text(result["name"])
    body = (f"<h1>{name}</h1><p class=note>Evaluation. <code>python recipes/eval_report.py RUN_DIR</code> makes this "
            "page again from eval.json and completions.jsonl.</p>")
    if "tasks" in result:
        note = " ".join([NOTE_INTERVALS, *(f"{_text(line)}." for line in context_note(result))])
        body += _section("Results", grid(*task_rows(result)) + f"<p class=note>{note}</p>")
    if "text" in result:
        body += _section("Held-out text", facts_table(text_rows(result)))
    body += _section("Run", _run_facts(result))
    if "tasks" in result:
        body += f"<h2>Figures</h2>{_task_figures(result, rows)}"
        body += _section("Answers given", _confusion(rows))
        body += f"<h2>Examples</h2>{_examples(rows)}"
        body += _section("Prompt", f"<pre>{_text(result['prompt_example'])}</pre>")
        settings = _text(json.dumps(result["settings"], indent=1, ensure_ascii=False))
        body += _section("Settings", f"<details><summary>all settings</summary><pre>{settings}</pre></details>")
    return page(name, body)


def build_comparison(results, sources):
    """The page of several evaluations; `sources`: where they were read from."""
    title = "Comparison"
    body = f"<h1>{title}</h1><p class=note>{_text(' / '.join(result['name'] for result in results))}</p>"
    note = "<p class=note>Brackets: 95 % intervals over problems.</p>"
    body += _section("Results", grid(*model_rows(results)) + note)
    header, rows = difference_rows(results)
    if rows:
        note = ("<p class=note>Percentage points of pass@1 on the problems that both models were asked, with 95 % "
                "intervals of the paired difference; * where 0 lies outside.</p>")
        body += _section(f"Differences to {results[0]['name']}", grid(header, rows) + note)
    with_tasks = [result for result in results if "tasks" in result]
    if with_tasks:
        body += "<h2>Figures</h2>" + figures_grid([(plots.accuracy_bars(with_tasks), "pass@1 with 95 % intervals."),
                                               (plots.length_bars(with_tasks), "Mean length of completions.")])
        for result in with_tasks:
            body += _section(result["name"], grid(*task_rows(result)))
    if differences := settings_differences(results):
        body += _section("Settings that differ", "<br>".join(map(_text, differences)))
    body += _section("Sources", facts_table([(result["name"], source) for result, source in zip(results, sources)]))
    return page(title, body)


def before_and_after(stages, run_dir):
    """The part of a training run's page on its tasks; `stages`: {"before": result, "after": result} or one of them."""
    results = [stages[name] for name in ("before", "after") if name in stages]
    if not results:
        return ""
    body = _section("Held-out problems", grid(*model_rows(results)) + f"<p class=note>{NOTE_INTERVALS}</p>"
                    + grid(*task_rows(results[-1])))
    header, rows = difference_rows(results)
    if rows:
        body += _section("Change", grid(header, rows) + "<p class=note>Percentage points on the same problems, with "
                         "95 % intervals of the paired difference; * where 0 lies outside.</p>")
    body += figures_grid([(plots.accuracy_bars(results), "pass@1 with 95 % intervals."),
                      (plots.outcome_bars(results[-1]), "What completions came to in the end, by task.")])
    completions = read_completions(Path(run_dir) / "eval_after" / COMPLETIONS)
    return body + (f"<h2>Answers after training</h2>{_examples(completions)}" if completions else "")


# ---------------------------------------------------------------- files


def write_evaluation(result, output_dir):
    """Write eval.json and report.html; returns the report's path."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False))
    return write_report(folder)


def write_report(folder):
    """report.html of a folder with eval.json and completions.jsonl."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    folder = Path(folder)
    if not (folder / RESULT_FILE).is_file():
        raise ValueError(f"{folder} holds no {RESULT_FILE}: is it the output_dir of recipes/eval.py?")
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    write_atomically(folder / REPORT_FILE, build_report(result, read_completions(folder / COMPLETIONS)))
    return folder / REPORT_FILE


def write_comparison(results, sources, output_dir):
    """report.html with several evaluations; returns its path."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT_FILE, build_comparison(results, sources))
    return folder / REPORT_FILE


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make report.html of an evaluation's folder again.")
    parser.add_argument("run_dir", help="folder with eval.json and completions.jsonl")
    print(write_report(parser.parse_args(argv).run_dir))


if __name__ == "__main__":
    main()
