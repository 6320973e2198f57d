"""Checks a model folder in a clean process, writes its model card and pushes it to the Hub, in one commit.

    python hub_upload.py runs/pretrain_nano user/my-r1 [--private] [--revision main] [--dry_run]
    python hub_upload.py runs/quickstart user/my-r1 --each_stage       # user/my-r1-pretrain, -sft, -reward, -ppo

The folder (as `save_pretrained` or a recipe wrote it: a model, a reward model or an adapter) is loaded here, and again,
as its users will, in a fresh process that does not have this package but the code in the folder; the upload happens
only if both give the same logits. Weights are compared with the folder's checksums.json where there is one. What
training needs to go on (checkpoints, optimizer, pickle files) stays here. The token is taken from where
`huggingface_hub` looks for it (`hf auth login`, HF_TOKEN). A failed or killed upload leaves the branch as it was; run
the command again.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id

import modeling_deepseek_r1  # registers the model type
from modeling_deepseek_r1.checkpoint_files import (
    ADAPTER_PATTERNS,
    MANIFEST,
    read_header,
    verify_files,
    verify_folder,
    write_manifest,
)
from recipes.hub_commit import (
    UploadError,
    account,
    check_destination,
    check_private,
    commit_files,
    hub_api,
    with_retries,
)
from recipes.hub_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    check_no_secret,
    has_tokenizer,
    is_adapter,
    read_json,
    select_files,
)
from recipes.hub_paths import public_results
from recipes.model_card import write_card

TOKENS = 16
STAGES = ("pretrain", "sft", "reward", "ppo")  # sub-folders of a run of several stages, in their order
AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
ADAPTER_TASKS = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}

FRESH_PROCESS = """
import sys
sys.path[:] = [p for p in sys.path if p not in {hidden!r}]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
{compute}
{tokenize}
found = []
for arguments, folder in {arguments!r}:
    print({marker!r}, folder, file=sys.stderr)
    code, logits = compute(*arguments)
    if not code.startswith(("transformers_modules", "transformers.")):
        raise SystemExit("the code came from " + code + ", not from the folder")
    found.append((logits, tokenize(folder)))
import torch
torch.save(found, {output!r})
"""
MARKER = "now loading"


@dataclass
class Upload:
    """A folder and where it goes. `base_folder`, `base_model`: of an adapter's base, here and on the Hub."""

    folder: Path
    repo_id: str
    adapter: bool = False
    base_folder: str | None = None
    base_model: str | None = None


# ---------------------------------------------------------------- checks


def _loading(upload):
    """-> (name of the Auto class, folder or Hub name of the model, adapter folder or None, keyword arguments)."""
    folder = str(upload.folder)
    if not upload.adapter:
        architecture = (read_json(upload.folder / "config.json").get("architectures") or [""])[0]
        ending = next((end for end in AUTO_CLASSES if architecture.endswith(end)), None)
        return AUTO_CLASSES.get(ending, "AutoModelForCausalLM"), folder, None, {"dtype": "auto"}
    found = read_json(upload.folder / ADAPTER_CONFIG)
    # In float32: merging in bf16 rounds the weights, which would hide what is wrong.
    loading = {"dtype": "float32"}
    auto_class = ADAPTER_TASKS.get(found.get("task_type"), "AutoModelForCausalLM")
    if auto_class != "AutoModelForCausalLM":
        header = read_header(upload.folder / ADAPTER_WEIGHTS)
        heads = [entry["shape"][0] for name, entry in header.items() if name.endswith("score.weight")]
        loading |= {"num_labels": heads[0]} if heads else {}
    return auto_class, upload.base_folder, folder, loading


def compute(auto_class, folder, adapter, tokens, loading):
    """-> (module of the model's code, [logits]); of an adapter [beside its base, merged]. Its text runs in the fresh
    process too, so it imports what it needs."""
    import torch
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(folder, **loading).eval()
    code = type(model).__module__
    ids = torch.arange(tokens).view(1, -1) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        if adapter is None:
            return code, [model(ids).logits]
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
        logits = model(ids).logits
        return code, [logits, model.merge_and_unload()(ids).logits]


def tokenize(folder):
    """-> token ids of a sentence, None if the folder has no tokenizer. Its text runs in the fresh process too."""
    from pathlib import Path

    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    if not any((Path(folder) / name).is_file() for name in names):
        return None
    return AutoTokenizer.from_pretrained(folder)("Is 3 + 4 equal to 7?\nYes, it is: 7 \u2260 8.")["input_ids"]


def outputs_here(upload):
    """The logits of `compute` and the ids of `tokenize` in this process."""
    auto_class, model, adapter, loading = _loading(upload)
    return compute(auto_class, model, adapter, TOKENS, loading)[1], tokenize(upload.folder)


def outputs_in_fresh_process(uploads):
    """[the same logits and ids] of all folders, with their own code, in one process that cannot import this package."""
    root = str(Path(modeling_deepseek_r1.__file__).resolve().parents[1])
    hidden = [root, "" if Path.cwd() == Path(root) else root]
    loadings = map(_loading, uploads)
    arguments = [((auto_class, model, adapter, TOKENS, loading | {"trust_remote_code": True}), adapter or model)
                 for auto_class, model, adapter, loading in loadings]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "logits.pt")
        program = FRESH_PROCESS.format(
            hidden=hidden, compute=inspect.getsource(compute), tokenize=inspect.getsource(tokenize),
            arguments=arguments, marker=MARKER, output=output,
        )  # fmt: skip
        secrets = ("PYTHONPATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the folder's code has no use for a token
        environment = {k: v for k, v in os.environ.items() if k not in secrets}
        environment |= {"HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, check=False, cwd=scratch, env=environment, capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.rpartition(MARKER)[2].strip()[-2000:]
            raise ValueError(f"{', '.join(str(u.folder) for u in uploads)}: not loaded by a process without this "
                             f"package; it stopped at\n{reason}")  # fmt: skip
        return torch.load(output)


def _largest_difference(upload, fresh):
    """Compares a folder's logits and token ids here with the fresh process's, and an adapter's with its merged ones."""
    (here, ids), (fresh, fresh_ids) = outputs_here(upload), fresh
    if ids != fresh_ids:
        raise ValueError(
            f"{upload.folder}: its tokenizer gives other ids reloaded: {fresh_ids} instead of {ids}; not uploaded"
        )
    apart = lambda one, other: (one.float() - other.float()).abs().max().item()
    difference = max(apart(*pair) for pair in zip(here, fresh, strict=True))
    if not difference <= 1e-4:
        raise ValueError(f"{upload.folder}: logits differ by {difference:.2e} after reloading; not uploaded")
    if upload.adapter:
        allowed = 1e-3 * max(1.0, here[0].abs().max().item())  # float32 sums in another order
        merged = apart(*here)
        if not merged <= allowed:
            raise ValueError(f"{upload.folder}: merging the adapter changes logits by {merged:.2e}; not uploaded")
    return difference


def verify_uploads(uploads):
    """Raises ValueError unless a fresh process computes the same logits; returns their largest differences."""
    resolved = [replace(upload, folder=upload.folder.resolve()) for upload in uploads]
    fresh = outputs_in_fresh_process(resolved)
    return [_largest_difference(*pair) for pair in zip(resolved, fresh, strict=True)]


def verify(folder):
    """`verify_uploads` of one folder with a model, or an adapter whose base is where it says."""
    folder = Path(folder)
    select_files(folder, is_adapter(folder))
    base = _base_folder(folder) if is_adapter(folder) else None
    return verify_uploads([Upload(folder, "", is_adapter(folder), base)])[0]


def _base_folder(folder, given=None):
    """Where the base of an adapter is read: a folder, or a name in the local cache of the Hub."""
    found = given or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not found:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path; give --base_folder")
    return str(Path(found).resolve()) if Path(found).is_dir() else found


# ---------------------------------------------------------------- what is uploaded


def plan(args):
    """[Upload] of the command line, bases before what needs them."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that save_pretrained or a recipe wrote")
    if not args.each_stage:
        folders = {args.repo_id: folder}
    else:
        models = [name for name in STAGES if (folder / name / "config.json").is_file() or is_adapter(folder / name)]
        if not models:
            raise ValueError(f"--each_stage: {folder} has no model in {', '.join(STAGES)}; leave it out for one model")
        folders = {f"{args.repo_id}-{name}": folder / name for name in models}
    for repo_id in folders:
        validate_repo_id(repo_id)  # raises a ValueError that says what is allowed
    for entry in args.stages or ():
        if not Path(entry.rpartition("=")[2]).is_dir():
            raise ValueError(f"--stages {entry}: {entry.rpartition('=')[2]} is no folder; give STAGE=FOLDER of a run")
    repos = {path.resolve(): repo_id for repo_id, path in folders.items()}
    return [_planned(path, repo_id, args, repos) for repo_id, path in folders.items()]


def _planned(folder, repo_id, args, repos):
    """An Upload with its base looked up; `repos`: {folder: repository} of this call."""
    upload = Upload(folder, repo_id, args.adapter_only or is_adapter(folder), base_model=args.base_model)
    if not upload.adapter:
        return upload
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"--adapter_only: {folder} has no {ADAPTER_CONFIG}")
    upload.base_folder = _base_folder(folder, args.base_folder)
    base = Path(upload.base_folder)
    if upload.base_model is None:
        if base.is_dir() and base not in repos:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} names the local folder {base} as its base, which nobody else has; upload "
                "it and give its name as --base_model user/name"
            )
        upload.base_model = repos.get(base, upload.base_folder)
    return upload


def contents(upload, files):
    """{path in the repository: Path or bytes}: as on disk, but an adapter names its base on the Hub."""
    if not upload.adapter:
        return files
    found = read_json(files[ADAPTER_CONFIG]) | {"base_model_name_or_path": upload.base_model}
    return files | {ADAPTER_CONFIG: (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()}


def check_files(upload, say=print):
    """Raises ValueError or FileNotFoundError for what is missing, damaged or not what was saved."""
    select_files(upload.folder, upload.adapter)
    if not has_tokenizer(upload.folder) and not upload.adapter and _loading(upload)[0] == "AutoModelForCausalLM":
        say(f"Warning: {upload.folder} has no tokenizer, so nobody can use the model with text; save it there with "
            "tokenizer.save_pretrained")  # fmt: skip
    if (upload.folder / MANIFEST).is_file() and upload.adapter == is_adapter(upload.folder):
        manifest = verify_files(upload.folder) if upload.adapter else verify_folder(upload.folder)
        if upload.adapter and ADAPTER_WEIGHTS not in manifest["files"]:
            raise ValueError(f"{upload.folder / MANIFEST} does not name {ADAPTER_WEIGHTS}, so it is of other weights; "
                             "save the adapter again, or remove it")  # fmt: skip
        say(f"{upload.folder}: the weights are those of {MANIFEST}")


def prepare(upload, args, say=print):
    """Writes the card of a checked folder; returns what is uploaded, {path in the repository: Path or bytes}."""
    folder = upload.folder
    if not args.dry_run and not (folder / MANIFEST).is_file() and upload.adapter == is_adapter(folder):
        write_manifest(folder, *[ADAPTER_PATTERNS] if upload.adapter else [])
    stages = None if args.stages is None else [Path(entry.rpartition("=")[2]) for entry in args.stages]
    target = Path(tempfile.mkdtemp(prefix="model_card_")) / CARD if args.dry_run else None
    card, written = write_card(
        folder, upload.repo_id, target, adapter=upload.adapter, base_model=upload.base_model,
        base_folder=upload.base_folder, stages=stages, licence=args.license, revision=args.revision,
    )  # fmt: skip
    say(f"{card}: {'model card written' if written else 'kept: you wrote or edited it'}")
    files, left_out = select_files(folder, upload.adapter)
    for name, reason in left_out.items():
        if args.dry_run or "pickle" in reason:
            say(f"  stays here: {name} ({reason})")
    return public_results(contents(upload, files | {CARD: card}))


def list_files(files, say=print):
    """Prints paths and sizes, the largest first."""
    sizes = {name: len(path) if isinstance(path, bytes) else path.stat().st_size for name, path in files.items()}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        say(f"  {size:>15,} bytes  {name}")
    say(f"  {sum(sizes.values()):>15,} bytes  in {len(sizes)} files")


# ---------------------------------------------------------------- the command


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="model folder; with --each_stage a folder of such folders")
    parser.add_argument("repo_id", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", default="main", help="branch to push to; created if it is not there")
    parser.add_argument("--dry_run", "--dry-run", action="store_true",
                        help="check, write the card to a temporary file, push nothing")  # fmt: skip
    parser.add_argument("--adapter_only", "--adapter-only", action="store_true",
                        help="the adapter, where the folder holds whole weights too")  # fmt: skip
    parser.add_argument("--base_model", "--base-model", help="name on the Hub of what an adapter was trained on")
    parser.add_argument("--base_folder", "--base-folder", help="folder of that model here, where it has moved")
    parser.add_argument("--each_stage", "--each-stage", action="store_true",
                        help=f"a repository a stage: name-STAGE of FOLDER/STAGE, for {', '.join(STAGES)}")  # fmt: skip
    parser.add_argument("--stages", nargs="*", metavar="STAGE=FOLDER",
                        help="earlier runs, for the card; default: those that config.yaml leads to")  # fmt: skip
    parser.add_argument("--license", "--licence", help="of the weights, e.g. apache-2.0; default: not stated")
    parser.add_argument("--overwrite", action="store_true", help="replace what a repository of other files holds")
    return parser.parse_args(argv)


def ask_the_hub(api, upload, args):
    """Raises UploadError for what the Hub would refuse, before models are loaded and anything is sent."""
    account(api, upload.repo_id)
    with_retries(lambda _: check_private(api, upload.repo_id, args.private), upload.repo_id)
    names = {*select_files(upload.folder, upload.adapter)[0], CARD}
    config = read_json(upload.folder / (ADAPTER_CONFIG if upload.adapter else "config.json"))
    kind = {"config": None, "adapter_config": None} | {"adapter_config" if upload.adapter else "config": config}
    card = upload.folder / CARD
    card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    look = lambda _: check_destination(api, upload.repo_id, args.revision, names, kind, card)
    if not args.overwrite:
        with_retries(look, upload.repo_id)


def run(args):
    """Checks all folders, then pushes them one after another. Returns the commits' addresses."""
    uploads, api, made = plan(args), hub_api(), []
    for upload in uploads if not args.dry_run else ():
        ask_the_hub(api, upload, args)
    for upload in uploads:
        check_files(upload)
    for upload, difference in zip(uploads, verify_uploads(uploads), strict=True):
        print(f"{upload.folder}: a fresh process gives the same logits (largest difference {difference:.1e})")
    ready = []
    for upload in uploads:
        files = prepare(upload, args)
        check_no_secret(files, get_token())
        ready.append((upload, files))
    for upload, files in ready:
        print(f"{upload.folder} -> {upload.repo_id}, {args.revision}{', nothing is pushed' if args.dry_run else ''}")
        list_files(files)
        if not args.dry_run:
            made.append(commit_files(
                api, upload.repo_id, files, f"Upload {upload.folder.resolve().name}", revision=args.revision,
                private=args.private or None,
            ).commit_url)  # fmt: skip
            print(made[-1])
    return made


def main(argv=None):
    transformers.utils.logging.disable_progress_bar()
    try:
        run(parse(argv))
    except (OSError, ValueError, UploadError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
