"""Load a metric of this project by name, without a network.

    from recipes.metrics_loader import load_metric
    load_metric("bleu").compute(predictions=["a b c d"], references=["a b c d"])

`evaluate.load("bleu")` asks the Hub for code; this takes the file beside it, from a checkout or an installed package.
"""

import difflib
from pathlib import Path

import evaluate

FOLDER = Path(__file__).resolve().parent / "metrics"


def metric_names():
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def load_metric(name, **settings):
    """An `evaluate.Metric`; use `compute(predictions=..., references=...)` or `add_batch` and `compute()`.

    Examples are kept in memory, so that processes which evaluate side by side (each what it gathered) share no
    cache files, and an error leaves none behind.

    Args:
        settings: for `evaluate.load`. With num_process > 1 the examples go through files that all processes see, and
            `experiment_id` must name the run.
    Raises:
        ValueError: for an unknown name (listing the known ones), or several processes without `experiment_id`.
    """
    names = metric_names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        raise ValueError(f"unknown metric {name!r}; " + (f"did you mean {' or '.join(close)}? " if close else "")
                         + f"Known are {', '.join(names)}")
    if settings.get("num_process", 1) == 1:
        settings.setdefault("keep_in_memory", True)
    elif not settings.get("experiment_id"):
        raise ValueError(f"num_process={settings['num_process']} needs an experiment_id, the same in all processes and "
                         "another for every run: their files would mix otherwise")
    return evaluate.load(str(FOLDER / f"{name}.py"), **settings)
