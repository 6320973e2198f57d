"""recipes/reward.py from end to end: a model that learns, resuming, adapters, other classifiers, steps, bad input."""

import json
import logging
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.judge_preferences import prepare as judge_pairs
from data_scripts.preferences.preference_baselines import baselines
from data_scripts.train_tokenizer import train_tokenizer
from recipes import reward
from recipes.logging_callbacks import read_metrics
from recipes.reporting import build_report
from recipes.reward_data import RewardEncoding, encode_pairs
from recipes.reward_functions import ModelReward
from recipes.reward_scoring import load_reward_model, score, score_steps
from tests.recipes.tiny_run import SIZES

SMALL = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
GOOD, BAD = "the sum is right", "the sum is off"


def pair(number, generator):
    """Reasoning of random length on both sides; only the answer tells them apart."""
    thoughts = [" ".join(str(generator.randrange(10)) for _ in range(generator.randrange(1, 9))) for _ in range(2)]
    sides = [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in zip(thoughts, (GOOD, BAD))]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
    prompt = [{"role": "user", "content": f"What is {number} + {number}?"}]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "problem": str(number),
            "source": "even" if number % 2 == 0 else "odd", "kind": "five" if number % 5 == 0 else "other"}  # fmt: skip


def solution(number, generator):
    """Three steps; from the first wrong one on all are wrong."""
    wrong = generator.randrange(4)
    labels = [place < wrong for place in range(3)]
    steps = [f"{generator.randrange(10)} {GOOD if right else BAD}." for right in labels]
    return {"prompt": [{"role": "user", "content": f"What is {number}?"}], "completions": steps, "labels": labels,
            "problem": str(number), "source": "steps"}  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model, its tokenizer, pairs and labelled steps."""
    folder, generator = tmp_path_factory.mktemp("reward"), random.Random(0)
    pairs = [pair(number, generator) for number in range(240)]
    steps = [solution(number, generator) for number in range(240)]
    for name, rows in (("pairs", pairs), ("steps", steps)):
        write(folder / name / "train.jsonl", rows[:200])
        write(folder / name / "test.jsonl", rows[200:])
    (folder / "pairs" / "manifest.json").write_text(json.dumps({"baselines": baselines(pairs[:200], pairs[200:])}))
    texts = [row["prompt"][0]["content"] + row["chosen"][0]["content"] + BAD for row in pairs]
    tokenizer = train_tokenizer(texts, 400)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    set_seed(0)
    sizes = SIZES | special | {"vocab_size": 400, "max_position_embeddings": 256}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_r1"](**sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def arguments(base, output_dir, *more, data="pairs", model="model"):
    return [
        "--model_name_or_path", str(base / model), "--dataset_name", str(base / data), "--output_dir",
        str(output_dir), "--max_steps", "24", "--per_device_train_batch_size", "16", "--max_length", "96",
        "--logging_steps", "4", "--eval_strategy", "steps", "--eval_steps", "12", "--save_steps", "12",
        "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--use_cpu", "--disable_tqdm", "true",
        "--report_to", "none", *more,
    ]  # fmt: skip


SHORT = ("--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, reward.main(arguments(base, folder))


@pytest.fixture
def no_report(monkeypatch):
    """Runs without report.html, which takes as long as their training."""
    monkeypatch.setattr("recipes.reward_results.write_report", lambda folder: folder / "report.html")


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_a_run_learns_and_leaves_what_it_promises(finished):
    folder, results = finished
    found = results["preferences"]
    assert found["accuracy"]["value"] > 0.9 and found["pairs"] == found["problems"] == 40
    assert found["accuracy"]["low"] < found["accuracy"]["value"] <= found["accuracy"]["high"] <= 1
    assert set(found["by_source"]) == {"even", "odd"} and 0.2 < found["baselines"]["longer"]["value"] < 0.8
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "eval.json", "report.html", "model.safetensors", "checkpoint-24",
            "held_out_rewards.jsonl", "chat_template.jinja"} <= names  # fmt: skip
    assert json.loads((folder / "eval.json").read_text()) == json.loads(json.dumps(results))
    records = read_metrics(folder / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert train[-1]["loss"] < 0.3 < train[0]["loss"] and train[-1]["accuracy"] > 0.9
    assert train[-1]["load max/mean"] >= 1
    last = [r for r in records if r["kind"] == "eval"][-1]
    assert last["step"] == 24 and last["eval accuracy"] == found["accuracy"]["value"]
    page = (folder / "report.html").read_text()
    assert "Reward model run" in page and "nats per pair" in page and page.count("<svg") >= 8
    assert "nats per token" not in page
    assert set(found["by_kind"]) == {"even: five", "even: other", "odd: five", "odd: other"}
    words = results["data_baselines"]["even: five"]["unigram"]
    assert "words alone, %" in page and f"{100 * words['accuracy']:.1f} <span" in page


def test_the_saved_model_gives_the_rewards_of_the_evaluation(finished, base):
    folder, results = finished
    model, tokenizer = load_reward_model(folder)
    rows = [json.loads(line) for line in (base / "pairs" / "test.jsonl").read_text().splitlines()]
    stored = [json.loads(line) for line in (folder / "held_out_rewards.jsonl").read_text().splitlines()]
    for side in ("chosen", "rejected"):
        rewards = score(model, tokenizer, [r["prompt"] for r in rows], [r[side] for r in rows], batch_size=7)
        assert rewards == pytest.approx([r[side] for r in stored], abs=1e-4)
    # PPO's reward function reads the same tokens as training did.
    encoded = encode_pairs(rows[:1], tokenizer, RewardEncoding("preference", 96))[0]
    sampled = encoded["chosen_ids"][-encoded["chosen_tokens"] :]
    as_function = ModelReward(model, tokenizer, tokenizer)
    assert as_function.sequences([rows[0]["prompt"]], [None], [sampled]) == [encoded["chosen_ids"]]
    normalised = score(model, tokenizer, [rows[0]["prompt"]], [rows[0]["chosen"]], normalise=True)[0]
    mean, std = results["preferences"]["reward"]["mean"], results["preferences"]["reward"]["std"]
    assert normalised == pytest.approx((stored[0]["chosen"] - mean) / std, abs=1e-4)
    assert model.config.num_nextn_predict_layers == 0 and model.config.pad_token_id == tokenizer.pad_token_id


def test_a_resumed_run_is_the_uninterrupted_one(finished, base, tmp_path, no_report):
    folder, results = finished
    tmp_path = shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "checkpoint-24" / "COMPLETE.json").unlink()  # as a kill in the middle of its save leaves it
    again = reward.main(arguments(base, tmp_path, "--resume_from_checkpoint", "true"))
    assert again == results
    expected = weights(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    with pytest.raises(ValueError, match="use_margin: true -> false"):
        reward.main(arguments(base, tmp_path, "--use_margin", "false", "--resume_from_checkpoint", "true"))


def test_judges_keep_the_pairs_that_they_are_sure_of(finished, base, tmp_path):
    folder, results = finished
    stored = [json.loads(line) for line in (folder / "held_out_rewards.jsonl").read_text().splitlines()]
    manifest = judge_pairs(base / "pairs", tmp_path / "kept", judges=[folder, folder], margin=0.5, judgements=2)
    kept = {row["problem"]: row for row in map(json.loads, (tmp_path / "kept" / "test.jsonl").read_text().splitlines())}
    assert manifest["splits"]["test"]["kept"] == len(kept) > 10
    differences = {row["problem"]: row["chosen"] - row["rejected"] for row in stored}
    spread = {round(differences[name] / row["margin"], 3) for name, row in kept.items()}
    assert len(spread) == 1  # one scale for all
    assert min(differences[name] for name in kept) > 0.5 * spread.pop() - 1e-2
    with pytest.raises(ValueError, match="is the source, which would be lost"):
        judge_pairs(base / "pairs", base / "pairs", judges=[folder])
    model, tokenizer = load_reward_model(folder)
    with pytest.raises(ValueError, match="exceed the context of the reward model .256."):
        score(model, tokenizer, ["1 " * 300], ["2"])


def test_only_a_new_head_is_silent(base, tmp_path, caplog, monkeypatch):
    """The library's report of missing weights is shown where more than the head is missing."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog sees it
    args = reward.parse_config(reward.RewardRecipeConfig, arguments(base, tmp_path))
    tokenizer = reward.load_chat_tokenizer(args)
    reward.load_for_training(args, tokenizer)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    args.model_name_or_path = str(tmp_path / "model")
    reward.load_for_training(args, tokenizer)
    assert "LOAD REPORT" not in caplog.text and caplog.text.count("its reward head is new") == 2
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    reward.load_for_training(args, tokenizer)
    assert "LOAD REPORT" in caplog.text and "embed_tokens" in caplog.text


def test_adapters_train_the_head_whole_and_merge(base, tmp_path, no_report):
    lora = ("--lora_rank", "2", "--lora_groups", "attention", "routed_experts")
    results = reward.main(arguments(base, tmp_path, *lora, *SHORT))
    assert results["merged_logits_difference"] < 1e-4
    model, tokenizer = load_reward_model(tmp_path / "merged")
    prompt = [{"role": "user", "content": "What is 207 + 207?"}]
    stored = [json.loads(line) for line in (tmp_path / "held_out_rewards.jsonl").read_text().splitlines()]
    row = [json.loads(line) for line in (base / "pairs" / "test.jsonl").read_text().splitlines()][7]
    assert row["prompt"] == prompt
    assert score(model, tokenizer, [prompt], [row["chosen"]])[0] == pytest.approx(stored[7]["chosen"], abs=1e-4)
    with pytest.raises(ValueError, match="holds an adapter; give"):
        load_reward_model(tmp_path)


def test_process_rewards(base, tmp_path, no_report):
    changes = ("--kind", "process", "--learning_rate", "2e-2", "--eval_strategy", "no", "--save_strategy", "no")
    results = reward.main(arguments(base, tmp_path, *changes, data="steps"))
    found = results["process"]
    assert found["steps"] == 120 and found["accuracy"]["value"] > 0.9 and found["first_error"]["f1"] > 0.8
    assert found["solution_auc"]["min"] > 0.9
    page = build_report(tmp_path)
    assert "Process reward model run" in page and "nats per step" in page
    model, tokenizer = load_reward_model(tmp_path, kind="process")
    rows = [json.loads(line) for line in (base / "steps" / "test.jsonl").read_text().splitlines()]
    stored = [json.loads(line) for line in (tmp_path / "held_out_rewards.jsonl").read_text().splitlines()]
    steps = score_steps(model, tokenizer, [r["prompt"] for r in rows], [r["completions"] for r in rows], batch_size=3)
    assert [p for row in steps for p in row] == pytest.approx([p for r in stored for p in r["probabilities"]], abs=1e-4)
    with pytest.raises(ValueError, match="kind=preference needs a ...ForSequenceClassification"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_any_other_classifier(base, tmp_path, family, no_report):
    """From a causal LM with a new head, and from a saved classifier."""
    tokenizer = reward.load_chat_tokenizer(reward.parse_config(reward.RewardRecipeConfig, arguments(base, tmp_path)))
    set_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    else:
        model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    more = ("--max_steps", "30", "--learning_rate", "1e-2", "--eval_strategy", "no", "--save_strategy", "no")
    results = reward.main(arguments(base, tmp_path / "run", *more, "--model_name_or_path", str(tmp_path / "model")))
    assert results["preferences"]["accuracy"]["value"] > 0.9


def test_bad_input_is_named(base, tmp_path):
    def fails(match, *more, **others):
        with pytest.raises((ValueError, OSError), match=match):
            reward.main(arguments(base, tmp_path / "run", *SHORT, *more, **others))

    good = json.loads((base / "pairs" / "train.jsonl").read_text().splitlines()[0])

    def broken(name, rows, match, *more):
        write(tmp_path / name / "train.jsonl", rows)
        fails(match, "--dataset_name", str(tmp_path / name), *more)

    broken("same", [good | {"rejected": good["chosen"]}], "row 0: chosen and rejected are the same")
    broken("column", [{"prompt": good["prompt"], "chosen": good["chosen"]}], "column rejected is missing")
    nan = [good | {"margin": float("nan")}]
    broken("nan", nan, "margin=nan must be a finite number")
    broken("skip", nan, "no pairs are left .1 pairs: bad row; first error", "--errors", "skip")
    broken("long", [good], "no pairs are left .1 pairs: left out: longer than max_length", "--max_length", "8")
    broken("empty", [good | {"chosen": [{"role": "assistant", "content": " "}]}], "a completion is empty")
    write(tmp_path / "shared" / "test.jsonl", [good])
    broken("shared", [good] * 4, "the problem of every held-out row is in the training rows too")
    fails("column prompt is missing|column completions is missing", "--kind", "process")
    fails("kind='pairs' must be one of preference, process", "--kind", "pairs")
    fails("center_rewards_coefficient=-1.0 must be zero or more", "--center_rewards_coefficient", "-1")
    fails("eos_token='x' has no effect here", "--eos_token", "x")
    fails("label_smoothing_factor=0.1 has no effect here", "--label_smoothing_factor", "0.1")
    fails("per_device_train_batch_size=999", "--per_device_train_batch_size", "999")
    fails("unknown chat template", "--chat_template", "deepseek_r9")
    fails("max_length=9999 exceeds the context", "--max_length", "9999")


def test_a_model_that_cannot_be_a_reward_model_is_named(base, tmp_path):
    def save(name, labels=1, vocabulary=400, template=True):
        config = BertConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, num_labels=labels)  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        args = reward.parse_config(reward.RewardRecipeConfig, arguments(base, tmp_path))
        tokenizer = reward.load_chat_tokenizer(args)
        tokenizer.chat_template = tokenizer.chat_template if template else None
        tokenizer.save_pretrained(tmp_path / name)

    def fails(name, match):
        with pytest.raises(ValueError, match=match):
            reward.main(arguments(base, tmp_path / "run", *SHORT, "--model_name_or_path", str(tmp_path / name)))

    save("labels", labels=3)
    fails("labels", "classifier with num_labels=3; kind=preference needs 1")
    save("small", vocabulary=100)
    fails("small", "vocab_size=100")
    save("plain", template=False)
    fails("plain", "has no chat template; set chat_template")
    with pytest.raises(ValueError, match="is no reward model"):
        load_reward_model(base / "model")
