"""Bits per byte of text: summed loss in nats / (ln 2 * bytes). Comparable between tokenizers, unlike perplexity."""

import math

import datasets
import evaluate

from recipes.metric_inputs import NeedExamples

INPUTS = """
Args:
    predictions: for each document the sum of its tokens' negative log-likelihoods, in nats.
    references: its length in bytes (UTF-8).
Returns:
    {"bits_per_byte"}, over all documents together
"""


class BitsPerByte(NeedExamples, evaluate.Metric):
    def _info(self):
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=INPUTS,
            features=datasets.Features({"predictions": number, "references": number}))

    def _compute(self, predictions, references):
        for index, (nats, size) in enumerate(zip(predictions, references)):
            if not (math.isfinite(nats) and nats >= 0):
                raise ValueError(f"predictions[{index}]={nats}: a summed negative log-likelihood is finite and >= 0 "
                                 "(log-probabilities need their sign changed)")
            if not (size >= 0 and size == int(size)):
                raise ValueError(f"references[{index}]={size}: a number of bytes is whole and >= 0")
        if not sum(references):
            raise ValueError("all documents have 0 bytes: bits per byte need text")
        return {"bits_per_byte": math.fsum(predictions) / (math.log(2) * math.fsum(references))}
