"""Share of completions in R1's format: reasoning, one "</think>", then an answer."""

import datasets
import evaluate

from recipes.chat_format import follows_format
from recipes.intervals import wilson_interval
from recipes.metric_inputs import NeedExamples

INPUTS = """
Args:
    predictions: completions, with or without the "<think>" that the generation prompt may already hold.
    confidence: of the interval.
Returns:
    {"format_rate": 0..1, "interval": [low, high]}; samples count as independent
"""


class FormatRate(NeedExamples, evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__, inputs_description=INPUTS,
            citation="DeepSeek-AI 2025, DeepSeek-R1 (arXiv:2501.12948), Sec. 2.2.2",
            features=datasets.Features({"predictions": datasets.Value("string")}))

    def _compute(self, predictions, confidence=0.95):
        good = sum(map(follows_format, predictions))
        return {"format_rate": good / len(predictions),
                "interval": list(wilson_interval(good, len(predictions), confidence))}
