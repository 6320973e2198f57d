"""The main job, small: text and code -> tokenizer -> pretraining -> samples -> report, on a CPU in a few minutes.

    python recipes/quickstart.py [--output_dir runs/quickstart] [--max_steps 100 --learning_rate 2e-3 ...]

Everything is made on the spot and without a network: the data from what this repository and Python bring
(`data_scripts/README.md`), the model by `recipes/configs/pretrain_tiny.yaml`; further keys override that file. A second
call continues where the first one stopped.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(ROOT)

from data_scripts import prepare_pretraining
from recipes import pretrain
from recipes.pretrain_config import PretrainConfig, parse_config

CONFIG = Path(__file__).resolve().parent / "configs" / "pretrain_tiny.yaml"


def stage(number, title):
    """Prints a stage's headline; returns a function that gives its seconds so far."""
    print(f"\n== {number}. {title}", flush=True)
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def main(argv=None):
    """Runs all stages. Returns {"seconds": {stage: seconds}, "eval": content of eval.json, "report": path}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder for data, model and report")
    args, overrides = parser.parse_known_args(argv)
    data, run = Path(args.output_dir) / "data", Path(args.output_dir) / "pretrain"
    seconds = {}

    command = ["--config", str(CONFIG), "--dataset_name", str(data), "--output_dir", str(run), *overrides]
    command += ["--resume_from_checkpoint", "auto"]
    parse_config(PretrainConfig, command)  # a mistyped key is said now, not after the data is made

    clock = stage(1, "data and tokenizer")
    print(prepare_pretraining.summary(prepare_pretraining.prepare(data, size="tiny")))
    seconds["data"] = clock()

    clock = stage(2, "pretraining")
    result = pretrain.main(command)
    seconds["pretraining"] = clock()

    report = run / "report.html"
    total = sum(seconds.values())
    print(f"\n== done in {total / 60:.1f} minutes (" + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()) + ")")
    print(f"report   {report}")
    print(f"model    {run}  (AutoModelForCausalLM.from_pretrained after `import modeling_deepseek_r1`)")
    return {"seconds": seconds, "eval": result, "report": report}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
