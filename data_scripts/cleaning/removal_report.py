"""The clean folder from what the stages made: sources with manifests, what was removed, report.json, a table."""

import itertools
import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy

from data_scripts import document_folder
from data_scripts.cleaning.clean_blocks import EXAMPLE_CHARACTERS, facts_path, merge_counts, read_json, write_json
from data_scripts.cleaning.clean_settings import DUPLICATE_STEPS
from data_scripts.cleaning.clean_stages import peak_bytes
from data_scripts.cleaning.corpus_blocks import PipelineStep
from data_scripts.cleaning.decontamination import merge_hits
from data_scripts.packing import packed_writer

logger = logging.getLogger(__name__)

PAIR_EXAMPLES = 12
OF_CONTENT = ("format", "version", "documents", "characters", "bytes", "files")


def _link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def build_sources(shards, documents, target, manifests, cleaned):
    """Link each source's files to `target/<source>`, numbered anew, with a manifest; {source: languages}.

    A source of which nothing is left gets no folder, and a warning.
    """
    languages = {}
    for source in dict.fromkeys(shard.source for shard in shards):
        files, content, found = [], Counter(documents=0, characters=0, bytes=0), Counter()
        for shard in (shard for shard in shards if shard.source == source):
            facts = read_json(facts_path(Path(documents, source, shard.name), "facts.json"))
            if not facts["documents"]:
                continue
            name = f"documents-{len(files):05d}.jsonl.zst"
            _link(Path(documents, source, shard.name), Path(target, source, name))
            files.append({"name": name, "documents": facts["documents"], "characters": facts["characters"],
                          "bytes": facts["file_bytes"], "sha256": facts["sha256"]})
            content.update({key: facts[key] for key in content})
            found.update(facts["languages"])
        languages[source] = dict(found.most_common())
        if not files:
            logger.warning("source %r: nothing is left of it; report.json says what removed it", source)
            continue
        facts = {key: value for key, value in manifests[source].items() if key not in OF_CONTENT}
        document_folder.write_folder_manifest(Path(target, source), {**content, "files": files}, **facts,
                                              cleaned={**cleaned, "documents_in": manifests[source]["documents"]})
    return languages


def link_removed(stage_folder, steps, shards, target):
    for step in steps:
        for shard in shards:
            path = Path(stage_folder, "removed", step, shard.source, shard.name)
            if path.exists():
                _link(path, Path(target, step, shard.source, shard.name))


def pair_examples(decisions, shards, documents):
    """Texts side by side of some pairs: the least similar ones, where a mistake would show, and others."""
    pairs = numpy.concatenate([numpy.load(Path(decisions) / f"{shard.rank:06d}.npy") for shard in shards])
    order = numpy.argsort(pairs["similarity"], kind="stable")
    chosen = sorted({*order[:PAIR_EXAMPLES // 2].tolist(),
                     *order[::max(1, len(order) // (PAIR_EXAMPLES // 2))][:PAIR_EXAMPLES // 2].tolist()})
    wanted = {}
    for place in chosen:
        for side in ("", "kept_"):
            wanted.setdefault(int(pairs[place][f"{side}rank"]), set()).add(int(pairs[place][f"{side}index"]))
    texts = {}
    for rank, indices in wanted.items():
        lines = document_folder.read_lines(Path(documents, shards[rank].source, shards[rank].name))
        for index, line in enumerate(itertools.islice(lines, max(indices) + 1)):
            if index in indices:
                row = json.loads(line)
                texts[rank, index] = {"source": shards[rank].source, "id": row["id"],
                                      "text": row["text"][:EXAMPLE_CHARACTERS]}
    return [{"similarity": round(float(pairs[place]["similarity"]), 3),
             "kept": texts[int(pairs[place]["kept_rank"]), int(pairs[place]["kept_index"])],
             "removed": texts[int(pairs[place]["rank"]), int(pairs[place]["index"])]} for place in chosen]


def duplicates_entry(decisions, shards, documents):
    entry = read_json(Path(decisions) / "totals.json")
    pairs = Path(decisions) / "pairs.json"
    return {**entry, **(read_json(pairs) if pairs.exists() else {}),
            "examples": pair_examples(decisions, shards, documents) if entry["removed"] else []}


class Publish(PipelineStep):
    """One task, the last: put the clean folder together in `work/new` and move it into place, report.json last.

    report.json is removed before the first source is replaced: a folder without it is not finished.
    """

    type, name = "WRITER", "publish"

    def __init__(self, plan):
        super().__init__()
        self.plan = plan

    def run(self, data=None, rank=0, world_size=1):
        plan = self.plan
        new = plan.work / "new"
        shutil.rmtree(new, ignore_errors=True)
        steps = [name for _, names in plan.steps for name in names]
        cleaned = {"fingerprint": plan.fingerprint, "steps": steps, "settings": plan.settings}
        languages = build_sources(plan.shards, plan.work / "final", new / "sources", plan.manifests, cleaned)
        for stage, names in plan.steps:
            link_removed(plan.work / stage, names, plan.shards, new / "removed")
        report = self._report(plan, languages)
        write_json(new / "report.json", report)
        self._move(plan, new)

    def _report(self, plan, languages):
        # Of stages that Slurm or Ray ran the time is not known here.
        stages = {stage: read_json(plan.work / stage / "stage.json").get("seconds", 0.0) for stage in plan.stage_names}
        steps = [merge_counts(plan.work / stage, name, plan.shards) for stage, names in plan.steps for name in names]
        names = {"exact_duplicates": "exact", "near_duplicates": "near"}
        used = [step["name"] for step in steps]
        return {
            "steps": steps,
            "duplicates": {names[step]: duplicates_entry(plan.work / names[step], plan.shards, plan.work / "filter")
                           for step in DUPLICATE_STEPS if step in used},
            "decontamination": merge_hits(plan.work / "evaluation", plan.work / "final" / "hits", len(plan.shards))
            if "decontamination" in used else {},
            "languages": languages, "settings": plan.settings, "fingerprint": plan.fingerprint,
            "stages": {stage: {"seconds": seconds, "peak_bytes": peak_bytes(plan.output / "logs", stage)}
                       for stage, seconds in stages.items()},
            "seconds": round(sum(stages.values()), 2)}

    @staticmethod
    def _move(plan, new):
        (plan.output / "report.json").unlink(missing_ok=True)
        (new / "replaced").mkdir(exist_ok=True)
        for old in finished_sources(plan.output):
            old.replace(new / "replaced" / old.name)  # at once: half of a folder must not stay behind if we are killed
        shutil.rmtree(plan.output / "removed", ignore_errors=True)
        for folder in sorted((new / "sources").iterdir()) if (new / "sources").is_dir() else ():
            folder.replace(plan.output / folder.name)
        if (new / "removed").is_dir():
            (new / "removed").replace(plan.output / "removed")
        (new / "report.json").replace(plan.output / "report.json")
        shutil.rmtree(new)


def finished_sources(folder):
    """The folders of clean documents in a clean folder."""
    return [path for path in sorted(Path(folder).iterdir()) if path.is_dir() and
            document_folder.is_document_folder(path) and "cleaned" in read_json(path / "manifest.json")]


def is_finished(folder, fingerprint=None):
    """Whether a clean folder is complete (its report is moved there last), and made with this fingerprint."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        return False
    report = read_json(path)
    found = {source.name: document_folder.read_folder_manifest(source)["cleaned"]["fingerprint"]
             for source in finished_sources(folder)}
    expected = {name: report["fingerprint"] for name, languages in report["languages"].items() if languages}
    return found == expected and fingerprint in (None, report["fingerprint"])


def table(report):
    """The report as lines of text: by source and step what was removed, seconds by step, reasons."""
    lines = [f"{'step':18}{'source':22}{'documents':>22}{'characters':>28}  removed because"]
    for step in report["steps"]:
        for source, counts in step["sources"].items():
            if counts["documents_in"] == counts["documents_out"] and not counts["changed"]:
                continue
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in
                                sorted(counts["reasons"].items(), key=lambda item: -item[1]))
            reasons = reasons or f"({counts['changed']:,} changed)"
            lines.append(f"{step['name']:18}{source:22}"
                         f"{counts['documents_in']:>10,} -> {counts['documents_out']:>8,}"
                         f"{counts['characters_in']:>13,} -> {counts['characters_out']:>11,}  {reasons}")
    for name, entry in report["decontamination"].get("sets", {}).items():
        if entry["documents_removed"] or entry["documents_cut"]:
            lines.append(f"evaluation set {name}: {entry['found']:,} of {entry['items']:,} items found, "
                         f"{entry['documents_removed']:,} documents removed, {entry['documents_cut']:,} cut")
    seconds = ", ".join(f"{step['name']} {step['seconds']:,.1f}" for step in report["steps"])
    stages = ", ".join(f"{name} {entry['seconds']:,.1f} s {entry['peak_bytes'] / 2**20:,.0f} MiB"
                       for name, entry in report["stages"].items())
    first, last = report["steps"][0]["sources"], report["steps"][-1]["sources"]
    totals = [sum(counts[key] for counts in part.values()) for part, key in
              ((first, "documents_in"), (last, "documents_out"), (first, "characters_in"), (last, "characters_out"))]
    return "\n".join([*lines, f"CPU seconds by step: {seconds}", f"stages (time, largest process): {stages}",
                      "kept {1:,} of {0:,} documents, {3:,} of {2:,} characters".format(*totals)])


def source_manifest(folder):
    """A raw folder's manifest, every file compared with its checksum."""
    manifest = document_folder.read_folder_manifest(folder, verify=True)
    for key, known in (("kind", document_folder.KINDS), ("source", None), ("languages", None)):
        if key not in manifest or known and manifest[key] not in known:
            raise ValueError(f"{folder}/manifest.json: {key}={manifest.get(key)!r}"
                             + (f"; known are {', '.join(known)}" if known else " is missing; make the folder again"))
    name, languages = manifest["source"], manifest["languages"]
    if not isinstance(name, str) or not name or name.startswith(".") or "/" in name:
        raise ValueError(f"{folder}/manifest.json: source={name!r} must be a name that a folder can have")
    if not isinstance(languages, list) or not all(isinstance(language, str) for language in languages):
        raise ValueError(f"{folder}/manifest.json: languages={languages!r} must be a list of codes")
    return manifest


def file_fingerprint(path):
    """What tells that a file, or the files of a folder, changed."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [(str(entry.name), packed_writer.file_sha256(entry)) for entry in files]
