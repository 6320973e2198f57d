"""pass@k: the probability that at least one of k samples solves a problem, unbiased, mean over problems."""

import datasets
import evaluate

from recipes.intervals import mean_interval, pass_at_k
from recipes.metric_inputs import NeedExamples, need_truth_values, whole_numbers

INPUTS = """
Args:
    predictions: for each problem a list that says of each of its samples whether it is right (True/False or 1/0).
    k: a number or several, at most as many as there are samples (default 1). confidence: of the intervals.
Returns:
    {"pass@1": 0..1, "pass@1_interval": [low, high], ...}, intervals over problems
"""


class PassAtK(NeedExamples, evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__, inputs_description=INPUTS,
            citation="Chen et al. 2021, Evaluating Large Language Models Trained on Code (arXiv:2107.03374)",
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}))

    def _compute(self, predictions, k=1, confidence=0.95):
        results = {}
        for index, samples in enumerate(predictions):
            need_truth_values(f"predictions[{index}]", samples)
        for size in whole_numbers("k", k):
            values = [pass_at_k(len(samples), int(sum(samples)), size) for samples in predictions]
            results[f"pass@{size}"] = sum(values) / len(values)
            results[f"pass@{size}_interval"] = list(mean_interval(values, confidence))
        return results
