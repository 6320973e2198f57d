"""Damaged checkpoint folders: refused by name by every loader, found by checksum, never loaded with other weights."""

import json
import os
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM, layout
from modeling_deepseek_r1.checkpoint_files import (
    INDEX,
    MANIFEST,
    WEIGHTS,
    check_weights,
    verify_folder,
    weight_files,
    write_manifest,
)
from modeling_deepseek_r1.checkpoint_shapes import check_tensors

FIELDS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 12, "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
load = DeepSeekR1ForCausalLM.from_pretrained


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return DeepSeekR1ForCausalLM(DeepSeekR1Config(**{**FIELDS, **changes})).eval()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """(model, folder): seven shards with experts and an MTP layer, without the code files."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model = tiny_model()
    model.save_pretrained(folder, max_shard_size="30KB")
    for path in folder.glob("*.py"):
        path.unlink()
    assert len(list(folder.glob("*.safetensors"))) > 4
    return model, folder


@pytest.fixture
def copied(sharded, tmp_path):
    return Path(shutil.copytree(sharded[1], tmp_path / "model"))


@pytest.fixture
def single(tmp_path):
    tiny_model().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def same_weights(model, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- 500 corruptions


def split_file(path):
    """-> header (dict), payload."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(path, header, payload):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def shard(rng, folder):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def tensor(rng, header):
    return rng.choice(sorted(key for key in header if key != "__metadata__"))


def truncate(rng, folder):
    path = shard(rng, folder)
    os.truncate(path, rng.choice([0, 1, 7, 8, 9, rng.randrange(path.stat().st_size)]))
    return path.name


def lengthen(rng, folder):
    path = shard(rng, folder)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 300)))
    return path.name


def header_length(rng, folder):
    path = shard(rng, folder)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    drawn = rng.randrange(length), rng.randrange(len(content))
    wrong = rng.choice([0, 2**63, 2**64 - 1, length - 1, length + 1, *drawn])
    path.write_bytes(struct.pack("<Q", wrong if wrong != length else 1) + content[8:])
    return path.name


def header_bytes(rng, folder):
    """Random bytes in the header; the result may still be the same header in another spelling."""
    path = shard(rng, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(rng.randint(1, 4)):
        content[8 + rng.randrange(length)] = rng.randrange(256)
    path.write_bytes(bytes(content))
    return path.name


def header_field(rng, folder):
    """A header that is valid JSON but wrong."""
    path = shard(rng, folder)
    header, payload = split_file(path)
    key = tensor(rng, header)
    entry = header[key]
    begin, end = entry["data_offsets"]
    junk = [None, "x", -1, 1.5, True, [], {}, 10**30]
    kind = rng.randrange(9)
    if kind == 0:
        entry["data_offsets"] = rng.choice([[begin + 4, end + 4], [begin, end + 4], [end, begin], [begin], [-4, 4]])
    elif kind == 1:
        entry["shape"] = [*entry["shape"], rng.choice([0, 2, -1])]
    elif kind == 2:
        entry["dtype"] = rng.choice(["F64", "BF16", "F33", "f32", "", "BOOL"])
    elif kind == 3:
        entry[rng.choice(sorted(entry))] = rng.choice(junk)
    elif kind == 4:
        del entry[rng.choice(sorted(entry))]
    elif kind == 5:
        header[key] = rng.choice(junk)
    elif kind == 6:
        header["__metadata__"] = rng.choice([None, 3, ["pt"], {"format": 1}])
    elif kind == 7:
        header[rng.choice(["renamed", key + "_x", key.replace("layers.", "layers.1")])] = header.pop(key)
    else:
        header = rng.choice([[], None, "header", 5, [header]])
    join_file(path, header, payload)
    return path.name


def duplicate_key(rng, folder):
    path = shard(rng, folder)
    header, payload = split_file(path)
    key = tensor(rng, header)
    text = (json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}" + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path.name


def other_shape(rng, folder):
    """The same bytes under another shape or kind of number: the file stays in order."""
    path = shard(rng, folder)
    header, payload = split_file(path)
    entry = header[tensor(rng, header)]
    shape = entry["shape"]
    shapes = [[*shape, 1], [1, *shape], [4 * shape[0], *shape[1:]] if shape[0] % 4 else [shape[0] // 4, 4, *shape[1:]]]
    if len(shape) == 2 and shape[0] != shape[1]:
        shapes.append(shape[::-1])
    entry["shape"] = rng.choice([s for s in shapes if torch.Size(s).numel() == torch.Size(shape).numel()])
    if rng.random() < 0.4:
        entry["shape"], entry["dtype"] = shape, rng.choice(["I32", "U32"])
    join_file(path, header, payload)
    return path.name


def index_edit(rng, folder):
    path = folder / INDEX
    index = json.loads(path.read_text())
    where = index["weight_map"]
    key = rng.choice(sorted(where))
    kind = rng.randrange(8)
    if kind == 0:
        del where[key]
    elif kind == 1:
        where[key + ".x"] = where.pop(key)
    elif kind == 2:
        where[key] = rng.choice(sorted(set(where.values()) - {where[key]}))
    elif kind == 3:
        where[key] = rng.choice(["../" + where[key], "/etc/passwd", "", ".", None, 3, "absent.safetensors", "a.bin"])
    elif kind == 4:
        index = rng.choice([[], {}, None, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}])
    elif kind == 5:
        where["model.layers.7.input_layernorm.weight"] = where[key]
    elif kind == 6:
        text = path.read_text()
        path.write_text(text[: rng.randrange(len(text) - 3)])
        return INDEX
    else:
        path.write_bytes(rng.choice([b"", b"\xff\xfe{", b"[" * 100000]))
        return INDEX
    path.write_text(json.dumps(index))
    return INDEX


def missing_file(rng, folder):
    path = rng.choice([shard(rng, folder), folder / INDEX])
    path.unlink()
    return path.name


def renamed_file(rng, folder):
    path = shard(rng, folder)
    path.rename(folder / rng.choice(["x.safetensors", "model-00009-of-00009.safetensors", path.name + ".bak"]))
    return path.name


def extra_file(rng, folder):
    path = shard(rng, folder)
    name = rng.choice(["model-00001-of-00099.safetensors", WEIGHTS])
    shutil.copyfile(path, folder / name)
    return name


def swapped_files(rng, folder):
    one, two = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    return one.name, two.name


def manifest_edit(rng, folder):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    name = rng.choice(sorted(manifest["files"]))
    kind = rng.randrange(5)
    if kind == 0:
        path.write_text(rng.choice(["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "files": {"a": 1}}']))
        return MANIFEST
    if kind == 1:
        manifest["format"] = 2
    elif kind == 2:
        manifest["files"][name]["bytes"] = rng.choice([-1, 5, None, "9"])
    elif kind == 3:
        del manifest["files"][name]
    else:
        manifest["saving"] = True
    path.write_text(json.dumps(manifest))
    return MANIFEST


def payload_bits(rng, folder):
    path = shard(rng, folder)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for position in {rng.randrange(8 + length, len(content)) for _ in range(rng.randint(1, 3))}:
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return path.name


STRUCTURAL = [truncate, lengthen, header_length, header_bytes, header_field, duplicate_key, other_shape, index_edit,
              missing_file, renamed_file, extra_file, swapped_files, manifest_edit]  # fmt: skip
CASES = 500


def read_cheaply(folder, model):
    """What `from_pretrained` checks before it makes a tensor, without its half a second."""
    where = check_weights(folder)
    return check_tensors(model, layout.read_headers(sorted({folder / name for name in where.values()})))


def refusal(function, *args, **kwargs):
    """The message with which the call was refused, None if it was not. Other errors than these two go through."""
    try:
        function(*args, **kwargs)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def run_case(number, sharded, scratch, from_pretrained):
    """Corruption `number`: -> its kind. Asserts that each loader refuses it by name."""
    model, original = sharded
    rng = random.Random(number)
    damage = payload_bits if number % 5 == 4 else STRUCTURAL[number % len(STRUCTURAL)]
    folder = scratch / str(number)
    shutil.copytree(original, folder)
    has_manifest = damage in (manifest_edit, payload_bits) or rng.random() < 0.5
    if not has_manifest:
        (folder / MANIFEST).unlink()
    victims = damage(rng, folder)
    victims = (victims,) if isinstance(victims, str) else victims
    what = f"case {number}, {damage.__name__} of {victims}"

    def named(message, *others):
        return any(name in message for name in (*victims, *others))

    message = refusal(verify_folder, folder)
    assert message and named(message, *([] if has_manifest else [MANIFEST])), f"{what}: verify_folder says {message}"
    if damage is payload_bits:
        loaders = [lambda folder: load(folder, verify=True)]
    else:
        loaders = [load, AutoModelForCausalLM.from_pretrained]
    loaders = loaders if from_pretrained else []
    if damage is not payload_bits:
        loaders.append(lambda folder: read_cheaply(folder, model))
        if damage not in (other_shape, manifest_edit, header_bytes):  # these need the model or the manifest
            loaders.append(weight_files)
    for loader in loaders:
        message = refusal(loader, folder)
        if message is None and damage is header_bytes and not has_manifest:  # another spelling of the same header
            assert same_weights(model, load(folder)), f"{what}: loaded with other weights"
            continue
        assert message and named(message), f"{what}: {loader} says {message}"
    shutil.rmtree(folder)
    return damage.__name__


def test_500_corruptions_are_refused_by_name(sharded, tmp_path):
    kinds = [run_case(number, sharded, tmp_path, from_pretrained=number % 17 == 0) for number in range(CASES)]
    assert len(set(kinds)) == len(STRUCTURAL) + 1 and kinds.count("payload_bits") == CASES // 5


@pytest.mark.slow
def test_500_corruptions_against_every_loader(sharded, tmp_path):
    for number in range(CASES):
        run_case(number, sharded, tmp_path, from_pretrained=True)


def test_the_undamaged_folder_passes_everything(sharded):
    model, folder = sharded
    manifest = verify_folder(folder)
    assert set(manifest["files"]) == {*weight_files(folder).values(), INDEX}
    assert read_cheaply(folder, model) == []
    assert same_weights(model, load(folder, verify=True))
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(folder, verify=True))


# ---------------------------------------------------------------- tensors that do not fit the model


def rewrite(folder, change):
    """Applies `change` to the tensors of a single-file folder, as another program would: without a manifest."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / MANIFEST).unlink()


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
FITS = {  # key, what becomes of it, words of the error
    "plain": ("model.norm.weight", lambda t: t[:-1], r"\(31,\), the model of config.json has \(32,\)"),
    "expert": (EXPERT, lambda t: t.T.contiguous(), r"\(32, 16\), the model of config.json has \(16, 32\)"),
    "mtp": ("model.layers.2.eh_proj.weight", lambda t: t[:, :-1].contiguous(), r"\(32, 63\).*\(32, 64\)"),
    "mtp expert": (
        "model.layers.2.mlp.experts.0.down_proj.weight", lambda t: t[:-1].contiguous(), r"\(31, 16\).*\(32, 16\)",
    ),
    "mtp copy": ("model.layers.2.embed_tokens.weight", lambda t: t[:-1].contiguous(), r"\(63, 32\).*\(64, 32\)"),
    "bias": ("model.layers.1.mlp.gate.e_score_correction_bias", lambda t: t[:-1], r"\(3,\).*\(4,\)"),
    "integers": (EXPERT, lambda t: t.to(torch.int32), r"is I32, the model has floats"),
    "bytes": ("lm_head.weight", lambda t: t.to(torch.uint8), r"is U8, the model has floats"),
    "fp8": (EXPERT, lambda t: t.to(torch.float8_e4m3fn), r"is in FP8, but config.json has no quantization_config"),
}


@pytest.mark.parametrize("kind", FITS)
def test_a_tensor_that_does_not_fit_is_named(single, kind):
    key, change, words = FITS[kind]
    rewrite(single, lambda tensors: tensors.update({key: change(tensors[key])}))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"model\.safetensors: {re.escape(key)} .*{words}"):
            load(single, **options)


def test_absent_and_surplus_experts_are_named(single):
    rewrite(single, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(ValueError, match=f"lacks 1 weights.*{re.escape(EXPERT)}"):
        load(single)
    message = r"experts\.2\.\w+_proj\.weight is there, but the config has n_routed_experts=2"
    with pytest.raises(ValueError, match=message):
        load(single, n_routed_experts=2)


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 65), ("moe_intermediate_size", 32), ("kv_lora_rank", 8), ("v_head_dim", 16), ("n_routed_experts", 8),
])  # fmt: skip
def test_another_models_config_is_refused(copied, field, value):
    config = json.loads((copied / "config.json").read_text()) | {field: value}
    (copied / "config.json").write_text(json.dumps(config))
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json"):
            loader(copied)


def test_a_new_head_may_differ_in_shape(single):
    from modeling_deepseek_r1 import DeepSeekR1ForSequenceClassification

    reward = DeepSeekR1ForSequenceClassification.from_pretrained(single, num_labels=3)
    reward.save_pretrained(single)
    with pytest.raises(ValueError, match=r"score\.weight has shape \(3, 32\), the model of config.json has \(1, 32\)"):
        DeepSeekR1ForSequenceClassification.from_pretrained(single, num_labels=1)
    again = DeepSeekR1ForSequenceClassification.from_pretrained(single, num_labels=1, ignore_mismatched_sizes=True)
    assert again.score.weight.shape == (1, 32)


def cast_to_fp8(folder, block=8):
    def change(tensors):
        for key in [key for key in tensors if key.endswith("_proj.weight") and "eh_proj" not in key]:
            rows, columns = tensors[key].shape
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            tensors[key + "_scale_inv"] = torch.ones(-(-rows // block), -(-columns // block))

    rewrite(folder, change)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change, words", [
    (lambda tensors, key: tensors.pop(key), r"its scale .*_scale_inv is in no file"),
    (lambda tensors, key: tensors.update({key: torch.ones(1, 4)}), r"_scale_inv is F32 \[1, 4\].*floats \[2, 4\]"),
    (lambda tensors, key: tensors.update({key: tensors[key].int()}), r"_scale_inv is I32.*floats \[2, 4\]"),
])  # fmt: skip
def test_fp8_weights_need_their_scales(single, change, words):
    cast_to_fp8(single)
    load(single)
    write_manifest(single)
    rewrite(single, lambda tensors: change(tensors, EXPERT + "_scale_inv"))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {re.escape(EXPERT)}.*{words}"):
        load(single)


# ---------------------------------------------------------------- pickles, two saves in one folder


def test_pickles_are_refused(single):
    torch.save(load_file(single / WEIGHTS), single / "pytorch_model.bin")
    load(single)  # not read beside safetensors
    with pytest.raises(ValueError, match="use_safetensors=False: pickles can run code"):
        load(single, use_safetensors=False)
    (single / WEIGHTS).unlink()
    for loader in (load, AutoModelForCausalLM.from_pretrained, weight_files, verify_folder):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which can run code.*save_file"):
            loader(single)
    (single / "pytorch_model.bin").rename(single / "training_args.bin")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load(single)


def test_the_stale_one_of_two_saves_is_named(copied, single):
    shutil.copyfile(single / WEIGHTS, copied / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{re.escape(WEIGHTS)} is stale \({MANIFEST} does not name it\)"):
        load(copied)
    (copied / MANIFEST).unlink()
    os.utime(copied / WEIGHTS, (1, 1))
    with pytest.raises(ValueError, match=rf" {re.escape(WEIGHTS)} is stale \(it is the older one\)"):
        weight_files(copied)
    for path in copied.glob("model-*"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(INDEX)} is stale \(model-00001.* is not there\)"):
        weight_files(copied)


@pytest.mark.parametrize("sizes", [("1GB", "30KB"), ("30KB", "1GB"), ("30KB", "60KB")])
def test_saving_over_another_save_leaves_one_version(tmp_path, sizes):
    for seed, size in enumerate(sizes):
        model = tiny_model(seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert same_weights(model, load(tmp_path, verify=True))
    assert len(list(tmp_path.glob("model*.safetensors"))) == len(set(weight_files(tmp_path).values()))


def test_a_mixture_of_two_saves_is_refused(copied, tmp_path):
    """Equal sizes and headers: only the checksums tell."""
    tiny_model(1).save_pretrained(tmp_path / "other", max_shard_size="30KB")
    victim = sorted(copied.glob("*.safetensors"))[2].name
    shutil.copyfile(tmp_path / "other" / victim, copied / victim)
    check_weights(copied)
    with pytest.raises(ValueError, match=rf"{victim} differs from what was written \(sha256"):
        load(copied, verify=True)


def test_a_variant_is_checked_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    assert same_weights(model, load(tmp_path, variant="fp16"))
    victim = min(tmp_path.glob("model.fp16-*.safetensors"))
    os.truncate(victim, 100)
    with pytest.raises(ValueError, match=victim.name.replace(".", r"\.")):
        load(tmp_path, variant="fp16")


# ---------------------------------------------------------------- verify=True


def test_verifying_without_a_manifest_is_an_error(copied):
    (copied / MANIFEST).unlink()
    for verify in (verify_folder, lambda folder: load(folder, verify=True)):
        with pytest.raises(FileNotFoundError, match=r"python -m modeling_deepseek_r1\.checkpoint verify"):
            verify(copied)


def cached_repository(folder, cache):
    """`folder` as the Hub's cache holds a downloaded repository user/model."""
    snapshot = cache / "models--user--model" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (cache / "models--user--model" / "refs").mkdir()
    (cache / "models--user--model" / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_name_on_the_hub_is_verified_after_download(sharded, tmp_path):
    model, folder = sharded
    snapshot = cached_repository(folder, tmp_path)
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        assert same_weights(model, loader("user/model", cache_dir=tmp_path, verify=True))
    victim = payload_bits(random.Random(0), snapshot)
    load("user/model", cache_dir=tmp_path)
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"{victim} differs from what was written"):
            loader("user/model", cache_dir=tmp_path, verify=True)
    os.truncate(snapshot / victim, 2000)
    with pytest.raises(ValueError, match=victim):
        load("user/model", cache_dir=tmp_path)
