"""The students: any causal LM, a new one on the teacher's tokenizer, or one made of the teacher's layers; teachers."""

import copy
import re

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes.adapters import add_adapters, quantization_config
from recipes.evaluation import model_fingerprint
from recipes.model_loading import load_causal_lm

SHOWN = 5  # tokens that an error about vocabularies names
LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


def teacher_settings(args):
    """The stage's settings with the teacher as the model to load."""
    settings = copy.copy(args)
    settings.model_name_or_path = args.teacher_model_name_or_path
    settings.weights_dtype = args.teacher_weights_dtype or args.weights_dtype
    settings.model_init_kwargs = args.teacher_model_init_kwargs
    settings.mtp_loss_coef = settings.seq_aux_loss_alpha = settings.bias_update_speed = None
    settings.add_template_tokens = False  # the student's tokens
    settings.max_length = args.max_length if args.method == "logits" else None
    return settings


def load_teacher(args, tokenizer):
    """The teacher, frozen and in evaluation mode. `tokenizer`: its own, or the student's where both are the same."""
    try:
        teacher = load_causal_lm(teacher_settings(args), tokenizer)
    except OSError as error:
        raise ValueError(
            f"teacher_model_name_or_path={args.teacher_model_name_or_path} cannot be loaded ({error}); give an "
            "existing folder or Hub name"
        ) from error
    return teacher.eval().requires_grad_(False)


def teacher_tokenizer(args):
    """The teacher's tokenizer."""
    name = args.teacher_model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher_model_name_or_path={name} has no tokenizer that can be loaded ({error}); "
                         "save one beside its weights") from error  # fmt: skip


# What a resumed run must share beyond `resume_guard.TRAJECTORY_FIELDS`.
GUARDED = (
    "method", "alpha", "temperature", "feature_coef", "feature_layers", "beta", "max_completion_length",
    "max_prompt_length", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs",
    "packing_strategy", "shuffle_dataset", "loss_type", "neftune_noise_alpha", "disable_dropout",
    "lora_rank", "lora_alpha", "lora_dropout", "lora_groups", "lora_target_modules",
)  # fmt: skip


def resume_facts(args, teacher):
    """What a resumed run must find unchanged: settings, and the teacher's weights where they are in the loss."""
    facts = {name: getattr(args, name) for name in GUARDED}
    return facts if teacher is None else facts | {"teacher": model_fingerprint(teacher)}


# ---------------------------------------------------------------- vocabularies


def _some(tokens):
    shown = ", ".join(repr(token) for token in sorted(tokens)[:SHOWN])
    return f"{len(tokens):,} ({shown}{', ...' if len(tokens) > SHOWN else ''})"


def check_same_vocabulary(args, student, teacher):
    """ValueError unless two tokenizers give every token the same number, as comparing distributions needs."""
    own, other = student.get_vocab(), teacher.get_vocab()
    if own == other:
        return
    moved = {token for token in own.keys() & other.keys() if own[token] != other[token]}
    raise ValueError(
        f"method={args.method} compares the distributions of student and teacher token by token, but their "
        f"vocabularies differ ({len(own):,} tokens of {student.name_or_path}, {len(other):,} of "
        f"{teacher.name_or_path}). Only the student has: {_some(own.keys() - other.keys())}. Only the teacher has: "
        f"{_some(other.keys() - own.keys())}. With another number: {_some(moved)}. method=traces works with any "
        "vocabulary: it trains on the teacher's text; or take student_config or student_layers, which use the "
        "teacher's tokenizer"
    )


def check_same_head(args, student, teacher):
    """ValueError unless both models' heads have as many rows."""
    own, other = (each.get_text_config().vocab_size for each in (student, teacher))
    if own != other:
        raise ValueError(
            f"method={args.method}: the student's head has {own:,} rows (vocab_size), the teacher's {other:,}, on the "
            "same tokenizer: make the smaller one larger with resize_token_embeddings and save it, or use method=traces"
        )


# ---------------------------------------------------------------- students


def _teacher_config(args):
    config = AutoConfig.from_pretrained(
        args.teacher_model_name_or_path, trust_remote_code=args.trust_remote_code
    ).get_text_config()
    if config.model_type in ("deepseek_v3", "deepseek_v2"):
        return CONFIG_MAPPING["deepseek_r1"].from_pretrained(args.teacher_model_name_or_path)
    return config


def new_config(args, tokenizer):
    """`student_config` filled in: the teacher's vocabulary and context, the tokenizer's special tokens."""
    given, teacher = dict(args.student_config), _teacher_config(args)
    found = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found["vocab_size"] = teacher.vocab_size
    if getattr(teacher, "max_position_embeddings", None):
        found["max_position_embeddings"] = teacher.max_position_embeddings
    return CONFIG_MAPPING[given.pop("model_type")](**(found | given))


def chosen_layers(given, depth):
    """The teacher's layers that a student keeps, in order: those given, or so many, evenly spread from first to last.

    >>> chosen_layers([3], 6), chosen_layers([0, 4], 6)
    ([0, 2, 5], [0, 4])

    Raises:
        ValueError: for layers that the teacher does not have, or in another order.
    """
    if len(given) > 1:
        if list(given) != sorted(set(given)) or not 0 <= given[0] <= given[-1] < depth:
            raise ValueError(f"student_layers={given} must rise and lie in [0, {depth - 1}], the teacher's layers")
        return list(given)
    count = given[0]
    if not 1 <= count <= depth:
        raise ValueError(f"student_layers={count} must lie in [1, {depth}], the number of the teacher's layers")
    return [round(place * (depth - 1) / (count - 1)) for place in range(count)] if count > 1 else [0]


def student_of_layers(teacher, given):
    """A causal LM like `teacher` with some of its layers (and all of its multi-token-prediction layers), weights
    copied. Source: initialisation of DistilBERT (arXiv:1910.01108, Sec. 3) from every second layer."""
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    kept = chosen_layers(given, depth)
    text.num_hidden_layers = len(kept)
    if getattr(text, "first_k_dense_replace", None) is not None:
        text.first_k_dense_replace = sum(place < text.first_k_dense_replace for place in kept)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, [getattr(text, name)[place] for place in kept])
    student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    new_places = {old: new for new, old in enumerate(kept)}
    more = getattr(text, "num_nextn_predict_layers", 0) or 0
    new_places |= {depth + place: len(kept) + place for place in range(more)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        layer = LAYER.search(name)
        if layer is None:
            weights[name] = tensor
        elif int(layer[2]) in new_places:
            weights[LAYER.sub(rf"\g<1>layers.{new_places[int(layer[2])]}.", name, count=1)] = tensor
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def build_student(args, tokenizer):
    """The student to be trained, with adapters where `lora_rank` asks for them."""
    settings = copy.copy(args)
    if args.method == "on_policy":
        settings.max_length = None  # prompt and completion have limits of their own
    quantisation = quantization_config(args)
    if args.student_config is not None:
        if quantisation is not None or args.lora_rank:
            raise ValueError("student_config is a new model: adapters and quantised weights need a trained one")
        student = AutoModelForCausalLM.from_config(new_config(args, tokenizer), dtype=_dtype(args))
        _check_length(settings, student.config)
    elif args.student_layers is not None:
        if quantisation is not None:
            raise ValueError("student_layers copies the teacher's weights: leave load_in_4bit and load_in_8bit out")
        with torch.no_grad():
            student = student_of_layers(load_causal_lm(settings, tokenizer), args.student_layers)
    else:
        student = load_causal_lm(settings, tokenizer, quantisation)
    return add_adapters(student, args) if args.lora_rank else student


def _dtype(args):
    return getattr(torch, args.weights_dtype)


def _check_length(settings, config):
    context = getattr(config, "max_position_embeddings", None)
    if context and (settings.max_length or 0) > context:
        raise ValueError(
            f"max_length={settings.max_length} exceeds student_config.max_position_embeddings={context}; lower the "
            "first or raise the second"
        )
