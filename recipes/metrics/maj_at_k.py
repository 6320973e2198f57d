"""maj@k: accuracy of the most frequent answer among the first k samples (self-consistency), mean over problems."""

import datasets
import evaluate

from recipes.intervals import majority, mean_interval
from recipes.metric_inputs import NeedExamples, whole_numbers

INPUTS = """
Args:
    predictions: for each problem the answers read out of its samples, as texts in one notation; None where there is
        none, which never wins. references: the right answers.
    k: a number or several, at most as many as there are samples (default: all). confidence: of the intervals.
    verify: a function (answer, reference) -> bool (default: equal texts).
Returns:
    {"maj@4": 0..1, "maj@4_interval": [low, high], ...}, intervals over problems
"""


class MajAtK(NeedExamples, evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__, inputs_description=INPUTS,
            citation="Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning (arXiv:2203.11171)",
            features=datasets.Features({"predictions": datasets.List(text), "references": text}))

    def _compute(self, predictions, references, k=None, confidence=0.95, verify=str.__eq__):
        fewest = min(len(answers) for answers in predictions)
        results = {}
        for size in whole_numbers("k", fewest if k is None else k):
            if size > fewest:
                raise ValueError(f"k={size} is more than the {fewest} samples that some problem has")
            winners = [majority(answers[:size])[0] for answers in predictions]
            right = [float(winner is not None and bool(verify(winner, reference)))
                     for winner, reference in zip(winners, references)]
            results[f"maj@{size}"] = sum(right) / len(right)
            results[f"maj@{size}_interval"] = list(mean_interval(right, confidence))
        return results
