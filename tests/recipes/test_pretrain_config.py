"""Settings: YAML and command line, checks with a way out, defaults that are safe on a CPU."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

import recipes
from recipes.model_loading import build_config, build_model, find_tokenizer, load_tokenizer
from recipes.pretrain_config import PretrainConfig, parse_config
from tests.recipes.tiny_run import SIZES, tiny_config

CONFIGS = Path(recipes.__file__).parent / "configs"
TINY = ["--config", str(CONFIGS / "pretrain_tiny.yaml"), "--use_cpu"]


def parse(*more, base=TINY):
    return parse_config(PretrainConfig, [*base, *more])


@pytest.mark.parametrize("size", ["tiny", "nano", "small", "base", "r1"])
def test_shipped_configs_parse(size):
    args = parse(base=["--config", str(CONFIGS / f"pretrain_{size}.yaml"), "--use_cpu"])
    config = build_config(args)
    assert config.vocab_size == args.model_config["vocab_size"]
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert not args.bf16 and not args.fp16  # use_cpu


def test_command_line_wins_over_the_file():
    args = parse("--max_steps", "200", "--model_config.hidden_size", "64", "--learning_rate=1e-3", "--streaming")
    assert (args.max_steps, args.learning_rate, args.streaming) == (200, 1e-3, True)
    assert args.model_config["hidden_size"] == 64 and args.model_config["vocab_size"] == 4096


def test_numbers_that_yaml_reads_as_text(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model_config: {hidden_size: 64, seq_aux_loss_alpha: 1e-4}\nlearning_rate: 3e-4\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
    )
    args = parse(base=["--config", str(file), "--use_cpu", "--output_dir", str(tmp_path)])
    assert args.model_config["seq_aux_loss_alpha"] == 1e-4 and args.learning_rate == 3e-4
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize("more, words", [
    (["--learning_rat", "1"], "unknown key 'learning_rat' in the command line: did you mean learning_rate"),
    (["--model_config.hiden_size", "1"], "unknown key 'hiden_size' in model_config: did you mean hidden_size"),
    (["--max_train_tokens", "5000"], "max_train_tokens=5000 and max_steps=400 exclude each other"),
    (["--lr_scheduler_kwargs", "{}"], "needs lr_scheduler_kwargs.num_decay_steps"),
    (["--warmup_steps", "1000"], "more than max_steps=400"),
    (["--model_config.num_nextn_predict_layers", "0"], "model_config.mtp_loss_coef=0.3 needs multi-token-prediction"),
    (["--lr_scheduler_type", "reduce_lr_on_plateau"], "warmup_steps=0.05 has no effect"),
    (["--streaming", "--max_steps", "-1"], "streaming=true has no end"),
    (["--validation_fraction", "1.5"], "validation_fraction=1.5 must be in"),
    (["--ema_decay", "1"], "ema_decay=1.0 must be in"),
    (["--sequence_length", "4"], "sequence_length=4 must be at least 8"),
    (["--model_config.label_smoothing", "0.1"], "set by label_smoothing_factor"),
    (["--config", "missing.yaml"], "missing.yaml: no such file"),
])  # fmt: skip
def test_bad_input_names_the_field_and_the_way_out(more, words):
    with pytest.raises(ValueError) as error:
        parse(*more)
    assert words in str(error.value)


def test_unknown_key_in_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model_config: {hidden_size: 64}\nsequence_lenght: 5\n")
    with pytest.raises(ValueError, match="unknown key 'sequence_lenght' in .*c.yaml: did you mean sequence_length"):
        parse(base=["--config", str(file)])
    file.write_text("- a\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        parse(base=["--config", str(file)])
    file.write_text("a: [\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(base=["--config", str(file)])


def test_neither_sizes_nor_weights(tmp_path):
    with pytest.raises(ValueError, match="model_config and model_name_or_path are both unset"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True)


def test_every_field_of_ours_is_explained():
    for field in dataclasses.fields(PretrainConfig):
        if field.name in PretrainConfig.__annotations__:
            assert len(field.metadata.get("help", "")) > 10, field.name


def test_tokens_decide_the_steps():
    args = parse("--max_steps", "-1", "--max_train_tokens", "500000")
    assert args.tokens_per_step == 8 * 256 and args.max_steps == 245


SCHEDULES = {
    "warmup_stable_decay": ({"num_decay_steps": 5, "min_lr_ratio": 0.1}, [0.55, 1, 1, 0.1]),  # warms up from the lowest
    "cosine": ({}, [0.5, 1, 0.5, 0.0]),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, [0.5, 1, 0.55, 0.1]),
    "cosine_with_restarts": ({"num_cycles": 2}, [0.5, 1, 1, 0.0]),
    "constant_with_warmup": ({}, [0.5, 1, 1, 1]),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules(kind, tmp_path):
    options, expected = SCHEDULES[kind]
    args = tiny_config(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=options, max_steps=22, warmup_steps=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(22),
        22,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(23):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [rates[1], rates[2], rates[12], rates[22]] == pytest.approx(expected, abs=1e-6)


def test_tokenizer_is_found_beside_packed_data(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    args = tiny_config(tmp_path / "out", dataset_name=str(tmp_path))
    assert find_tokenizer(args) == str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer_name_or_path is unset"):
        find_tokenizer(tiny_config(tmp_path / "out", dataset_name="some/hub-name"))
    with pytest.raises(ValueError, match="--output_dir data/absent --size nano"):
        load_tokenizer(tiny_config(tmp_path / "out", dataset_name="data/absent"))


def test_sequence_longer_than_the_positions(tmp_path):
    args = tiny_config(tmp_path, sequence_length=128)
    with pytest.raises(ValueError, match="sequence_length=128 exceeds model_config.max_position_embeddings=64"):
        build_config(args)


def test_label_smoothing_goes_to_the_model(tmp_path):
    args = tiny_config(tmp_path, label_smoothing_factor=0.1, model_config=dict(SIZES))
    assert build_config(args).label_smoothing == 0.1


@pytest.mark.parametrize("given, built", [([], "sdpa"), (["--attn_implementation", "eager"], "eager")])
def test_attention_is_chosen_by_name(given, built):
    assert build_model(parse(*given), None).config._attn_implementation == built


def test_a_group_and_its_single_values_come_together():
    """`--model_config '{}'` clears the file's mapping; the dotted values are laid over it, in any order."""
    for order in (1, -1):
        parts = [["--model_config", "{}"], ["--model_config.mtp_loss_coef", "0.1"]][::order]
        config = parse_config(PretrainConfig, [*TINY, *sum(parts, []), "--model_name_or_path", "somewhere"])
        assert config.model_config == {"mtp_loss_coef": 0.1}


def test_shares_of_max_steps():
    config = parse_config(PretrainConfig, [*TINY, "--max_steps", "100"])
    assert config.lr_scheduler_kwargs["num_decay_steps"] == 35 and config.get_warmup_steps(100) == 5


def test_rows_are_equal_unless_a_last_batch_may_be_short():
    """Else processes that share experts would exchange rows without asking how many come."""
    uneven, kept = ["--accelerator_config", '{"even_batches": false}'], ["--dataloader_drop_last", "false"]
    assert all(parse(*more).equal_rows for more in ([], uneven, kept))
    assert not parse(*uneven, *kept).equal_rows
