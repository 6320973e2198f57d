"""LoRA on a DeepSeek-R1 model: which weights each group names, what share of the model they are, quantised bases.

Attention, the shared experts and dense MLPs are linear layers. The routed experts are 3-D parameters (E, ...), which
PEFT adapts by `target_parameters`: one pair of factors for each expert.
Source: LoRA (arXiv:2106.09685); QLoRA (arXiv:2305.14314) for 4-bit bases.
"""

import importlib.util
import logging

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from recipes.zero_setup import whole_size

logger = logging.getLogger(__name__)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Suffixes of module names, and for the 3-D experts of parameter names.
LORA_GROUPS = {
    "attention": tuple(f"self_attn.{name}" for name in (
        "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    "shared_experts": tuple(f"shared_experts.{name}" for name in PROJECTIONS),
    "dense_mlp": tuple(f"mlp.{name}" for name in PROJECTIONS),
    "mtp_projection": ("eh_proj",),
    "routed_experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}  # fmt: skip


def _linear_suffixes(model, groups):
    """The suffixes of the groups that some linear layer of this model has."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = [suffix for group in groups if group != "routed_experts" for suffix in LORA_GROUPS[group]]
    return [suffix for suffix in wanted if any(name.endswith("." + suffix) for name in names)]


def lora_config(model, args, task_type="CAUSAL_LM"):
    """PEFT's config for `lora_groups` (a DeepSeek model) or `lora_target_modules` (any).

    `task_type`: PEFT's; with SEQ_CLS and TOKEN_CLS the head is trained whole.

    Raises:
        ValueError: if nothing of the model is named; for dropout on routed experts, which PEFT has not.
    """
    alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    common = {"r": args.lora_rank, "lora_alpha": alpha, "task_type": task_type}
    if args.lora_target_modules:
        targets = "all-linear" if args.lora_target_modules == ["all-linear"] else list(args.lora_target_modules)
        return LoraConfig(target_modules=targets, lora_dropout=args.lora_dropout, **common)
    if not hasattr(model, "routers"):
        raise ValueError(
            f"lora_groups names parts of a DeepSeek model, not of {type(model).__name__}; give lora_target_modules, "
            "e.g. all-linear"
        )
    modules, parameters = _linear_suffixes(model, args.lora_groups), []
    if "routed_experts" in args.lora_groups:
        names = [name for name, _ in model.named_parameters()]
        parameters = [p for p in LORA_GROUPS["routed_experts"] if any(name.endswith(p) for name in names)]
    if not modules and not parameters:
        raise ValueError(f"lora_groups={', '.join(args.lora_groups)} names nothing that this model has")
    if parameters and args.lora_dropout:
        raise ValueError(
            f"lora_dropout={args.lora_dropout} cannot act on routed experts (PEFT adapts the weights, not their "
            "input); set it to 0 or take routed_experts out of lora_groups"
        )
    return LoraConfig(
        target_modules=modules, target_parameters=parameters or None, lora_dropout=args.lora_dropout, **common
    )


def add_adapters(model, args, task_type="CAUSAL_LM"):
    """The model with fresh adapters; prints the share of weights that they adapt and that are trained."""
    config = lora_config(model, args, task_type)
    sizes = {name: whole_size(parameter) for name, parameter in model.named_parameters()}
    peft_model = get_peft_model(model, config)
    if hasattr(model, "freeze_mtp") and not model.config.mtp_loss_coef:
        model.freeze_mtp()  # with the adapters there, which would never get a gradient
    trained = sum(whole_size(p) for p in peft_model.parameters() if p.requires_grad)
    adapted = sum(size for name, size in sizes.items() if _is_adapted(name, model, config))
    total = sum(sizes.values())
    logger.warning(
        "LoRA of rank %d: %s of %s weights adapted (%.1f %%), %s trained (%.2f %%)", args.lora_rank, f"{adapted:,}",
        f"{total:,}", 100 * adapted / total, f"{trained:,}", 100 * trained / total,
    )  # fmt: skip
    return peft_model


def _is_adapted(name, model, config):
    """Whether the parameter called `name` before the adapters came has one now that is trained."""
    module = model.get_submodule(name.rpartition(".")[0])
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return False
    if any(name.endswith(suffix) for suffix in config.target_parameters or ()):
        return True
    return name.endswith(".weight") and hasattr(module, "lora_A")


# ---------------------------------------------------------------- quantised bases


def quantization_config(args):
    """bitsandbytes' settings for `load_in_4bit` / `load_in_8bit`, or None.

    Raises:
        ValueError: if the library is missing.
    """
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        name = "load_in_4bit" if args.load_in_4bit else "load_in_8bit"
        raise ValueError(f"{name}=true needs bitsandbytes: pip install bitsandbytes, or leave it out")
    kept = ["lm_head"]  # TRL's loss reads it as a plain matrix; routers and routed experts are no linear layers
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=kept,
    )  # fmt: skip


def describe_quantisation(model):
    """One line: the share of weights in 4 or 8 bit, and what stays in 16 or 32 bit."""
    quantised = kept = 0
    others = {}
    for name, parameter in model.named_parameters():
        # Packed 4-bit weights hold two values a byte; their shape before packing is in `quant_state`.
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else parameter.numel()
        if parameter.dtype in (torch.uint8, torch.int8):
            quantised += size
        else:
            kept += size
            kind = "routed experts" if ".experts." in name else name.split(".")[-2] if "." in name else name
            others[kind] = others.get(kind, 0) + size
    largest = sorted(others.items(), key=lambda item: -item[1])[:6]
    listed = ", ".join(f"{kind} {size:,}" for kind, size in largest)
    return (
        f"{quantised:,} of {quantised + kept:,} weights quantised ({quantised / (quantised + kept):.1%}); in full "
        f"precision: {listed}"
    )
