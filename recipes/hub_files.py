"""Which files of a run folder go to the Hub: the model and what explains it, never what training needs to go on."""

import fnmatch
import json
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from modeling_deepseek_r1.checkpoint_files import INDEX, MANIFEST, WEIGHTS, read_header, weight_files

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VALUE_HEAD = "value_head.safetensors"
CARD = "README.md"
# Beside weights, code and card. Anything that is not named here stays where it is.
TOKENIZER = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]  # fmt: skip
MODEL = ["config.json", "generation_config.json", MANIFEST, VALUE_HEAD]
RESULTS = ["config.yaml", "eval.json", "metrics.jsonl", "report.html", "*.svg", "plots/*.svg", "LICENSE*"]
# What a push replaces as a whole: of these, a branch keeps none that the folder does not have. README.md, licences,
# pictures and code are not among them: people add theirs on the Hub.
REPLACED = TOKENIZER + MODEL + [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model.bin.index.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin", "config.yaml", "eval.json",
    "metrics.jsonl", "report.html",
]  # fmt: skip
TOKENIZERS = (  # one of these makes a tokenizer
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz")


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file if it cannot be read as one."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save it again") from error
    if type(found) is not dict:
        raise ValueError(f"{path} is damaged (it holds no object); copy or save it again")
    return found


def is_adapter(folder):
    """Whether a folder holds an adapter and no weights of a whole model."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG).is_file() and not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file())


def has_tokenizer(folder):
    return any((Path(folder) / name).is_file() for name in TOKENIZERS)


def is_replaced(name):
    """Whether a push removes the file `name` of a branch if the folder has none."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in REPLACED)


def code_files(folder):
    """Names of the Python files that loading the folder runs: those of `auto_map` and what they import.

    Raises:
        ValueError: if one is missing, or a DeepSeek-R1 folder names none.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    auto_map = config.get("auto_map") or {}
    if config.get("model_type") == "deepseek_r1" and "AutoConfig" not in auto_map:
        raise ValueError(
            f"{folder / 'config.json'} has no auto_map: nobody without this package could load the model; save it "
            "again by save_pretrained"
        )
    references = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value])]
    # "user/repo--module.Class" is code of another repository.
    todo = sorted({name.rpartition(".")[0] for name in references if name and "--" not in name})
    found = []
    while todo:
        name = f"{todo.pop()}.py"
        if name in found:
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its code needs; save the model again by save_pretrained")
        found.append(name)
        todo += get_relative_imports(folder / name)
    return sorted(found)


def _weights(folder, adapter):
    """Names of the files with weights, each of them whole."""
    if adapter:
        if not (folder / ADAPTER_WEIGHTS).is_file():
            found = "; adapter_model.bin is a pickle file" if (folder / "adapter_model.bin").is_file() else ""
            raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}{found}; save the adapter as safetensors")
        read_header(folder / ADAPTER_WEIGHTS)
        return [ADAPTER_WEIGHTS, ADAPTER_CONFIG]
    if not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickled:
            raise ValueError(
                f"{folder} has its weights as a pickle file ({pickled[0]}), which may run any code when it is read; "
                "load it where you trust it and save it by save_pretrained, which writes safetensors"
            )
    names = set(weight_files(folder).values())
    return sorted(names) + ([INDEX] if WEIGHTS not in names else [])


def select_files(folder, adapter=False):
    """What goes to the Hub. -> ({path in the repository: local Path}, {left out: why})

    Raises:
        ValueError, FileNotFoundError: if weights or code are missing or damaged, or pickled.
    """
    folder = Path(folder)
    if not adapter and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
    names = _weights(folder, adapter) + ([] if adapter else code_files(folder))
    patterns = TOKENIZER + RESULTS + [CARD] + ([] if adapter else MODEL)
    if is_adapter(folder):
        patterns.append(MANIFEST)  # beside whole weights it is theirs
    inside = {path.relative_to(folder).as_posix(): path for path in folder.glob("*") if path.is_file()}
    for sub in ("plots", "additional_chat_templates"):
        inside |= {f"{sub}/{path.name}": path for path in (folder / sub).glob("*") if path.is_file()}
    kept = {name for name in inside if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)} | set(names)
    reasons = {}
    for name in sorted(set(inside) - kept):
        pickled = any(fnmatch.fnmatchcase(name, pattern) for pattern in PICKLES)
        reasons[name] = "a pickle file: never uploaded" if pickled else "not part of the model"
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ("plots", "additional_chat_templates"):
            reasons[f"{path.name}/"] = "training state" if "checkpoint-" in path.name else "not part of the model"
    return {name: inside[name] for name in sorted(kept)}, reasons


def check_no_secret(files, secret):
    """Raises ValueError naming the file if one of `files` ({name: Path or bytes}) holds the text `secret`."""
    for name, content in files.items() if secret else ():
        if name.endswith(".safetensors"):
            continue
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        if secret.encode() in content:
            raise ValueError(f"{name} holds your access token; take it out (and revoke it if others saw the file)")
