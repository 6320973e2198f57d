"""recipes/ppo.py from end to end, its prompts and its settings: a tiny real run, resuming, adapters, bad input."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import train_tokenizer
from recipes import ppo
from recipes.logging_callbacks import read_metrics
from recipes.ppo_config import PPORecipeConfig
from recipes.pretrain_config import parse_config
from recipes.rl_data import build_prompts, fitting, hold_out_prompts, prompt_lengths
from recipes.rl_plots import rl_rows
from recipes.rl_results import _held_out_rewards
from recipes.task_puzzles import PUZZLE_TASKS
from tests.recipes.tiny_run import SIZES

CONFIGS = Path(ppo.__file__).parent / "configs"
# Rises with the share of one letter: a random model learns it in a few steps.
REWARD = """
def letters(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(t.count(x) for x in "aeiou") / max(len(t), 1) for t in texts]
"""


def prompt_rows(count):
    problems = PUZZLE_TASKS["chain_sum"].problems("train", 0, 1, count)
    rows = [problem.to_row() for problem in problems]
    return [{"question": row.pop("prompt"), **row} | {"prompt": [{"role": "user", "content": p.prompt}]}
            for row, p in zip(rows, problems)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model, its tokenizer, prompts about sums, and a reward of the user's own."""
    folder, rows = tmp_path_factory.mktemp("ppo"), prompt_rows(40)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_rewards.py").write_text(REWARD)
    generator = random.Random(0)
    texts = [row["question"] for row in rows] + ["".join(generator.choices("abcdefghij ", k=50)) for _ in range(20)]
    tokenizer = train_tokenizer(texts, 400)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    set_seed(0)
    config = CONFIG_MAPPING["deepseek_r1"](**(SIZES | special | {"vocab_size": 400, "max_position_embeddings": 256}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def arguments(base, output_dir, *more):
    return [
        "--model_name_or_path", str(base / "model"), "--dataset_name", str(base / "data"), "--output_dir",
        str(output_dir), "--max_steps", "4", "--per_device_train_batch_size", "8", "--max_completion_length", "12",
        "--num_ppo_epochs", "2", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "4",
        "--save_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--disable_tqdm", "true", "--validation_fraction",
        "0.2", "--report_to", "none", "--rewards", str(base / "my_rewards.py:letters"), "--track_rewards", "accuracy",
        "format", *more,
    ]  # fmt: skip


TASKS = ("--eval_tasks", "chain_sum:1", "--eval_problems", "4", "--eval_max_new_tokens", "6")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, ppo.main(arguments(base, folder, *TASKS))


def test_a_run_leaves_what_it_promises(finished):
    folder, results = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "eval.json", "report.html", "model.safetensors", "checkpoint-4"} <= names
    assert {"value_head.safetensors", "chat_template.jinja"} <= names
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "value_head")
    assert json.loads((folder / "eval.json").read_text()) == json.loads(json.dumps(results))
    assert set(results["tasks"]) == {"before", "after"}
    held_out = results["held_out_rewards"]
    assert set(held_out["rewards"]) == {"letters", "accuracy", "format"}
    assert held_out["reward"] == pytest.approx(held_out["rewards"]["letters"], abs=1e-6)


def test_metrics_have_their_names_and_tracked_rewards_weigh_nothing(finished):
    records = read_metrics(finished[0] / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    rollouts = [r for r in train if "reward" in r]
    assert len(rollouts) >= 2
    for record in rollouts:
        assert {"kl", "policy loss", "value loss", "entropy", "ratio", "length", "cut off"} <= set(record)
        assert set(record["rewards"]) == {"letters", "accuracy", "format"}
        assert record["reward"] == pytest.approx(record["rewards"]["letters"], abs=1e-6)
        assert record["reward"] > 0 and record["rewards"]["accuracy"] == 0 and record["unscored"] == 0
    assert all(r["tokens"] > 0 for r in train)
    (evaluated,) = [r for r in records if r["kind"] == "eval"]
    assert set(evaluated["eval rewards"]) == {"letters", "accuracy", "format"}
    (samples,) = [r for r in records if r["kind"] == "samples"]
    assert samples["step"] == 4 and set(samples["samples"][0]["rewards"]) == {"letters", "accuracy", "format"}


def test_the_report_shows_rewards_and_samples(finished):
    page = (finished[0] / "report.html").read_text()
    for words in (
        "Reinforcement learning (PPO)", "KL to the reference", "Where the time of a rollout goes", "explained variance",
        "Held-out problems", ", letters 0.", "rewards on held-out prompts", "first and last fifth",
    ):  # fmt: skip
        assert words in page, words
    assert "last training loss" not in page  # a sum of terms that says nothing by itself


def test_a_reward_called_reward_is_not_the_weighted_sum():
    """As the quickstart has it: a reward model in a folder `reward`, tracked beside the rules."""
    found = {"eval_loss": 0.0, "eval_reward": 1.0, "eval_rewards/reward/mean": 3.0, "eval_rewards/format/mean": 1.0}
    trainer = SimpleNamespace(evaluate=lambda **_: found, state=SimpleNamespace(global_step=4))
    held_out = _held_out_rewards(trainer)
    assert held_out == {"reward": 1.0, "rewards": {"reward": 3.0, "format": 1.0}}
    records = [{"step": 1, "reward": reward, "rewards": {"reward": 3.0}} for reward in (0.0, 0.2, 0.5, 0.5, 1.0)]
    rows = dict(rl_rows(records, {"held_out_rewards": held_out}))
    assert rows["reward, first and last fifth of the run"] == "0.000 -> 1.000"
    assert rows["reward: reward"] == "3.000 -> 3.000"
    assert rows["rewards on held-out prompts"] == "sum 1.000, reward 3.000, format 1.000"


def test_a_report_of_what_is_known():
    """No held-out answer could be judged, routing was compared for a while only, KL is logged between rollouts too."""
    trainer = SimpleNamespace(evaluate=lambda **_: {"eval_reward": None, "eval_rewards/accuracy/mean": None},
                              state=SimpleNamespace(global_step=4))  # fmt: skip
    held_out = _held_out_rewards(trainer)
    assert held_out == {"reward": None, "rewards": {"accuracy": None}}
    records = [{"step": 1, "reward": 0.5, "kl": 0.0}, {"step": 2, "kl": 0.25},
               {"step": 3, "reward": 0.5, "kl": 0.0, "sampler kl with replay": 1e-3, "sampler kl without replay": 2e-3},
               {"step": 4, "kl": 0.75}]  # fmt: skip
    rows = dict(rl_rows(records, {"held_out_rewards": held_out}))
    assert rows["rewards on held-out prompts"] == "sum none, accuracy none"
    assert rows["KL of sampler and trainer, with and without replay"] == "1.00e-03, 2.00e-03"
    assert rows["KL to the reference, at the end"] == "0.7500 nats per token"


class Stop(TrainerCallback):
    """Ends a run after its third step: in the middle of a rollout."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == 3


def test_a_resumed_run_is_the_uninterrupted_one(base, finished, tmp_path):
    args = parse_config(PPORecipeConfig, arguments(base, tmp_path))
    set_seed(args.seed)
    stopped = ppo.build_trainer(args, AutoTokenizer.from_pretrained(base / "model"))
    stopped.add_callback(Stop())
    stopped.train()
    args = parse_config(PPORecipeConfig, arguments(base, tmp_path, "--resume_from_checkpoint", "true"))
    resumed = ppo.build_trainer(args, AutoTokenizer.from_pretrained(base / "model"))
    resumed.train()
    names = ("loss", "reward", "kl", "value loss", "length", "entropy")
    found = [read_metrics(folder / "metrics.jsonl") for folder in (finished[0], tmp_path)]
    runs = [[{name: r.get(name) for name in names} for r in records if r["kind"] == "train"] for records in found]
    assert runs[0] == runs[1]
    args.rewards, args.resume_from_checkpoint = ["format"], "true"
    args.track_rewards = []
    with pytest.raises(ValueError, match="rewards"):
        ppo.build_trainer(args, AutoTokenizer.from_pretrained(base / "model")).train()


def test_adapters_averages_and_a_reward_model(base, tmp_path):
    """LoRA (reference: the base), an average of the weights, and a reward model with the policy's tokenizer."""
    config = CONFIG_MAPPING["deepseek_r1"].from_pretrained(base / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(base / "model").save_pretrained(tmp_path / "judge")
    run = tmp_path / "run"
    results = ppo.main(arguments(
        base, run, "--lora_rank", "2", "--max_steps", "2", "--ema_decay", "0.9", "--rewards", str(tmp_path / "judge"),
        "--eval_strategy", "no", "--validation_fraction", "0",
    ))  # fmt: skip
    assert results["merged_logits_difference"] < 1e-4 and "held_out_rewards" not in results
    names = {path.name for path in run.iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors", "merged", "ema"} <= names
    folders = (run / "merged", base / "model")
    merged, plain = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert set(merged) == set(plain) and any(not merged[name].equal(plain[name]) for name in plain)
    first = next(r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train")
    assert first["kl"] == 0 and first["reward"] == pytest.approx(first["rewards"]["judge"], abs=1e-6)


# ---------------------------------------------------------------- settings and prompts


def test_dry_run_shows_data_and_rewards(base, tmp_path, capsys):
    ppo.main(arguments(base, tmp_path / "run", "--dry_run", "true"))
    said = capsys.readouterr().out
    assert "prompts, 21 tokens at most" in said and "letters" in said and "weight 0" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (("--rewards", "acuracy"), "unknown reward 'acuracy'; did you mean accuracy"),
        (("--rewards", "accuracy"), "name accuracy twice"),
        (("--reward_weights", "1", "2"), "must hold one weight for each of rewards"),
        (("--reward_weights", "0"), "reward_weights=.0.0. must be other than 0"),
        (("--reward_weights", "nan"), "reward_weights=.nan. must be finite"),
        (("--reward_kwargs", '{"letters": {"loud": 3}}'), "reward_kwargs.letters holds 'loud'"),
        (("--reward_kwargs", "{letters: 3}"), "reward_kwargs='{letters: 3}' is not JSON"),
        (("--reward_kwargs", '{"letters": 3}'), "reward_kwargs=.* must hold settings by name"),
        (("--rewards", "runs/none"), "the reward model runs/none cannot be loaded"),
        (("--dataset_name", "data/none"), "data_scripts.prepare_prompts"),
        (("--max_prompt_length", "3"), "are longer than max_prompt_length=3 tokens .shortest .*, longest 21"),
        (("--per_device_train_batch_size", "64"), "prompts are fewer than the 64 of one rollout"),
        (("--max_completion_length", "300"), "exceed the model's context of 256 tokens"),
        (("--validation_fraction", "0"), "eval_strategy=steps needs held-out prompts"),
        (("--ref_model_name_or_path", "/none"), "ref_model_name_or_path=/none cannot be loaded"),
        (("--label_smoothing_factor", "0.1"), "label_smoothing_factor=0.1 has no effect in reinforcement learning"),
        (("--lora_rank", "-1"), "lora_rank=-1 must be zero"),
        (("--eval_tasks", "chain_sums"), "chain_sum"),
        (("--rewardz", "a"), "did you mean rewards"),
    ],
)
def test_bad_input_is_named(base, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        ppo.main(arguments(base, tmp_path, *more))


def test_prompts_that_are_too_long_are_counted(base):
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    rows = Dataset.from_list([{"prompt": "one"}, {"prompt": "one and two and three"}, {"prompt": "two"}])
    lengths = prompt_lengths(rows["prompt"], tokenizer)
    assert lengths == [len(tokenizer(text)["input_ids"]) for text in rows["prompt"]]
    kept, line = fitting(rows, tokenizer, lengths[1] - 1, "here")
    assert kept["prompt"] == ["one", "two"] and "1 longer than max_prompt_length" in line and f"{lengths[1]})" in line
    assert fitting(rows, tokenizer, None, "here")[0] is rows


def test_accuracy_alone_needs_verifiers(base, tmp_path):
    """Every reward would be None, and training would do nothing."""
    rows = [{"prompt": f"how much is {number}?", "task": None} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = arguments(base, tmp_path / "out", "--dataset_name", str(tmp_path), "--track_rewards", "format")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    args = parse_config(PPORecipeConfig, [*given, "--rewards", "accuracy"])
    with pytest.raises(ValueError, match="no row of .* has a task that verifies its answer"):
        build_prompts(args, tokenizer)
    args.rewards = ["accuracy", "format"]
    assert len(build_prompts(args, tokenizer)[0]) > 20


def test_the_value_head_learns_ten_times_as_fast(base, tmp_path):
    """In the presets too, whatever learning rate the command line sets."""
    for preset in ("tiny", "nano"):
        for rate in (3e-4, 1e-5):
            given = ["--config", f"{CONFIGS}/ppo_{preset}.yaml", "--learning_rate", str(rate)]
            assert parse_config(PPORecipeConfig, given).value_learning_rate == pytest.approx(10 * rate)
    args = parse_config(PPORecipeConfig, ["--config", f"{CONFIGS}/ppo_instructgpt.yaml", "--bf16", "false"])
    assert args.generation_batch_size == 512 and args.max_steps * 64 == 256_000


def test_held_out_prompts_are_never_trained_on():
    rows = Dataset.from_list([{"prompt": f"question {number % 50}"} for number in range(200)])
    train, held_out = hold_out_prompts(rows, 0.3, 0)
    assert len(train) + len(held_out) == 200 and 0 < len(held_out) < 120
    assert not set(train["prompt"]) & set(held_out["prompt"])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question": "a"}], "has no column prompt, only question"),
        ([{"prompt": " "}], "row 0: the prompt is empty"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "must end with the user's message, .* 'assistant'"),
        ([{"prompt": [{"role": "user", "content": ""}]}], "row 0: the last message is empty"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], "cannot be read as json|mixes formats"),
    ],
)
def test_bad_prompts_are_named(base, tmp_path, rows, message):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = parse_config(PPORecipeConfig, arguments(base, tmp_path / "out", "--dataset_name", str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        build_prompts(args, AutoTokenizer.from_pretrained(base / "model"))


@pytest.mark.parametrize("kind", ["torch", "fused", "muon"])
def test_the_value_function_has_its_learning_rate_under_every_optimizer(base, tmp_path, kind):
    args = parse_config(PPORecipeConfig, arguments(base, tmp_path, "--optimizer", kind))
    trainer = ppo.build_trainer(args, AutoTokenizer.from_pretrained(base / "model"))
    trainer.create_optimizer()
    value = {id(parameter) for parameter in trainer.model.value_head.parameters()}
    rates = [(id(p) in value, group["lr"]) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert set(rates) == {(True, 10 * args.learning_rate), (False, args.learning_rate)} and len(value) == 6
    assert len(rates) == sum(parameter.requires_grad for parameter in trainer.model.parameters())
