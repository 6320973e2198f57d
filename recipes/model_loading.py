"""Tokenizer, model config and model of a stage, from its settings."""

import logging
from datetime import timedelta
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import modeling_deepseek_r1  # noqa: F401  (registers the model type deepseek_r1)
from modeling_deepseek_r1.expert_parallel import expert_groups, parallelise_experts
from recipes.chat_format import NEEDED_TOKENS, set_chat_template
from recipes.data import check_vocabulary
from recipes.parallel_settings import divisors, launched_with

logger = logging.getLogger(__name__)

DEEPSEEK_TYPES = ("deepseek_r1", "deepseek_v3", "deepseek_v2")
DIVIDED = {"expert_parallel_size": ("n_routed_experts",), "tensor_parallel_size": (
    "num_attention_heads", "intermediate_size", "moe_intermediate_size")}  # fmt: skip


def find_tokenizer(args):
    """Where the tokenizer is: as given, else beside the packed data, else with the weights."""
    if args.tokenizer_name_or_path:
        return args.tokenizer_name_or_path
    packed = Path(args.dataset_name or "") / "tokenizer"
    if args.dataset_name and packed.is_dir():
        return str(packed)
    if args.model_name_or_path:
        return args.model_name_or_path
    raise ValueError(
        f"tokenizer_name_or_path is unset, and neither dataset_name={args.dataset_name} (a packed data set with a "
        "tokenizer folder) nor model_name_or_path brings one; give a tokenizer folder or Hub name, or train one: "
        "python -m data_scripts.train_tokenizer --help"
    )


def load_tokenizer(args):
    """The tokenizer; says how to make the default data where it is missing."""
    if not args.dataset_name:
        raise ValueError("dataset_name is unset: give a packed data set, text files, a folder or a Hub name")
    size = Path(args.dataset_name).name
    if args.dataset_name.startswith("data/") and not Path(args.dataset_name).exists():
        raise ValueError(
            f"dataset_name={args.dataset_name} does not exist yet; make it: python -m data_scripts.prepare_pretraining "
            f"--output_dir {args.dataset_name} --size {size if size in ('tiny', 'nano') else 'nano'}"
        )
    tokenizer = AutoTokenizer.from_pretrained(find_tokenizer(args))
    if args.model_name_or_path:
        _check_same_vocabulary(tokenizer, args.model_name_or_path)
    return tokenizer


def _check_same_vocabulary(tokenizer, model):
    """ValueError if the weights come with another vocabulary: they would read every token as something else."""
    try:
        own = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        return  # the weights bring no tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"model_name_or_path={model} has another vocabulary ({len(own)} tokens) than the data's tokenizer "
            f"({len(tokenizer)} tokens, {tokenizer.name_or_path}); prepare the data with the model's: "
            f"python -m data_scripts.prepare_pretraining --from_folder {model} ..."
        )


def build_config(args, tokenizer=None):
    """The model's config: `model_config` as a new one, or laid over that of `model_name_or_path`.

    Raises:
        ValueError: for another model family; for a vocabulary smaller than the tokenizer.
    """
    overrides = dict(args.model_config)
    if args.label_smoothing_factor:
        overrides["label_smoothing"] = args.label_smoothing_factor
    family = CONFIG_MAPPING["deepseek_r1"]
    if args.model_name_or_path is None:
        if tokenizer is not None:
            special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            overrides = special | {"vocab_size": len(tokenizer)} | overrides
        config = family(**overrides)
    else:
        found = AutoConfig.from_pretrained(args.model_name_or_path).model_type
        if found not in DEEPSEEK_TYPES:
            raise ValueError(
                f"model_name_or_path={args.model_name_or_path} has model_type={found!r}; this recipe continues "
                f"{', '.join(DEEPSEEK_TYPES)} weights"
            )
        config = family.from_pretrained(args.model_name_or_path, **overrides)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
    if args.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length={args.sequence_length} exceeds model_config.max_position_embeddings="
            f"{config.max_position_embeddings}; lower the first or raise the second"
        )
    return config


def builds_on(args):
    """Where new weights are drawn: on the GPU that trains them (1.8 B take a second there, half a minute on a CPU),
    unless they are to be sharded and may not fit one."""
    sharded = launched_with(args, "FSDP") or launched_with(args, "DEEPSPEED")
    return args.device if args.device.type == "cuda" and not sharded else torch.device("cpu")


def check_spread(args, config):
    """ValueError unless the model's sizes can be divided as `expert_parallel_size` and `tensor_parallel_size` say."""
    sizes = [(name, getattr(args, name, 1)) for name in ("expert_parallel_size", "tensor_parallel_size")]
    for name, size in sizes:
        if size == 1:
            continue
        if config.model_type not in DEEPSEEK_TYPES:
            raise ValueError(f"{name}={size} is for DeepSeek models, this is a {config.model_type}; use 1")
        for field in DIVIDED[name]:
            total = getattr(config, field, None)
            if not total or total % size:
                fitting = f"one of {divisors(total, args.world_size)}" if total else "1"
                raise ValueError(f"{name}={size} must divide {field}={total}; use {fitting} on {args.world_size} "
                                 "processes")  # fmt: skip


def spread(args, model):
    """Leaves each process its share of the experts or of every matrix, where `expert_parallel_size` or
    `tensor_parallel_size` says so; returns `model`."""
    if getattr(args, "expert_parallel_size", 1) > 1:
        timeout = timedelta(seconds=args.collective_timeout_s)  # new groups do not take that of the first
        groups = expert_groups(args.expert_parallel_size, timeout)
        parallelise_experts(model, *groups, equal_rows=args.equal_rows)
    size = getattr(args, "tensor_parallel_size", 1)
    if size > 1:
        config = DistributedConfig(tp_size=size, tp_plan="auto", fsdp_size=args.world_size // size)
        config, _, mesh = model.prepare_distribute_model(config)
        model = model.maybe_distribute_model(model.to(args.device), config, mesh)
    return model


def build_model(args, tokenizer):
    """A model with weights in `weights_dtype` (float32: bf16 compute is autocast's), new or with the given weights.

    MTP layers that get no loss (mtp_loss_coef 0) are frozen: neither DDP nor AdamW should see them.
    """
    config = build_config(args, tokenizer)
    check_spread(args, config)
    kwargs = {"dtype": getattr(torch, args.weights_dtype), "attn_implementation": args.attn_implementation}
    if args.model_name_or_path is None:
        with builds_on(args):
            model = AutoModelForCausalLM.from_config(config, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, **kwargs)
    if config.num_nextn_predict_layers and not config.mtp_loss_coef:
        logger.warning("mtp_loss_coef=0: the multi-token-prediction layers are frozen")
        model.freeze_mtp()
    return spread(args, model)


# ---------------------------------------------------------------- stages after pretraining


def load_chat_tokenizer(args):
    """The tokenizer of a stage that starts from weights, with the chat template that `chat_template` names, if any."""
    source = args.tokenizer_name_or_path or args.model_name_or_path
    if source.startswith(("/", ".", "~", "runs/")) and not Path(source).expanduser().exists():
        raise FileNotFoundError(f"{source} does not exist in {Path.cwd()}; recipes/pretrain.py makes a base model")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    if args.chat_template:
        set_chat_template(tokenizer, args.chat_template, getattr(args, "add_template_tokens", False))
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {source} has no chat template; set chat_template, e.g. to deepseek_r1")
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has no pad_token; add one (its eos_token does) and save it")
    return tokenizer


EMBEDDING_ROWS = 64  # tensor cores want the head's width in multiples

# What `load_causal_lm` passes to `from_pretrained` itself: from which field.
INIT_KWARGS = {
    "dtype": "weights_dtype", "torch_dtype": "weights_dtype", "trust_remote_code": "trust_remote_code",
    "quantization_config": "load_in_4bit or load_in_8bit", "config": "the recipe",
}  # fmt: skip


def make_room(model, tokenizer, most):
    """Grows the embeddings to the tokenizer's size, as a multiple of 64 rows, where it has up to `most` tokens more.

    New rows are drawn with the old ones' mean and spread: the library's, all but equal to the mean, have a cosine of
    0.999 to each other after 36 steps, and </think> is never said. Spare rows are used as they are.
    Raises:
        ValueError: for more tokens than `most`: the tokenizer is another model's.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows + most:
        check_vocabulary(tokenizer, model.config.get_text_config())
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=EMBEDDING_ROWS, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # tied: the same rows twice
            old = layer.weight.detach()[:rows].float()
            drawn = torch.randn_like(layer.weight[rows:], dtype=torch.float32) * old.std(0) + old.mean(0)
            layer.weight.data[rows:] = drawn.to(layer.weight.dtype)


def load_causal_lm(args, tokenizer, quantization_config=None, auto_class=AutoModelForCausalLM, **config_changes):
    """Any causal LM of `model_name_or_path`, in `weights_dtype`; deepseek_v2/v3 folders become deepseek_r1 models.

    `auto_class`: for another head on it; `config_changes`: fields of its config, such as num_labels.
    MTP layers that get no loss (mtp_loss_coef 0) are frozen: neither DDP nor AdamW should see them.
    Raises:
        ValueError: for settings of DeepSeek models on another one; for a vocabulary smaller than the tokenizer; for
            `model_init_kwargs` that other fields set; for a `max_length` beyond the model's context.
    """
    name, kwargs = args.model_name_or_path, dict(args.model_init_kwargs or {})
    for taken, field in INIT_KWARGS.items():
        if taken in kwargs:
            raise ValueError(f"model_init_kwargs holds {taken!r}, which {field} sets; take it out there")
    found = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **config_changes)
    names = ("mtp_loss_coef", "seq_aux_loss_alpha", "bias_update_speed")
    overrides = {field: getattr(args, field) for field in names if getattr(args, field, None) is not None}
    if found.model_type in DEEPSEEK_TYPES:
        config = CONFIG_MAPPING["deepseek_r1"].from_pretrained(name, **overrides, **config_changes)
        if overrides.get("mtp_loss_coef") and not config.num_nextn_predict_layers:
            raise ValueError(
                f"mtp_loss_coef={args.mtp_loss_coef}: {name} has no multi-token-prediction layers; leave it unset"
            )
    elif overrides:
        raise ValueError(f"{', '.join(overrides)}: {name} is a {found.model_type} model, which has no such setting")
    else:
        config = found
    check_spread(args, config)
    grows = getattr(args, "add_template_tokens", False)
    if not grows:
        check_vocabulary(tokenizer, config.get_text_config())
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and (getattr(args, "max_length", None) or 0) > context:
        raise ValueError(f"max_length={args.max_length} exceeds the context of {name} ({context} tokens); lower it")
    model = auto_class.from_pretrained(
        name, config=config, dtype=getattr(torch, args.weights_dtype), quantization_config=quantization_config,
        trust_remote_code=args.trust_remote_code, **kwargs,
    )  # fmt: skip
    if grows:
        make_room(model, tokenizer, len(NEEDED_TOKENS.get(args.chat_template, ())))
    if getattr(config, "num_nextn_predict_layers", 0) and hasattr(model, "freeze_mtp") and not config.mtp_loss_coef:
        logger.warning("mtp_loss_coef=0: the multi-token-prediction layers are frozen")
        model.freeze_mtp()
    return spread(args, model)
