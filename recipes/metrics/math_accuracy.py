"""Share of completions whose final answer equals the reference, up to notation, by math-verify."""

import datasets
import evaluate

from recipes.intervals import wilson_interval
from recipes.metric_inputs import NeedExamples
from recipes.task_answers import extract_answer
from recipes.tasks import verify_mathematics

INPUTS = """
Args:
    predictions: completions; the answer is read after the last "</think>", from a box or where else answers stand.
    references: the right answers, LaTeX or plain.
    untagged: what a text without "</think>" is: the "whole" is the answer (default), or "unparsable".
    confidence: of the interval.
Returns:
    {"math_accuracy": 0..1, "interval": [low, high], "unparsable": share without a readable answer, counted as wrong}
"""


class MathAccuracy(NeedExamples, evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references, untagged="whole", confidence=0.95):
        if untagged not in ("whole", "unparsable"):
            raise ValueError(f"untagged={untagged!r} must be 'whole' or 'unparsable'")
        right = unparsable = 0
        for completion, reference in zip(predictions, references):
            answer = extract_answer(completion, "mathematics", untagged)
            verdict = answer and verify_mathematics(answer, reference)
            right += bool(verdict and verdict.correct)
            unparsable += not (verdict and verdict.parsed)
        return {"math_accuracy": right / len(predictions), "unparsable": unparsable / len(predictions),
                "interval": list(wilson_interval(right, len(predictions), confidence))}
