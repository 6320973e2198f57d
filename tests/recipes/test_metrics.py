import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import evaluate
import numpy
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sklearn_metrics

from recipes import metrics_loader
from recipes.intervals import mean_interval, wilson_interval
from recipes.metrics_loader import load_metric, metric_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def metric_folders(tmp_path_factory):
    """evaluate's caches in a folder of the test: what a former version left there is not used."""
    folder = tmp_path_factory.mktemp("evaluate")
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
    patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
    yield
    patch.undo()


def compute(name, predictions, references=None, **settings):
    inputs = {"predictions": predictions} | ({} if references is None else {"references": references})
    return load_metric(name).compute(**inputs, **settings)


def test_every_metric_loads_by_path_and_says_what_it_takes():
    assert metric_names() == ["accuracy", "auc", "bits_per_byte", "bleu", "f1", "format_rate", "maj_at_k",
                              "math_accuracy", "mrr", "ndcg", "pass_at_k", "recall_at_k", "rouge"]
    for name in metric_names():
        metric = evaluate.load(str(ROOT / "recipes" / "metrics" / f"{name}.py"), keep_in_memory=True)
        assert metric.module_type == "metric" and metric.description
        assert "Args:" in metric.inputs_description and "Returns:" in metric.compute.__doc__
        with pytest.raises(ValueError, match="predictions is empty"):
            features = metric.features[0] if isinstance(metric.features, list) else metric.features
            metric.compute(**{feature: [] for feature in features})


def test_accuracy_and_f1():
    truth, guess = ["a", "b", "a", "c", "a"], ["a", "a", "a", "c", "b"]
    assert compute("accuracy", guess, truth) == {"accuracy": 0.6}
    assert compute("accuracy", [1, 0, 2], [1, 1, 2], sample_weight=[1, 2, 1]) == {"accuracy": 0.5}
    # a: precision 2/3, recall 2/3; b: never right; c: 1
    scores = compute("f1", guess, truth)
    assert scores == pytest.approx({"f1": 5 / 9, "precision": 5 / 9, "recall": 5 / 9})
    assert compute("f1", guess, truth, average=None)["f1"] == pytest.approx([2 / 3, 0, 1])
    assert compute("f1", ["a"], ["b"], average=None) == {"f1": [0, 0], "precision": [0, 0], "recall": [0, 0]}
    rng = numpy.random.default_rng(0)
    truth, guess = rng.integers(0, 4, 60).tolist(), rng.integers(0, 4, 60).tolist()
    for average in ("macro", "micro", "weighted"):
        expected = sklearn_metrics.f1_score(truth, guess, average=average)
        assert compute("f1", guess, truth, average=average)["f1"] == pytest.approx(expected)
    binary = compute("f1", [1, 0, 1, 1], [1, 1, 0, 1], average="binary")
    assert binary == pytest.approx({"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3})
    with pytest.raises(ValueError, match="mix of .*continuous"):  # scores are not labels; a cast would make them 0
        compute("accuracy", [0.7, 0.2], [1, 0])
    with pytest.raises(ValueError, match="Mismatch in the number"):
        compute("accuracy", [1, 0], [1])


def test_auc():
    scores, truth = [0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0]
    assert compute("auc", scores, truth) == {"auc": 0.75}  # 3 of the 4 pairs are in order
    assert compute("auc", [-s for s in scores], truth) == {"auc": 0.25}
    assert compute("auc", [0.5] * 4, truth) == {"auc": 0.5}
    with pytest.raises(ValueError, match="all 2 references are 1"):
        compute("auc", [0.1, 0.2], [1, 1])
    with pytest.raises(ValueError, match="references must hold truth values"):
        compute("auc", [0.1, 0.2], [1, 2])


def test_bleu():
    # Precisions 4/5, 3/4, 2/3, 1/2 by hand; the prediction is a word shorter: exp(1 - 6/5).
    predictions, references = ["the cat sat on it"], ["the cat sat on the mat"]
    score = compute("bleu", predictions, references)
    assert score["precisions"] == pytest.approx([80, 75, 200 / 3, 50])
    assert score["bleu"] == pytest.approx(100 * math.exp(-0.2) * (4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
    assert score["brevity_penalty"] == pytest.approx(math.exp(-0.2))
    assert score["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    # Several references, their number varying.
    predictions = ["the cat sat on it", "a dog ran home quickly today", "Yes, it is."]
    references = [["the cat sat on the mat", "a cat sat on it"], ["the dog ran home quickly"],
                  ["Yes, it is not.", "yes"]]
    columns = [[r[0] for r in references], [references[0][1], None, references[2][1]]]
    assert compute("bleu", predictions, references)["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(predictions, columns).score)
    assert compute("bleu", ["学而时习之不亦乐乎"], ["学而时习之不亦说乎"], tokenize="zh")["bleu"] > 50
    assert compute("bleu", predictions, [r[0].upper() for r in references])["bleu"] < 5
    with pytest.raises(ValueError, match=r"references\[1\] is empty"):
        compute("bleu", ["a", "b"], [["a"], []])


def test_rouge():
    # 3 of 4 and 3 of 5 words in common; 2 of 3 and 2 of 4 pairs.
    score = compute("rouge", ["the cat sat down"], ["the cat sat on mats"])
    assert score["rouge1"] == pytest.approx(2 * 3 / (4 + 5))
    assert score["rouge2"] == pytest.approx(2 * 2 / (3 + 4))
    assert score["rougeL"] == score["rougeLsum"] == pytest.approx(2 * 3 / 9)
    predictions = ["one two\nthree four five", "cats running"]
    references = [["one", "three four five\none two"], ["a cat runs"]]
    scorer = RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)
    best = [scorer.score_multi(r, p)["rougeLsum"].fmeasure for r, p in zip(references, predictions)]
    both = compute("rouge", predictions, references, rouge_types=["rougeL", "rougeLsum"], use_stemmer=True)
    assert both["rougeLsum"] == pytest.approx(sum(best) / 2) and both["rougeL"] < both["rougeLsum"]
    assert compute("rouge", ["学而"], ["学习"], tokenizer=list, rouge_types=["rouge1"]) == {"rouge1": 0.5}
    with pytest.raises(ValueError, match=r"references\[0\]=\['学习'\] holds no token.*tokenizer=list"):
        compute("rouge", ["学而"], ["学习"])


def test_ranking_metrics_by_hand():
    rankings, relevant = [["d1", "d2", "d3", "d4"], ["d9", "d8", "d7"]], [["d2", "d4", "d5"], ["d6"]]
    assert compute("recall_at_k", rankings, relevant, k=[1, 2, 4]) == pytest.approx(
        {"recall@1": 0, "recall@2": 1 / 6, "recall@4": 1 / 3})
    assert compute("mrr", rankings, relevant) == {"mrr": 0.25}
    assert compute("mrr", rankings, relevant, k=1) == {"mrr": 0}
    # Grades 3 and 1 at places 2 and 1: (1 + 3 / log2(3)) / (3 + 1 / log2(3))
    expected = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert compute("ndcg", [[0.9, 0.5, 0.1]], [[1, 3, 0]])["ndcg"] == pytest.approx(expected)
    assert compute("ndcg", [[0.9, 0.5, 0.1], [2, 1]], [[1, 3, 0], [1, 0]])["ndcg"] == pytest.approx((expected + 1) / 2)
    assert compute("ndcg", [[0.9, 0.5]], [[0, 2]], k=1) == {"ndcg": 0}


def test_ranking_metrics_against_scikit_learn():
    rng = numpy.random.default_rng(1)
    scores, right = rng.normal(size=(50, 8)), rng.integers(0, 8, 50)
    rankings, relevant = (-scores).argsort(1).tolist(), [[int(i)] for i in right]
    for k in (1, 3):
        expected = sklearn_metrics.top_k_accuracy_score(right, scores, k=k)
        assert compute("recall_at_k", rankings, relevant, k=k) == {f"recall@{k}": pytest.approx(expected)}
    # With one relevant document mean average precision is the mean reciprocal rank.
    one_hot = numpy.eye(8)[right]
    expected = sklearn_metrics.label_ranking_average_precision_score(one_hot, scores)
    assert compute("mrr", rankings, relevant)["mrr"] == pytest.approx(expected)
    grades = rng.integers(0, 4, (50, 8))
    for k in (None, 3):
        assert compute("ndcg", scores.tolist(), grades.tolist(), k=k)["ndcg"] == pytest.approx(
            sklearn_metrics.ndcg_score(grades, scores, k=k))


@pytest.mark.parametrize("name, predictions, references, settings, message", [
    ("recall_at_k", [[0, 0, 1]], [[1]], {}, "names a document twice"),
    ("recall_at_k", [[0.9, 0.2, 0.2]], [[1]], {}, "names a document twice"),  # scores by mistake
    ("recall_at_k", [["a"]], [["a"]], {"k": 0}, "k=0 must be a whole number"),
    ("mrr", [["a"]], [[]], {}, r"references\[0\] is empty"),
    ("ndcg", [[0.1, 0.2]], [[1]], {}, "query 0 has 2 scores and 1 grades"),
    ("ndcg", [[0.1, 0.2]], [[1, -1]], {}, "negative"),
    ("pass_at_k", [[1, 0.5]], None, {}, r"predictions\[0\] must hold truth values"),
    ("pass_at_k", [[1, 0], [1]], None, {"k": 2}, "k=2 must lie in"),
    ("maj_at_k", [["1"]], ["1"], {"k": 3}, "k=3 is more than the 1 samples"),
    ("bits_per_byte", [-3.0], [4], {}, "change|sign"),
    ("bits_per_byte", [3.0], [4.5], {}, "whole"),
    ("bits_per_byte", [0.0], [0], {}, "0 bytes"),
    ("math_accuracy", ["1"], ["1"], {"untagged": "no"}, "untagged='no'"),
])  # fmt: skip
def test_bad_input_is_an_error(name, predictions, references, settings, message):
    with pytest.raises(ValueError, match=message):
        compute(name, predictions, references, **settings)


def test_sampling_metrics():
    samples = [[True, False, False, False], [False] * 4, [True] * 4]
    scores = compute("pass_at_k", samples, k=[1, 2, 4])
    assert [scores[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([(0.25 + 1) / 3, (0.5 + 1) / 3, 2 / 3])
    assert scores["pass@4_interval"] == list(wilson_interval(2, 3))
    assert scores["pass@1_interval"] == list(mean_interval([0.25, 0.0, 1.0]))

    answers = [["4", "5", "5", None], [None, None, None, "7"], ["1", "2", "2", "2"], [None] * 4]
    assert compute("maj_at_k", answers, ["5", "7", "1", "9"])["maj@4"] == 0.5
    scores = compute("maj_at_k", answers, ["4", "7", "1", "9"], k=[1, 2])
    assert scores["maj@1"] == 0.5 and scores["maj@2"] == 0.5 and scores["maj@1_interval"] == list(wilson_interval(2, 4))
    assert compute("maj_at_k", [["0.5"]], ["1/2"], verify=lambda a, b: Fraction(a) == Fraction(b))["maj@1"] == 1


def test_bits_per_byte():
    # A uniform model of bytes needs 8 bits for each.
    nats = [10 * math.log(256), 20 * math.log(256)]
    assert compute("bits_per_byte", nats, [10, 20]) == {"bits_per_byte": pytest.approx(8)}
    # Over all documents together, not a mean of means.
    assert compute("bits_per_byte", [0.0, 8 * math.log(2)], [3, 1]) == {"bits_per_byte": pytest.approx(2)}


def test_format_rate_and_math_accuracy():
    good = ["<think>\nhm\n</think>\n\n4", "hm</think>4", "\n<think></think>4"]
    bad = ["4", "hm</think>", "hm</think> \n", "a</think>b</think>4", "<think>hm", "x<think>hm</think>4",
           "<think><think>hm</think>4", "hm</think>4<think>", ""]
    for completion in good + bad:
        assert compute("format_rate", [completion])["format_rate"] == (completion in good), completion
    rate = compute("format_rate", good + bad)
    assert rate == {"format_rate": 0.25, "interval": list(wilson_interval(3, 12))}

    completions = ["hm</think> \\boxed{0.5}", "<think>It is 1/2", r"so $\frac{2}{4}$", "The answer is 3."]
    result = compute("math_accuracy", completions, [r"\frac{1}{2}"] * 4)
    assert result == {"math_accuracy": 0.5, "unparsable": 0.25, "interval": list(wilson_interval(2, 4))}
    strict = compute("math_accuracy", completions, ["1/2"] * 4, untagged="unparsable")
    assert strict["math_accuracy"] == 0.25 and strict["unparsable"] == 0.75


def test_loading_by_name(tmp_path):
    with pytest.raises(ValueError, match="unknown metric 'blue'; did you mean bleu.*accuracy, auc"):
        load_metric("blue")
    with pytest.raises(ValueError, match="num_process=2 needs an experiment_id"):
        load_metric("bleu", num_process=2)
    metric = load_metric("accuracy")
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add(prediction=1, reference=1)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
    # An error leaves nothing behind, neither in the metric nor in files.
    metric = load_metric("auc", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="all 1 references"):
        metric.compute(predictions=[0.1], references=[1])
    assert metric.compute(predictions=[0.1, 0.2], references=[0, 1]) == {"auc": 1}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert metrics_loader.FOLDER == ROOT / "recipes" / "metrics"


@pytest.mark.slow
def test_processes_side_by_side_and_an_installed_package(tmp_path):
    """Four processes with one fresh cache, offline, from another folder, with the package as a wheel installs it."""
    pytest.importorskip("setuptools")
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("recipes", "modeling_deepseek_r1", "data_scripts"):  # a copy: building leaves files in the source
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hub_upload.py"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build_py", "--build-lib"]
    subprocess.run([*build, str(site)], cwd=source, check=True)
    code = ("from recipes.metrics_loader import load_metric, metric_names; import recipes;"
            "assert len(metric_names()) == 13, metric_names(); print(recipes.__file__);"
            "print(load_metric('pass_at_k').compute(predictions=[[1, 0]], k=[1, 2])['pass@1'])")
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for run in runs:
        output, errors = run.communicate()
        assert output.split()[-1:] == ["0.5"] and str(site) in output, errors
