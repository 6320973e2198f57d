"""Recall@k of ranked lists: the share of a query's relevant documents among the first k, mean over queries."""

import datasets
import evaluate

from recipes.metric_inputs import NeedExamples, need_rankings, whole_numbers

INPUTS = """
Args:
    predictions: for each query the documents' ids, best first. references: the ids of its relevant documents.
    k: a number or several (default 1, 5, 10).
Returns:
    {"recall@1": 0..1, ...}
"""


class RecallAtK(NeedExamples, evaluate.Metric):
    def _info(self):
        ids = [datasets.List(datasets.Value(kind)) for kind in ("string", "float64")]  # int64 would round
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in ids])

    def _compute(self, predictions, references, k=(1, 5, 10)):
        need_rankings(predictions, references)
        results = {}
        for cut in whole_numbers("k", k):
            found = [len(set(ranking[:cut]) & set(relevant)) / len(set(relevant))
                     for ranking, relevant in zip(predictions, references)]
            results[f"recall@{cut}"] = sum(found) / len(found)
        return results
