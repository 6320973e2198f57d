"""Running the chosen stages of a pipeline: what may run, what is said about it, records of how it went."""

import sys
import time
import traceback

from recipes.eval_tables import aligned, with_interval
from recipes.pipeline_graph import states_of
from recipes.pipeline_report import read_scores, write_report
from recipes.pipeline_stages import alone, check_stage, run_stage
from recipes.sizing import format_duration

DONE = "done"
USERS = (ValueError, OSError, FloatingPointError)  # what a user can mend needs no traceback


def check_choice(graph, planned, chosen, options):
    """ValueError where what is to run reads something that is missing or stale, or would replace what is done.

    With `options.dry_run` files outside of the graph may be missing and stages stale: both have been shown.
    """
    absent = [name for name in chosen if graph.absent.get(name) and planned[name].status != DONE]
    if absent and not options.dry_run:
        raise ValueError("; ".join(message for name in absent for message in graph.absent[name]))
    for name in options.force:
        if name not in chosen:
            raise ValueError(f"--force {name}: not among the stages of this call ({', '.join(chosen)})")
    for name in chosen:
        for source in graph.sources[name]:
            if source not in chosen and planned[source].status != DONE and planned[name].status != DONE:
                what = "is stale: " + "; ".join(planned[source].reasons) if planned[source].reasons else "is not done"
                raise ValueError(f"stage {name} reads {source}, which {what}; run it first (--until {name})")
    stale = [name for name in chosen if planned[name].status == "stale"]
    if stale and not (options.rerun_stale or options.dry_run):
        raise ValueError(f"stale: {', '.join(stale)} (reasons above). Restore the settings, take another --output_dir, "
                         "or pass --rerun_stale to make them again; the present folders are kept as NAME.stale-N")


def announce(graph, planned, chosen):
    """Prints the plan."""
    rows = [[name, graph.stages[name].module or graph.stages[name].kind, ", ".join(graph.sources[name]) or "-",
             graph.stages[name].config.name if graph.stages[name].config else "-",
             planned[name].status if name in chosen else f"({planned[name].status}, not of this call)"]
            for name in graph.stages]  # fmt: skip
    print(aligned(["stage", "kind", "reads", "config", "state"], rows))
    for name in chosen:
        for message in graph.absent.get(name, ()):
            print(f"missing  {message}")
        for reason in planned[name].reasons:
            print(f"{planned[name].status}  {name}: {reason}")


def _inputs_there(graph, home, name):
    for _, reference in graph.stages[name].references(graph.names):
        if reference.stage and not (path := home.path / reference.stage / reference.rest).exists():
            raise ValueError(f"stage {name} reads {path}, which {reference.stage} has not made")


def run_one(graph, home, name, planned, launcher):
    """Runs a stage and keeps its record. Raises what the stage raises."""
    stage, afresh = graph.stages[name], planned.status in ("new", "stale", "forced")
    if afresh and (old := home.set_aside(name)):
        print(f"the earlier folder of {name} is now {old}")
    before, start = 0 if afresh else home.records[name].get("seconds", 0), time.perf_counter()
    words = check_stage(graph, name, home.path)
    home.record(name, state="running", command=alone(stage, words, launcher), seconds=before, scores={}, outputs={},
                error=None, process=None, **planned.record)  # fmt: skip
    try:
        _inputs_there(graph, home, name)
        run_stage(stage, words, launcher, lambda process: home.record(name, process=process))
        made = {"outputs": home.outputs(name), "scores": read_scores(home.path / name)}
    except Exception as error:  # whatever a stage raises is kept, so that others can go on and the page shows it
        home.record(name, state="failed", error=f"{type(error).__name__}: {error}",
                    seconds=before + time.perf_counter() - start)  # fmt: skip
        raise
    home.record(name, state=DONE, seconds=before + time.perf_counter() - start, process=None, **made)


def draw(graph, home):
    """Writes the page; returns what to say of it. A page that cannot be drawn ends no pipeline."""
    try:
        return str(write_report(graph, home))
    except Exception as error:  # files of a command of one's own may hold anything
        traceback.print_exc()
        return f"no report ({type(error).__name__}: {error})"


def run(graph, home, planned, chosen, launcher=None, keep_going=False):
    """Runs the chosen stages in order, the page drawn after each. Returns {stage: why it failed or did not run}."""
    failed = {}
    for number, name in enumerate(chosen, 1):
        if blocked := [source for source in graph.sources[name] if source in failed]:
            failed[name] = f"waits for {', '.join(blocked)}"
        elif planned[name].status != DONE:
            print(f"\n== {number}/{len(chosen)}. {name}", flush=True)
            try:
                run_one(graph, home, name, planned[name], launcher)
            except Exception as error:  # see run_one
                if not isinstance(error, USERS):
                    traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
                said = f"stage {name} failed: {failed[name]}\nalone: {home.records.get(name, {}).get('command')}"
                print(said, file=sys.stderr, flush=True)
            seconds = home.records.get(name, {}).get("seconds", 0)
            print(f"{name}: {format_duration(seconds)}, {draw(graph, home)}", flush=True)
            if failed and not keep_going:
                break
    return failed


def summary(graph, home):
    """A line a stage: state, time, accuracy."""
    rows, states = [], states_of(graph, home)
    for name in graph.stages:
        record = home.records.get(name, {})
        scores = record.get("scores", {})
        best = scores.get("mean of tasks") or next(iter(scores.values()), None)
        rows.append([name, states[name], format_duration(record["seconds"]) if "seconds" in record else "-",
                     with_interval(best) if best else "-"])
    return aligned(["stage", "state", "time", "pass@1 %"], rows)
