"""Corpus BLEU by sacreBLEU, on its scale of 0 to 100, with the signature that makes a score comparable."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU

from recipes.metric_inputs import NeedExamples

INPUTS = """
Args:
    predictions: texts, not tokenized. references: a text for each, or a list of texts (their number may vary).
    tokenize: sacreBLEU's tokenizer: "13a" (default), "intl", "zh" for Chinese, "char", ...
    lowercase: ignore case. effective_order: for very short texts, leave out orders that cannot occur.
Returns:
    {"bleu": 0..100, "precisions": of 1 to 4 tokens, "brevity_penalty", "signature"}
"""


class Bleu(NeedExamples, evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__, inputs_description=INPUTS,
            citation="Post 2018, A Call for Clarity in Reporting BLEU Scores (arXiv:1804.08771)",
            features=[datasets.Features({"predictions": text, "references": kind})
                      for kind in (text, datasets.List(text))])

    def _compute(self, predictions, references, tokenize="13a", lowercase=False, effective_order=False):
        references = [[texts] if isinstance(texts, str) else texts for texts in references]
        if not all(references):
            raise ValueError(f"references[{[bool(texts) for texts in references].index(False)}] is empty: "
                             "BLEU needs at least one reference text for every prediction")
        most = max(len(texts) for texts in references)
        columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        scorer = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=effective_order)
        score = scorer.corpus_score(predictions, columns)
        return {"bleu": score.score, "precisions": score.precisions, "brevity_penalty": score.bp,
                "signature": str(scorer.get_signature())}
