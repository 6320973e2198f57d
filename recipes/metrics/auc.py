"""Area under the ROC curve of scores for two classes, by scikit-learn: how often a positive outranks a negative."""

import datasets
import evaluate
from sklearn.metrics import roc_auc_score

from recipes.metric_inputs import NeedExamples, need_truth_values

INPUTS = """
Args:
    predictions: scores, higher for the positive class. references: 1 for positive, 0 for negative.
    sample_weight: one weight for each example.
Returns:
    {"auc": 0..1}, 0.5 for chance
"""


class Auc(NeedExamples, evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64"),
                                        "references": datasets.Value("float64")}))

    def _compute(self, predictions, references, sample_weight=None):
        need_truth_values("references", references)
        if len(set(references)) < 2:
            raise ValueError(f"all {len(references)} references are {references[0]:.0f}: an area under the curve "
                             "compares two classes, so both must be there")
        return {"auc": float(roc_auc_score(references, predictions, sample_weight=sample_weight))}
