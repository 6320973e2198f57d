"""The released checkpoint layout: how a model's own keys become those on disk, and back.

On disk every expert has its own matrices (`mlp.experts.7.gate_proj.weight`), in the model they are one tensor; and a
multi-token-prediction layer holds copies of the embedding and of the output head.
"""

import contextlib
import inspect
import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoint_files import MANIFEST, FolderSave, check_weights, read_header, verify_folder, weight_names
from .checkpoint_shapes import EXPERT_KEY, MTP_COPIES, check_tensors
from .fp8 import forget_dequantised_source, released_fp8

CLASS_NAMES = (
    "DeepSeekR1Model",
    "DeepSeekR1ForCausalLM",
    "DeepSeekR1ForSequenceClassification",
    "DeepSeekR1ForTokenClassification",
)
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek_r1.DeepSeekR1Config",
    "AutoModel": "modeling_deepseek_r1.DeepSeekR1Model",
    "AutoModelForCausalLM": "modeling_deepseek_r1.DeepSeekR1ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_deepseek_r1.DeepSeekR1ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_deepseek_r1.DeepSeekR1ForTokenClassification",
}
HEAD_KEYS = ("score.weight", "score.bias")


def weight_converters():
    """Fuses per-expert matrices on load; the library reverses it on save."""
    return [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]
        ),
    ]


def register_with_library():
    """Makes the library convert the checkpoints of our classes. By class name too: a config that was read from a
    deepseek_v3 file may reach the library under that model type."""
    for name in ("deepseek_r1", *CLASS_NAMES):
        register_checkpoint_conversion_mapping(name, weight_converters(), overwrite=True)
    # Trainer's own label smoothing shifts the labels only for class names it finds here.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["deepseek_r1"] = "DeepSeekR1ForCausalLM"


@torch.no_grad()
def fuse_expert_keys(module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
    """Load-state-dict pre-hook of the experts: takes per-expert keys, as `save_pretrained` wrote them.

    Trainers resume with a plain `load_state_dict`, which would pass over those keys and leave the experts as they
    were. Each matrix is copied to its place at once, so that experts may be spread over several shards; with
    `assign=True`, a model without storage or a sharded one (a part of which is no view of it), new tensors are made
    instead, and all experts must be there.
    """
    found = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if match := EXPERT_KEY.fullmatch(key[len(prefix) :]):
            found[int(match[1]), match[2]] = state_dict.pop(key)
    if not found:
        return
    gate_up, down, inner = module.gate_up_proj, module.down_proj, module.intermediate_dim
    complete = len(found) == 3 * module.num_experts
    if local_metadata.get("assign_to_params_buffers") or gate_up.is_meta or hasattr(gate_up, "full_tensor"):
        if not complete:
            error_msgs.append(f"{prefix[:-1]}: only {len(found)} of {3 * module.num_experts} matrices to assign")
            return
        example = next(iter(found.values()))
        gate_up, down = (torch.empty(p.shape, dtype=example.dtype, device=example.device) for p in (gate_up, down))
    places = {"gate": lambda e: gate_up[e, :inner], "up": lambda e: gate_up[e, inner:], "down": lambda e: down[e]}
    for (expert, kind), value in found.items():
        if expert >= module.num_experts:
            unexpected_keys.append(f"{prefix}{expert}.{kind}_proj.weight")
            continue
        place = places[kind](expert)
        if place.shape != value.shape:
            error_msgs.append(
                f"size mismatch for {prefix}{expert}.{kind}_proj.weight: the checkpoint has {tuple(value.shape)}, "
                f"the model {tuple(place.shape)}"
            )
            continue
        place.copy_(value)
    for expert in range(module.num_experts):
        missing_keys.extend(f"{prefix}{expert}.{k}_proj.weight" for k in places if (expert, k) not in found)
    state_dict[prefix + "gate_up_proj"], state_dict[prefix + "down_proj"] = gate_up, down


def drop_mtp_copies(module, state_dict, prefix, *_):
    """Load-state-dict pre-hook of an MTP layer: the copies are not loaded, the model shares the originals."""
    for name in MTP_COPIES:
        state_dict.pop(prefix + name, None)


def wrong_checkpoint(missing, mtp_prefixes, path):
    """The error for a checkpoint that lacks weights; names the way out where only MTP layers are absent."""
    shown = ", ".join(sorted(missing)[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    message = f"{path} lacks {len(missing)} weights that the model needs: {shown}."
    if mtp_prefixes and all(any(key.startswith(p) for p in mtp_prefixes) for key in missing):
        return ValueError(
            f"{message} They are the multi-token-prediction layers; load with num_nextn_predict_layers=0 "
            "to go without them."
        )
    return ValueError(f"{message} Check that the folder is complete and that its config.json belongs to it.")


def mtp_prefixes(config):
    """How the keys of the multi-token-prediction layers begin."""
    last, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    return [f"model.layers.{index}." for index in range(last, last + depth)]


def verified_snapshot(repo_id, kwargs):
    """Downloads the weight files and `checksums.json` of a Hub repository -> (local folder, commit)."""
    options = {key: kwargs.get(key) for key in ("cache_dir", "token", "revision")}
    options |= {key: bool(kwargs.get(key)) for key in ("force_download", "local_files_only")}
    inside = f"{kwargs['subfolder'].strip('/')}/" if kwargs.get("subfolder") else ""
    patterns = [inside + name for name in ("*.safetensors", "*.safetensors.index*.json", MANIFEST)]
    folder = snapshot_download(str(repo_id), allow_patterns=patterns, **options)
    return folder, Path(folder).name


def check_local_folder(source, kwargs, verify):
    """Raises what `check_weights` or, if `verify`, `verify_folder` raises if `source` is a folder."""
    folder = os.path.join(source, kwargs.get("subfolder") or "")
    if not os.path.isdir(folder):
        return
    adapter = os.path.join(folder, "adapter_config.json")
    if os.path.isfile(adapter) and not os.path.isfile(os.path.join(folder, "config.json")):
        with open(adapter, encoding="utf-8") as file:  # the weights are in another folder
            folder = str(json.load(file).get("base_model_name_or_path"))
        if not os.path.isdir(folder):
            return
    if verify:
        verify_folder(folder)
    else:
        check_weights(folder, kwargs.get("variant"))


def read_headers(files):
    """-> {tensor name: (path, header entry)} of the files to load. Raises ValueError if one is a pickle or damaged, or
    a tensor is in two of them."""
    headers = {}
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file; pickles can run code when read, convert it first")
        for key, entry in read_header(path).items():
            if key in headers:
                raise ValueError(f"{path}: {key} is in {headers[key][0].name} too; copy or download both again")
            headers[key] = path, entry
    return headers


def check_downloaded(files):
    """What `check_weights` says of a folder in the Hub's cache, for weights without variant."""
    single, _, shards = weight_names()
    if all(path.name == single or shards.fullmatch(path.name) for path in map(Path, files)):
        check_weights(Path(files[0]).parent)


class CheckpointLayoutMixin:
    """Loading and saving in the released layout, for `DeepSeekR1PreTrainedModel`."""

    _folder_save = None  # the save that is under way in this process

    def post_init(self):
        config = self.config
        last, depth = config.num_hidden_layers, config.num_nextn_predict_layers
        own_mtp = len(getattr(self, "layers", [])) > last or hasattr(self, "lm_head")
        copies = "|".join(re.escape(name) for name in MTP_COPIES)
        # Copies that are not read, and (for heads without them) whole MTP layers.
        self._keys_to_ignore_on_load_unexpected = [
            rf"(^|\.)layers\.{index}\." + (f"({copies})$" if own_mtp else "") for index in range(last, last + depth)
        ]
        super().post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, verify=False, **kwargs
    ):
        """As in transformers, but a checkpoint that lacks weights is an error, not a warning, and damage is named.

        Only a freshly declared task head (`score`) may be absent; the library then logs that it is new.
        verify: also compare the sha256 of the weight files, downloaded first if it is a name on the Hub, with the
        `checksums.json` that was written when they were saved.
        Raises ValueError naming the missing weights; where they are MTP layers, naming `num_nextn_predict_layers=0`;
        ValueError or FileNotFoundError naming a weight file that is damaged, absent, a pickle or not the one saved, or
        a tensor in it whose shape or dtype is not the model's.
        """
        source = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickles can run code when read; only safetensors are loaded")
        if isinstance(source, (str, os.PathLike)) and not kwargs.get("gguf_file"):
            kwargs["use_safetensors"] = True
            if verify and not os.path.isdir(source):
                source, kwargs["revision"] = verified_snapshot(source, kwargs)
            check_local_folder(source, kwargs, verify)
        elif verify:
            raise ValueError("verify=True compares safetensors files with checksums.json; there are none here")
        with released_fp8():
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        missing = {key for key in info["missing_keys"] if key not in HEAD_KEYS}
        if missing and pretrained_model_name_or_path is not None:
            raise wrong_checkpoint(missing, mtp_prefixes(model.config), pretrained_model_name_or_path)
        forget_dequantised_source(model, kwargs.get("dtype", kwargs.get("torch_dtype")))
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """The library's step between the empty model and its weights: files, by then downloaded, and model must fit."""
        if state_dict is None and checkpoint_files:
            headers = read_headers(checkpoint_files)
            if not os.path.isdir(load_config.pretrained_model_name_or_path):
                check_downloaded(checkpoint_files)
            quantization = getattr(load_config.hf_quantizer, "quantization_config", None)
            if quantization is None or quantization.quant_method == "fp8":  # others pack weights in their own ways
                block = getattr(quantization, "weight_block_size", None)
                lost = check_tensors(
                    model, headers, block, HEAD_KEYS if load_config.ignore_mismatched_sizes else ()
                )
                if lost:
                    raise wrong_checkpoint(lost, mtp_prefixes(model.config), Path(checkpoint_files[0]).parent)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, *args, **kwargs):
        """The last step before tensors are written: adds the embedding and head under each MTP layer's names. Clones,
        because the library writes a tensor that appears under two names only once."""
        state_dict = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if self._folder_save is not None:
            self._folder_save.begin_weights()
        config = self.config
        if not hasattr(self, "lm_head") or getattr(self, "_hf_peft_config_loaded", False):
            return state_dict
        for index in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
            for name, original in MTP_COPIES.items():
                tensor = state_dict.get(original, state_dict.get("model.embed_tokens.weight"))  # a tied head has no key
                if tensor is None:
                    continue  # not the process that writes
                if tensor.is_meta:
                    tensor = load_offloaded_parameter(self, original)
                state_dict[f"model.layers.{index}.{name}"] = tensor.detach().clone()
        return state_dict

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, in the released layout: per-expert matrices, MTP copies, our code and `auto_map`.

        `checksums.json`, with the sha256 of the weight files, is written last; until then the folder is marked as
        unfinished, and loading it is refused, so that a kill never leaves a mixture that loads. Adapters that are
        saved alone, and sharded checkpoints (`distributed_checkpoint`), have none.
        """
        self.config.auto_map = dict(AUTO_MAP)
        save = super().save_pretrained
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory} is a file; name a folder")
        plain = not getattr(self, "_hf_peft_config_loaded", False) and not given.get("distributed_checkpoint")
        if not plain or not self.should_save_on_this_rank(given.get("is_main_process", True)):
            with _own_class(self):
                return save(save_directory, *args, **kwargs)
        os.makedirs(save_directory, exist_ok=True)
        self._folder_save = FolderSave(save_directory, given.get("variant"))
        try:
            with _own_class(self):
                save(save_directory, *args, **kwargs)
            self._finish_save()
        except BaseException:
            if self._folder_save is not None:
                self._folder_save.abandon()
            raise
        finally:
            self._folder_save = None

    def _finish_save(self):
        """Once: the manifest, before an upload looks for files and before other ranks go on."""
        if self._folder_save is not None:
            self._folder_save.finish()
            self._folder_save = None

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        self._finish_save()
        files_timestamps.pop(MANIFEST, None)  # the mark of the unfinished save may be as young as the manifest
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    def barrier_after_gathered_checkpoint_save(self, *args, **kwargs):
        self._finish_save()
        return super().barrier_after_gathered_checkpoint_save(*args, **kwargs)


@contextlib.contextmanager
def _own_class(model):
    """FSDP2 gives a model a class that it makes inside torch: the library would save torch's code in place of ours."""
    given = type(model)
    model.__class__ = next(cls for cls in given.__mro__ if not cls.__module__.startswith("torch."))
    try:
        yield
    finally:
        model.__class__ = given


__all__ = ["AUTO_MAP", "MTP_COPIES", "CheckpointLayoutMixin", "register_with_library"]
