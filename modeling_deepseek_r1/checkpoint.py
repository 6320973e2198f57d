"""Commands on checkpoint folders.

    python -m modeling_deepseek_r1.checkpoint export SRC DST

`export` writes a plain deepseek_v3 folder (deepseek_v2 for softmax routing) that transformers' own class, and engines
that know it, load without custom code.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig

from .checkpoint_files import INDEX, WEIGHTS, weight_files
from .configuration_deepseek_r1 import DeepSeekR1Config

CODE_SUFFIX = ".py"
LANGUAGE_MODELS = ("DeepSeekR1ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")
# Fields of ours that change training only: the exported model computes the same without them.
TRAINING_FIELDS = (
    "bias_update_speed", "seq_aux_loss_alpha", "router_z_loss_coef", "mtp_loss_coef", "label_smoothing",
    "hidden_dropout", "drop_path_rate", "auto_map", "attention_types",
)  # fmt: skip


def plain_config(fields):
    """config.json of a DeepSeek-R1 folder (dict) -> the same for transformers' own class.

    Raises ValueError for a model that class cannot express, naming the field.
    """
    architectures = fields.get("architectures") or ["DeepSeekR1ForCausalLM"]
    if architectures[0] not in LANGUAGE_MODELS:
        raise ValueError(f"architectures={architectures}: only a language model can be exported, this is none")
    config = DeepSeekR1Config(**fields)
    is_v2 = config.scoring_func == "softmax"
    kind, name = ("deepseek_v2", "DeepseekV2ForCausalLM") if is_v2 else ("deepseek_v3", "DeepseekV3ForCausalLM")
    fits = {
        "n_routed_experts": config.n_routed_experts is not None,
        "n_shared_experts": config.n_shared_experts > 0,
        "moe_layer_freq": config.moe_layer_freq == 1,
        "attention_types": set(config.attention_types or ["latent"]) == {"latent"},
        "rope_interleave": config.rope_interleave or not is_v2,
        "norm_topk_prob": not (is_v2 and config.norm_topk_prob),
        "num_nextn_predict_layers": not (is_v2 and config.num_nextn_predict_layers),
    }
    for field in (field for field, ok in fits.items() if not ok):
        value = getattr(config, field)
        raise ValueError(f"{field}={value} has no counterpart in {name}; this model cannot be exported")
    result = {key: value for key, value in fields.items() if key not in TRAINING_FIELDS}
    result.update(model_type=kind, architectures=[name])
    result.update(scoring_func=config.scoring_func, topk_method=config.topk_method)
    return result


def split_experts(key, tensor):
    """Yields (key, tensor) on disk for one tensor of a folder saved with `save_original_format=False`."""
    if key.endswith("mlp.experts.gate_up_proj"):
        base = key.removesuffix("gate_up_proj")
        for expert, matrix in enumerate(tensor):
            gate, up = matrix.chunk(2)
            yield f"{base}{expert}.gate_proj.weight", gate.contiguous()
            yield f"{base}{expert}.up_proj.weight", up.contiguous()
    elif key.endswith("mlp.experts.down_proj"):
        base = key.removesuffix("down_proj")
        for expert, matrix in enumerate(tensor):
            yield f"{base}{expert}.down_proj.weight", matrix.contiguous()
    else:
        yield key, tensor


def copy_weights(source, target):
    """Copies the weights file by file, splitting fused experts; one file's tensors are in memory at a time."""
    files = sorted(set(weight_files(source).values()))
    where, total = {}, 0
    for name in tqdm(files, desc="weights", unit="file"):
        with safe_open(source / name, framework="pt") as file:
            fused = any(key.endswith(("experts.gate_up_proj", "experts.down_proj")) for key in file.keys())
            tensors = {}
            for key in file.keys():
                tensors.update(split_experts(key, file.get_tensor(key)))
        if fused:
            save_file(tensors, target / name, metadata={"format": "pt"})
        else:
            shutil.copyfile(source / name, target / name)
        where.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if files != [WEIGHTS]:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (target / INDEX).write_text(json.dumps(index, indent=2))
    return where


def export(source, target):
    """Writes `source` (a folder of ours) as a plain folder `target`; all of it or nothing.

    Returns the exported keys. Raises FileExistsError if `target` exists, ValueError if the model cannot be exported or
    a weight file is damaged, FileNotFoundError if `source` is no model folder.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another folder")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; is it a model folder?")
    fields = json.loads((source / "config.json").read_text())
    if not isinstance(fields, dict):
        raise ValueError(f"{source / 'config.json'} holds no mapping of fields; is it a model folder?")
    config = plain_config(fields)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        keys = copy_weights(source, partial)
        for file in sorted(source.iterdir()):
            others = file.is_file() and file.suffix not in (CODE_SUFFIX, ".safetensors", ".bin", ".pt")
            if others and file.name not in ("config.json", INDEX, "trainer_state.json", "COMPLETE.json"):
                shutil.copyfile(file, partial / file.name)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        AutoConfig.from_pretrained(partial)  # the library reads it
        os.chmod(partial, 0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(keys)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deepseek_r1.checkpoint", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a plain deepseek_v3 folder")
    command.add_argument("source", metavar="SRC", help="a folder that save_pretrained wrote")
    command.add_argument("target", metavar="DST", help="the folder to make")
    args = parser.parse_args(argv)
    try:
        keys = export(args.source, args.target)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{args.target}: {len(keys)} tensors, model_type {AutoConfig.from_pretrained(args.target).model_type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
