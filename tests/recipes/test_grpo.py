"""recipes/grpo.py from data to report, its presets, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from recipes import grpo
from recipes.grpo_arguments import divisors_near
from recipes.grpo_config import GRPORecipeConfig
from recipes.logging_callbacks import read_metrics
from recipes.pretrain_config import parse_config
from tests.recipes.tiny_ppo import one_thread  # noqa: F401
from tests.recipes.tiny_stages import make_base, records, same_tensors, without_clocks

CONFIGS = Path(grpo.__file__).parent / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("grpo_*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("grpo"))


def arguments(base, output_dir, *more):
    return [
        "--model_name_or_path", str(base / "model"), "--dataset_name", str(base / "ppo"), "--output_dir",
        str(output_dir), "--max_steps", "4", "--per_device_train_batch_size", "8", "--num_generations", "4",
        "--steps_per_generation", "2", "--num_iterations", "2", "--max_completion_length", "12", "--logging_steps", "1",
        "--eval_strategy", "steps", "--eval_steps", "4", "--save_steps", "3", "--learning_rate", "1e-2", "--use_cpu",
        "--disable_tqdm", "true", "--validation_fraction", "0.2", "--report_to", "none", "--beta", "0.01", "--rewards",
        str(base / "my_rewards.py:vowels"), "--track_rewards", "accuracy", "format", "--max_eval_prompts", "4",
        "--preflight_prompts", "4", "--curriculum", "pass_rate", *more,
    ]  # fmt: skip


TASKS = ("--eval_tasks", "chain_sum:1", "--eval_problems", "4", "--eval_max_new_tokens", "6")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, grpo.main(arguments(base, folder, *TASKS))


def test_a_run_leaves_what_it_promises(finished):
    folder, results = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "eval.json", "report.html", "model.safetensors", "checkpoint-3",
            "preflight.json", "chat_template.jinja"} <= names  # fmt: skip
    AutoModelForCausalLM.from_pretrained(folder)
    assert json.loads((folder / "eval.json").read_text()) == json.loads(json.dumps(results))
    assert results["stage"] == "grpo" and set(results["tasks"]) == {"before", "after"}
    held_out = results["held_out_rewards"]
    assert set(held_out["rewards"]) == {"vowels", "accuracy", "format"}
    assert held_out["reward"] == pytest.approx(held_out["rewards"]["vowels"], abs=1e-6)
    looked = json.loads((folder / "preflight.json").read_text())
    assert (looked["groups"], looked["group_size"]) == (4, 4) and looked["verdict"] in ("ok", "warning")
    assert looked["rewards"]["vowels"]["weight"] == 1 and looked["rewards"]["format"]["weight"] == 0
    assert looked["memory"] and looked["samples"][0]["prompt"]


def test_metrics_have_their_names(finished):
    found = read_metrics(finished[0] / "metrics.jsonl")
    train = [r for r in found if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    (rollout,) = [r for r in train if "reward" in r]
    assert {"kl", "entropy", "length", "cut off"} <= set(rollout)
    assert set(rollout["rewards"]) == {"vowels", "accuracy", "format"}
    assert rollout["reward"] == pytest.approx(rollout["rewards"]["vowels"], abs=1e-6) and rollout["reward"] > 0
    assert all(r["tokens"] > 0 and "kl" in r for r in train)
    (samples,) = [r for r in found if r["kind"] == "samples"]
    assert samples["step"] == 4 and set(samples["samples"][0]["rewards"]) == {"vowels", "accuracy", "format"}
    assert set(next(r for r in found if r["kind"] == "eval")["eval rewards"]) == {"vowels", "accuracy", "format"}


def test_the_report_shows_curves_and_samples(finished):
    page = (finished[0] / "report.html").read_text()
    for words in ("Reinforcement learning (GRPO)", "KL to the reference", "Held-out problems", ", vowels 0.",
                  "rewards on held-out prompts", "first and last fifth", "router replay"):  # fmt: skip
        assert words in page, words
    assert "last training loss" not in page and "Reinforcement learning (PPO)" not in page


def test_a_second_run_continues_or_is_refused(base, finished, tmp_path):
    """From the checkpoint in the middle of the rollout to the same end; not into a folder that is in use."""
    folder, results = finished
    with pytest.raises((ValueError, OSError), match="resume_from_checkpoint|output_dir"):
        grpo.main(arguments(base, folder, *TASKS))
    resume = ("--resume_from_checkpoint", str(folder / "checkpoint-3"))
    with pytest.raises(ValueError, match="num_iterations"):
        grpo.main(arguments(base, tmp_path / "other", *resume, "--num_iterations", "4"))
    run = tmp_path / "run"
    again = grpo.main(arguments(base, run, *TASKS, *resume))
    assert same_tensors(folder / "model.safetensors", run / "model.safetensors")
    assert without_clocks(again)["held_out_rewards"] == without_clocks(results)["held_out_rewards"]
    last = [[r for r in records(each) if r["kind"] == "train" and r["step"] == 4] for each in (folder, run)]
    assert last[0] == last[1] != []
    assert not (run / "preflight.json").exists()


def test_dry_run_shows_data_and_rewards(base, tmp_path, capsys):
    assert grpo.main(arguments(base, tmp_path / "run", "--dry_run", "true")) is None
    said = capsys.readouterr().out
    assert "tokens at most" in said and "vowels" in said and "weight 0" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


OPTIONS = ("--dynamic_sampling", "--router_replay", "--curriculum_target", "--preflight_prompts")


def test_the_documented_command_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        grpo.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(name in said for name in OPTIONS)


@pytest.mark.slow
def test_as_a_script_from_elsewhere_it_has_help(tmp_path):
    run = subprocess.run([sys.executable, grpo.__file__, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(name in run.stdout for name in OPTIONS)


# ---------------------------------------------------------------- presets


def preset(name, *more):
    return parse_config(GRPORecipeConfig, ["--config", str(CONFIGS / name), "--use_cpu", "--bf16", "false", *more])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse(name):
    args = preset(name)
    assert args.generation_batch_size % args.num_generations == 0
    assert args.steps_per_generation % args.gradient_accumulation_steps == 0
    assert args.output_dir.startswith("runs/") and args.rewards
    missing = [name for name in grpo.GUARDED if not hasattr(args, name)]
    assert not missing


@pytest.mark.parametrize("name", ["grpo_r1_zero.yaml", "grpo_r1.yaml", "grpo_r1_all.yaml"])
def test_r1_presets_hold_the_papers_numbers(name):
    args = preset(name)
    assert (args.learning_rate, args.beta, args.epsilon, args.epsilon_high) == (3e-6, 0.001, 10.0, None)
    devices = 64
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    rollout = args.per_device_train_batch_size * args.steps_per_generation * devices
    assert (args.num_generations, step // args.num_generations, step) == (16, 32, 512)
    assert (rollout, rollout // step) == (8192, 16)
    assert args.num_iterations == 1 and args.max_completion_length == 32768 and args.lr_scheduler_type == "constant"
    assert (args.sync_ref_model, args.ref_model_sync_steps, args.ref_model_mixup_alpha) == (True, 400, 1.0)
    assert args.loss_type == "grpo" and args.scale_rewards == "group" and args.importance_sampling_level == "token"
    assert args.use_bias_correction_kl is False  # Eq. 2 has no ratio before the KL
    assert args.temperature == (0.7 if name == "grpo_r1_all.yaml" else 1.0)
    if name == "grpo_r1_zero.yaml":
        assert args.rewards == ["accuracy", "format"] and args.max_steps == 10400
    if name == "grpo_r1_all.yaml":
        assert (args.max_steps, args.prompts_from_step, args.reward_from_step) == (1700, 1300, {"reward_r1": 1300})
        assert set(args.reward_from_step) == {Path(args.rewards[-1]).name}


def test_presets_of_other_papers():
    dapo, dr, gspo = (preset(f"grpo_{name}.yaml") for name in ("dapo", "dr_grpo", "gspo"))
    assert (dapo.loss_type, dapo.epsilon, dapo.epsilon_high, dapo.dynamic_sampling) == ("dapo", 0.2, 0.28, True)
    assert (dapo.max_completion_length, dapo.reward_kwargs) == (20480, {"length": {"buffer": 4096}})
    assert (dr.loss_type, dr.scale_rewards, dr.beta) == ("dr_grpo", "none", 0.0)
    assert (gspo.importance_sampling_level, gspo.loss_type) == ("sequence", "grpo")
    assert (gspo.epsilon, gspo.epsilon_high) == (3e-4, 4e-4)
    assert gspo.steps_per_generation == 4 * gspo.gradient_accumulation_steps


# ---------------------------------------------------------------- what is refused


def test_the_nearest_group_sizes_divide():
    for size in range(2, 70):
        for wanted in range(2, 80):
            dividing = [group for group in range(2, size + 1) if size % group == 0]
            expected = [g for g in dividing if g < wanted][-1:] + [g for g in dividing if g > wanted][:1]
            assert divisors_near(size, wanted, 2) == expected


@pytest.mark.parametrize(
    "more, message",
    [
        (("--num_generations", "5"), "num_generations=5 does not divide the 16 .* are 4 and 8, .* rollouts 15 and 20"),
        (("--num_generations", "64"), "num_generations=64 does not divide .* do are 16, the nearest rollouts 64"),
        (("--num_generations", "1"), "num_generations=1 must be at least 2"),
        (("--dynamic_sampling", "true", "--scale_rewards", "batch"), "dynamic_sampling=true with scale_rewards=batch"),
        (("--sync_ref_model", "true", "--beta", "0"), "sync_ref_model=true with beta=0"),
        (("--curriculum_reward", "vowel"), "curriculum_reward='vowel' is none of the rewards vowels, accuracy, format"),
        (("--curriculum", "passrate"), "curriculum='?passrate'? must be one of none, pass_rate"),
        (("--router_replay", "true", "--use_vllm", "true"), "router_replay=true with use_vllm=true"),
        (("--reward_weights", "0"), "reward_weights=.0.0. must be other than 0, one at least"),
        (("--temperature", "0"), "temperature=0.0 must be positive"),
        (("--reward_from_step", "{vowels: 3}"), "reward_from_step='{vowels: 3}' is not JSON"),
        (("--reward_from_step", '{"vowels": -3}'), "reward_from_step.vowels=-3 must be a step"),
        (("--max_prompt_length", "3"), "are longer than max_prompt_length=3 tokens"),
        (("--max_completion_length", "300"), "exceed the model's context of 256 tokens"),
        (("--per_device_train_batch_size", "128"), "prompts are fewer than the 64 of one rollout"),
        (("--use_liger_kernel", "true"), "use_liger_kernel=True has no effect here"),
        (("--rewardz", "a"), "did you mean rewards"),
    ],
)
def test_bad_input_is_named(base, tmp_path, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        grpo.main(arguments(base, tmp_path, *more))


def test_no_prompts(base, tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises((ValueError, OSError), match="rows|empty|train.jsonl"):
        grpo.main(arguments(base, tmp_path / "run", "--dataset_name", str(tmp_path)))


REWARDS = """
def constant(completions, **columns):
    return [0.0] * len(completions)

def broken(completions, **columns):
    raise KeyError("score")

def no_number(completions, **columns):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "theirs.py"
    path.write_text(REWARDS)
    return path


def test_a_policy_that_can_learn_nothing_is_refused(base, rewards, tmp_path):
    """Before the first step, with what was seen in the folder and with advice; not with the pre-flight off."""
    more = ("--rewards", f"{rewards}:constant", "--preflight_prompts", "16", "--track_rewards", "format",
            "--curriculum", "none")  # fmt: skip
    with pytest.raises(ValueError, match="nothing can be learned: in 16 groups of 4 .*name a reward that tells them"):
        grpo.main(arguments(base, tmp_path, *more))
    looked = json.loads((tmp_path / "preflight.json").read_text())
    assert looked["verdict"] == "nothing can be learned" and looked["informative"] == 0
    assert not list(tmp_path.glob("checkpoint-*"))


FAILING = [("broken", Exception, "broken|score"), ("no_number", ValueError, "no_number.*nan|nan.*no_number")]


@pytest.mark.parametrize("name, error, message", FAILING)
def test_rewards_that_fail(base, rewards, tmp_path, name, error, message):
    args = parse_config(GRPORecipeConfig, arguments(base, tmp_path, "--rewards", f"{rewards}:{name}"))
    set_seed(args.seed)
    trainer = grpo.build_trainer(args, AutoTokenizer.from_pretrained(base / "model"))
    with pytest.raises(error, match=message):
        trainer.train()
