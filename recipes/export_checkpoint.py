"""A checkpoint in shards -> a plain model folder, as `save_pretrained` writes it.

    python recipes/export_checkpoint.py runs/base/checkpoint-1000 exported [--max_shard_size 5GB]

Checkpoints of sharded models and those of `async_save` hold their weights in shards (recipes/sharded_checkpoints.py).
The model at the end of a run is plain already; this is for one from the middle. On a CPU, with the weights whole in
memory. PPO's value function goes into `value_head.safetensors`, as always.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # launched as a script: recipes/ is first on the path and shadows packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import modeling_deepseek_r1
from recipes.checkpoint_files import IncompleteCheckpointError, find_problem
from recipes.sharded_checkpoints import LayoutError, holds_shards, read_whole_weights
from recipes.tensor_pieces import named_tensors
from recipes.value_head import VALUE_FILE

VALUE = "value_head."


def empty_model(folder, dtype):
    """A model without storage, of the class and config in `folder`."""
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or [None])[0]
    found = getattr(modeling_deepseek_r1, str(name), None) or getattr(transformers, str(name), None)
    if found is None:
        raise ValueError(f"{folder}/config.json names the architecture {name}, which neither this package nor "
                         "transformers has; export with the code that trained it")  # fmt: skip
    with torch.device("meta"):
        return found._from_config(config, dtype=dtype)


def under_all_names(model, state):
    """The state dict with shared tensors under each of their names.

    Raises:
        LayoutError: unless its names are the model's.
    """
    first, full = {}, {}
    for name, tensor in named_tensors(model).items():
        first.setdefault(id(tensor), name)
        full[name] = state.get(first[id(tensor)])
    wrong = [name for name, tensor in full.items() if tensor is None] + sorted(set(state) - set(full))
    if wrong:
        raise LayoutError(f"{len(wrong)} weights are in the checkpoint or in the model of its config, but not in both, "
                          f"e.g. {wrong[0]}")  # fmt: skip
    return full


def export_checkpoint(checkpoint, target, max_shard_size=None):
    """Writes the plain folder `target`; returns the number of the model's tensors.

    Raises:
        ValueError: for a checkpoint that is damaged, plain already, or an adapter's.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    if reason := find_problem(checkpoint):
        raise IncompleteCheckpointError(f"{checkpoint} is not a complete checkpoint: {reason}")
    if not holds_shards(checkpoint):
        raise ValueError(f"{checkpoint} is in the plain layout already: from_pretrained reads it as it is")
    if (checkpoint / "adapter_config.json").is_file():
        raise ValueError(f"{checkpoint} is an adapter's: resume it to the end of its run, which writes the adapter")
    if target.exists():
        raise ValueError(f"{target} exists; name a folder that does not")
    state = read_whole_weights(checkpoint)
    value = {name.removeprefix(VALUE): state.pop(name) for name in list(state) if name.startswith(VALUE)}
    model = empty_model(checkpoint, next(iter(state.values())).dtype)
    full = under_all_names(model, state)
    count = len(full)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    model.save_pretrained(target, state_dict=full, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    if (checkpoint / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(target)
    if value:
        kind = "separate" if any(name.startswith("trunk.") for name in value) else "shared"
        save_file(value, target / VALUE_FILE, metadata={"format": "pt", "kind": kind})
    return count


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder checkpoint-N with shards")
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--max_shard_size", help="largest weight file, e.g. 2GB. Default: the library's")
    args = parser.parse_args(argv)
    count = export_checkpoint(args.checkpoint, args.target, args.max_shard_size)
    print(f"{args.target}: {count} tensors")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend needs no traceback
        sys.exit(f"{type(error).__name__}: {error}")
