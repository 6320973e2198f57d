"""recipes/distill.py from end to end: the methods, students, resuming, intermediate students, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import EOS, train_tokenizer
from recipes import distill
from recipes.checkpoint_files import find_problem, list_checkpoints
from recipes.distill_config import DistillRecipeConfig
from recipes.distill_results import read_teacher_eval
from recipes.distill_students import student_of_layers
from recipes.logging_callbacks import read_metrics
from recipes.pretrain_config import parse_config
from tests.recipes.test_resume_stages import stopped_after
from tests.recipes.tiny_ppo import one_thread  # noqa: F401  (a fixture)
from tests.recipes.tiny_stages import differences, make_base, tokenizer_without_marks, without_clocks

CONFIGS = Path(distill.__file__).parent / "configs"
DENSE = ("--student_config", json.dumps({
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}))  # fmt: skip
TASKS = ("--eval_tasks", "chain_sum:1", "--eval_problems", "4", "--eval_max_new_tokens", "5")
LOGITS = ("--method", "logits", "--max_length", "96")
ON_POLICY = ("--method", "on_policy", "--max_completion_length", "8")
CASES = {  # options, after which steps the run stops; checkpoints every third step
    "traces": (("--max_length", "96", *DENSE), (4,)),
    # maps between two widths; two micro-batches a step; the second epoch
    "logits": ((*LOGITS, *DENSE, "--feature_coef", "0.5", "--gradient_accumulation_steps", "2", "--packing", "false",
                "--per_device_train_batch_size", "8"), (7,)),
    # a smaller MoE: its experts are balanced; the second epoch
    "on_policy": ((*ON_POLICY, "--student_layers", "1", "--gradient_accumulation_steps", "2", "--validation_fraction",
                   "0.3", "--max_eval_prompts", "4"), (7,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("distill"))


def arguments(base, data, output_dir, *more):
    return [
        "--teacher_model_name_or_path", str(base / "model"), "--dataset_name", str(base / data), "--output_dir",
        str(output_dir), "--max_steps", "8", "--per_device_train_batch_size", "4", "--logging_steps", "1",
        "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3", "--learning_rate", "1e-2", "--use_cpu",
        "--disable_tqdm", "true", "--validation_fraction", "0.25", "--report_to", "none", "--seed", "1",
        "--speed_tokens", "4", "--speed_prompts", "2", "--device_peak_tflops", "0.1", *more,
    ]  # fmt: skip


def launch(base, case, folder, *more):
    set_seed(random.randrange(2**31))  # whatever was drawn before must not matter
    data = "ppo" if case == "on_policy" else "sft"
    return distill.main(arguments(base, data, folder, *CASES[case][0], *more))


@pytest.fixture(scope="module")
def no_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.run_results.write_report", lambda folder: folder / "report.html")
        yield


# ---------------------------------------------------------------- what a run leaves


def _same_apart_from_speed(one, two):
    for results in (one, two):
        for part in ("teacher", "student"):
            results["distillation"].get(part, {}).pop("tokens/s, greedy", None)
    return without_clocks(one) == without_clocks(two)


def test_a_run_leaves_what_it_promises(base, tmp_path):
    results = distill.main(arguments(base, "sft", tmp_path / "run", *LOGITS, *DENSE, *TASKS, "--max_steps", "3"))
    folder, found = tmp_path / "run", results["distillation"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "eval.json", "report.html", "model.safetensors", "eval_teacher"} <= names
    assert json.loads((folder / "eval.json").read_text()) == results and results["stage"] == "distill"
    student, teacher = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, base / "model"))
    assert student.config.model_type == "llama" and student.config.vocab_size == teacher.config.vocab_size
    assert student.config.eos_token_id == AutoTokenizer.from_pretrained(folder).eos_token_id
    for model, facts in ((student, found["student"]), (teacher, found["teacher"])):
        assert facts["parameters"] == sum(each.numel() for each in model.parameters())
        assert facts["bytes of weights"] == 4 * facts["parameters"] and facts["tokens/s, greedy"] > 0
    assert found["teacher"]["active parameters a token"] < found["teacher"]["parameters"]
    assert results["tasks"].keys() == {"before", "after"} and found["kept"].keys() == {"chain_sum", "mean"}
    records = read_metrics(folder / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert all({"kl", "next-token loss", "token accuracy"} <= record.keys() for record in train)
    page = (folder / "report.html").read_text()
    assert "Student and teacher" in page and "Distillation run" in page and "tokens/s, greedy" in page

    again = ("--teacher_eval", str(tmp_path / "teacher.json"))
    (tmp_path / "teacher.json").write_text(json.dumps(found["teacher"]["tasks"]))
    twin = distill.main(arguments(base, "sft", tmp_path / "two", *LOGITS, *DENSE, *TASKS, "--max_steps", "3", *again))
    assert not (tmp_path / "two" / "eval_teacher").exists() and _same_apart_from_speed(twin, results)
    args = parse_config(DistillRecipeConfig, arguments(base, "sft", folder, *LOGITS, *DENSE, *TASKS, "--teacher_eval",
                                                       str(folder)))  # fmt: skip
    assert read_teacher_eval(args) == found["teacher"]["tasks"]  # and not the student's of that run
    args.teacher_model_name_or_path = str(folder)
    assert read_teacher_eval(args) == results["tasks"]["after"]
    with pytest.raises(ValueError, match="teacher.json was made with other settings: problems .there 4, here 5"):
        distill.main(arguments(base, "sft", tmp_path / "3", *LOGITS, *DENSE, *TASKS, *again, "--eval_problems", "5"))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case, base, tmp_path, no_report):
    results = launch(base, case, tmp_path / "whole")
    for step in CASES[case][1]:
        with stopped_after(step):
            launch(base, case, tmp_path / "run", "--resume_from_checkpoint", "auto")
    for _ in range(2 if case == "on_policy" else 1):  # once more, as after a kill in the last evaluation, which samples
        again = launch(base, case, tmp_path / "run", "--resume_from_checkpoint", "true")
        assert differences(tmp_path / "run", tmp_path / "whole") == []
        assert _same_apart_from_speed(again, results)
    maps = [path.name for path in (tmp_path / "run" / "checkpoint-6").glob("feature*")]
    assert bool(maps) == (case == "logits") and not list((tmp_path / "run").glob("feature*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["logits", "on_policy"])
def test_kill_9_while_a_checkpoint_is_written(case, base, tmp_path, no_report):
    run, data = tmp_path / "run", "ppo" if case == "on_policy" else "sft"
    command = [sys.executable, distill.__file__, *arguments(base, data, run, *CASES[case][0])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process, deadline = subprocess.Popen(command, env=environment), time.monotonic() + 120
    while not (run / "checkpoint-6").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    complete = [path.name for _, path in list_checkpoints(run) if find_problem(path) is None]
    assert complete in (["checkpoint-3"], ["checkpoint-3", "checkpoint-6"])
    subprocess.run([*command, "--resume_from_checkpoint", "true"], env=environment, check=True)
    launch(base, case, tmp_path / "whole")
    assert differences(run, tmp_path / "whole") == []


# ---------------------------------------------------------------- students


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_students_of_layers(base):
    """All layers: the teacher. Some: those layers' outputs in turn, for dense and MoE models, MTP layers too."""
    teacher = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    ids = torch.arange(5, 17).unsqueeze(0)
    assert logits_of(student_of_layers(teacher, [0, 1]), ids).equal(logits_of(teacher, ids))
    one = student_of_layers(teacher, [1])  # one layer: the first, which is dense
    assert one.config.first_k_dense_replace == 1 and one.config.num_hidden_layers == 1
    mtp = [model.model.mtp_layers.state_dict() for model in (one, teacher)]
    assert mtp[0] and all(each.equal(mtp[1][name]) for name, each in mtp[0].items())
    set_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
                                         num_attention_heads=2, num_key_value_heads=2)).eval()  # fmt: skip
    found = logits_of(student_of_layers(dense, [0, 2, 3]), ids)
    del dense.model.layers[1]
    for place, layer in enumerate(dense.model.layers):
        layer.self_attn.layer_idx = place
    dense.config.num_hidden_layers = 3
    torch.testing.assert_close(found, logits_of(dense, ids))


def test_intermediate_students_teach_and_are_not_made_twice(base, tmp_path, no_report):
    steps = ("--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no")
    chain = ("--progressive", json.dumps([{"student_layers": [1], "max_steps": 3}]))
    start = arguments(base, "sft", tmp_path, *LOGITS, *DENSE, *TASKS, *steps)
    with stopped_after(1):
        distill.main([*start, *chain])
    assert not (tmp_path / "stage_1" / "eval.json").exists()
    results = distill.main([*start, *chain])
    stage = json.loads((tmp_path / "stage_1" / "eval.json").read_text())
    assert stage["step"] == 3 and results["step"] == 2 and results["stages"] == [str(tmp_path / "stage_1")]
    assert results["distillation"]["teacher"]["name"] == str(tmp_path / "stage_1")
    assert results["distillation"]["teacher"]["tasks"] == stage["tasks"]["after"]  # not evaluated again
    assert not (tmp_path / "eval_teacher").exists() and (tmp_path / "stage_1" / "eval_teacher").exists()
    before = (tmp_path / "stage_1" / "eval.json").stat().st_mtime_ns
    distill.main([*start, *chain, "--overwrite_output_dir", "--resume_from_checkpoint", "auto"])
    assert (tmp_path / "stage_1" / "eval.json").stat().st_mtime_ns == before
    other = ("--progressive", json.dumps([{"student_layers": [1], "max_steps": 4}]))
    with pytest.raises(ValueError, match="stage_1 was begun with other settings .max_steps: 3 -> 4"):
        distill.main([*start, *other])
    with pytest.raises(ValueError, match="progressive, stage 1: .* must be settings with one of model_name_or_path"):
        distill.main([*start, "--progressive", '[{"max_steps": 3}]'])


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def stranger(base, tmp_path_factory):
    """A dense model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    tokenizer = train_tokenizer(["quite other words, and some more of them"] * 3, 320)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def test_another_vocabulary_is_explained_and_traces_still_work(base, stranger, tmp_path, no_report):
    given = ("--model_name_or_path", str(stranger), "--max_steps", "1", "--eval_strategy", "no")
    for method, data in ((LOGITS, "sft"), (ON_POLICY, "ppo")):
        with pytest.raises(ValueError, match=r"vocabularies differ \(320 tokens .* 400 of .*Only the teacher has: "
                                             r".*method=traces works with any"):  # fmt: skip
            distill.main(arguments(base, data, tmp_path / "no", *method, *given))
    results = distill.main(arguments(base, "sft", tmp_path / "yes", "--max_length", "200", *given, *TASKS))
    assert results["distillation"]["kept"].keys() == {"chain_sum", "mean"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "yes").config.vocab_size == 320


def test_a_student_without_the_template_s_tokens_gets_them(base, tmp_path, no_report):
    folder = tokenizer_without_marks(tmp_path / "student", bos_token=EOS, pad_token=EOS)  # one token ends and pads
    size = len(AutoTokenizer.from_pretrained(folder))
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
    ))  # fmt: skip
    model.save_pretrained(folder)
    old = model.get_input_embeddings().weight.detach().clone()
    start = arguments(base, "sft", tmp_path / "run", "--model_name_or_path", str(folder), "--chat_template",
                      "deepseek_r1", "--max_length", "200", "--max_steps", "1", "--eval_strategy", "no")
    with pytest.raises(ValueError, match="no tokens <think>.* set add_template_tokens=true"):
        distill.main(start)
    with pytest.raises(ValueError, match="lora_rank=2 leaves untrained"):
        distill.main([*start, "--add_template_tokens", "true", "--lora_rank", "2"])
    # Adam's first step moves a weight by the learning rate at most
    distill.main([*start, "--add_template_tokens", "true", "--learning_rate", "1e-6"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    rows = student.get_input_embeddings().weight
    assert len(tokenizer) == size + 4 and student.config.vocab_size == len(rows) == -(-len(tokenizer) // 64) * 64
    assert student.lm_head.weight is rows
    torch.testing.assert_close(rows[:size], old, rtol=0, atol=2e-6)
    new = rows[size : len(tokenizer)]
    assert 0.2 < (new.std() / old.std()).item() < 5  # drawn as the old ones, and neither zero nor wild
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {tokenizer.convert_tokens_to_ids(EOS)}


def test_an_embedding_that_is_too_small(base, stranger, tmp_path):
    shutil.copytree(stranger, tmp_path / "small")
    AutoTokenizer.from_pretrained(base / "model").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="token ids up to 399 .* vocab_size=320; set vocab_size to at least 400"):
        distill.main(arguments(base, "sft", tmp_path / "run", "--model_name_or_path", str(tmp_path / "small"), *LOGITS))


@pytest.mark.parametrize("more, reason", [
    ((), "the student is one of .* given: none of them"),
    ((*DENSE, "--student_layers", "1"), "given: student_config, student_layers"),
    ((*DENSE, "--method", "logit"), "method='logit' must be one of traces, logits, on_policy"),
    ((*DENSE, "--alpha", "0.5"), "alpha=0.5 has no effect with method=traces, only with logits"),
    ((*DENSE, *LOGITS, "--beta", "0.5"), "beta=0.5 has no effect with method=logits, only with on_policy"),
    ((*DENSE, *LOGITS, "--alpha", "1.5"), r"alpha=1.5 must be in \[0, 1\]"),
    ((*DENSE, *LOGITS, "--temperature", "0"), "temperature=0.0 must be positive"),
    ((*DENSE, *LOGITS, "--feature_layers", "1"), "feature_layers=.* has no effect with feature_coef=0"),
    ((*DENSE, *LOGITS, "--feature_coef", "1", "--feature_layers", "0:7"), "the teacher 0 to 1"),
    ((*DENSE, "--student_config.hiden_size", "8"), "unknown key 'hiden_size' in student_config: did you mean hidden"),
    (("--student_config", "{hidden_size: 8}"), "student_config has no model_type"),
    (("--student_layers", "3", "--max_length", "96"), r"student_layers=3 must lie in \[1, 2\]"),
    (("--student_layers", "1", "--max_length", "400"), "max_length=400 exceeds the context"),
    ((*DENSE, *ON_POLICY), "has no column prompt, only"),
    ((*DENSE, *LOGITS, "--teacher_model_name_or_path", "runs/none"), "runs/none"),
    ((*DENSE, "--add_template_tokens", "true", "--chat_template", "deepseek_r1"), "student_config uses the teacher's"),
    (("--model_name_or_path", "x", "--add_template_tokens", "true"), "has no effect without chat_template"),
    ((*DENSE, "--progressive", "[{student_layers: 1}]"), "progressive=.* has no effect with method=traces"),
    ((*DENSE, "--max_length", "96", *TASKS, "--teacher_eval", "none.json"), "teacher_eval=none.json does not exist"),
])  # fmt: skip
def test_bad_input_is_named(base, tmp_path, more, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        distill.main(arguments(base, "sft", tmp_path, *more))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["tiny", "nano", "small", "r1"])
def test_shipped_configs_are_read(size, tmp_path):
    args = parse_config(DistillRecipeConfig, ["--config", str(CONFIGS / f"distill_{size}.yaml"), "--output_dir",
                                              str(tmp_path), "--use_cpu", "true", "--bf16", "false"])  # fmt: skip
    assert args.method in ("traces", "logits", "on_policy") and args.teacher_model_name_or_path


@pytest.mark.parametrize("method, temperature", [("traces", None), ("logits", 2.0), ("on_policy", 1.0)])
def test_the_tiny_config_serves_every_method(method, temperature, tmp_path):
    """Its head says how to run on_policy: another method is one option, not a setting to be found and unset."""
    args = parse_config(DistillRecipeConfig, ["--config", str(CONFIGS / "distill_tiny.yaml"), "--method", method,
                                              "--output_dir", str(tmp_path), "--use_cpu", "true"])  # fmt: skip
    assert args.temperature == temperature
