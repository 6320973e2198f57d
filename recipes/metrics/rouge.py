"""ROUGE F1 by rouge-score, mean over examples; of several references the best one counts."""

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

from recipes.metric_inputs import FunctionTokenizer, NeedExamples

INPUTS = """
Args:
    predictions: texts. references: a text for each, or a list of texts.
    rouge_types: default rouge1, rouge2, rougeL and rougeLsum (sentences are lines).
    use_stemmer: Porter's. tokenizer: a function from text to tokens; the default one keeps a-z and 0-9 only, so for
        Chinese pass tokenizer=list.
Returns:
    {"rouge1": 0..1, ...}
"""
TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(NeedExamples, evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__, inputs_description=INPUTS,
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries (ACL W04-1013)",
            features=[datasets.Features({"predictions": text, "references": kind})
                      for kind in (text, datasets.List(text))])

    def _compute(self, predictions, references, rouge_types=TYPES, use_stemmer=False, tokenizer=None):
        scorer = RougeScorer(list(rouge_types), use_stemmer, tokenizer=tokenizer and FunctionTokenizer(tokenizer))
        references = [[texts] if isinstance(texts, str) else texts for texts in references]
        for index, texts in enumerate(references):
            if not texts or not all(tokenizer(text) if tokenizer else any(c.isascii() and c.isalnum() for c in text)
                                    for text in texts):
                raise ValueError(f"references[{index}]={texts!r:.200} holds no token to compare with; for scripts "
                                 "other than Latin pass tokenizer=list (characters) or a tokenizer of their own")
        scores = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references)]
        return {name: float(sum(score[name].fmeasure for score in scores) / len(scores)) for name in rouge_types}
