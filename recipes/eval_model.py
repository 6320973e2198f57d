"""Loading any causal language model for evaluation, and the facts about it that eval.json keeps."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_deepseek_r1  # noqa: F401  (registers the model type deepseek_r1)
from recipes.chat_format import set_chat_template
from recipes.data import check_vocabulary
from recipes.logging_callbacks import git_commit

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "reasoning-gym", "math-verify")


def check_output_dir(folder):
    """Makes the folder; OSError where nothing can be written, before any work is done."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"output_dir={folder} is read-only; take another one")


def _source(args, gguf=True):
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    return source | ({"gguf_file": args.gguf_file} if gguf and args.gguf_file else {})


def load_tokenizer(args):
    """The model's tokenizer or the one named, with the chat template of a file if one is given."""
    own = args.tokenizer_name_or_path is None
    tokenizer = AutoTokenizer.from_pretrained(
        args.model_name_or_path if own else args.tokenizer_name_or_path,
        **(_source(args) if own else {"trust_remote_code": args.trust_remote_code}))
    if args.chat_template is not None:
        set_chat_template(tokenizer, args.chat_template)
    return tokenizer


def load_model(args, tokenizer, device):
    """The model on `device`, in evaluation mode, with its adapter if there is one."""
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.torch_dtype(device),
                                                 **_source(args))
    check_vocabulary(tokenizer, model.config.get_text_config())
    if args.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    return model.to(device).eval()


def _versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a task that needs it says so itself
            found[name] = None
    return found


def model_facts(args, model, accelerator):
    """Where the model came from and what it ran with and on."""
    device = accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "model": {
            "name_or_path": args.model_name_or_path, "revision": args.revision, "adapter": args.adapter,
            "gguf_file": args.gguf_file, "commit": getattr(model.config, "_commit_hash", None),
            "type": model.config.model_type, "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "device": {"type": device.type, "name": where, "processes": accelerator.num_processes},
        "batch_size": args.batch_size,
        "versions": _versions() | {"code": git_commit()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
