"""What a report shows of a distillation: rows of results, student beside teacher, the loss's parts."""

import html

from recipes.eval_report import grid
from recipes.eval_tables import with_interval
from recipes.report_page import plot

SIZES = (
    ("parameters", "{:,}"), ("active parameters a token", "{:,}"), ("bytes of weights", "{:,}"),
    ("tokens/s, greedy", "{:,.0f}"),
)  # fmt: skip


def _series(label, records, name):
    points = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
    return label, [step for step, _ in points], [value for _, value in points]


def distill_figures(train, stage):
    """[(svg, caption)] of the parts of the loss; [] for other stages."""
    if stage != "distill":
        return []
    made = []
    for name, ylabel, caption in (
        ("kl", "nats per token", "KL from the teacher's to the student's distribution at the loss's temperature."),
        ("feature loss", "feature loss", "Squared distance of normalised hidden states, mean over layers."),
        ("entropy", "nats per token", "Entropy of the student's next token."),
        ("length", "tokens", "Mean length of the student's completions."),
    ):
        curve = _series(name, train, name)
        if curve[1]:
            made.append((plot([curve], ylabel), caption))
    return made


def _share(value):
    return "none: the teacher has none right" if value is None else f"{value:.0%}"


def distill_rows(evaluation):
    """[(label, text)] of the results table."""
    found = evaluation.get("distillation")
    if not found:
        return []
    rows = [("method", found["method"])]
    for name, form in SIZES:
        values = {who: found[who].get(name) for who in ("teacher", "student") if who in found}
        shown = [f"{who} {form.format(value)}" for who, value in values.items() if value is not None]
        if shown:
            rows.append((name, ", ".join(shown)))
    kept = found.get("kept")
    if kept:
        rows += [(f"{name}, share of the teacher's accuracy kept", _share(value)) for name, value in kept.items()]
    return rows


def distill_section(evaluation):
    """Accuracy of the student before and after beside the teacher's, as a part of the page."""
    found, tasks = evaluation.get("distillation", {}), evaluation.get("tasks", {})
    if "tasks" not in found.get("teacher", {}):
        return ""
    columns = [(name, tasks[name]["tasks"]) for name in ("before", "after") if name in tasks]
    columns.append(("teacher", found["teacher"]["tasks"]["tasks"]))
    rows = [
        [name, *(with_interval(column[name]["pass@1"]) for _, column in columns), _share(found["kept"].get(name))]
        for name in tasks["after"]["tasks"]
    ]
    header = ["task", *(f"{name}, pass@1 %" for name, _ in columns), "kept"]
    return f"<h2>{html.escape('Student and teacher')}</h2><section>{grid(header, rows)}</section>"
