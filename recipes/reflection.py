"""Words of reflection in completions: how often a policy doubts, checks and begins anew.

Source: DeepSeek-R1 (Nature, 2025; arXiv:2501.12948), Extended Data Fig. 1a: ten words that three people agreed on,
counted in the outputs over training.
"""

import re

REFLECTION_WORDS = (
    "wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
)  # fmt: skip
_PATTERN = re.compile(rf"\b(?:{'|'.join(REFLECTION_WORDS)})\b", re.IGNORECASE)


def reflection_words(text):
    """How many of the words of REFLECTION_WORDS stand in a text: whole words, in any case."""
    return len(_PATTERN.findall(text))
