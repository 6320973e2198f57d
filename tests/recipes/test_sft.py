"""recipes/sft.py from end to end: full training, adapters, resuming, other models, bad input."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, set_seed

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import train_tokenizer
from recipes import sft
from recipes.logging_callbacks import read_metrics
from recipes.pretrain_config import parse_config
from recipes.sft_trainer import causal_lm
from recipes.task_puzzles import PUZZLE_TASKS
from tests.recipes.tiny_run import SIZES

SCRIPT = Path(sft.__file__)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model, its tokenizer, and conversations about sums."""
    folder, generator = tmp_path_factory.mktemp("sft"), random.Random(0)
    problems = PUZZLE_TASKS["chain_sum"].problems("train", 0, 1, 60)
    rows = []
    for problem in problems:
        thought = f"<think>\n{problem.metadata['key']}={problem.reference}\n</think>\n\n{problem.reference}"
        turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": thought}]
        if generator.random() < 0.2:
            turns += [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "You are welcome."}]
        rows.append({"messages": turns, "key": problem.metadata["key"]})
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row["messages"]], 400)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = SIZES | special | {"vocab_size": 400, "max_position_embeddings": 256}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_r1"](**sizes))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def arguments(base, output_dir, *more):
    return [
        "--model_name_or_path", str(base / "model"), "--dataset_name", str(base / "data"), "--output_dir",
        str(output_dir), "--max_steps", "4", "--per_device_train_batch_size", "2", "--max_length", "96",
        "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2",
        "--learning_rate", "1e-2", "--use_cpu", "--disable_tqdm", "true", "--validation_fraction", "0.2",
        "--report_to", "none", "--device_peak_tflops", "0.1", *more,
    ]  # fmt: skip


TASKS = ("--eval_tasks", "chain_sum:1", "--eval_problems", "4", "--eval_max_new_tokens", "6")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, sft.main(arguments(base, folder, *TASKS))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_leaves_what_it_promises(finished):
    folder, results = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "eval.json", "report.html", "model.safetensors", "checkpoint-4"} <= names
    assert "chat_template.jinja" in names
    records = read_metrics(folder / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4] and train[-1]["next-token loss"] < train[0]["next-token loss"]
    assert all(r["mtp loss"] > 0 and r["load max/mean"] >= 1 for r in train)
    last = [r for r in records if r["kind"] == "eval"][-1]
    assert last["step"] == 4 and last["eval loss"] == pytest.approx(results["held_out"]["loss"], rel=1e-6)
    assert json.loads((folder / "eval.json").read_text()) == results
    assert results["tasks"]["before"]["tasks"]["chain_sum"]["problems"] == 4
    assert len((folder / "eval_after" / "completions.jsonl").read_text().splitlines()) == 4
    page = (folder / "report.html").read_text()
    assert "chain_sum" in page and "before" in page and "held out" in page


def test_the_chat_template_travels(finished, base, tmp_path):
    folder, _ = finished
    own = AutoTokenizer.from_pretrained(base / "model").chat_template
    assert AutoTokenizer.from_pretrained(folder).chat_template == own
    zero = ("--chat_template", "deepseek_r1_zero", "--max_length", "256", "--max_steps", "1", "--eval_strategy", "no",
            "--save_strategy", "no")  # fmt: skip
    sft.main(arguments(base, tmp_path, *zero))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template != own


def test_a_resumed_run_is_the_uninterrupted_one(finished, base, tmp_path):
    folder, results = finished
    sft.main(arguments(base, tmp_path, *TASKS))
    for name in ("model.safetensors", "eval.json"):
        (tmp_path / name).unlink()
    (tmp_path / "checkpoint-4" / "COMPLETE.json").unlink()  # as a kill in the middle of its save leaves it
    again = sft.main(arguments(base, tmp_path, *TASKS, "--resume_from_checkpoint", "true"))
    assert again["held_out"] == results["held_out"]
    assert again["tasks"]["after"]["tasks"] == results["tasks"]["after"]["tasks"]
    expected = weights(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="lora_rank: 0 -> 2"):
        sft.main(arguments(base, tmp_path, "--lora_rank", "2", "--resume_from_checkpoint", "true"))


RELOAD = """
import sys, torch
import modeling_deepseek_r1
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 40)[None]).logits, sys.argv[2])
"""


def test_adapters_on_routed_experts(base, tmp_path, caplog):
    """Trains the adapters alone, merges exactly, resumes, and loads in a fresh process."""
    groups = ("--lora_groups", "attention", "routed_experts", "--lora_rank", "2", "--max_steps", "2",
              "--save_steps", "1")  # fmt: skip
    results = sft.main(arguments(base, tmp_path, *groups))
    assert "LoRA of rank 2" in caplog.text
    assert results["merged_logits_difference"] < 1e-4
    merged, start = weights(tmp_path / "merged"), weights(base / "model")
    changed = {name for name in start if not torch.equal(merged[name], start[name])}
    assert any("mlp.experts.gate_up_proj" in name for name in changed)
    assert any("self_attn.o_proj" in name for name in changed)
    assert not any(part in name for name in changed for part in ("shared_experts", "mlp.gate.", "embed_tokens", "norm"))
    fresh = subprocess.Popen([sys.executable, "-c", RELOAD, tmp_path, tmp_path / "logits.pt"])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(torch.arange(3, 40)[None]).logits

    resumed = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-1"), "--merge_adapter", "false")
    again = sft.main(arguments(base, tmp_path / "again", *groups, *resumed))
    assert again["held_out"] == results["held_out"] and not (tmp_path / "again" / "merged").exists()
    files = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert len({file.read_bytes() for file in files}) == 1
    assert fresh.wait(timeout=120) == 0
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def test_adapters_on_mtp_layers_are_trained_only_with_their_loss(base, caplog):
    """Under DDP, a trained weight that gets no gradient stops the run."""
    shares = []
    for coef in ("0.3", "0"):
        more = ("--lora_rank", "2", "--lora_groups", "attention", "routed_experts", "--mtp_loss_coef", coef)
        args = parse_config(sft.SFTRecipeConfig, arguments(base, "unused", *more))
        model = sft.build_model(args, AutoTokenizer.from_pretrained(base / "model"))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("layers.1.mlp.experts" in name for name in trained)
        assert any("layers.2." in name for name in trained) == (coef != "0") == causal_lm(model).trains_mtp
        shares.append(re.findall(r"([\d,]+) of .* adapted", caplog.text)[-1])
    assert shares[0] != shares[1]


def test_adapters_that_nothing_can_take(base, tmp_path):
    with pytest.raises(ValueError, match="lora_dropout=0.1 cannot act on routed experts"):
        sft.main(arguments(base, tmp_path, "--lora_rank", "2", "--lora_groups", "routed_experts",
                           "--lora_dropout", "0.1"))  # fmt: skip


@pytest.mark.parametrize("more, reason", [
    (("--dataset_name", "data/none"), "data_scripts.prepare_sft"),
    (("--mtp_loss_cof", "1"), "did you mean mtp_loss_coef"),
    (("--eval_tasks", "chainsum"), "unknown task 'chainsum'; known are chain_sum"),
    (("--chat_template", "deepseek_r2"), "did you mean deepseek_r1"),
    (("--max_length", "257"), "max_length=257 exceeds the context of .* .256 tokens"),
    (("--model_init_kwargs", '{"dtype": "bfloat16"}'), "model_init_kwargs holds 'dtype', which weights_dtype sets"),
    (("--model_name_or_path", "runs/none"), "runs/none does not exist"),
    (("--validation_fraction", "0"), "eval_strategy=steps needs held-out examples: raise validation_fraction=0.0"),
    (("--per_device_train_batch_size", "64"), "rows of examples fill no batch: .* times 1 processes is 64; lower it"),
])  # fmt: skip
def test_bad_input_is_named(base, tmp_path, more, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        sft.main(arguments(base, tmp_path, *more))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_overwritten(finished, base):
    """Said before the tasks are evaluated, not after."""
    with pytest.raises(ValueError, match="already holds checkpoint-4 of an earlier run"):
        sft.main(arguments(base, finished[0], "--eval_tasks", "gcd:1", "--eval_problems", "3"))


def test_dry_run_shows_the_data(base, tmp_path, capsys):
    assert sft.main(arguments(base, tmp_path, "--dry_run", "--max_length", "30")) is None
    out = capsys.readouterr().out
    assert "trained" in out and "left out: longer than max_length" in out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_are_one(finished, base, tmp_path):
    """The same weights from the same global batches, launched as documented."""
    changes = ("--packing", "false", "--optim", "sgd", "--train_sampling_strategy", "sequential", "--eval_strategy",
               "no", "--save_strategy", "no", "--max_steps", "2")  # fmt: skip
    sft.main(arguments(base, tmp_path / "one", *changes, "--per_device_train_batch_size", "4"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631", SCRIPT,
               *arguments(base, tmp_path / "two", *changes)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6, msg=name)
