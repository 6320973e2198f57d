"""Normalised discounted cumulative gain by scikit-learn, mean over queries whose lists may differ in length."""

import datasets
import evaluate
from sklearn.metrics import ndcg_score

from recipes.metric_inputs import NeedExamples, whole_numbers

INPUTS = """
Args:
    predictions: for each query a score for every document. references: their grades (0 and more), in the same order.
    k: count the first k places only (default: all). Equal scores share their places.
Returns:
    {"ndcg": 0..1}; a query without a relevant document counts 0
"""


class Ndcg(NeedExamples, evaluate.Metric):
    def _info(self):
        numbers = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__, inputs_description=INPUTS,
            citation="Jarvelin and Kekalainen 2002, Cumulated Gain-Based Evaluation of IR Techniques",
            features=datasets.Features({"predictions": numbers, "references": numbers}))

    def _compute(self, predictions, references, k=None):
        cut, total = None if k is None else whole_numbers("k", k)[0], 0.0
        for index, (scores, grades) in enumerate(zip(predictions, references)):
            if len(scores) != len(grades) or len(scores) < 2:
                raise ValueError(f"query {index} has {len(scores)} scores and {len(grades)} grades: "
                                 "one of each for at least two documents is needed")
            total += ndcg_score([grades], [scores], k=cut)
        return {"ndcg": float(total / len(predictions))}
