"""recipes/pretrain.py from end to end: from nothing, from our weights, from deepseek_v3 weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from data_scripts.train_tokenizer import train_tokenizer
from recipes import pretrain
from tests.recipes.processes import run_ranks
from tests.recipes.tiny_run import SIZES

SCRIPT = Path(pretrain.__file__)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with documents and a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"Item {i} of the list costs {i * 7 % 50} coins, and {i % 9} of them are silver." for i in range(200)]
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    train_tokenizer(lines, 320).save_pretrained(folder / "tokenizer")
    return folder


def arguments(texts, output_dir, *more):
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    return [
        "--dataset_name", str(texts / "documents.jsonl"), "--tokenizer_name_or_path", str(texts / "tokenizer"),
        "--output_dir", str(output_dir), "--model_config", json.dumps(sizes), "--sequence_length", "32",
        "--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--eval_strategy", "steps",
        "--eval_steps", "2", "--save_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--disable_tqdm", "true",
        "--validation_fraction", "0.1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    more = ("--ema_decay", "0.9", "--sample_prompts", "Item 3", "--sample_tokens", "4", "--report_to", "tensorboard")
    return folder, pretrain.main(arguments(texts, folder, *more))


def test_a_run_leaves_what_it_promises(finished):
    folder, results = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "eval.json", "report.html", "ema", "model.safetensors"} <= names
    assert list(folder.rglob("events.out.tfevents*"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [(r["kind"], r["step"]) for r in records]
    assert kinds.count(("eval", 2)) == kinds.count(("eval", 4)) == kinds.count(("samples", 4)) == 1
    last = next(r for r in records if r["kind"] == "eval" and r["step"] == 4)
    assert results["weights"]["bits_per_byte"] == pytest.approx(last["bits/byte"], rel=1e-6)
    assert json.loads((folder / "eval.json").read_text()) == results
    raw, average = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, folder / "ema"))
    assert not torch.equal(raw.lm_head.weight, average.lm_head.weight)
    assert (folder / "ema" / "tokenizer.json").exists()


def test_continue_from_our_weights(finished, texts, tmp_path):
    folder, results = finished
    more = ("--model_name_or_path", str(folder), "--model_config", "{}", "--max_steps", "1", "--learning_rate", "1e-9")
    continued = pretrain.main(arguments(texts, tmp_path / "next", *more))
    assert continued["weights"]["loss"] == pytest.approx(results["weights"]["loss"], rel=1e-4)


def test_continue_from_deepseek_v3_weights(texts, tmp_path):
    """A released layout without MTP layers, which transformers' own class wrote."""
    sizes = SIZES | {"vocab_size": 320, "num_key_value_heads": 2, "num_nextn_predict_layers": 0}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
    theirs.save_pretrained(tmp_path / "v3")
    more = ("--model_name_or_path", str(tmp_path / "v3"), "--model_config", '{"num_nextn_predict_layers": 0}',
            "--max_steps", "1", "--learning_rate", "1e-9", "--eval_strategy", "no")  # fmt: skip
    pretrain.main(arguments(texts, tmp_path / "next", *more))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "next").eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_larger_than_the_vocabulary(texts, tmp_path):
    sizes = json.dumps(SIZES)
    with pytest.raises(ValueError, match="vocab_size=64"):
        pretrain.main(arguments(texts, tmp_path, "--model_config", sizes))


def test_another_family_is_refused(texts, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama'"):
        pretrain.main(arguments(texts, tmp_path / "out", "--model_name_or_path", str(tmp_path)))


def test_dry_run_needs_no_data(tmp_path, capsys):
    config = SCRIPT.parent / "configs" / "pretrain_nano.yaml"
    assert pretrain.main(["--config", str(config), "--dry_run", "--use_cpu", "--output_dir", str(tmp_path)]) is None
    out = capsys.readouterr().out
    assert re.search(r"parameters +16\.876 M \+ MTP 2\.496 M", out) and "layout for this host" in out
    assert not list(tmp_path.iterdir())


def test_as_a_script_it_sees_the_installed_packages(tmp_path):
    """recipes/ is first on a launched script's path; nothing there may hide a package."""
    stems = {path.stem for path in SCRIPT.parent.glob("*.py")} - {"__init__"}
    assert not stems & {"evaluate", "accelerate", "datasets", "tokenizers", "trl", "peft", "torch", "transformers"}
    config = SCRIPT.parent / "configs" / "pretrain_tiny.yaml"
    command = [
        sys.executable,
        str(SCRIPT),
        "--config",
        str(config),
        "--dry_run",
        "--use_cpu",
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FLOPs per training token" in done.stdout


def test_too_little_text_for_a_batch_is_an_error(texts, tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size=5000"):
        pretrain.main(arguments(texts, tmp_path / "run", "--per_device_train_batch_size", "5000"))


def test_weights_with_another_vocabulary_are_refused(texts, finished, tmp_path):
    folder, _ = finished
    other = train_tokenizer(["completely different words, of another text altogether"] * 3, 290)
    other.save_pretrained(tmp_path / "other")
    more = ("--model_name_or_path", str(folder), "--model_config", "{}",
            "--tokenizer_name_or_path", str(tmp_path / "other"))  # fmt: skip
    with pytest.raises(ValueError, match="another vocabulary.*--from_folder"):
        pretrain.main(arguments(texts, tmp_path / "run", *more))


def test_a_refused_run_leaves_the_other_runs_files(texts, tmp_path):
    folder = tmp_path / "run"
    pretrain.main(arguments(texts, folder, "--sample_prompts", "Item 3", "--sample_tokens", "2"))
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="seed"):
        pretrain.main(arguments(texts, folder, "--resume_from_checkpoint", "true", "--seed", "5"))
    assert (folder / "config.yaml").read_bytes() == before
    for _ in range(2):                                             # a finished run, run again: nothing is said twice
        pretrain.main(arguments(texts, folder, "--sample_prompts", "Item 3", "--sample_tokens", "2",
                                "--resume_from_checkpoint", "true"))  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "samples"] == [4]


def test_a_checkpoint_without_optimizer_is_refused(texts, tmp_path):
    pretrain.main(arguments(texts, tmp_path / "run", "--save_only_model", "true"))
    with pytest.raises(ValueError, match=r"no optimizer\.pt.*model_name_or_path"):
        pretrain.main(arguments(texts, tmp_path / "run", "--resume_from_checkpoint", "true"))


def test_a_stream_with_more_workers_than_shards_says_so(texts, tmp_path):
    more = ("--streaming", "true", "--dataloader_num_workers", "2", "--validation_fraction", "0",
            "--eval_strategy", "no")  # fmt: skip
    with pytest.raises(ValueError, match="fewer shards than workers"):
        pretrain.main(arguments(texts, tmp_path / "run", *more))


@pytest.mark.slow
def test_processes_that_start_differently_are_refused(texts, tmp_path):
    """Rank 1 has another rate: both end before step 1, naming the field and both values."""
    given = arguments(texts, tmp_path / "two", "--per_device_train_batch_size", "2")

    def work(rank):
        with pytest.raises(ValueError, match="learning_rate: 0.001 on rank 1, 0.002 on rank 0"):
            pretrain.main([*given, "--learning_rate", "1e-3" if rank == 1 else "2e-3"])

    run_ranks(2, work, tmp_path / "logs", {"ACCELERATE_USE_CPU": "true"})
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_train_like_one(texts, tmp_path, streaming):
    """The same global batch: equal losses, load and bits per byte to fp32 rounding, documents kept apart."""
    more = ("--streaming", streaming, "--per_device_train_batch_size")
    pretrain.main(arguments(texts, tmp_path / "one", *more, "4"))
    given = arguments(texts, tmp_path / "two", *more, "2")
    run_ranks(2, lambda rank: pretrain.main(given), tmp_path / "logs", {"ACCELERATE_USE_CPU": "true"})
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in two]
    for ours, theirs in zip(one, two):
        for key in ("loss", "mtp loss", "bits/byte", "grad"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4), (ours["step"], key)
