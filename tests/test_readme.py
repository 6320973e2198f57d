"""The README's example and walk-throughs do what they say, on smaller sizes."""

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from data_scripts import prepare_pretraining
from data_scripts.train_tokenizer import train_tokenizer
from recipes import eval as eval_recipe
from recipes import pretrain, sft
from recipes.pretrain_config import PretrainConfig, parse_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
QUICK = ["--max_steps", "3", "--sequence_length", "32",
         "--per_device_train_batch_size", "2", "--eval_strategy", "no", "--save_strategy", "no", "--sample_tokens", "2",
         "--logging_steps", "1"]  # fmt: skip


def commands(name):
    """The argument lists of the bash block behind `<!-- test: name -->`."""
    block = re.search(rf"<!-- test: {name} -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
    return [shlex.split(line) for line in block.strip().splitlines()]


def run(command, model=SMALL):
    """Runs one documented command in this process, with small sizes added to it."""
    if command[:3] == ["python", "-m", "data_scripts.prepare_pretraining"]:
        small = [] if "--from_folder" in command else ["--vocab_size", "300"]
        return prepare_pretraining.main([*command[3:], *small])
    assert command[:3] == ["accelerate", "launch", "recipes/pretrain.py"]
    sizes = [part for name, value in model.items() for part in (f"--model_config.{name}", str(value))]
    return pretrain.main([*command[3:], *sizes, *QUICK])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the repository's recipes and two text files, as the current folder."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my_texts").mkdir()
    words = "the quick brown fox jumps over the lazy dog while seven wise men watch from the old stone bridge".split()
    generator = torch.Generator().manual_seed(0)
    for number in range(30):
        order = torch.randint(len(words), (120,), generator=generator).tolist()
        (tmp_path / "my_texts" / f"{number}.txt").write_text(" ".join(words[i] for i in order))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_corpus(workplace):
    pytest.importorskip("datatrove")
    for command in commands("corpus"):
        assert command[:2] == ["python", "-m"]
        script = importlib.import_module(command[2])
        small = {"prepare_pretraining": ["--vocab_size", "300"],
                 "clean_corpus": ["--skip", "decontamination"]}  # which makes 200 problems of every task: 15 s
        script.main([*command[3:], *small.get(command[2].split(".")[1], [])])
    assert "Random samples" in (workplace / "data/report.html").read_text()
    assert json.loads(Path("data/packed/manifest.json").read_text())["licences"] == {"mine": "CC0"}


def results(folder):
    return json.loads((Path(folder) / "eval.json").read_text())


def run_example(block, folder):
    """The names that a Python block leaves behind, run in `folder`."""
    (folder / "example.py").write_text(block)
    return runpy.run_path(str(folder / "example.py"))


@pytest.fixture(scope="module")
def first_example(tmp_path_factory):
    """(folder with the saved model, names) of the example that opens the README."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run_example(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], folder)


def test_example(first_example):
    folder, names = first_example
    again = AutoModelForCausalLM.from_pretrained(folder / "my-r1").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(names["ids"]).logits, names["model"].eval()(names["ids"]).logits)
    assert names["model"].expert_load and any(r.e_score_correction_bias.any() for r in again.routers.values())


def test_generation(first_example, monkeypatch, capsys):
    """The example of that section, on the model that the first one saves."""
    folder, _ = first_example
    monkeypatch.chdir(folder)
    block = re.search(r"<!-- test: generation -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    names = run_example(block.replace("max_new_tokens=64", "max_new_tokens=6"), folder)
    assert names["tokens"].shape == names["drafted"].shape == (4, 38)
    assert [len(answer.generated_tokens) for answer in names["answers"].values()] == [6, 6]
    assert f"{torch.Size([4, 37, 2, 4])} {torch.Size([4, 6])}" in capsys.readouterr().out


def test_own_text_then_released_weights(workplace):
    prepare, train = commands("own text")
    run(prepare)
    run(train)
    assert results("runs/mine") and (workplace / "runs/mine/report.html").is_file()

    torch.manual_seed(0)
    vocabulary = json.loads(Path("data/mine/manifest.json").read_text())["vocab_size"]
    released = DeepseekV3ForCausalLM(DeepseekV3Config(
        **{**SMALL, "vocab_size": vocabulary}, num_key_value_heads=2, q_lora_rank=None, n_group=1, topk_group=1,
        first_k_dense_replace=1, num_mtp_layers=0,
    ))  # fmt: skip
    released.save_pretrained("deepseek-v3-folder")
    AutoTokenizer.from_pretrained("data/mine/tokenizer").save_pretrained("deepseek-v3-folder")
    prepare, command = commands("released weights")
    run(prepare)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        run([part.replace("1e-4", "1e-12") for part in command], model={"num_nextn_predict_layers": 1})
    run([part.replace("1e-4", "1e-12") for part in command], model={"num_nextn_predict_layers": 0})
    continued = AutoModelForCausalLM.from_pretrained("runs/continued")
    for name, weight in released.named_parameters():         # a step of 1e-12 leaves the released weights in place
        torch.testing.assert_close(continued.get_parameter(name), weight, rtol=0, atol=1e-6)


def test_hub_data_set(workplace, monkeypatch):
    """The Hub is not there: its loader is asked for the documented name and answers with local rows."""
    import datasets

    asked = []

    def from_hub(name, *args, streaming=False, **kwargs):
        asked.append((name, streaming))
        texts = [path.read_text() for path in sorted(Path("my_texts").iterdir())]
        rows = datasets.Dataset.from_dict({"text": texts})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *args, **kwargs: ["train"])
    run(["python", "-m", "data_scripts.prepare_pretraining", "--output_dir", "data/tiny", "--source", "mine=./my_texts",
         "--mixture", "mine=100"])  # fmt: skip
    (command,) = commands("hub data set")
    run(command)
    assert ("roneneldan/TinyStories", True) in asked and results("runs/stories")


def test_own_conversations(workplace):
    """Fine-tuning on a file of chats, then the evaluation of what came out."""
    question, answer = "State the final answer: 14 + 25 =", "<think>\n14+25=39\n</think>\n\n39"
    chat = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    Path("my_chats.jsonl").write_text("\n".join([json.dumps(chat)] * 40))
    tokenizer = train_tokenizer([question + answer], 400)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = SMALL | special | {"vocab_size": 400, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                               "max_position_embeddings": 512}  # fmt: skip
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_r1"](**sizes)).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    tune, evaluate = commands("own conversations")
    assert tune[:3] == ["accelerate", "launch", "recipes/sft.py"] and evaluate[:2] == ["python", "recipes/eval.py"]
    few = ["--max_steps", "2", "--eval_strategy", "no", "--eval_problems", "2", "--eval_max_new_tokens", "4"]
    few += ["--use_cpu"]
    sft.main([*tune[3:], *few])
    assert results("runs/my_chats")["tasks"]["after"]["tasks"]["chain_sum"]["problems"] == 2
    eval_recipe.main([*evaluate[2:], "--problems", "2", "--max_new_tokens", "4"])
    assert set(results("runs/my_eval")["tasks"]) == {"chain_sum", "gcd"} and Path("runs/my_eval/report.html").is_file()


def test_first_commands(workplace):
    """The block that opens the section on pretraining; its settings are read as documented."""
    block = re.search(r"## Pretraining.*?```bash\n(.*?)```", README, re.DOTALL)[1]
    prepare, train, dry = (shlex.split(line, comments=True) for line in block.strip().splitlines())
    assert prepare[3:] == ["--output_dir", "data/tiny", "--size", "tiny"]
    prepare_pretraining.main(["--output_dir", "data/tiny", "--source", "mine=./my_texts", "--mixture", "mine=100",
                              "--vocab_size", "300"])  # fmt: skip
    assert parse_config(PretrainConfig, train[3:]).max_steps == 100
    run(train)
    assert results("runs/pretrain_tiny")
    pretrain.main(dry[2:])


def test_documented_files_exist():
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", README):
        if not path.startswith(("runs/", "ema/", "data/")):
            assert (ROOT / path).exists(), path
    assert sys.version_info >= (3, 11)
