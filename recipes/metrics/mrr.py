"""Mean reciprocal rank: 1 / place of the first relevant document, 0 where none is found, mean over queries."""

import datasets
import evaluate

from recipes.metric_inputs import NeedExamples, need_rankings, whole_numbers

INPUTS = """
Args:
    predictions: for each query the documents' ids, best first. references: the ids of its relevant documents.
    k: look at the first k places only (default: all).
Returns:
    {"mrr": 0..1}
"""


class Mrr(NeedExamples, evaluate.Metric):
    def _info(self):
        ids = [datasets.List(datasets.Value(kind)) for kind in ("string", "float64")]  # int64 would round
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in ids])

    def _compute(self, predictions, references, k=None):
        need_rankings(predictions, references)
        cut = None if k is None else whole_numbers("k", k)[0]
        total = 0.0
        for ranking, relevant in zip(predictions, references):
            relevant = set(relevant)
            total += next((1 / place for place, name in enumerate(ranking[:cut], 1) if name in relevant), 0.0)
        return {"mrr": total / len(predictions)}
