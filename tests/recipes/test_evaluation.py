"""Evaluation in memory: scores, figures, resuming, held-out text."""

import itertools
import json
import math
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from data_scripts.train_tokenizer import train_tokenizer
from recipes import evaluation
from recipes.eval_scores import (
    has_format,
    macro_average,
    measured,
    outcome_of,
    score_completion,
    score_row,
    summarise_tasks,
)
from recipes.eval_text import cut_windows, encode, held_out_documents
from recipes.evaluation import (
    EvaluationSettings,
    SamplingSettings,
    evaluate_tasks,
    evaluate_text,
    load_problems,
    parse_task,
    read_completions,
    render_prompt,
)
from recipes.sampling import Completion
from tests.modeling.helpers import tiny_model

TEXTS = ["State the final answer to the following problem: 12 + 30 = 42. The answer is yes, Tom's friend said."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 340)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(vocab_size=340, max_position_embeddings=512, num_hidden_layers=2)


class Scripted(PreTrainedModel, GenerationMixin):
    """A model that continues each known prompt with its text, whatever the padding; then it ends."""

    config_class = LlamaConfig

    def __init__(self, scripts, end, vocab_size):
        super().__init__(LlamaConfig(vocab_size=vocab_size, eos_token_id=end, max_position_embeddings=4096))
        self.scripts, self.end, self.weight = scripts, end, torch.nn.Parameter(torch.zeros(1))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist())):
            ids = tuple(itertools.compress(ids, mask))
            prompt = max((p for p in self.scripts if ids[:len(p)] == p), key=len, default=())
            rest = self.scripts.get(prompt, ())[len(ids) - len(prompt):]
            logits[row, -1, rest[0] if rest else self.end] = 20.0
        return CausalLMOutput(logits=logits)


def scripted(tokenizer, settings, write):
    """A Scripted model that says `write(problem)` to each problem."""
    scripts = {}
    for _, problem in load_problems(settings):
        _, ids, _ = render_prompt(tokenizer, problem, settings)
        scripts[tuple(ids)] = tokenizer(write(problem), add_special_tokens=False)["input_ids"]
    return Scripted(scripts, tokenizer.eos_token_id, len(tokenizer))


def settings_of(tasks=("chain_sum:1-2", "syllogism:1"), **changes):
    sampling = changes.pop("sampling", {})
    return EvaluationSettings(list(tasks), problems=changes.pop("problems", 4), sampling=SamplingSettings(
        **({"max_new_tokens": 40} | sampling)), **changes)


@pytest.mark.parametrize("write, figures, outcome", [
    (lambda p: f"Easy.\n</think>\nThe answer is {p.reference}.", (1, 1, 1, 0), "correct"),
    (lambda p: "Hm.</think> The answer is 987654 or so", (0, 0, 1, 0), None),
    (lambda p: f"The answer is {p.reference}", (0, 1, 0, 0), "no closing tag"),
    (lambda p: f"a</think> b</think> The answer is {p.reference}", (0, 1, 0, 0), "malformed"),
    (lambda p: "and " * 60, (0, 0, 0, 1), "truncated"),
    (lambda p: "Hm.</think> I do not know.", (0, 0, 1, 0), "unparsable"),
])  # fmt: skip
def test_scripted_answers_get_their_scores(tokenizer, write, figures, outcome):
    settings = settings_of()
    result = evaluate_tasks(scripted(tokenizer, settings, write), tokenizer, settings, progress=False)
    for part in (*result["tasks"].values(), result["overall"]):
        found = part["pass@1"]["value"], part["lenient"]["value"], part["format"], part["truncated"]
        assert found == figures
    if outcome:
        assert all(task["outcomes"] == {name: 4 * (name == outcome) for name in task["outcomes"]}
                   for task in result["tasks"].values())
    assert set(result["tasks"]["chain_sum"]["difficulties"]) == {"1", "2"}


def test_strict_or_not_decides_what_counts(tokenizer):
    def write(problem):
        return f"The answer is {problem.reference}"
    for strict in (True, False):
        settings = settings_of(strict=strict)
        result = evaluate_tasks(scripted(tokenizer, settings, write), tokenizer, settings, progress=False)
        assert result["overall"]["pass@1"]["value"] == (0 if strict else 1)


def test_plain_prompts_stop_before_the_next_question(tokenizer):
    settings = settings_of(prompt_format="plain")
    model = scripted(tokenizer, settings, lambda p: f" {p.reference}\nQuestion: and 7 + 7?\nAnswer: 14")
    result = evaluate_tasks(model, tokenizer, settings, progress=False)
    assert result["overall"]["pass@1"]["value"] == 1 and result["overall"]["format"] == 1
    assert result["prompt_example"].startswith("Question: ") and result["prompt_example"].endswith("\nAnswer:")


def test_chat_prompts_by_template(tokenizer):
    problem = load_problems(settings_of())[0][1]
    text, ids, opened = render_prompt(tokenizer, problem, settings_of(system_prompt="Be brief."))
    assert opened and text.endswith("<think>\n") and "Be brief." in text and problem.prompt in text
    assert tokenizer.decode(ids) == text and ids.count(tokenizer.bos_token_id) == 1
    text, _, opened = render_prompt(tokenizer, problem, settings_of(thinking=False))
    assert not opened and "<think>" not in text
    bare = train_tokenizer(TEXTS, 340)
    bare.chat_template = None
    with pytest.raises(ValueError, match="prompt_format='plain'"):
        render_prompt(bare, problem, settings_of())


@pytest.mark.parametrize("text, opened, good", [
    ("so</think> 4", True, True), ("so 4", True, False), ("so</think>  \n", True, False),
    ("</think>a</think> 4", True, False),
    ("<think>so</think> 4", True, False), ("4", False, True), (" ", False, False), ("<think>so</think> 4", False, True),
    ("<think>so 4", False, False), ("a <think>so</think> 4", False, False), ("so</think> 4", False, False),
])  # fmt: skip
def test_format(text, opened, good):
    assert has_format(text, opened) is good


def row_of(correct, answer="1", index=0, sample=0, task="t", **changes):
    return {"task": task, "difficulty": 1, "index": index, "sample": sample, "correct": correct, "lenient": correct,
            "answer": answer, "format": True, "finished": True, "parsed": True, "shortened": False, "tokens": 5,
            "log_prob": -0.1, "outcome": "correct" if correct else "wrong", "completion": "x", **changes}  # fmt: skip


def test_figures_against_counting():
    """pass@k by trying all subsets of the samples; maj@n by hand; every figure a mean over problems."""
    grid = [[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    answers = [["7", "3", "3", None], ["7", "7", "2", "7"], ["1", "2", "3", "4"]]
    rows = [row_of(bool(grid[p][s]), answers[p][s], p, s) for p in range(3) for s in range(4)]
    found = summarise_tasks(rows[::-1])["tasks"]["t"]
    for k in (1, 2, 4):
        subsets = list(itertools.combinations(range(4), k))
        tries = [[any(problem[s] for s in chosen) for chosen in subsets] for problem in grid]
        expected = sum(sum(t) / len(t) for t in tries) / 3
        assert found["pass@k"][str(k)]["value"] == pytest.approx(expected)
    assert found["pass@1"]["value"] == pytest.approx(4 / 12) and found["maj@n"]["value"] == pytest.approx(1 / 3)
    assert found["pass@1"]["low"] < 4 / 12 < found["pass@1"]["high"]


def test_calibration_uses_the_majority_or_the_log_probability():
    rows = [row_of(s < 3, "1" if s < 3 else "2", 0, s) for s in range(4)]
    assert summarise_tasks(rows)["calibration"]["ece"] == pytest.approx(0.25)  # sure by 3/4, right
    single = [row_of(False, "1", p, log_prob=math.log(0.8)) for p in range(5)]
    assert summarise_tasks(single)["calibration"]["ece"] == pytest.approx(0.8)


def test_macro_average():
    parts = [{"value": 0.0, "low": 0.0, "high": 0.3}, {"value": 1.0, "low": 0.6, "high": 1.0}]
    assert macro_average(parts) == pytest.approx({"value": 0.5, "low": 0.3, "high": 0.65})


def test_the_macro_average_covers_the_truth():
    rng, inside, shares = numpy.random.default_rng(0), 0, (0.1, 0.5, 0.8)
    for _ in range(500):  # 20 problems of three tasks, one sample of each
        parts = [measured((rng.uniform(size=20) < share).astype(float)) for share in shares]
        found = macro_average(parts)
        inside += found["low"] <= sum(shares) / 3 <= found["high"]
    assert 0.93 < inside / 500 < 0.985


@pytest.mark.parametrize("text, opened, strict, lenient", [
    ("{} it is.</think>", True, False, True), ("{} it is.</think>", False, False, True), ("{}", False, True, True),
    ("So {}", True, False, True), ("<think>So {}", False, False, True), ("<think>a</think>{}", False, True, True),
    ("{}</think> 98765", True, False, False),
])  # fmt: skip
def test_lenient_reads_the_answer_wherever_it_stands(text, opened, strict, lenient):
    ((task, problem), *_) = load_problems(settings_of())
    good, verdict, free = score_completion(task, problem, text.format(problem.reference), opened)
    assert (good and verdict.correct, free.correct) == (strict, lenient)


def test_malformed_answers_have_no_vote(tokenizer):
    ((task, problem), *_) = load_problems(settings_of())
    completion = Completion(f"a</think>b</think> The answer is {problem.reference}", [1, 2], True, -0.5)
    row = score_row(task, problem, "p", completion, 0, opened=True, strict=True)
    assert row["answer"] is None and row["parsed"] and not row["correct"] and row["lenient"]
    assert outcome_of(row, True) == "malformed"


# ---------------------------------------------------------------- resuming and errors


def quiet(result):
    return {name: value for name, value in result.items() if name != "timing"}


def test_any_batch_size_and_a_cut_off_run_give_the_same(tokenizer, model, tmp_path):
    def run(batch_size, folder):
        sampling = {"samples": 2, "temperature": 1.0, "batch_size": batch_size, "max_new_tokens": 12}
        return evaluate_tasks(model, tokenizer, settings_of(sampling=sampling), folder, progress=False)
    whole = run(1, tmp_path / "a")
    assert quiet(run(7, tmp_path / "b")) == quiet(whole)
    lines = (tmp_path / "a/completions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 16 and whole["timing"]["resumed"] == 0
    # killed while it wrote: five lines of one process, two and a half of another
    (tmp_path / "a/completions.jsonl").write_text("".join(lines[:5]))
    (tmp_path / "a/completions.rank1.jsonl").write_text("".join(lines[9:11]) + lines[12][:40])
    resumed = run(3, tmp_path / "a")
    assert quiet(resumed) == quiet(whole) and resumed["timing"]["resumed"] == 7
    assert (tmp_path / "a/completions.jsonl").read_text().splitlines(keepends=True) == lines
    assert not list(tmp_path.glob("a/*rank*"))


def test_completions_of_another_evaluation_are_an_error(tokenizer, model, tmp_path, monkeypatch):
    changes = {"sampling": {"max_new_tokens": 2}, "problems": 1, "tasks": ["gcd:1"]}
    evaluate_tasks(model, tokenizer, settings_of(**changes), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"seed \(was 0, is 1\).*overwrite_output_dir"):
        evaluate_tasks(model, tokenizer, settings_of(**changes, seed=1), tmp_path, progress=False)
    for holder, name, words in ((model.config, "num_experts_per_tok", "model"),  # the same weights in another model
                                (model.generation_config, "eos_token_id", "end_tokens")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"different: {words}"):
            patch.setattr(holder, name, 1)
            evaluate_tasks(model, tokenizer, settings_of(**changes), tmp_path, progress=False)
    with torch.no_grad():
        model.lm_head.weight[5] += 1e-2
    with pytest.raises(ValueError, match="different: model"):
        evaluate_tasks(model, tokenizer, settings_of(**changes), tmp_path, progress=False)
    evaluation.clear_completions(tmp_path)
    evaluate_tasks(model, tokenizer, settings_of(**changes), tmp_path, progress=False)
    path = tmp_path / "completions.jsonl"
    whole = read_completions(path)
    path.write_bytes(path.read_bytes() + '{"completion": "é'.encode()[:-1])  # cut within a character
    assert read_completions(path) == whole
    path.write_text("{cut\n" + path.read_text(errors="ignore"))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_completions(path)


@pytest.mark.parametrize("tasks, words", [
    (["chain_sun"], "unknown task 'chain_sun'; known are chain_sum"), (["gcd:x"], "gcd:1-3"), (["gcd:3-1"], "gcd:1-3"),
    (["gcd", "gcd:2"], "more than once"), ([], "list of task names"),
])  # fmt: skip
def test_tasks_that_cannot_be(tasks, words):
    with pytest.raises(ValueError, match=words):
        settings_of(tasks)


def test_task_names_and_shares_of_difficulties():
    assert parse_task("gcd:2-4") == ("gcd", [2, 3, 4]) and parse_task("gcd") == ("gcd", None)
    levels = [p.metadata["difficulty"] for _, p in load_problems(settings_of(["gcd:2-4", "lcm"], problems=5))]
    assert levels == [2, 2, 3, 3, 4] + [1, 2, 3, 4, 5]
    fives = load_problems(settings_of(["lcm"], difficulties=[5], problems=2))
    assert [problem.metadata["difficulty"] for _, problem in fives] == [5, 5]


def test_sharded_parameters_are_refused(tokenizer, model):
    model.lm_head.weight.ds_id = 1  # what ZeRO-3 marks parameters with
    try:
        with pytest.raises(ValueError, match="spread over processes"):
            evaluate_tasks(model, tokenizer, settings_of(), progress=False)
    finally:
        del model.lm_head.weight.ds_id


# ---------------------------------------------------------------- held-out text


@torch.no_grad()
def direct_nats(model, ids, window):
    """Each token alone, from the context that the windows give it."""
    total, begin, end = 0.0, 0, min(window, len(ids))
    for place in range(1, len(ids)):
        if place >= end:
            begin, end = end - window // 2, min(end - window // 2 + window, len(ids))
        scores = model(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1].double().log_softmax(-1)
        total -= float(scores[ids[place]])
    return total


def test_perplexity_equals_a_direct_computation(tokenizer, model):
    texts = [TEXTS[0], "Tom's <｜end▁of▁sentence｜> is text here", "é"]
    encoded = encode(tokenizer, texts)
    assert [ids.count(tokenizer.eos_token_id) for ids in encoded] == [1, 1, 1]  # the quoted one stays text
    nats = sum(direct_nats(model, ids, 16) for ids in encoded)
    tokens, size = sum(map(len, encoded)) - 3, sum(len(text.encode()) for text in texts)
    for batch_size in (1, 3, 50):
        found = evaluate_text(model, tokenizer, texts, window=16, batch_size=batch_size)
        assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)  # fp32, other batches and padding
        assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert (found["tokens"], found["bytes"]) == (tokens, size)
    with pytest.raises(ValueError, match="text_window=4096"):
        evaluate_text(model, tokenizer, texts, window=4096)


@pytest.mark.parametrize("length, window", [(2, 4), (4, 4), (5, 4), (23, 5), (23, 6), (100, 64)])
def test_windows_predict_every_token_once_with_half_a_window_before_it(length, window):
    ids = list(range(length))
    predicted = []
    for number, token_ids, first in cut_windows([ids], window):
        assert number == 0 and len(token_ids) <= window and token_ids == ids[token_ids[0]:token_ids[-1] + 1]
        assert first >= min(window // 2, token_ids[first])
        predicted += token_ids[first:]
    assert predicted == ids[1:]


def test_a_packed_set_serves_another_tokenizer(tokenizer, model, tmp_path):
    from data_scripts.prepare_pretraining import main as prepare

    texts = [f"{' '.join(str(n * 1000 + i * i) for i in range(20))} <｜User｜> naïve,  Tom 's\n" for n in range(40)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(["--output_dir", str(tmp_path / "packed"), "--source", f"mine={tmp_path / 'texts'}",
             "--mixture", "mine=100", "--vocab_size", "300"])  # fmt: skip
    documents, split = held_out_documents(tmp_path / "packed")
    assert split == "validation" and documents and {d.text for d in documents} <= set(texts)
    assert {d.source for d in documents} == {"mine"}
    found = evaluate_text(model, tokenizer, str(tmp_path / "packed"), window=64)
    again = evaluate_text(model, tokenizer, [d.text for d in documents], window=64)
    assert found["bits_per_byte"] == again["bits_per_byte"] == found["sources"]["mine"]
    assert held_out_documents(tmp_path / "packed", max_bytes=1)[0] == documents[:1]


def test_a_data_set_in_hub_format(tokenizer, model, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["one two", None, "", "Tom's friend é"], "label": [1, 2, 3, 4]})
    held_out = datasets.Dataset.from_dict({"text": ["held out"]})
    rows.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict({"train": rows, "validation": held_out}).save_to_disk(tmp_path / "both")
    found = evaluate_text(model, tokenizer, tmp_path / "flat")
    assert (found["split"], found["documents"], found["bytes"]) == ("all", 2, len("one twoTom's friend é".encode()))
    assert evaluate_text(model, tokenizer, tmp_path / "both")["checksum"] == evaluate_text(
        model, tokenizer, ["held out"])["checksum"]
    with pytest.raises(ValueError, match="'label' holds a int.*--text_column"):
        evaluate_text(model, tokenizer, tmp_path / "flat", text_column="label")


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_loss_that_is_no_number_is_an_error(tokenizer, value):
    model = tiny_model(vocab_size=340, max_position_embeddings=64, num_hidden_layers=1)
    model.lm_head.weight.data[:7] = value
    with pytest.raises(ValueError, match="nats per token: check the model's weights"):
        evaluate_text(model, tokenizer, TEXTS[:1])


def test_processes_share_the_windows(tokenizer, model, monkeypatch):
    """Two processes in turn: what each computes, gathered, is the whole."""
    from recipes import eval_text

    gathered = []
    monkeypatch.setattr(eval_text, "gather_object", lambda sums: gathered.extend(sums) or gathered)
    for rank in (0, 1):
        part = evaluate_text(model, tokenizer, TEXTS[:3], window=16, accelerator=SimpleNamespace(
            process_index=rank, num_processes=2))
    whole = evaluate_text(model, tokenizer, TEXTS[:3], window=16)
    assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
