"""Share of labels that are right, by scikit-learn; labels are texts or whole numbers."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

from recipes.metric_inputs import NeedExamples

INPUTS = """
Args:
    predictions, references: labels, all texts or all numbers.
    sample_weight: one weight for each example.
Returns:
    {"accuracy": 0..1}
"""


class Accuracy(NeedExamples, evaluate.Metric):
    def _info(self):
        labels = [datasets.Value("string"), datasets.Value("float64")]  # not int64: that cast would round scores down
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in labels])

    def _compute(self, predictions, references, sample_weight=None):
        return {"accuracy": float(accuracy_score(references, predictions, sample_weight=sample_weight))}
