"""What all reports share: a self-contained page, its style, and curves as inline SVG."""

import html
import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLORS = ("#1f5fa8", "#c8502e", "#2f8a57", "#8257a8", "#a8842a", "#4a9aa8", "#8a3a5a", "#555555")
STYLE = """
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1d2329;background:#f6f7f8;margin:0}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
.note{color:#59636e;font-size:.9rem;margin:.2rem 0 0}
section,.card{background:#fff;border:1px solid #dfe3e7;border-radius:8px;padding:1rem 1.2rem;margin:.8rem 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:.8rem}
.plots figure{margin:0;background:#fff;border:1px solid #dfe3e7;border-radius:8px;padding:.6rem}
.plots svg{width:100%;height:auto;display:block}figcaption{color:#59636e;font-size:.85rem;padding:.2rem .4rem}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #eceff1;vertical-align:top}
td:last-child{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}th{font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;
background:#f6f7f8;padding:.8rem;border-radius:6px;font-size:.85rem;margin:.4rem 0}
.prompt{color:#59636e}summary{cursor:pointer}
@media(max-width:32rem){.plots{grid-template-columns:1fr}}
"""


def figure_svg(figure):
    """The figure as inline SVG, the same for the same content; closes it."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plot(curves, ylabel, references=(), log=False):
    """SVG of [(label, steps, values)] over optimizer steps; `references`: [(label, value)] dashed lines."""
    figure, axes = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    marker = "o" if max((len(steps) for _, steps, _ in curves), default=0) < 25 else None
    for (label, steps, values), color in zip(curves, COLORS * 8):
        axes.plot(steps, values, label=label, color=color, linewidth=1.4, marker=marker, markersize=3)
    for position, (label, value) in enumerate(references):
        axes.axhline(value, color="#8a939c", linewidth=1, linestyle=("--", ":", "-.")[position % 3], label=label)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) + len(references) > 1:
        figure.legend(loc="outside right center", fontsize=8, frameon=False)  # beside the curves, never on them
    return figure_svg(figure)


def page(title, body):
    """A whole page from its escaped title and the HTML of its body."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>"
    )


def facts_table(rows):
    """[(name, value)] as a table of two columns."""
    cells = "".join(f"<tr><th>{html.escape(str(a))}</th><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"
