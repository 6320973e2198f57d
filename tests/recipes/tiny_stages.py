"""Every stage as a run of seconds: one random model and tokenizer, data for each recipe, and its command line."""

import json
import math
import random
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import EOS, train_tokenizer
from recipes import ppo, pretrain, reward, sft
from recipes.logging_callbacks import METRICS_FILE, read_metrics
from recipes.task_puzzles import PUZZLE_TASKS
from tests.recipes.tiny_run import SIZES

RECIPES = {"pretrain": pretrain, "sft": sft, "reward": reward, "process": reward, "ppo": ppo}
CLOCKS = ("tok/s", "mfu", "seconds")  # what a name of theirs ends in
VOWELS = """
def vowels(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(t.count(x) for x in "aeiou") / max(len(t), 1) for t in texts]
"""


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def make_base(folder):
    """Fills `folder` with model/, a folder of data for each stage, and a reward of the user's own. Returns it."""
    folder, generator = Path(folder), random.Random(0)
    prompts, conversations, pairs, steps, texts = [], [], [], [], []
    for problem in PUZZLE_TASKS["chain_sum"].problems("train", 0, 1, 48):
        right, wrong = (f"<think>\n{value}\n</think>\n\n{value}" for value in (problem.reference, "none"))
        question, answer = ({"role": role, "content": text} for role, text in (("user", problem.prompt),
                                                                              ("assistant", right)))  # fmt: skip
        key, row = problem.metadata["key"], problem.to_row()
        prompts.append({"question": row.pop("prompt"), **row, "prompt": [question]})
        conversations.append({"messages": [question, answer], "key": key})
        pairs.append({"prompt": [question], "chosen": [answer], "problem": key,
                      "rejected": [{"role": "assistant", "content": wrong}]})  # fmt: skip
        labels = [generator.random() < 0.5 for _ in range(3)]
        steps.append({"prompt": [question], "completions": [f"{'right' if each else 'wrong'}." for each in labels],
                      "labels": labels, "problem": key})  # fmt: skip
        texts.append(f"{problem.prompt} {right} right wrong")
    for stage, rows in (("sft", conversations), ("reward", pairs), ("process", steps), ("ppo", prompts)):
        _write(folder / stage / "train.jsonl", rows)
    _write(folder / "pretrain" / "train.jsonl", [{"text": text} for text in texts])
    (folder / "my_rewards.py").write_text(VOWELS)
    tokenizer = train_tokenizer(texts + ["".join(generator.choices("abcdefghij ", k=50)) for _ in range(20)], 400)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    set_seed(0)
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | special | {"vocab_size": 400, "max_position_embeddings": 256}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def tokenizer_without_marks(folder, **special):
    """A byte-level tokenizer as others ship it: none of R1's tokens. `special`: bos_token, pad_token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ":\n<think>\n Assistant:\n<answer> 2 </answer></think>" * 9
    backend.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=330, special_tokens=[EOS], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, **special).save_pretrained(folder)
    return folder


OPTIONS = {
    "pretrain": ("--sequence_length", "64", "--device_peak_tflops", "0.1", "--ema_decay", "0.9"),
    "sft": ("--max_length", "96", "--device_peak_tflops", "0.1"),
    "reward": ("--max_length", "96"),
    "process": ("--max_length", "96", "--kind", "process"),
}  # fmt: skip


def arguments(base, stage, output_dir, *more):
    """The command line of a run of eight steps: batches of four, a checkpoint after every third."""
    options = OPTIONS.get(stage) or (
        "--max_completion_length", "8", "--num_ppo_epochs", "2", "--num_mini_batches", "2", "--rewards",
        f"{base / 'my_rewards.py'}:vowels", "--max_eval_prompts", "4",
    )  # fmt: skip
    return [
        "--model_name_or_path", str(base / "model"), "--dataset_name", str(base / stage), "--output_dir",
        str(output_dir), "--max_steps", "8", "--per_device_train_batch_size", "4", "--logging_steps", "1",
        "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3", "--learning_rate", "1e-2", "--use_cpu",
        "--disable_tqdm", "true", "--validation_fraction", "0.25", "--report_to", "none", "--seed", "1",
        *options, *more,
    ]  # fmt: skip


def records(output_dir):
    """Every record of metrics.jsonl but its clocks."""
    found = read_metrics(Path(output_dir) / METRICS_FILE)
    return [{name: value for name, value in record.items() if not name.endswith(CLOCKS)} for record in found]


def differences(output_dir, expected):
    """What two runs' records and saved tensors differ in, as text; empty where both are the same, bit for bit."""
    runs, found = (records(output_dir), records(expected)), []
    if runs[0] != runs[1]:
        pairs = [f"{a}\n  != {b}" for a, b in zip(*runs) if a != b]
        found.append(f"{len(runs[0])} and {len(runs[1])} records; the first that differ: {pairs[:1]}")
    names = {p.relative_to(f).as_posix() for f in (Path(output_dir), Path(expected)) for p in _weights(f)}
    for name in sorted(names):
        files = [Path(folder) / name for folder in (output_dir, expected)]
        if not all(file.is_file() for file in files) or not same_tensors(*files):
            found.append(name)
    return found


def same_tensors(*files):
    """Whether two safetensors files hold the same, bit for bit; the order of what describes them may differ."""
    one, two = map(load_file, files)
    return one.keys() == two.keys() and all(tensor.equal(two[name]) for name, tensor in one.items())


def _weights(folder):
    return [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in path.as_posix()]


def without_clocks(results):
    """The content of an eval.json but its seconds."""
    if isinstance(results, dict):
        return {name: without_clocks(value) for name, value in results.items() if "second" not in name}
    return None if isinstance(results, float) and math.isnan(results) else results
