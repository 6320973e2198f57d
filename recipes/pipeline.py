"""DeepSeek-R1's pipeline, or any graph of stages over files: runs what is not done yet, and draws one report.

    python recipes/pipeline.py --config recipes/configs/pipeline_nano.yaml --output_dir runs/r1_nano [--branch zero]
        [--until NAME | --only NAME ...] [--dry_run] [--force NAME ...] [--rerun_stale] [--keep_going]
        [--launcher "accelerate launch --num_processes 8"] [--STAGE.key value ...]

Every stage writes into `<output_dir>/<name>/`. A finished stage is not run again; one that was interrupted goes on from
its newest checkpoint; where settings have changed, the stages that this makes stale are named with the reason and made
again with --rerun_stale, the old folders being kept as `<name>.stale-<n>`. The graph: docs/pipeline.md.
"""

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.pipeline_graph import plan, read_graph
from recipes.pipeline_report import REPORT_FILE
from recipes.pipeline_run import DONE, USERS, announce, check_choice, draw, run, summary
from recipes.pipeline_stages import KINDS, check_stage
from recipes.pipeline_state import PipelineFolder


def parse(argv=None):
    """(options, overrides of stages)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the graph, e.g. recipes/configs/pipeline_nano.yaml")
    parser.add_argument("--output_dir", help="folder of all stages (default: the graph's output_dir)")
    parser.add_argument("--branch", help="only the stages of this branch, e.g. zero or full")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these stages alone")
    some.add_argument("--until", metavar="NAME", help="this stage and all that it needs")
    parser.add_argument("--dry_run", action="store_true", help="check everything, show the plan, run nothing")
    parser.add_argument("--force", nargs="+", default=[], metavar="NAME", help="make these again, done or not")
    parser.add_argument("--rerun_stale", action="store_true", help="make stale stages again; old folders are kept")
    parser.add_argument("--keep_going", action="store_true", help="after a failure run what does not depend on it")
    parser.add_argument("--launcher", help='run stages as commands, e.g. "accelerate launch --num_processes 8"')
    return parser.parse_known_args(argv)


def main(argv=None):
    """Runs a pipeline. Returns {"stages": the records of pipeline.json, "report": path or None}."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    options, overrides = parse(argv)
    graph = read_graph(options.config, overrides, KINDS)
    folder = options.output_dir or graph.output_dir
    if not folder:
        raise ValueError("output_dir is unset; give it in the graph's file or as --output_dir")
    chosen = graph.chosen(options.only, options.until, options.branch)
    for name in graph.stages:
        check_stage(graph, name, folder)
    home = PipelineFolder(folder)
    planned = plan(graph, home.records, home, options.force)
    announce(graph, planned, chosen)
    check_choice(graph, planned, chosen, options)
    if options.dry_run:
        return {"stages": home.records, "report": None}
    with home.locked():
        home = PipelineFolder(folder)  # as the one who had the lock before has left it
        home.check_orphans()
        planned = plan(graph, home.records, home, options.force)
        check_choice(graph, planned, chosen, options)
        home.content["config"] = str(options.config)
        failed = run(graph, home, planned, chosen, options.launcher or graph.launcher, options.keep_going)
        report = home.path / REPORT_FILE  # drawn after each stage
        if all(planned[name].status == DONE for name in chosen) or not report.is_file():
            draw(graph, home)
    print(f"\n{summary(graph, home)}\nreport   {report}")
    if failed:
        raise ValueError("not finished: " + "; ".join(f"{name} ({why})" for name, why in failed.items()))
    return {"stages": home.records, "report": report}


if __name__ == "__main__":
    try:
        main()
    except USERS as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
