"""The commands on checkpoint folders: FP8 and back, adapters, resuming, atomicity, reports."""

import errno
import json
import math
import os
import shutil
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM, checkpoint_cast, checkpoint_files, checkpoint_writer
from modeling_deepseek_r1.checkpoint import cast, export, main, merge_adapter
from modeling_deepseek_r1.checkpoint_cast import quantise
from modeling_deepseek_r1.checkpoint_reader import dequantise
from modeling_deepseek_r1.checkpoint_report import compare, describe
from modeling_deepseek_r1.checkpoint_writer import parse_size

from .helpers import tiny_model

FP8 = torch.float8_e4m3fn
# Matrices larger than a block and no multiple of one: kv_a_proj_with_mqa is (132, 160).
SIZES = dict(
    hidden_size=160, intermediate_size=136, moe_intermediate_size=20, num_hidden_layers=2, kv_lora_rank=128,
    q_lora_rank=12, num_nextn_predict_layers=1, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 checkpoint in several shards, and its FP8 cast in several shards."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    tiny_model(**SIZES).bfloat16().save_pretrained(root / "bf16", max_shard_size="200KB")
    (root / "bf16" / "tokenizer.json").write_text("{}")
    cast(root / "bf16", root / "fp8", "fp8", max_shard_size="60KB")
    return root


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def change(folder, edit):
    """Applies `edit(tensors)` to a folder's weights, which end up in one file."""
    values = tensors(folder)
    edit(values)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json", folder / "checksums.json"]:
        path.unlink(missing_ok=True)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- FP8


def released_as_fp8(name):
    """Written out from the released index: which tensors have a `weight_scale_inv`."""
    kinds = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return any(name.endswith(f".{kind}.weight") for kind in kinds)


def e4m3(value):
    """The nearest float8_e4m3fn to a float, ties to even: 4 exponent bits of bias 7, 3 mantissa bits, no infinity."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)


def test_fp8_cast_equals_plain_loops(folders):
    """An independent implementation of DeepSeek-V3, Sec. 3.3.2: one scale for a block of 128 x 128."""
    source, cast_to = tensors(folders / "bf16"), tensors(folders / "fp8")
    wanted = {name for name in source if released_as_fp8(name)}
    assert {name for name, value in cast_to.items() if value.dtype == FP8} == wanted
    assert cast_to.keys() == source.keys() | {name + "_scale_inv" for name in wanted}
    for name in source.keys() - wanted:
        assert torch.equal(cast_to[name], source[name]) and cast_to[name].dtype == source[name].dtype, name
    names = [f"model.layers.2.{part}.weight" for part in ("self_attn.kv_a_proj_with_mqa", "mlp.experts.3.down_proj")]
    for name in names:
        matrix, weight, scales = source[name].float(), cast_to[name].float(), cast_to[name + "_scale_inv"]
        rows, columns = matrix.shape
        assert scales.shape == (math.ceil(rows / 128), math.ceil(columns / 128)) and scales.dtype == torch.float32
        for top in range(0, rows, 128):
            for left in range(0, columns, 128):
                block = matrix[top : top + 128, left : left + 128].tolist()
                scale = torch.tensor(max(abs(x) for row in block for x in row)) / 448
                assert scales[top // 128, left // 128] == scale
                scaled = [[float(torch.tensor(x) / scale) for x in row[:16]] for row in block[:16]]
                expected = torch.tensor([[e4m3(x) for x in row] for row in scaled])
                assert torch.equal(weight[top : top + 128, left : left + 128][:16, :16], expected)


def test_round_trip_stays_within_the_formats_bound(folders, tmp_path):
    cast(folders / "fp8", tmp_path / "back", "bf16")
    source, back, scales = tensors(folders / "bf16"), tensors(tmp_path / "back"), tensors(folders / "fp8")
    assert back.keys() == source.keys()
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    worst = 0.0
    for name, value in source.items():
        assert back[name].dtype == value.dtype
        if not released_as_fp8(name):
            assert torch.equal(back[name], value)
            continue
        x, gap = value.double(), (back[name].double() - value.double()).abs()
        step = scales[name + "_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        # 1/17 from e4m3 and 2^-9 from bf16 make less than 1/16; subnormals are half of 2^-9 off at most
        assert (gap <= x.abs() * 2**-4 + step[: x.shape[0], : x.shape[1]] * 2**-10).all(), name
        normal = x.abs() > step[: x.shape[0], : x.shape[1]] * 2**-6
        worst = max(worst, float((gap / x.abs())[normal].max()))
    assert 0.05 < worst <= 1 / 16  # the bound is nearly reached


def test_the_bound_holds_for_all_magnitudes():
    matrix = torch.randn(256, 384) * torch.logspace(-45, 30, 384)
    matrix[:128, :128] = 0
    weight, scale = quantise(matrix)
    assert scale.isfinite().all() and (scale > 0).all() and not weight[:128, :128].float().any()
    gap = (dequantise(weight, scale).double() - matrix.double()).abs()
    steps = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert (gap <= torch.maximum(matrix.double().abs() / 17, steps * 2**-10) * (1 + 1e-6)).all()
    assert torch.equal(weight.float().abs().unflatten(0, (2, 128)).unflatten(2, (3, 128)).amax((1, 3))[1],
                       torch.full((3,), 448.0))  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="with FP8 hardware the weights stay in FP8")
def test_dequantising_equals_the_librarys(folders, tmp_path):
    loaded, info = DeepSeekR1ForCausalLM.from_pretrained(folders / "fp8", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    cast(folders / "fp8", tmp_path / "ours", "bf16")
    ours = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    for (name, value), other in zip(loaded.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("to", ["fp16", "fp32", "bf16"])
def test_other_dtypes(folders, tmp_path, to):
    cast(folders / "bf16", tmp_path / "cast", to)
    dtype = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[to]
    for name, value in tensors(folders / "bf16").items():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        assert torch.equal(tensors(tmp_path / "cast")[name], value.to(wanted)), name
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "cast/tokenizer.json").is_file() and (tmp_path / "cast/modeling_deepseek_r1.py").is_file()


def test_pieces_of_a_large_matrix_join_up(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_r1.checkpoint_reader.PIECE_ELEMENTS", 1)
    cast(folders / "bf16", tmp_path / "fp8", "fp8", max_shard_size="60KB")
    assert describe(tmp_path / "fp8")["tensors"] == describe(folders / "fp8")["tensors"]
    assert all(torch.equal(value.view(torch.uint8), tensors(folders / "fp8")[name].view(torch.uint8))
               for name, value in tensors(tmp_path / "fp8").items())  # fmt: skip


KEY = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("base, to, edit, words", [
    ("bf16", "fp8", lambda t: t[KEY][3, 4].fill_(math.nan), r"experts\.2\.up_proj\.weight holds NaN .*\(row 3"),
    ("bf16", "fp16", lambda t: t[KEY].mul_(1e9), r"experts\.2\.up_proj\.weight reaches .* beyond torch\.float16"),
    ("fp8", "bf16", lambda t: t.pop(KEY + "_scale_inv"), r"model\.safetensors.*2\.up_proj\.weight_scale_inv is not"),
    ("fp8", "bf16", lambda t: t.update({KEY + "_scale_inv": torch.ones(2, 2)}), r"weight_scale_inv has shape \(2, 2\)"),
    ("fp8", "bf16", lambda t: t.pop(KEY), r"up_proj\.weight_scale_inv belongs to no FP8 matrix"),
    ("fp8", "fp8", lambda t: None, "cast it to bf16 first"),
])  # fmt: skip
def test_what_cannot_be_cast_is_named(folders, tmp_path, capsys, base, to, edit, words):
    shutil.copytree(folders / base, tmp_path / "source")
    change(tmp_path / "source", edit)
    assert main(["cast", str(tmp_path / "source"), str(tmp_path / "cast"), "--to", to]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and "Traceback" not in error
    with pytest.raises(ValueError, match=words):
        cast(tmp_path / "source", tmp_path / "cast", to)
    assert not (tmp_path / "cast").exists()


def test_config_without_quantisation_is_an_error(folders, tmp_path):
    shutil.copytree(folders / "fp8", tmp_path / "source")
    fields = json.loads((tmp_path / "source/config.json").read_text())
    assert fields.pop("quantization_config") == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    }  # fmt: skip
    (tmp_path / "source/config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"lacks quantization_config, but .*_proj\.weight is in FP8"):
        cast(tmp_path / "source", tmp_path / "bf16", "bf16")


# ---------------------------------------------------------------- writing


def test_index_and_manifest_are_right(folders):
    folder = folders / "fp8"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, values in files.items() for name in values}
    assert index["metadata"]["total_size"] == sum(v.nbytes for values in files.values() for v in values.values())
    assert len(files) > 5
    for values in files.values():  # eh_proj alone is larger
        assert sum(v.nbytes for v in values.values()) <= 60_000 or [name[-14:] for name in values] == ["eh_proj.weight"]
    written = json.loads((folder / "checksums.json").read_text())
    assert checkpoint_files.write_manifest(folder) == written
    assert not list(folders.glob(".fp8*"))


# `flush` and `write_atomically` end in these calls.
POINTS = [(checkpoint_writer, "write_shard"), (checkpoint_writer, "hash_file"), (checkpoint_writer, "copy_others"),
          (os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink")]  # fmt: skip


def cast_and_die(source, target, count):
    """Cast in a forked child that exits at the `count`-th call of any of `POINTS`; -> its exit code, 0: finished."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        calls = [0]

        def dying(real):
            def call(*args, **kwargs):
                calls[0] += 1
                if calls[0] == count:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for module, name in POINTS:
            setattr(module, name, dying(getattr(module, name)))
        checkpoint_cast.copy_others = checkpoint_writer.copy_others
        cast(source, target, "fp8", max_shard_size="6KB")
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_and_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and only a power cut would tell
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    matrices = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(130, 40) for i in range(3)}
    save_file(matrices, source / "model.safetensors")
    cast(source, tmp_path / "whole", "fp8", max_shard_size="6KB")
    whole = (tmp_path / "whole" / "checksums.json").read_text()
    target, partial = tmp_path / "cast", tmp_path / ".cast.partial"
    states, count = set(), 0
    while True:
        count += 1
        code = cast_and_die(source, target, count)
        if code == 0:
            break
        assert code == 9
        if target.exists():  # after the rename: complete, and said so
            assert (target / "checksums.json").read_text() == whole
            checkpoint_files.verify_folder(target)
            with pytest.raises(FileExistsError, match="remove it or name another folder"):
                cast(source, target, "fp8", max_shard_size="6KB")
            states.add("renamed")
        else:
            journal = tmp_path / ".cast.partial.json"
            good = set(json.loads(journal.read_text())["files"]) if journal.exists() else set()
            inodes = {name: ((partial / name).stat().st_ino, (partial / name).stat().st_mtime_ns) for name in good}
            states.add(len(good))
            cast(source, target, "fp8", max_shard_size="6KB")
            assert (target / "checksums.json").read_text() == whole
            kept = {name: ((target / name).stat().st_ino, (target / name).stat().st_mtime_ns) for name in good}
            assert kept == inodes  # what was on disk was not written again
        shutil.rmtree(target)
        assert [path.name for path in tmp_path.glob(".cast*")] == []
    shards = len(list((tmp_path / "whole").glob("*.safetensors")))
    assert states == {*range(shards + 1), "renamed"} and count > 4 * shards


def stopped(folders, target, monkeypatch, after=2, **options):
    """A cast that failed after some shards."""
    real, calls = checkpoint_writer.write_shard, [0]

    def fail(*args):
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            cast(folders / "bf16", target, "fp8", **{"max_shard_size": "60KB", **options})


@pytest.mark.parametrize("changed", ["settings", "damage", "nothing"])
def test_partial_work_is_reused_only_if_it_fits(folders, tmp_path, monkeypatch, changed):
    stopped(folders, tmp_path / "cast", monkeypatch)
    names = sorted(path.name for path in (tmp_path / ".cast.partial").glob("*.safetensors"))
    assert len(names) == 2
    written, real = [], checkpoint_writer.write_shard
    monkeypatch.setattr(checkpoint_writer, "write_shard", lambda *args: (written.append(args[0].name), real(*args)))
    if changed == "damage":
        path = tmp_path / ".cast.partial" / names[1]
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    cast(folders / "bf16", tmp_path / "cast", "fp8", max_shard_size="50KB" if changed == "settings" else "60KB")
    assert [name in written for name in names] == {
        "settings": [False, False], "damage": [False, True], "nothing": [False, False]
    }[changed]  # fmt: skip
    total = len(list((tmp_path / "cast").glob("*.safetensors")))
    assert len(written) == {"settings": total, "damage": total - 1, "nothing": total - 2}[changed]
    assert compare(tmp_path / "cast", folders / "fp8")["extra"] == []
    checkpoint_files.verify_folder(tmp_path / "cast")


@pytest.mark.parametrize("fault", ["not made", "half made", "lost afterwards"])
def test_a_tensor_that_was_not_written_is_an_error(folders, tmp_path, monkeypatch, capsys, fault):
    if fault == "lost afterwards":
        real = checkpoint_writer.write_shard

        def write(path, groups, bar):
            real(path, [group for group in groups if group.targets[0].name != KEY], bar)

        monkeypatch.setattr(checkpoint_writer, "write_shard", write)
    else:
        real = checkpoint_cast.quantise
        short = {"not made": 0, "half made": 1}[fault]

        def lose(matrix):
            weight, scale = real(matrix)
            return weight[: len(weight) * short // 2], scale

        monkeypatch.setattr(checkpoint_cast, "quantise", lose)
    assert main(["cast", str(folders / "bf16"), str(tmp_path / "cast"), "--to", "fp8"]) == 1
    assert ("lacks tensors" if "lost" in fault else "not written completely") in capsys.readouterr().err
    assert not (tmp_path / "cast").exists()


def test_full_disk_names_the_bytes_and_keeps_the_work(folders, tmp_path, monkeypatch, capsys):
    stopped(folders, tmp_path / "cast", monkeypatch)
    usage = namedtuple("usage", "total used free")
    arguments = ["cast", str(folders / "bf16"), str(tmp_path / "cast"), "--to", "fp8", "--max_shard_size", "60KB"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage(9, 9, 1234))
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "bytes needed" in error and "1,234 free" in error and "Traceback" not in error

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_shard", fail)
        assert main(arguments) == 1
    assert "bytes needed" in capsys.readouterr().err
    assert len(list((tmp_path / ".cast.partial").glob("*.safetensors"))) == 2
    assert main(arguments) == 0


def test_a_second_process_is_refused(folders, tmp_path):
    (tmp_path / ".cast.partial").mkdir()
    with checkpoint_writer.locked(tmp_path / ".cast.partial"), pytest.raises(ValueError, match="another process"):
        cast(folders / "bf16", tmp_path / "cast", "fp8")


def test_sizes_are_read():
    assert [parse_size(text) for text in ("5GB", "1.5 kb", "200", 7)] == [5 * 10**9, 1500, 200, 7]
    for text in ("", "5XB", "0", "-1GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(text)


def test_export_casts_and_splits_fused_experts(folders, tmp_path):
    model = DeepSeekR1ForCausalLM.from_pretrained(folders / "bf16", dtype="auto")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    export(tmp_path / "fused", tmp_path / "plain", to="fp8", max_shard_size="90KB")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["quantization_config"]["quant_method"] == "fp8"
    expected = tensors(folders / "fp8")
    result = tensors(tmp_path / "plain")
    copies = {name for name in expected if name.endswith(("layers.2.embed_tokens.weight", "shared_head.head.weight"))}
    assert expected.keys() - copies <= result.keys() <= expected.keys()
    assert all(torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)) for name, value in result.items())
    export(folders / "fp8", tmp_path / "kept")  # without a cast FP8 stays as it is
    assert compare(tmp_path / "kept", folders / "fp8")["missing"] == []
    assert {row["dtype"] for row in describe(tmp_path / "kept")["tensors"]} == {"float8_e4m3fn", "float32", "bfloat16"}


# ---------------------------------------------------------------- adapters

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": {"target_modules": ["q_a_proj", "kv_b_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "one parameter": {"target_modules": ["o_proj"], "target_parameters": EXPERTS[1:]},
    "all, rslora": {"target_modules": "all-linear", "target_parameters": EXPERTS, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear", "target_parameters": EXPERTS,
        "rank_pattern": {"o_proj": 3, r"layers\.1\.mlp\.experts\.down_proj": 4},
        "alpha_pattern": {"self_attn.q_a_proj": 7, r"experts\.gate_up_proj": 1},
    },
    "saved modules": {"target_modules": ["o_proj"], "modules_to_save": ["enorm", "input_layernorm", "lm_head"]},
    "head": {"target_modules": ["lm_head", "eh_proj"]},
}  # fmt: skip


def make_adapter(folder, **options):
    """Makes `base`, a tiny fp32 model, and `adapter` with random factors."""
    torch.manual_seed(1)
    model = tiny_model(num_nextn_predict_layers=1)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    adapted.save_pretrained(folder / "adapter")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merging_equals_pefts(kind, tmp_path):
    make_adapter(tmp_path, **ADAPTERS[kind])
    base = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "base")
    reference = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    reference.save_pretrained(tmp_path / "merged")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "ours")]
    assert main(["merge-adapter", *arguments, "--max_shard_size", "50KB"]) == 0
    comparison = compare(tmp_path / "ours", tmp_path / "merged")
    assert not comparison["missing"] and not comparison["extra"] and not comparison["shapes"]
    assert all(row["largest"] < 1e-5 for row in comparison["differences"])
    change = compare(tmp_path / "ours", tmp_path / "base")["differences"]
    moved = {row["name"] for row in change if row["largest"] > 1e-3}
    assert moved and (".experts.7.down_proj" in str(moved)) == ("target_parameters" in ADAPTERS[kind])
    if kind in ("head", "saved modules"):
        assert "model.layers.3.shared_head.head.weight" in moved  # the copy in the MTP layer follows


@pytest.mark.parametrize("edit, words", [
    (lambda s, t: s.update(use_dora=True), "use_dora=True cannot be merged"),
    (lambda s, t: s.update(peft_type="IA3"), "peft_type='IA3' cannot be merged"),
    (lambda s, t: s.update(some_later_variant={"a": 1}), "some_later_variant=.* cannot be merged"),
    (lambda s, t: s.update(init_lora_weights="pissa_niter_4"), "changed the base's weights"),
    (lambda s, t: s.update(r=3), r"lora_A\.weight \(2, \d+\) and lora_B .* with rank 3"),
    (lambda s, t: t.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(2, 2),
                            "base_model.model.model.layers.9.x.lora_B.weight": torch.ones(2, 2)}),
     r"layers\.9\.x\.lora_A\.weight finds no weight"),
    (lambda s, t: t.update({"base_model.model.score.weight": torch.ones(1, 32)}), r"score\.weight finds no weight"),
    (lambda s, t: t.pop(next(key for key in t if "lora_A" in key)), "has no lora_A"),
    (lambda s, t: t.pop(next(key for key in t if "lora_B" in key)), "has no lora_B"),
    (lambda s, t: t.clear(), "holds no tensors"),
])  # fmt: skip
def test_what_cannot_be_merged_is_named(tmp_path, edit, words):
    make_adapter(tmp_path, target_modules=["o_proj"])
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    edit(settings, factors)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ValueError, match=words):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_pickled_adapter_and_an_fp8_base_are_refused(folders, tmp_path):
    make_adapter(tmp_path, target_modules=["o_proj"])
    with pytest.raises(ValueError, match="cast the base to bf16 first"):
        merge_adapter(folders / "fp8", tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle .* is not read"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


# ---------------------------------------------------------------- inspect, verify


def test_inspect_counts_and_compares(folders, tmp_path, capsys):
    assert main(["inspect", str(folders / "fp8"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    values = tensors(folders / "fp8")
    rows = {row["name"]: (row["dtype"], tuple(row["shape"]), row["bytes"]) for row in report["tensors"]}
    assert rows == {n: (str(v.dtype).removeprefix("torch."), tuple(v.shape), v.nbytes) for n, v in values.items()}
    assert report["parameters"] == sum(v.numel() for v in tensors(folders / "bf16").values())
    assert report["dtypes"]["float8_e4m3fn"]["tensors"] == sum(v.dtype == FP8 for v in values.values())

    both = ["inspect", str(folders / "bf16"), "--against", str(folders / "fp8")]
    assert main(both) == 1 and main([*both, "--tolerance", "1"]) == 0
    assert main(["inspect", str(folders / "fp8"), "--against", str(folders / "fp8")]) == 0
    assert "largest difference 0," in capsys.readouterr().out
    shutil.copytree(folders / "bf16", tmp_path / "other")

    def edit(values):
        values["more"] = values.pop(KEY)
        values["model.norm.weight"][5] += 0.5

    change(tmp_path / "other", edit)
    assert main(["inspect", str(tmp_path / "other"), "--against", str(folders / "bf16"), "--tolerance", "9"]) == 1
    text = capsys.readouterr().out
    assert f"missing: {KEY}" in text and "extra: more" in text
    name, both = "model.norm.weight", (tmp_path / "other", folders / "bf16")
    row = next(row for row in compare(*both)["differences"] if row["name"] == name)
    changed, original = (tensors(folder)[name][5].double() for folder in both)
    assert row["largest"] == float(changed - original)
    assert row["relative"] == pytest.approx(float(changed / original - 1))


def test_verify_finds_a_flipped_bit_and_writes_manifests(folders, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "bf16", folder)
    (folder / "checksums.json").unlink(missing_ok=True)
    assert main(["verify", str(folder)]) == 1 and "checksums.json" in capsys.readouterr().err
    assert main(["verify", str(folder), "--write"]) == 0 and main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder), "--write"]) == 1 and "run verify without --write" in capsys.readouterr().err
    victim = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    assert main(["verify", str(folder)]) == 1
    assert victim.name in capsys.readouterr().err
    victim.write_bytes(bytes(data[:-1]))
    (folder / "checksums.json").unlink()
    assert main(["verify", str(folder), "--write"]) == 1 and victim.name in capsys.readouterr().err
    assert not (folder / "checksums.json").exists()


def test_an_existing_target_and_no_folder_are_errors(folders, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert main(["cast", str(folders / "bf16"), str(tmp_path / "there"), "--to", "fp8"]) == 1
    assert capsys.readouterr().err.startswith("FileExistsError: ")
    assert main(["cast", str(tmp_path / "nowhere"), str(tmp_path / "new"), "--to", "fp8"]) == 1
    assert "is it a model folder?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


# ---------------------------------------------------------------- sources that are not what they seem


@pytest.mark.parametrize("dtype", [torch.float32, "float16", "auto"])
def test_fp8_loads_in_the_dtype_that_is_asked_for(folders, tmp_path, dtype):
    model = DeepSeekR1ForCausalLM.from_pretrained(folders / "fp8", dtype=dtype)
    expected = {"float16": torch.float16, "auto": torch.bfloat16}.get(dtype, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    model(input_ids=torch.arange(8)[None])
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(expected).split(".")[1]


def test_an_unfinished_save_is_no_source(folders, tmp_path):
    shutil.copytree(folders / "bf16", tmp_path / "source")
    (tmp_path / "source" / "checksums.json").write_text('{"format": 1, "saving": true}')
    for command in (lambda to: cast(tmp_path / "source", to, "fp8"), lambda to: export(tmp_path / "source", to)):
        with pytest.raises(ValueError, match="a save into this folder was interrupted"):
            command(tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_source_without_what_its_config_needs(folders, tmp_path):
    shutil.copytree(folders / "bf16", tmp_path / "source")
    change(tmp_path / "source", lambda values: values.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.1\.mlp\.experts\.2\.up_proj"):
        cast(tmp_path / "source", tmp_path / "target", "fp8")
    change(tmp_path / "source", lambda values: values.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks 2 weights .*model\.norm\.weight"):
        export(tmp_path / "source", tmp_path / "target")


def test_a_source_that_changes_meanwhile(folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "bf16", tmp_path / "source")
    write = checkpoint_writer.write_shard

    def touched(*args):
        write(*args)
        os.utime(tmp_path / "source" / "config.json", (1, 1))

    monkeypatch.setattr(checkpoint_writer, "write_shard", touched)
    with pytest.raises(ValueError, match="source was changed while it was read"):
        cast(tmp_path / "source", tmp_path / "target", "fp8")
    assert not (tmp_path / "target").exists()


def test_tied_embeddings_are_not_merged_apart(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    tiny_model(**sizes).save_pretrained(tmp_path / "base")
    base = DeepSeekR1ForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="ties to another weight"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "target")


def test_the_value_function_goes_along_with_a_cast(folders, tmp_path):
    shutil.copytree(folders / "bf16", tmp_path / "source")
    save_file({"linear.weight": torch.ones(1, 4)}, tmp_path / "source" / "value_head.safetensors")
    cast(tmp_path / "source", tmp_path / "target", "fp8")
    assert load_file(tmp_path / "target" / "value_head.safetensors")["linear.weight"].dtype == torch.float32
