"""F1, precision and recall, by scikit-learn; labels are texts or whole numbers."""

import datasets
import evaluate
from sklearn.metrics import precision_recall_fscore_support

from recipes.metric_inputs import NeedExamples

INPUTS = """
Args:
    predictions, references: labels, all texts or all numbers.
    average: "macro" (default: mean over classes), "micro", "weighted", "binary" (needs pos_label) or None (one value
        for each class, in the order of `labels` or sorted).
    labels: the classes to count. pos_label: the class that "binary" looks at.
Returns:
    {"f1", "precision", "recall"}: 0..1, or lists; 0 where a class is never predicted or never right.
"""


class F1(NeedExamples, evaluate.Metric):
    def _info(self):
        labels = [datasets.Value("string"), datasets.Value("float64")]  # not int64: that cast would round scores down
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in labels])

    def _compute(self, predictions, references, average="macro", labels=None, pos_label=1):
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average=average, labels=labels, pos_label=pos_label, zero_division=0.0)
        read = float if average is not None else list
        return {"f1": read(f1), "precision": read(precision), "recall": read(recall)}
