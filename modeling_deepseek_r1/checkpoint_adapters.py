"""Merges a LoRA adapter of PEFT into a checkpoint folder, tensor by tensor.

W + scaling * B A (LoRA, arXiv:2106.09685), scaling = alpha / r or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732). Factors
of the routed experts, which PEFT adapts by `target_parameters`, hold all experts: A (E * r, in) one expert after the
other, B (out, r * E) with the expert as the fastest index.
"""

import functools
import json
import math
import re
import shutil
from pathlib import Path

from .checkpoint_cast import check_all_used, plan_tensor
from .checkpoint_files import read_header
from .checkpoint_reader import TensorReader, logical_tensors, open_checkpoint, read_config
from .checkpoint_writer import CheckpointWriter, copy_others, refuse_existing, write_config
from .layout import MTP_COPIES

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Settings of PEFT's LoRA that are honoured here or change nothing once the adapter is trained. Others must be unset.
HONOURED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters", "modules_to_save"}
WITHOUT_EFFECT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias",
    "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "loftq_config",
    "eva_config",
}  # fmt: skip
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that alter the base's weights
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def read_settings(folder):
    """adapter_config.json of a LoRA adapter, as a dict. Raises ValueError for what cannot be merged, naming it."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}; is it an adapter that PEFT saved?")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is unreadable ({error!r}); copy or download it again") from error
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type={kind!r} cannot be merged here, only LORA; use PEFT's merge_and_unload")
    others = [name for name in settings.keys() - HONOURED - WITHOUT_EFFECT if settings[name]]
    if others:
        name = min(others)
        raise ValueError(f"{path}: {name}={settings[name]!r} cannot be merged here; use PEFT's merge_and_unload")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base's weights; convert it to plain LoRA with PEFT"
        )
    if not (Path(folder) / ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} has no {ADAPTER}; a pickle (adapter_model.bin) is not read, save it as safetensors"
        )
    return settings


class Adapter:
    """A LoRA adapter on disk.

    After construction `factors` is {weight's name: (key of A, key of B, scaling, expert count or None)} with the names
    of the released layout (`...mlp.experts.gate_up_proj` for all experts), `replaced` {weight's name: key}.

    Args:
        shapes: {name: shape} of the base's logical tensors.
    Raises:
        ValueError: naming the key of an adapter that finds no weight or does not fit it.
    """

    def __init__(self, folder, shapes):
        self.folder, self.settings, self.shapes = Path(folder), read_settings(folder), shapes
        self.reader = TensorReader(folder, dict.fromkeys(read_header(self.folder / ADAPTER), ADAPTER))
        self.read = functools.lru_cache(maxsize=4)(lambda key: self.reader.read(key).float())
        self.factors, self.replaced = {}, {}
        for key in self.reader.entries:
            name = key.removeprefix(PREFIX)
            if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
                if match[2] == "A":
                    self._add_factors(key, match[1])
                elif key[: -len("B.weight")] + "A.weight" not in self.reader.entries:
                    raise ValueError(f"{self.folder / ADAPTER}: {key} has no lora_A; copy the adapter again")
            else:
                self._add_replacement(key, name)
        if not self.factors and not self.replaced:
            raise ValueError(f"{self.folder / ADAPTER} holds no tensors; was it saved under ZeRO-3 without gathering?")

    def _entry(self, key):
        return self.reader.entries[key].shape

    def _setting(self, field, module):
        """`rank_pattern` and `alpha_pattern`: the first whose pattern ends the module's name, else the common value."""
        common, patterns = {"rank": "r", "alpha": "lora_alpha"}[field], self.settings.get(f"{field}_pattern") or {}
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(matching, self.settings[common])

    def _add_factors(self, key, module):
        other = key[: -len("A.weight")] + "B.weight"
        if other not in self.reader.entries:
            raise ValueError(f"{self.folder / ADAPTER}: {key} has no lora_B; copy the adapter again")
        inner, outer = self._entry(key), self._entry(other)
        plain = module.replace(".base_layer", "")
        expert = f"{plain}.0.gate_proj.weight"
        if plain + ".weight" in self.shapes and plain == module:
            name, module, experts = plain + ".weight", plain, None
            out, columns = self.shapes[name]
        elif expert in self.shapes:
            height, hidden = self.shapes[expert]
            experts = sum(
                re.fullmatch(re.escape(plain) + r"\.\d+\.gate_proj\.weight", n) is not None for n in self.shapes
            )
            # PEFT nests the wrappers of two parameters of one module; their shapes tell which is which.
            kind, out, columns = ("gate_up_proj", 2 * height, hidden)
            if (outer[0], inner[1]) != (out, columns):
                kind, out, columns = ("down_proj", hidden, height)
            name = module = f"{plain}.{kind}"
        else:
            raise ValueError(
                f"{self.folder / ADAPTER}: {key} finds no weight in the base; is it the base it was trained on, and no "
                "embedding (use PEFT's merge_and_unload)?"
            )
        rank = self._setting("rank", module)
        total = rank * (experts or 1)
        if inner != (total, columns) or outer != (out, total) or name in self.factors:
            raise ValueError(
                f"{self.folder / ADAPTER}: {key} {inner} and lora_B {outer} do not fit {name} ({out}, {columns}) with "
                f"rank {rank}" + (f" and {experts} experts" if experts else "") + "; is it the base it was trained on?"
            )
        scaling = self._setting("alpha", module) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        self.factors[name] = (key, other, scaling, experts)

    def _add_replacement(self, key, name):
        name = name.replace(".base_layer", "")
        if "lora_" in name or name not in self.shapes:
            raise ValueError(
                f"{self.folder / ADAPTER}: {key} finds no weight in the base; is it the base it was trained on? "
                "A reward model's adapter goes into a reward model: save one from the base first"
            )
        if self._entry(key) != self.shapes[name]:
            raise ValueError(
                f"{self.folder / ADAPTER}: {key} {self._entry(key)} does not fit the base's {self.shapes[name]}"
            )
        self.replaced[name] = key

    def merged(self, tensor):
        """The pieces of a base tensor with the adapter, as a callable for `plan_tensor`; None if it has none."""
        name = self._original(tensor.name)
        update = self._update(name)
        if update is None and name not in self.replaced:
            return None

        def pieces():
            for start, piece in tensor.pieces():
                if name in self.replaced:
                    piece = self.reader.read(self.replaced[name], start, start + piece.shape[0])
                if update is not None:
                    a, b, scaling = update()
                    piece = piece.float() + scaling * (b[start : start + piece.shape[0]] @ a)
                yield start, piece

        return pieces

    def _original(self, name):
        """An MTP layer's copy of embedding or head follows the original, which the model shares."""
        if name not in self.factors and name not in self.replaced:
            for copy, original in MTP_COPIES.items():
                if re.fullmatch(rf"model\.layers\.\d+\.{re.escape(copy)}", name):
                    return original
        return name

    def _update(self, name):
        """-> callable giving (A (r, in), B (out, r), scaling) of a weight, or None."""
        if name in self.factors:
            key_a, key_b, scaling, _ = self.factors[name]
            return lambda: (self.read(key_a), self.read(key_b), scaling)
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        kind = "down_proj" if match and match[3] == "down" else "gate_up_proj"
        if not match or f"{match[1]}.{kind}" not in self.factors:
            return None
        key_a, key_b, scaling, experts = self.factors[f"{match[1]}.{kind}"]
        expert, height = int(match[2]), self.shapes[name][0]
        rows = slice(height, 2 * height) if match[3] == "up" else slice(0, height)

        def factors():
            a, b = self.read(key_a), self.read(key_b)
            return a.unflatten(0, (experts, -1))[expert], b.unflatten(1, (-1, experts))[rows, :, expert], scaling

        return factors


def merge_adapter(base, adapter, target, max_shard_size="5GB", progress=False):
    """Writes the folder `base` with the LoRA adapter merged into its weights as `target`. Returns the names written.

    Tokenizer and chat template are the adapter's where it has them. Sums are taken in float32 and rounded to the
    base's dtype.

    Raises ValueError for an FP8 base, another kind of adapter, a key without weight; and what `cast` raises.
    """
    refuse_existing(target)
    fields = read_config(base)
    if fields.get("quantization_config"):
        raise ValueError(f"{Path(base) / 'config.json'} has a quantization_config; cast the base to bf16 first")
    reader = open_checkpoint(base)
    tensors = logical_tensors(reader, fields)
    check_all_used(reader, tensors)
    lora = Adapter(adapter, {tensor.name: tensor.shape for tensor in tensors})
    tied = {"model.embed_tokens.weight", "lm_head.weight"} & {*lora.factors, *lora.replaced}
    if fields.get("tie_word_embeddings") and tied:
        raise ValueError(f"{Path(adapter) / ADAPTER} changes {min(tied)}, which the base ties to another weight "
                         "(tie_word_embeddings=true); use PEFT's merge_and_unload")  # fmt: skip
    groups = [plan_tensor(tensor, pieces=lora.merged(tensor)) for tensor in tensors]

    def finish(folder):
        copy_others(base, folder)
        for path in [path for pattern in TOKENIZER_FILES for path in Path(adapter).glob(pattern)]:
            shutil.copyfile(path, folder / path.name)
        write_config(folder, fields)

    settings = {"command": "merge-adapter", "config": fields}
    sources = [*reader.files(), Path(base) / "config.json", Path(adapter) / ADAPTER, Path(adapter) / SETTINGS]
    return CheckpointWriter(target, groups, settings, sources, max_shard_size).run(finish, progress)
