"""The main job, small, on a CPU in about ten minutes: data -> pretraining -> fine-tuning -> reward model -> PPO and
GRPO -> rejection sampling -> distillation -> evaluation -> one report.

    python recipes/quickstart.py [--output_dir runs/quickstart] [--pretrain.max_steps 100] [--ppo.learning_rate 1e-4]

Everything is made on the spot and without a network: the data from what this repository, Python and reasoning-gym bring
(`data_scripts/README.md`), the model by `recipes/configs/*_tiny.yaml`. The stages, and how they read each other, are
those of `recipes/configs/pipeline_tiny.yaml`; further keys, with their stage's name in front, override it, and the
options of `recipes/pipeline.py` hold (--dry_run, --until sft, --rerun_stale, ...). A second call continues where the
first one stopped.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import shlex

from recipes import pipeline
from recipes.pipeline_graph import CONFIGS
from recipes.pipeline_run import USERS

CONFIG = CONFIGS / "pipeline_tiny.yaml"


def results_of(report, records):
    """{stage: its eval.json} of the stages that have one."""
    files = {name: report.parent / name / "eval.json" for name in records}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def main(argv=None):
    """Runs all stages. Returns {"seconds": {stage: seconds}, "results": {stage: its eval.json}, "report": path}."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return None
    found = pipeline.main(["--config", str(CONFIG), *arguments])
    if found["report"] is None:  # --dry_run
        return found
    records, report = found["stages"], found["report"]
    seconds = {name: record["seconds"] for name, record in records.items() if record["state"] == "done"}
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n== done in {sum(seconds.values()) / 60:.1f} minutes ({spent})")
    for name in ("grpo", "distill"):
        if name in seconds:
            print(f"chat     python recipes/chat.py --model_name_or_path {shlex.quote(str(report.parent / name))}")
    return {"seconds": seconds, "results": results_of(report, records), "report": report}


if __name__ == "__main__":
    try:
        main()
    except USERS as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
