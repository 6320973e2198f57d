"""The graph of a pipeline: stages that read each other's folders, from a YAML file; checked, ordered, fingerprinted.

    defaults: {sft: {seed: 1}}                  # settings of all stages of a kind
    stages:
      data: {kind: data, module: prepare_sft, arguments: {size: tiny}}
      sft:
        kind: sft
        config: sft_tiny.yaml                   # beside the graph's file, or in recipes/configs
        branches: [full]                        # default: all
        inputs: {dataset_name: data, model_name_or_path: "hub:NAME"}
        arguments: {max_steps: 300}

An input is the folder of another stage (`sft`), something in it (`rejection/train.jsonl`), perhaps named
(`own=rejection/train.jsonl`); else a file that is there, `hub:NAME`, or, where the flag is not one for paths, a plain
value (`rewards: [accuracy, reward]`). Edges follow from inputs.

A stage's version says what its folder holds: a hash of its settings and of the versions that it reads, and how often
it was started afresh. The settings that are compared are those of the config file with what the graph and the command
line lay over it; the defaults of the code are left out, so that an update of the code alone makes nothing stale.
"""

import difflib
import graphlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from recipes.checkpoint_files import hash_file

CONFIGS = Path(__file__).resolve().parent / "configs"
NAME = re.compile(r"[A-Za-z]\w*")
GRAPH_KEYS = ("title", "output_dir", "launcher", "defaults", "stages")
STAGE_KEYS = ("kind", "config", "module", "command", "branches", "inputs", "arguments")
OURS = ("config", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run")  # set by the pipeline
PATH_FLAG = re.compile(
    r".*(name_or_path|dataset_name|dataset|from_messages|from_samples|from_folder|corpus|conversations|teacher_eval)"
)
# Settings that change what is said, not what is made.
SILENT = ("disable_tqdm", "report_to", "logging_steps", "hub_token", "push_to_hub", "dataloader_num_workers")
SMALL_FILE = 2**20  # bytes; in a folder outside of the graph larger files are told apart by size alone


def close_names(name, known):
    """`did you mean ...?` or the list of what is known."""
    close = difflib.get_close_matches(str(name), list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def _known(given, known, where):
    for name in given:
        if name not in known:
            raise ValueError(f"unknown key {name!r} in {where}: {close_names(name, known)}")


def _each(value):
    return value if isinstance(value, list) else [value]


def _path_of(value):
    """The file that an input names: `my_rewards.py:function` -> my_rewards.py."""
    return Path(re.sub(r"(\.py):\w+$", r"\1", value)).expanduser()


@dataclass
class Reference:
    """A text of `inputs` taken apart: `prefix` ("own=" or ""), the stage or None, the rest of the path or the value."""

    prefix: str
    stage: str | None
    rest: str

    @classmethod
    def of(cls, text, names):
        text = str(text)
        prefix, equals, inner = text.partition("=")
        if not NAME.fullmatch(prefix):  # a path with = in it
            equals = ""
        for before, value in (("", text), (prefix + equals, inner if equals else "")):
            head, _, rest = value.partition("/")
            if value and head in names:
                return cls(before, head, rest)
        return cls(prefix + equals, None, inner) if equals else cls("", None, text)

    def resolved(self, folder):
        """As it stands on a command line; `folder`: that of all stages."""
        if self.stage is None:
            rest = self.rest.removeprefix("hub:")
            return self.prefix + (str(Path(rest).expanduser()) if rest.startswith("~") else rest)
        return self.prefix + str(Path(folder, self.stage, self.rest))


@dataclass
class Stage:
    """One entry of `stages`, with the graph's defaults and the command line's overrides laid over it."""

    name: str
    kind: str
    config: Path | None = None
    module: str | None = None
    command: list = field(default_factory=list)
    branches: list = field(default_factory=list)
    inputs: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)

    def references(self, names):
        """[(flag, Reference)] of every input."""
        return [(flag, Reference.of(value, names)) for flag, given in self.inputs.items() for value in _each(given)]

    def values(self, names, folder):
        """{flag: value} for its command line: arguments, then inputs with their paths."""
        made = {}
        for flag, given in self.inputs.items():
            found = [Reference.of(value, names).resolved(folder) for value in _each(given)]
            made[flag] = found if isinstance(given, list) else found[0]
        return self.arguments | made


class Graph:
    """Stages in the order in which they run.

    Raises:
        ValueError: names that are none, a cycle, an input that a branch does not have.

    Attributes:
        absent: {stage: [message]} of inputs outside of the graph that are not there.
    """

    def __init__(self, stages, title="Pipeline", launcher=None, output_dir=None):
        self.title, self.launcher, self.output_dir = title, launcher, output_dir
        self.names, self.absent = list(stages), {}
        for name, stage in stages.items():
            for flag, reference in stage.references(self.names):
                if reference.stage is None:
                    self._check_outside(name, flag, reference.rest)
        self.sources = {name: list(dict.fromkeys(reference.stage for _, reference in stage.references(self.names)
                                                 if reference.stage)) for name, stage in stages.items()}  # fmt: skip
        self.stages = {name: stages[name] for name in self._order()}
        self._check_branches(self.stages)

    def _check_outside(self, name, flag, value):
        """An input that names no stage must be there; a word may be a plain value where no path is wanted."""
        if value.startswith("hub:") or value == "built-in" or _path_of(value).exists():
            return
        where, close = f"stages.{name}.inputs.{flag}={value!r}", difflib.get_close_matches(
            value.partition("/")[0], self.names, n=1, cutoff=0.75)
        if close:
            raise ValueError(f"{where} is no stage and no file; did you mean the stage {close[0]}? Stages are "
                             f"{', '.join(self.names)}; write hub:NAME for what comes from the Hub")
        if PATH_FLAG.fullmatch(flag) or "/" in value:
            self.absent.setdefault(name, []).append(
                f"{where} is not there: bring this file or folder, name a stage, or write hub:NAME for the Hub's")

    def _check_branches(self, stages):
        for name, stage in stages.items():
            for source in self.sources[name]:
                has = stages[source].branches
                lacking = [b for b in stage.branches if b not in has] if has else []
                if lacking or has and not stage.branches:
                    raise ValueError(f"stages.{name} (branches {stage.branches or 'all'}) reads {source}, which only "
                                     f"branches {has} have; add them to {source} or take another input")

    def _order(self):
        """Inputs first, else as in the file."""
        sorter = graphlib.TopologicalSorter(self.sources)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            raise ValueError(f"the stages' inputs form a cycle: {' -> '.join(error.args[1])}; a stage cannot wait for "
                             "itself: remove one of these inputs") from error
        order, ready = [], []
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=self.names.index)
            order.append(ready.pop(0))
            sorter.done(order[-1])
        return order

    def branch_names(self):
        return list(dict.fromkeys(branch for stage in self.stages.values() for branch in stage.branches))

    def in_branch(self, name, branch):
        return not (branch and self.stages[name].branches) or branch in self.stages[name].branches

    def ancestors(self, name):
        """The stage and all that it needs."""
        found = {name}
        for source in self.sources[name]:
            found |= self.ancestors(source)
        return found

    def chosen(self, only=(), until=None, branch=None):
        """Names that a call is about, in order. Raises ValueError for unknown ones."""
        for option, names in (("--only", only), ("--until", [until] if until else [])):
            for name in names:
                if name not in self.names:
                    raise ValueError(f"{option} {name}: no such stage; {close_names(name, self.names)}")
        if branch and branch not in self.branch_names():
            known = ", ".join(self.branch_names()) or "none: leave it out"
            raise ValueError(f"--branch {branch}: no such branch; branches are {known}")
        if until and not self.in_branch(until, branch):
            has = ", ".join(self.stages[until].branches)
            raise ValueError(f"--until {until} is of branch {has}, not of --branch {branch}; leave one of them out")
        wanted = set(only) or (self.ancestors(until) if until else set(self.names))
        return [name for name in self.stages if name in wanted and (name in only or self.in_branch(name, branch))]


# ---------------------------------------------------------------- reading


def _read_yaml(path, what):
    if not Path(path).is_file():
        raise ValueError(f"{what} {path}: no such file; the shipped ones are in recipes/configs/")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path} must hold a mapping, got {type(content).__name__}")
    return content


def _scalar(text, flag):
    """The value after `flag` as YAML would have given it: numbers, true, false, JSON; else text."""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{flag} {text} is not valid JSON ({error}); a list may also be written as "
                             f"{flag} a b c") from error
    return {"true": True, "false": False}.get(text.lower(), text)


def parse_overrides(arguments, names):
    """["--sft.max_steps", "9"] -> {"sft": {"max_steps": 9}}; a key without a stage is an error."""
    found, values, flag = {}, None, ""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            key, equals, inline = argument[2:].partition("=")
            stage, dot, key = key.partition(".")
            if not dot or stage not in names:
                raise ValueError(f"{argument}: begin it with a stage, e.g. --{names[0]}.{key or stage}; stages are "
                                 f"{', '.join(names)}")
            values = found.setdefault(stage, {}).setdefault(key, [])
            values[:] = [_scalar(inline, flag)] if equals else []
        elif values is None:
            raise ValueError(f"{argument}: a value without a key; write --stage.key value")
        else:
            values.append(_scalar(argument, flag))
    return {stage: {key: True if not v else v[0] if len(v) == 1 else list(v) for key, v in given.items()}
            for stage, given in found.items()}


def _find_config(name, folder, where):
    found = [path for path in (Path(folder, name), CONFIGS / name) if path.is_file()]
    if not found:
        raise ValueError(f"{where}.config={name}: no such file beside the graph or in {CONFIGS}; "
                         + close_names(name, sorted(path.name for path in CONFIGS.glob("*.yaml"))))
    return found[0]


def _read_stage(name, entry, defaults, overrides, folder, kinds):
    """A `Stage` from its entry; ValueError names the field that is wrong."""
    where = f"stages.{name}"
    if not NAME.fullmatch(str(name)):
        raise ValueError(f"{where}: a name begins with a letter and holds letters, digits and _ only")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with a kind, got {entry!r}")
    _known(entry, STAGE_KEYS, where)
    if entry.get("kind") not in kinds:
        raise ValueError(f"{where}.kind={entry.get('kind')!r} is unknown: {close_names(entry.get('kind'), kinds)}")
    for key in ("inputs", "arguments"):
        if not isinstance(entry.get(key) or {}, dict):
            raise ValueError(f"{where}.{key}={entry[key]!r} must be a mapping of flags")
    inputs = dict(entry.get("inputs") or {})
    arguments = defaults.get(entry["kind"], {}) | (entry.get("arguments") or {})
    for key, value in overrides.items():
        (inputs if key in inputs else arguments)[key] = value
    for key in (*inputs, *arguments):
        if key in OURS:
            raise ValueError(f"{where}: {key} is set by the pipeline; leave it out")
    if double := sorted(set(inputs) & set(arguments)):
        raise ValueError(f"{where}: {double[0]} stands in inputs and in arguments; keep one")
    config = entry.get("config")
    return Stage(name, entry["kind"], config and _find_config(config, folder, where), entry.get("module"),
                 [str(part) for part in _each(entry.get("command") or [])], list(entry.get("branches") or []),
                 inputs, arguments)  # fmt: skip


def read_graph(path, overrides=(), kinds=()):
    """A `Graph` from its YAML file; `overrides`: `--stage.key value` of the command line; `kinds`: the known ones."""
    content = _read_yaml(path, "--config")
    _known(content, GRAPH_KEYS, path)
    entries, defaults = content.get("stages"), content.get("defaults") or {}
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: stages is empty; it maps names to stages")
    _known(defaults, kinds, f"{path}, defaults")
    given = parse_overrides(overrides, list(entries))
    stages = {name: _read_stage(name, entry, defaults, given.get(name, {}), Path(path).parent, kinds)
              for name, entry in entries.items()}  # fmt: skip
    return Graph(stages, content.get("title", "Pipeline"), content.get("launcher"), content.get("output_dir"))


# ---------------------------------------------------------------- what a stage depends on


def _mark(path):
    """What tells the content of a file or folder outside of the graph apart from another."""
    path = Path(path)
    if path.is_file():
        return hash_file(path)[:16]
    files = sorted(each for each in path.rglob("*") if each.is_file())
    parts = [(each.relative_to(path).as_posix(), size := each.stat().st_size,
              hash_file(each) if size <= SMALL_FILE else "") for each in files]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def settings_of(graph, name):
    """{field: value}: all that decides what a stage makes, but the stages that it reads."""
    stage = graph.stages[name]
    values = {"kind": stage.kind} | ({"module": stage.module} if stage.module else {})
    values |= {"command": stage.command} if stage.command else {}
    values |= _read_yaml(stage.config, "config") if stage.config else {}
    for key, value in (stage.arguments | stage.inputs).items():
        group, dot, inner = key.partition(".")
        held = values.get(group) or {}
        if dot and isinstance(held, dict):
            values[group] = held | {inner: value}
        else:  # a plain key, or one inside of what is written as JSON
            values[key] = value
    for flag, reference in stage.references(graph.names):
        outside = _path_of(reference.rest)
        if reference.stage is None and not reference.rest.startswith("hub:") and outside.exists():
            values[f"content of {flag} {reference.rest}"] = _mark(outside)
    kept = {key: value for key, value in values.items() if key not in (*SILENT, *OURS)}
    return json.loads(json.dumps(kept, default=str))


def version_of(settings, inputs, run):
    """The name of what a stage's folder holds; `inputs`: {stage: its version}; `run`: how often it was begun afresh."""
    content = json.dumps([settings, inputs], sort_keys=True)
    return f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.{run}"


def differences(old, new):
    """["max_steps: 300 -> 200"] of two records {"settings", "inputs"}."""
    before, after = old.get("settings", {}), new["settings"]
    found = []
    for name in sorted(set(before) | set(after)):
        a, b = (json.dumps(values[name]) if name in values else "(not set)" for values in (before, after))
        found += [f"{name}: {a} -> {b}"] if a != b else []
    changed = [name for name, version in new["inputs"].items() if old.get("inputs", {}).get(name) != version]
    return found + [f"its input {name} is another one than it was made from" for name in changed]


@dataclass
class Planned:
    """What is to be done with a stage: `status` is done, new, unfinished, stale or forced; why it is stale."""

    status: str
    reasons: list
    record: dict


def plan(graph, records, files, forced=()):
    """{stage: Planned} of all stages.

    Args:
        records: {stage: its entry in pipeline.json}; forced: names to make again although they are done.
        files: `missing(name, record)` names what of a stage's outputs is gone, `has_checkpoints(name)` says whether an
            unfinished stage has work in it that another configuration would lose.
    """
    planned, versions = {}, {}
    for name in graph.stages:
        old = records.get(name)
        new = {"settings": settings_of(graph, name), "inputs": {s: versions[s] for s in graph.sources[name]}}
        reasons = [] if old is None else differences(old, new)
        if old is not None and not reasons and old["state"] == "done":
            reasons = [f"{part} is gone" for part in files.missing(name, old)]
        if old is None:
            status = "new"
        elif name in forced or reasons and old["state"] != "done" and not files.has_checkpoints(name):
            status = "forced"
        else:
            status = "stale" if reasons else "done" if old["state"] == "done" else "unfinished"
        run = 1 if old is None else old["run"] + (status in ("stale", "forced"))
        versions[name] = new["version"] = version_of(new["settings"], new["inputs"], run)
        planned[name] = Planned(status, reasons, new | {"run": run})
    return planned


def states_of(graph, home):
    """{stage: "not run", "running", "done", "failed" or "stale"} as the page and the last table say it."""
    planned = plan(graph, home.records, home)
    return {name: "stale" if each.status == "stale" else home.records.get(name, {}).get("state", "not run")
            for name, each in planned.items()}  # fmt: skip
