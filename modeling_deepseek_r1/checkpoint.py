"""Commands on checkpoint folders.

    python -m modeling_deepseek_r1.checkpoint inspect FOLDER [--against OTHER] [--tolerance 0] [--json]
    python -m modeling_deepseek_r1.checkpoint export SRC DST [--to bf16|fp16|fp32|fp8]
    python -m modeling_deepseek_r1.checkpoint cast SRC DST --to bf16|fp16|fp32|fp8
    python -m modeling_deepseek_r1.checkpoint merge-adapter BASE ADAPTER DST
    python -m modeling_deepseek_r1.checkpoint verify FOLDER [--write]

`export` writes a plain deepseek_v3 folder (deepseek_v2 for softmax routing) that transformers' own class, and engines
that know it, load without custom code. What is written appears all at once, with `checksums.json`; a command that was
killed goes on where it was when repeated. Memory does not grow with the model. The structure of what is read is
checked, its bytes are not: `verify` it first where in doubt. Exit codes: 0 done (inspect: no difference), 1 an error or
a difference, 2 wrong arguments, 130 interrupted.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from . import checkpoint_files
from .checkpoint_adapters import merge_adapter
from .checkpoint_cast import KINDS, cast
from .checkpoint_export import export, plain_config
from .checkpoint_files import MANIFEST, weight_files, write_manifest
from .checkpoint_report import compare, comparison_lines, describe, description_lines, is_equal


def write_missing_manifest(folder):
    """`checksums.json` of a folder that has none, after a check of its structure. Returns its content.

    Raises ValueError if it has one: what differs from it is damage, not to be blessed.
    """
    path = Path(folder) / MANIFEST
    if path.exists():
        raise ValueError(
            f"{path} exists; run verify without --write, or remove it if the weights were changed on purpose"
        )
    weight_files(folder)
    return write_manifest(folder)


def finite(value):
    """Infinity, which JSON does not have, as the text "inf", wherever it is."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run_inspect(args):
    report = describe(args.folder)
    comparison = None if args.against is None else compare(args.folder, args.against, progress=True)
    if args.json:
        print(json.dumps(finite(report if comparison is None else {**report, **comparison}), indent=1))
    else:
        print("\n".join(description_lines(report)))
        if comparison is not None:
            print("\n".join(comparison_lines(comparison)))
    return 0 if comparison is None or is_equal(comparison, args.tolerance) else 1


def run_verify(args):
    manifest = write_missing_manifest(args.folder) if args.write else checkpoint_files.verify_folder(args.folder)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    how = "written to" if args.write else "as in"
    print(f"{args.folder}: {len(manifest['files'])} files, {size:,} bytes, {how} {MANIFEST}")
    return 0


def run_writer(write, sources):
    """A command that makes a folder: -> function of the parsed arguments."""

    def run(args):
        options = {"max_shard_size": args.max_shard_size, "progress": True}
        if hasattr(args, "to"):
            options["to"] = args.to
        names = write(*(getattr(args, source) for source in sources), args.target, **options)
        fields = json.loads((Path(args.target) / "config.json").read_text(encoding="utf-8"))
        print(
            f"{args.target}: {len(names)} tensors, model_type {fields.get('model_type')}, dtype {fields.get('dtype')}"
        )
        return 0

    return run


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deepseek_r1.checkpoint", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="tensors, dtypes, sizes; differences from another folder")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("--against", metavar="OTHER", help="compare with this folder; FP8 is dequantised")
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest absolute difference that counts as equal"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_inspect)

    def writing(name, help_text, write, sources):
        command = commands.add_parser(name, help=help_text)
        for source, text in sources.items():
            command.add_argument(source, metavar={"source": "SRC"}.get(source, source.upper()), help=text)
        command.add_argument("target", metavar="DST", help="the folder to make")
        command.add_argument("--max_shard_size", default="5GB", help="largest weight file (default 5GB)")
        command.set_defaults(run=run_writer(write, tuple(sources)))
        return command

    saved = {"source": "a folder that save_pretrained wrote"}
    command = writing("export", "write a plain deepseek_v3 folder", export, saved)
    command.add_argument("--to", choices=list(KINDS), help="cast as well; default: as they are")
    command = writing("cast", "write the folder in another dtype", cast, saved)
    command.add_argument("--to", choices=list(KINDS), required=True)
    merged = {"base": "the model the adapter was trained on", "adapter": "a LoRA adapter that PEFT saved"}
    writing("merge-adapter", "write the model with a LoRA adapter merged into it", merge_adapter, merged)

    command = commands.add_parser("verify", help=f"check the weights against {MANIFEST}")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("--write", action="store_true", help=f"make {MANIFEST} for a folder that has none")
    command.set_defaults(run=run_verify)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


__all__ = ["cast", "export", "main", "merge_adapter", "plain_config"]

if __name__ == "__main__":
    sys.exit(main())
