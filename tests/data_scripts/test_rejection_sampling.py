"""Rejection sampling: the rules one by one, what is taken, provenance, resuming, and that test problems are refused.

The model speaks given texts: its `generate` feeds them, token by token, through the processors that
`recipes.sampling` passes, so that everything but the forward pass is the real code.
"""

import json
import random
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from data_scripts import rejection_sampling
from data_scripts.finetuning.rejection_rules import REASONS, Rules, foreign_share, normalised, refusal, repetition, take
from data_scripts.prepare_sft import prepare
from data_scripts.reasoning.traces import content, make
from data_scripts.rejection_sampling import main, run, source_problems, task_problems
from data_scripts.train_tokenizer import train_tokenizer
from recipes.conversations import check_conversation
from recipes.sampling import Completion, SamplingSettings
from recipes.task_base import split_of
from recipes.tasks import get_task

SETTINGS = SamplingSettings(max_new_tokens=160, temperature=1.0, samples=4, batch_size=8)
RULES = Rules(keep_per_problem=2)
CHAIN = get_task("chain_sum")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["<think>\n1 2 3 4 5 6 7 8 9 + - = 10\n</think>\n\nThe answer is 7. 中"] * 20, 400)


@pytest.fixture(scope="module")
def problems():
    return task_problems(["chain_sum:1"], 6, 0)


class Speaker(GPT2LMHeadModel):
    """Says `script(prompt text, sample)`; samples of a prompt are counted in the order in which they are asked for."""

    def set_script(self, tokenizer, script):
        self.tokenizer, self.script, self.asked, self.calls = tokenizer, script, {}, 0
        return self

    def generate(self, input_ids, attention_mask, logits_processor, generation_config, **kwargs):
        if generation_config.output_logits:  # a look at the model itself, not a completion
            return super().generate(input_ids, attention_mask=attention_mask, logits_processor=logits_processor,
                                    generation_config=generation_config, **kwargs)
        self.calls += 1
        replies = []
        for row, mask in zip(input_ids, attention_mask):
            prompt = self.tokenizer.decode(row[mask.bool()])
            sample = self.asked[prompt] = self.asked.get(prompt, -1) + 1
            text = self.script(prompt, sample)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [] if text.endswith("...") else [self.tokenizer.eos_token_id]
            replies.append(ids)
        for step in range(min(max(map(len, replies)), generation_config.max_new_tokens)):
            wanted = torch.tensor([(*reply, *[self.tokenizer.pad_token_id] * 99)[step] for reply in replies])
            scores = torch.zeros(len(wanted), 400).scatter(1, wanted[:, None], 1e4)
            input_ids = torch.cat([input_ids, logits_processor(input_ids, scores).argmax(-1, keepdim=True)], dim=1)
        return input_ids


def speaker(tokenizer, script):
    torch.manual_seed(0)
    model = Speaker(GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, n_positions=512))
    return model.set_script(tokenizer, script)


def answer_of(prompt):
    left, sign, right = re.search(r"(\d+) ([+-]) (\d+)", prompt).groups()
    return int(left) + int(right) if sign == "+" else int(left) - int(right)


def script(prompt, sample):
    """Right, right in other spaces, wrong, cut off: the prompt ends inside <think>."""
    right = answer_of(prompt)
    return [f"so {right}\n</think>\n\n{right}", f"so  {right}\n</think>\n\n{right}", f"so\n</think>\n\n{right + 1}",
            "1 2 3 ..."][sample]  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(text, problem, rules=RULES, finished=True):
    completion = Completion(text, [1], finished, -0.5)
    return refusal(completion, True, CHAIN, problem, rules)[0]


def test_each_rule_refuses_what_it_names(problems):
    problem = problems[0]
    good = f"count\n</think>\n\n{problem.reference}"
    assert judge(good, problem) is None
    loop = "one two three four five six seven " * 9
    cases = {
        "unfinished": judge(good, problem, finished=False),
        "format": judge(good + "\n</think>\n3", problem),
        "wrong": judge("count\n</think>\n\n-99", problem),
        "too long": judge("c" * 5_000 + good, problem),
        "repetition": judge(loop + good, problem),
        "languages": judge("先数一数看看" + good, problem),
    }
    assert cases == {reason: reason for reason in REASONS}
    assert judge(good, problem, Rules(max_characters=10)) == "too long"
    assert judge(loop + good, problem, Rules(max_repetition=1)) is None
    assert judge("先数一数看看" + good, problem, Rules(max_foreign=1)) is None
    assert judge(problem.reference, problem) == "format"  # no closing tag
    assert judge("</think>\n\n", problem) == "format"     # no answer


def test_our_own_traces_pass_the_rules():
    """The rule against repetition must not refuse honest working."""
    for name in ("gcd", "products", "count_bits", "letter_counting", "spell_backward"):
        task = get_task(name)
        for problem in task.problems("train", 0, 3, 5):
            found = make(problem, random.Random(0), "terse")
            text = content(found.reasoning, found.answer)
            assert refusal(Completion(text, [1], True, 0.0), False, task, problem, RULES)[0] is None


def test_measures():
    assert repetition("a b c") == 0 and repetition(" ".join(map(str, range(200)))) == 0
    assert repetition("x " * 100) > 0.9
    assert foreign_share("你好 abc", "abc?") == pytest.approx(2 / 5) and foreign_share("你好 abc", "你?") == 0
    assert normalised("A  b\nＣ") == normalised("a b C")


def test_take_removes_duplicates_and_caps():
    rows = [{"text": text, "log_prob": value, "sample": i} for i, (text, value) in enumerate(
        [("long text", -3.0), ("Long  Text", -1.0), ("b", -2.0), ("cc", -0.5)])]
    def taken(choose, salt="s"):
        return [row["sample"] for row in take(rows, Rules(keep_per_problem=2, choose=choose), salt)[0]]
    assert taken("shortest") == [2, 3] and taken("likeliest") == [3, 2]
    assert take(rows, RULES, "s")[1] == 1
    assert taken("random") == taken("random") and len({tuple(taken("random", salt)) for salt in range(20)}) > 2


def test_kept_rows_and_manifest(tokenizer, problems, tmp_path, capsys):
    manifest = run(speaker(tokenizer, script), tokenizer, problems, SETTINGS, RULES, tmp_path, "some/model",
                   progress=False)
    rows = rows_of(tmp_path / "train.jsonl")
    assert len(rows) == manifest["rows"] == len(problems)  # two right ones each, the same but for a space
    for row, problem in zip(rows, problems):
        check_conversation(row["messages"])
        assert row["messages"][0]["content"] == problem.prompt and row["key"] == problem.metadata["key"]
        assert split_of(row["key"]) == "train"
        assert CHAIN.score(row["messages"][1]["content"], problem, untagged="unparsable").correct
        assert row["model"] == "some/model" and json.loads(row["checkpoint"])["weights"] and row["verdict"] == "correct"
        assert json.loads(row["sampling"])["temperature"] == 1.0 and row["seed"] == 0 and row["sample"] in (0, 1)
    tally = manifest["tasks"]["chain_sum:1"]
    assert (tally["samples"], tally["accepted"], tally["duplicates"], tally["taken"]) == (24, 12, 6, 6)
    assert (tally["wrong"], tally["unfinished"], tally["solved"]) == (6, 6, 6) and manifest["acceptance"] == 0.5
    assert "unfinished" in capsys.readouterr().out
    own = prepare(tmp_path / "sft", sources={"own": str(tmp_path / "train.jsonl")}, progress=False)
    assert own["splits"]["train"]["rows"] == 6 and own["splits"]["test"]["rows"] == 0


def test_an_interrupted_run_goes_on(tokenizer, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection_sampling, "CHUNK", 2)
    whole = run(speaker(tokenizer, script), tokenizer, problems, SETTINGS, RULES, tmp_path / "whole", progress=False)

    def stops(prompt, sample):
        if answer_of(prompt) == int(problems[3].reference) and problems[3].prompt in prompt:
            raise KeyboardInterrupt
        return script(prompt, sample)

    with pytest.raises(KeyboardInterrupt):
        run(speaker(tokenizer, stops), tokenizer, problems, SETTINGS, RULES, tmp_path / "cut", progress=False)
    partial = tmp_path / "cut" / "samples.jsonl"
    assert 0 < len(rows_of(partial)) < 24 and not (tmp_path / "cut" / "train.jsonl").exists()
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"task": "chain')  # what a kill leaves of a line
    model = speaker(tokenizer, script)
    resumed = run(model, tokenizer, problems, SETTINGS, RULES, tmp_path / "cut", progress=False)
    assert model.calls == 2 and resumed["sha256"] == whole["sha256"] and resumed["tasks"] == whole["tasks"]
    with pytest.raises(ValueError, match="holds samples of another run; different: sampling"):
        run(model, tokenizer, problems, SamplingSettings(160, 0.7, samples=4), RULES, tmp_path / "cut", progress=False)


def test_nothing_accepted_is_an_error_with_reasons(tokenizer, problems, tmp_path):
    with pytest.raises(ValueError, match=r"none of 24 samples was accepted \(24 format\).*easier tasks"):
        run(speaker(tokenizer, lambda prompt, sample: "no idea"), tokenizer, problems, SETTINGS, RULES, tmp_path,
            progress=False)
    assert len(rows_of(tmp_path / "samples.jsonl")) == 24


def test_problems_of_a_source(tmp_path):
    train, test = CHAIN.problems("train", 0, 1, 1)[0], CHAIN.problems("test", 0, 1, 1)[0]
    def source(*rows):
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)
    found, = source_problems(source(train.to_row()))
    assert (found.prompt, found.reference) == (train.prompt, train.reference)
    assert found.metadata["key"] == train.metadata["key"]
    asked = {"messages": [{"role": "user", "content": train.prompt}], "reference": train.reference, "task": "chain_sum",
             "key": train.metadata["key"]}
    assert source_problems(source(asked))[0].prompt == train.prompt
    for row, message in (
            (test.to_row(), "is on the test side of task chain_sum"),
            ({**test.to_row(), "metadata": json.dumps({**test.metadata, "split": "train"})}, "is on the test side"),
            ({**asked, "key": None}, "give the column key"),
            ({"prompt": "q"}, "reference and task are needed"),
            ({**asked, "task": "human_eval"}, "is on the test side of task human_eval"),
            ({**asked, "task": "chain"}, "unknown task 'chain'")):
        with pytest.raises(ValueError, match=message):
            source_problems(source(row))


def test_command_line_on_a_saved_model(tokenizer, tmp_path, capsys):
    """A random model solves nothing: the samples are drawn and judged, and the error says so."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "rs"), "--use_cpu"]
    with pytest.raises(SystemExit):
        main([*command, "--tasks", "chain_sum:1", "--problems", "2", "--samples", "2", "--max_new_tokens", "8"])
    assert "none of 4 samples was accepted" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "rs" / "samples.jsonl")) == 4
    for extra, message in ((["--choose", "shortest"], "either --tasks or --source"),
                           (["--tasks", "gcd", "--keep_per_problem", "0"], "keep_per_problem=0 must be at least 1")):
        with pytest.raises(SystemExit):
            main([*command, *extra])
        assert message in capsys.readouterr().err
