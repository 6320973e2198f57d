"""What `prepare_sft.py` can be asked for: presets, settings, and the fingerprint by which a finished set is known."""

import dataclasses
import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path

from data_scripts.finetuning.sft_rows import BUILT_IN, parse_tasks
from data_scripts.reasoning.traces import BACKTRACK_SHARE, CHECK_SHARE, VOICE_SHARES
from data_scripts.sources import identity
from recipes import task_base

# Tasks of `tiny`: few distinct tokens, small sums and products, almost one voice. A model of 3 M parameters gets about
# a third of them right after 1 M tokens; spelling, sorting and filtering, which copy words and larger numbers from the
# question, stay under 10 % there and begin at about 10 M tokens (benchmarks/LOG.md).
SIZES = {
    "tiny": {"tasks": "simple_equations:1,leg_counting:1",
             "problems": 3_000, "test_problems": 30, "dialogues": 100, "repeats": 1,
             "voices": {"terse": 0.96, "prose": 0.02, "numbered": 0.02}, "check": 0.02, "backtrack": 0.02},
    "nano": {"tasks": "chain_sum,basic_arithmetic:1-2,products,simple_equations,decimal_chain_sum:1-2,leg_counting,gcd,"
                      "count_bits,base_conversion:1-2,count_primes:1-2,letter_counting,spell_backward,word_sorting,"
                      "word_sequence_reversal,number_sorting,number_filtering,binary_alternation:1-2,"
                      "caesar_cipher:1-2,family_relationships,syllogism,calendar_arithmetic:1-2,number_sequence,"
                      "largest_island:1,fraction_simplification:1-2,mini_sudoku:1",
             "problems": 800, "test_problems": 20, "dialogues": 3_000, "repeats": 3, "voices": VOICE_SHARES,
             "check": CHECK_SHARE, "backtrack": BACKTRACK_SHARE},
}


def with_preset(size, given):
    """The values of a preset, replaced by those of `given` that are not None.

    Raises:
        ValueError: for an unknown size or task, naming the known ones.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; known sizes are {', '.join(SIZES)}")
    values = {**SIZES[size], **{name: value for name, value in given.items() if value is not None}}
    return {**values, "tasks": parse_tasks(values["tasks"])}


@dataclasses.dataclass
class Settings:
    """Everything that decides the output; kept in the manifest."""

    tasks: dict
    problems: int
    test_problems: int
    dialogues: int
    repeats: int
    sources: dict
    columns: dict
    mixture: dict | None
    voices: dict
    check: float
    backtrack: float
    direct_answers: str
    max_characters: int
    test_share: float
    errors: str
    seed: int

    def __post_init__(self):
        for name in ("check", "backtrack", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for least, names in ((1, ("problems", "repeats", "max_characters")), (0, ("test_problems", "dialogues"))):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if set(self.voices) - set(VOICE_SHARES) or sum(self.voices.values()) <= 0:
            raise ValueError(f"voices={self.voices} must give shares to {', '.join(VOICE_SHARES)}")
        if self.direct_answers not in ("empty_block", "bare"):
            raise ValueError(f"direct_answers={self.direct_answers!r} must be 'empty_block' or 'bare'")
        for name, location in self.sources.items():
            if location == "built-in" and name not in BUILT_IN:
                raise ValueError(f"source {name!r} is not built in; built in are {', '.join(BUILT_IN)}. Give its file, "
                                 f"folder or Hub name with --source {name}=LOCATION")
        if self.mixture is not None:
            if set(self.mixture) != set(self.sources):
                raise ValueError(f"mixture names {', '.join(self.mixture)}, the sources are {', '.join(self.sources)}: "
                                 "give every source a share")
            if not math.isclose(sum(self.mixture.values()), 100, abs_tol=0.01) or min(self.mixture.values()) <= 0:
                raise ValueError(f"mixture {self.mixture} must sum to 100 (per cent of conversations), each above 0")
        if set(self.columns) - set(self.sources):
            raise ValueError(f"columns for {min(set(self.columns) - set(self.sources))!r}, which is no source; "
                             f"sources are {', '.join(self.sources)}")

    def fingerprint(self):
        inputs = {name: {"reasoning-gym": version("reasoning-gym")} if location == "built-in" else
                  identity(name, location) for name, location in self.sources.items()}
        content = json.dumps([dataclasses.asdict(self), inputs, code_version()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def code_version():
    """SHA-256 over the modules that decide what rows look like and on which side they lie: then sets are remade."""
    here, recipes = Path(__file__).parents[1], Path(task_base.__file__).parent
    files = [*here.glob("reasoning/*.py"), *here.glob("finetuning/*.py"), here / "prepare_sft.py",
             here / "row_files.py",
             *recipes.glob("task*.py"), recipes / "conversations.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
