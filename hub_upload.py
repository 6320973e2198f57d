"""Checks a model folder in a clean process and pushes it to the Hub.

    python hub_upload.py runs/pretrain_nano user/my-r1 [--private] [--revision main] [--dry_run]

The folder (as `save_pretrained` or a recipe wrote it) is loaded here, and again, as its users will, in a fresh process
that does not have this package but the code in the folder; the upload happens only if both give the same logits. The
token is taken from where `huggingface_hub` looks for it (`hf auth login`, HF_TOKEN).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import modeling_deepseek_r1  # noqa: F401  (registers the model type)

# What a run folder holds beside the model.
NOT_UPLOADED = ["checkpoint-*", "abandoned-checkpoint-*", ".removing-*", "*.partial*", "runs/*", "logs/*"]
TOKENS = 16

FRESH_PROCESS = """
import sys
sys.path[:] = [p for p in sys.path if p not in {hidden!r}]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True, dtype="auto").eval()
if not type(model).__module__.startswith(("transformers_modules", "transformers.")):
    raise SystemExit("the code came from " + type(model).__module__ + ", not from the folder")
with torch.no_grad():
    torch.save(model(torch.arange({tokens}).view(1, -1)).logits, {output!r})
"""


def logits_here(folder):
    """Logits (1, TOKENS, V) of the folder in this process."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(torch.arange(TOKENS).view(1, -1)).logits


def logits_in_fresh_process(folder):
    """Logits (1, TOKENS, V) of the folder loaded with its own code, in a process that cannot import this package."""
    root = str(Path(modeling_deepseek_r1.__file__).resolve().parents[1])
    hidden = [root, "" if Path.cwd() == Path(root) else root]
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "logits.pt")
        program = FRESH_PROCESS.format(hidden=hidden, folder=str(folder), tokens=TOKENS, output=output)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.strip()[-2000:]
            raise ValueError(f"{folder} does not load in a process without this package:\n{reason}")
        return torch.load(output)


def verify(folder):
    """Raises ValueError unless a fresh process computes the same logits; returns their largest difference."""
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
    difference = (logits_here(folder).float() - logits_in_fresh_process(folder).float()).abs().max().item()
    if not difference <= 1e-4:
        raise ValueError(f"{folder}: logits differ by {difference:.2e} after reloading; not uploaded")
    return difference


def upload(folder, repo_id, private=False, revision="main"):
    """Creates the repository if need be and pushes the folder without its checkpoints; returns the commit's address."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=NOT_UPLOADED,
        commit_message=f"Upload {Path(folder).name}",
    ).commit_url  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="model folder")
    parser.add_argument("repo_id", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", default="main", help="branch to push to")
    parser.add_argument("--dry_run", action="store_true", help="check only, push nothing")
    args = parser.parse_args(argv)
    try:
        print(f"{args.folder}: a fresh process gives the same logits (largest difference {verify(args.folder):.1e})")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.dry_run:
        return 0
    print(upload(args.folder, args.repo_id, args.private, args.revision))
    return 0


if __name__ == "__main__":
    sys.exit(main())
