"""Plain deepseek_v3 folders (deepseek_v2 for softmax routing), which engines load without custom code."""

from pathlib import Path

from transformers import AutoConfig

from .checkpoint_cast import cast_config, plan_groups
from .checkpoint_reader import read_config
from .checkpoint_writer import CheckpointWriter, copy_others, refuse_existing, write_config
from .configuration_deepseek_r1 import DeepSeekR1Config

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


def export(source, target, to=None, max_shard_size="5GB", progress=False):
    """Writes `source` (a folder of ours) as a plain folder `target`; all of it or nothing, resumable.

    `to`: as for `cast`; None keeps the weights as they are, FP8 included. Returns the exported keys.

    Raises FileExistsError if `target` exists, ValueError if the model cannot be exported or a weight file is damaged,
    FileNotFoundError if `source` is no model folder.
    """
    refuse_existing(target)
    fields = read_config(source)
    config = plain_config(fields)
    reader, groups = plan_groups(source, fields, to)
    config = config if to is None else cast_config(config, to)

    def finish(folder):
        copy_others(source, folder, code=False)
        write_config(folder, config)
        AutoConfig.from_pretrained(folder)  # the library reads it

    settings = {"command": "export", "to": to, "config": config}
    sources = [*reader.files(), Path(source) / "config.json"]
    return CheckpointWriter(target, groups, settings, sources, max_shard_size).run(finish, progress)
