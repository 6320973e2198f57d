"""The filters in the order in which they run, from one set of settings."""

import dataclasses

from data_scripts.cleaning.code_checks import CodeParsesFilter, TrimLicenceHeader
from data_scripts.cleaning.entropy_filter import EntropyFilter
from data_scripts.cleaning.language_check import LanguageFilter
from data_scripts.cleaning.private_data import MaskPrivateData
from data_scripts.cleaning.text_filters import (
    BoilerplateFilter,
    RepairText,
    RepetitionFilter,
    ShortTextFilter,
)
from data_scripts.quality_model import QualityFilter


@dataclasses.dataclass
class FilterSettings:
    """What decides the outcome of the filters; part of a clean folder's fingerprint.

    skip: names of steps to leave out. quality_model: a folder made by quality_model.py, None leaves the step out.
    """

    min_characters: int = 10
    min_words: int = 0
    language_threshold: float = 0.7
    max_parse_errors: float | dict | None = None  # None: by language, code_checks.MAX_ERRORS
    licence_headers: str = "trim"
    quality_model: str | None = None
    quality_threshold: dict | None = None  # {kind: lowest probability of good}; None: the model's own
    skip: tuple = ()


STEPS = ("repair", "short", "language", "boilerplate", "repetition", "entropy", "licence_headers", "code", "quality",
         "private_data")


def filter_steps(settings):
    """[(step name, block)] in order; a block without `filter` changes documents and drops none.

    Raises:
        ValueError: a step to skip that there is none of, or an impossible setting.
    """
    unknown = set(settings.skip) - set(STEPS)
    if unknown:
        raise ValueError(f"skip={list(settings.skip)} names {sorted(unknown)[0]!r}; steps are {', '.join(STEPS)}")
    if settings.licence_headers not in ("trim", "keep"):
        raise ValueError(f"licence_headers={settings.licence_headers!r} must be 'trim' or 'keep'")
    quality = settings.quality_model and QualityFilter(settings.quality_model, settings.quality_threshold)
    blocks = {
        "repair": RepairText(),
        "short": ShortTextFilter(settings.min_characters, settings.min_words),
        "language": LanguageFilter(settings.language_threshold),
        "boilerplate": BoilerplateFilter(),
        "repetition": RepetitionFilter(),
        "entropy": EntropyFilter(),
        "licence_headers": TrimLicenceHeader() if settings.licence_headers == "trim" else None,
        "code": CodeParsesFilter(settings.max_parse_errors),
        "quality": quality or None,
        "private_data": MaskPrivateData(),
    }
    return [(name, block) for name, block in blocks.items() if block is not None and name not in settings.skip]
