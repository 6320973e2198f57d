"""What the files in `recipes/metrics` share: checks that evaluate's casts would hide, and small adapters."""


class FunctionTokenizer:
    """A function from text to tokens, as the object that rouge-score wants."""

    def __init__(self, function):
        self.tokenize = function


class NeedExamples:
    """Mixed into a metric: no examples are an error that says so, not an IndexError or a division by zero."""

    def _infer_feature_from_batch(self, batch):
        for name, column in batch.items():
            if column is None or not len(column):
                raise ValueError(f"{name} is empty: a metric needs at least one example")
        return super()._infer_feature_from_batch(batch)


def need_truth_values(name, values):
    """ValueError unless every value is 0 or 1 and there is one."""
    wrong = [value for value in values if value not in (0, 1)]
    if wrong or not len(values):
        raise ValueError(f"{name} must hold truth values (True/False or 1/0), found {wrong[0] if wrong else 'none'}")


def need_rankings(predictions, references):
    """ValueError if a ranking names a document twice or a query has no relevant one."""
    for index, (ranking, relevant) in enumerate(zip(predictions, references)):
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"predictions[{index}] names a document twice: it takes ids in order of rank, not scores")
        if not relevant:
            raise ValueError(f"references[{index}] is empty: leave out queries without a relevant document")


def whole_numbers(name, values):
    """One whole number >= 1, or several, as a list."""
    values = [values] if isinstance(values, int) else list(values)
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 1]
    if wrong or not values:
        raise ValueError(f"{name}={wrong[0] if wrong else values!r} must be a whole number of at least 1, or several")
    return values
