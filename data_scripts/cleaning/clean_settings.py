"""Settings of `clean_corpus.py`: what a YAML file may say, with the reasons for the defaults."""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from data_scripts.document_folder import KINDS

DUPLICATE_STEPS = ("exact_duplicates", "near_duplicates")
LAST_STEPS = (*DUPLICATE_STEPS, "decontamination")


def _by_kind(**values):
    return field(default_factory=lambda: dict(values))


@dataclass
class NearSettings:
    """MinHash: 14 buckets of 8 hashes over shingles of 5 units (words, or CJK characters), datatrove's defaults.

    Attributes:
        minimum_similarity: by kind, the share of equal hashes below which a pair that met in a bucket is no pair
            after all. The buckets alone let pairs of Jaccard similarity 0.5 through with probability 5 %.
            Code shares licences and templates, and worked problems differ in a number: both need more.
        kinds: those that are compared at all.
    """

    units: int = 5
    buckets: int = 14
    hashes: int = 8
    seed: int = 1
    minimum_similarity: dict = _by_kind(text=0.6, code=0.75, multilingual=0.7, mathematics=0.9)
    kinds: list = field(default_factory=lambda: list(KINDS))


@dataclass
class DecontaminationSettings:
    """Against which evaluation sets, and what is done with a document that holds an item of one.

    Attributes:
        action: "drop" the document, or "cut" the sentences that match out of it.
        tasks: names of recipes/tasks.py; None: all.
        problems: of each generated task, in the order in which `recipes/eval.py` asks them (seed `problem_seed`).
        shortest_words, shortest_characters: items below are found only together with their answer.
        common_items, common_share: an n-gram in more items of its set than both allow is wording of the set.
    """

    action: str = "drop"
    tasks: list | None = None
    tasks_dir: str = "data/tasks"
    without_packaged: bool = False
    benchmarks: list = field(default_factory=list)
    problems: int = 200
    problem_seed: int = 0
    shortest_words: int = 8
    shortest_characters: int = 18
    common_items: int = 10
    common_share: float = 0.01


@dataclass
class CleanSettings:
    """`filters` goes to `filter_steps`; of duplicates the first by `source_order`, then by name, is kept."""

    filters: dict = field(default_factory=dict)
    skip: list = field(default_factory=list)
    source_order: list = field(default_factory=list)
    near_duplicates: NearSettings = field(default_factory=NearSettings)
    decontamination: DecontaminationSettings = field(default_factory=DecontaminationSettings)

    def __post_init__(self):
        near, last = self.near_duplicates, self.decontamination
        for name in ("units", "buckets", "hashes"):
            if not isinstance(getattr(near, name), int) or getattr(near, name) < 1:
                raise ValueError(f"near_duplicates.{name}={getattr(near, name)!r} must be a whole number from 1 on")
        strangers = (set(near.minimum_similarity) | set(near.kinds)) - set(KINDS)
        if strangers:
            raise ValueError(f"near_duplicates names the kinds {sorted(strangers)}; known are {', '.join(KINDS)}")
        near.minimum_similarity = NearSettings().minimum_similarity | near.minimum_similarity
        for kind, value in near.minimum_similarity.items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"near_duplicates.minimum_similarity of {kind} is {value!r}; it must lie in [0, 1]")
        if last.action not in ("drop", "cut"):
            raise ValueError(f"decontamination.action={last.action!r} must be 'drop' or 'cut'")
        if last.problems < 1 or last.shortest_words < 1 or last.shortest_characters < 1:
            raise ValueError("decontamination.problems, shortest_words and shortest_characters must be 1 or more")


def fingerprint(*parts):
    """SHA-256 of JSON values; dataclasses count as their dicts."""
    plain = json.dumps(parts, sort_keys=True,
                       default=lambda part: dataclasses.asdict(part) if dataclasses.is_dataclass(part) else str(part))
    return hashlib.sha256(plain.encode()).hexdigest()


def _names_with_values(values, place):
    if not isinstance(values, dict):
        raise ValueError(f"{place} is a {type(values).__name__}, expected names with values")
    return values


def _is_of(value, kinds):
    """Whether a value of YAML can stand for a field's type: a whole number for a float, a list for a tuple."""
    if isinstance(value, bool):
        return isinstance(True, kinds) and kinds is not int
    return isinstance(value, kinds) or any(isinstance(value, other) and isinstance(made, kinds)
                                           for other, made in ((int, 0.0), (list, ())))


def build(kind, values, place):
    """A dataclass of settings from a dict; ValueError for an unknown name or a value of another type."""
    _names_with_values(values, place)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            raise ValueError(f"{place}: unknown setting {name!r}" + f" (did you mean {close[0]!r}?)" * bool(close)
                             + f"; known are {', '.join(fields)}")
    nested = {"near_duplicates": NearSettings, "decontamination": DecontaminationSettings}
    values = {name: build(nested[name], value, f"{place}: {name}") if name in nested else value
              for name, value in values.items()}
    for name, value in values.items():
        wanted = fields[name].type
        if not _is_of(value, wanted):
            raise ValueError(f"{place}: {name}={value!r} must be of type {getattr(wanted, '__name__', wanted)}")
    return kind(**values)


def read_settings(path=None, **overrides):
    """The settings of a YAML file with `overrides` put over them ("decontamination.action" for nested ones).

    Raises:
        ValueError: unknown or impossible settings, naming the file.
    """
    values = {}
    if path is not None:
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    for name, value in overrides.items():
        if value is not None:
            *outer, last = name.split(".")
            target = _names_with_values(values, path)
            for part in outer:
                target = _names_with_values(target.setdefault(part, {}), f"{path}: {part}")
            target[last] = value
    return build(CleanSettings, values, str(path) if path else "settings")
