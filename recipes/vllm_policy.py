"""Rollouts through vLLM: it starts from a plain deepseek_v3 folder and gets the policy's weights under its own names.

    with vllm_engine(model, tokenizer, args):    # exports to <output_dir>/vllm_start, unless a server is asked for
        trainer = GRPOTrainer(model, ...)        # use_vllm=True: TRL starts the engine in here
    attach(trainer)                              # from now on `sync_weights` sends what vLLM's class expects

TRL (trl/generation/vllm_generation.py) starts vLLM from the policy's own folder, whose class vLLM does not know, and
then sends `named_parameters()`: the experts under fused names, multi-token prediction and value head included, and no
buffers, so that the routing biases of the sampler stay what they were at the start. Sent instead are

* one matrix per expert (`mlp.experts.7.gate_proj.weight`), as in the released files and as vLLM's
  `DeepseekV3ForCausalLM.load_weights` reads them, and every other weight of the decoder;
* every `e_score_correction_bias`, in float32;
* with PEFT the merged weights (TRL merges, sends, unmerges); no value head and no multi-token-prediction layers.

FSDP, DeepSpeed and PEFT are TRL's business as before: its iterator is wrapped. A server (`vllm_mode: server`) is
started by the user from a folder that `export_for_vllm` made.

vLLM samples with other kernels and precisions than the loss. TRL corrects for that by default
(`vllm_importance_sampling_correction`): the ratio exp(log p_trainer - log p_vllm), of a sequence or of each token
(`vllm_importance_sampling_mode`: sequence_mask, the default, sequence_truncate, token_mask, token_truncate), multiplies
the policy loss; outside of [`vllm_importance_sampling_clip_min` (none), `..._clip_max` (3.0)] it is set to 0 (mask) or
to the bound (truncate). How far the two are apart is logged as `sampling/sampling_logp_difference` and
`sampling/importance_sampling_ratio`. PPOTrainer's loss takes the same ratio.

Router replay does not work here: vLLM does not say which experts it chose.

*Not run* with vLLM itself, which cannot be installed where this was written. Tested against TRL's own VLLMGeneration
with an engine that holds transformers' DeepseekV3ForCausalLM, started from the exported folder. Not known therefore:
whether a vLLM version derives further tensors from weights when it starts and leaves them as they were on a sync
(absorbed attention matrices, experts in a kernel's own layout). Look at `sampling/sampling_logp_difference` after the
first updates: it must not grow with the steps.
"""

import contextlib
import json
import re
import uuid
from pathlib import Path

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from modeling_deepseek_r1.checkpoint_cast import cast_config
from modeling_deepseek_r1.checkpoint_export import plain_config
from modeling_deepseek_r1.checkpoint_files import MANIFEST
from modeling_deepseek_r1.checkpoint_writer import CheckpointWriter, Group, Target, write_config
from modeling_deepseek_r1.layout import mtp_prefixes

ENGINE_FOLDER = "vllm_start"
ROUTING_BIAS = "e_score_correction_bias"
OURS = ("deepseek_r1", "deepseek_v3", "deepseek_v2")
KINDS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
WRAPPERS = ("base_model.model.", "modules_to_save.default.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


# ---------------------------------------------------------------- names


def _causal_lm(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_ours(policy):
    return policy.config.model_type in OURS


def _plain_name(name):
    """A parameter's name without what PEFT, FSDP and checkpointing put into it."""
    for part in WRAPPERS:
        name = name.replace(part, "")
    return name.replace(".base_layer", "")


def _split_experts(name, tensor):
    """A fused tensor (E, 2 I, D) or (E, D, I) as the experts' own matrices; anything else as it is."""
    match = FUSED_EXPERTS.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    prefix, kind = match.groups()
    for expert, matrix in enumerate(tensor):
        if kind == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", matrix
        else:
            gate, up = matrix.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up


def as_released(named, policy):
    """(released name, tensor) of what vLLM reads, from (model's name, whole tensor) of the parameters.

    The routing biases are added from `policy`, the causal LM without PEFT's wrapper. Tensors are views where they can
    be. Models of other families keep their names; only a value head is left out.
    """
    ours = _is_ours(policy)
    left_out = ("value_head.", *(mtp_prefixes(policy.config) if ours else ()))
    for name, tensor in named:
        if not name.startswith(left_out):
            yield from _split_experts(name, tensor) if ours else [(name, tensor)]
    if not ours:
        return
    for name, buffer in policy.named_buffers():
        name = _plain_name(name)
        if name.endswith(ROUTING_BIAS) and not name.startswith(left_out):
            yield name, buffer.float()


# ---------------------------------------------------------------- a model in this process


@contextlib.contextmanager
def merged(model):
    """A PEFT model with its adapter merged into the weights for the time being; other models as they are."""
    if not isinstance(model, PeftModel):
        yield
        return
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


def _named_parameters(model):
    adapter = getattr(model, "prefix", None) if isinstance(model, PeftModel) else None
    for name, parameter in model.named_parameters():
        if (adapter and adapter in name) or "original_module" in name:
            continue
        name = _plain_name(name)
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is sharded over processes: make the folder before the model is sharded, for instance with "
                "python -m modeling_deepseek_r1.checkpoint export SRC DST"
            )
        yield name, parameter.data


def released_weights(model):
    """(released name, tensor) of a model that is whole in this process, merged if it has an adapter.

    Raises:
        ValueError: for parameters that are sharded.
    """
    with merged(model):
        yield from as_released(_named_parameters(model), _causal_lm(model))


def _planned(name, tensor, dtype):
    dtype = dtype if tensor.is_floating_point() and dtype and not name.endswith(ROUTING_BIAS) else tensor.dtype
    target = Target(name, dtype, tuple(tensor.shape))
    return Group((target,), lambda: iter([(name, tensor.detach().to("cpu", dtype))]))


def engine_config(model, dtype=None):
    """config.json (dict) of the folder that `export_for_vllm` writes. Raises ValueError for other families, and for a
    model that deepseek_v3 cannot express."""
    policy = _causal_lm(model)
    if not _is_ours(policy):
        raise ValueError(
            f"model_type={policy.config.model_type}: only {', '.join(OURS)} need another folder; vLLM starts from the "
            "model's own"
        )
    if dtype not in KINDS:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(str, KINDS))}")
    fields = json.loads(policy.config.to_json_string(use_diff=False))
    if fields.get("quantization_config"):
        raise ValueError("the model is quantised (quantization_config); vLLM would be sent other tensors than it has")
    fields.update(num_nextn_predict_layers=0, architectures=["DeepSeekR1ForCausalLM"], use_cache=True)
    fields = plain_config(fields)
    fields["dtype"] = str(policy.dtype).removeprefix("torch.")
    return fields if dtype is None else cast_config(fields, dtype)


def export_for_vllm(model, tokenizer, folder, dtype=None, max_shard_size="5GB"):
    """Writes the model as a plain deepseek_v3 folder (deepseek_v2 for softmax routing); all of it or nothing.

    Nothing is copied in memory. What it holds is what a sync sends: no multi-token-prediction layers, no value head.

    Args:
        dtype: "bf16", "fp16", "fp32", None: the parameters' own. The routing biases stay in float32.
    Returns:
        the names written, sorted.
    Raises:
        FileExistsError: if the folder is there. ValueError: for another family, or sharded parameters.
    """
    config, policy = engine_config(model, dtype), _causal_lm(model)

    def finish(target):
        write_config(target, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if policy.generation_config is not None:
            policy.generation_config.save_pretrained(target)

    with merged(model):
        weights = as_released(_named_parameters(model), policy)
        groups = [_planned(name, tensor, KINDS[dtype]) for name, tensor in weights]
        settings = {"command": "export_for_vllm", "run": uuid.uuid4().hex}  # never goes on with other weights
        return CheckpointWriter(folder, groups, settings, [], max_shard_size).run(finish)


# ---------------------------------------------------------------- the engine


@contextlib.contextmanager
def vllm_starts_from(model, folder):
    """Inside, vLLM in TRL's trainers is started from `folder` (colocate mode takes `model.name_or_path`); the config,
    from which TRL names what it saves, stays as it is.

    Raises:
        ValueError: if the folder is not one that `export_for_vllm` or the package's export finished.
    """
    for name in ("config.json", MANIFEST):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"vLLM cannot start from {folder}: no {name}; make it with export_for_vllm")
    policy = _causal_lm(model)
    name = policy.name_or_path
    policy.name_or_path = str(folder)
    try:
        yield
    finally:
        policy.name_or_path = name


@contextlib.contextmanager
def vllm_engine(model, tokenizer, args):
    """Around the construction of a trainer: exports the policy to `<output_dir>/vllm_start` and lets vLLM start there.

    Does nothing without `use_vllm`, for a server, and for models of other families. The folder of an earlier run is
    used again where its config is the same: its weights do not matter, all are sent before the first rollout.

    Raises:
        ValueError: for a folder of another model, and what `export_for_vllm` raises.
    """
    if not args.use_vllm or args.vllm_mode != "colocate" or not _is_ours(_causal_lm(model)):
        yield
        return
    folder, dtype = Path(args.output_dir) / ENGINE_FOLDER, "bf16" if args.bf16 else "fp16" if args.fp16 else None
    with args.main_process_first(local=False, desc="export for vLLM"):
        if not (folder / MANIFEST).is_file():
            export_for_vllm(model, tokenizer, folder, dtype)
        elif _stored_config(folder) != json.loads(json.dumps(engine_config(model, dtype))):
            raise ValueError(f"{folder} belongs to another model; remove it or take another output_dir")
    with vllm_starts_from(model, folder):
        yield


def _stored_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def attach(trainer):
    """From now on the weights that the trainer sends to vLLM are `as_released`.

    Raises:
        ValueError: if vLLM was started from a folder of our own class, or with another implementation of the model
            (`vllm_model_impl: transformers`), whose names are not the released ones.
    """
    generation, policy = trainer.vllm_generation, _causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    if _is_ours(policy):
        _check_engine(generation)
    named = generation._iter_named_params
    generation._iter_named_params = lambda: as_released(named(), policy)


def _check_engine(generation):
    if generation.model_impl not in ("auto", "vllm"):
        raise ValueError(
            f"vllm_model_impl={generation.model_impl!r}: the weights are sent under the names of vLLM's own class; use "
            "auto or vllm"
        )
    if generation.mode != "colocate":
        return  # the user's server
    config = generation.llm.llm_engine.model_config.hf_config
    if config.model_type not in OURS[1:]:
        raise ValueError(
            f"vLLM was started with model_type={config.model_type}, which has no class of its own there; construct the "
            "trainer inside `with vllm_engine(model, tokenizer, args)`"
        )
