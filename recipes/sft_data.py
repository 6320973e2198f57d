"""Data of supervised fine-tuning: conversations -> token ids and labels that train on the assistant's part alone.

| columns                          | become                                                              |
|----------------------------------|---------------------------------------------------------------------|
| `messages` or `conversations`    | the conversation: role/content, or ShareGPT's from/value, human/gpt |
| `prompt` and `completion`        | message lists put together; two texts: one user, one assistant turn |
| `text`                           | a plain document, all of it trained (needs assistant_only_loss off) |

`tools` beside a conversation is handed to the chat template. Messages and tools may be JSON text.

A conversation of several turns gives, by `multi_turn`:

* `split`: one example for each answered user message, as the model sees it at inference (earlier reasoning
  dropped by the chat template), trained on that answer alone;
* `last`: only the last of these;
* `keep`: one example in which every assistant turn keeps its reasoning and is trained.
"""

import hashlib
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from recipes.chat_format import check_training_template
from recipes.conversations import (
    as_messages,
    check_conversation,
    drop_none,
    drop_oldest_turn,
    read_json,
    split_turns,
    user_turns,
)

logger = logging.getLogger(__name__)

MULTI_TURN = ("split", "last", "keep")
OVERLONG = ("shorten", "drop", "error")
HELD_OUT = ("test", "validation", "valid", "eval")
ENDINGS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet"}
LEAST_QUESTION = 16  # tokens of a question that must be left for a cut example to be worth training on
GAP, CUT_CHARACTER = " ... ", "\ufffd"  # the second: what a decoder makes of some bytes of a character
UNSEEN_TOOLS = "the chat template has no place for the column tools: describe them in the system message"
ROWS_PER_WORKER = 4_000


# ---------------------------------------------------------------- reading


def _ending(path):
    return next((kind for ending, kind in ENDINGS.items() if path.name.endswith(ending)), None)


def _load_files(kind, files):
    try:
        return load_dataset(kind, data_files=files)
    except (DatasetGenerationError, StopIteration) as error:  # StopIteration: an empty file
        where = files if isinstance(files, str) else ", ".join(files.values())
        reason = str(error.__cause__ or "it is empty").strip()
        raise ValueError(
            f"{where} cannot be read as {kind} ({reason:.300}); every row must be an object with the same columns of "
            "the same types (python -m data_scripts.prepare_sft --errors skip leaves broken lines out)"
        ) from error


def _read_folder(root):
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return load_from_disk(str(root))
    files = {path.name.split(".")[0]: path for path in sorted(root.iterdir()) if path.is_file() and _ending(path)}
    if "train" not in files:
        raise ValueError(
            f"dataset_name={root} holds no train.jsonl or train.parquet (found: {', '.join(files) or 'no data file'}); "
            "make a set with python -m data_scripts.prepare_sft, or name a file"
        )
    # an empty test.jsonl: nothing was held out (--test 0)
    wanted = {name: str(path) for name, path in files.items()
              if name == "train" or (name in HELD_OUT and path.stat().st_size)}  # fmt: skip
    return _load_files(_ending(files["train"]), wanted)


def read_splits(name, streaming=False, maker="data_scripts.prepare_sft"):
    """(training rows, held-out rows or None) of a folder, a file or a Hub data set (`name` or `name:configuration`).

    `maker`: the module that makes the offline default, for the error where there is nothing.

    Raises:
        ValueError: for a folder or file that holds none; FileNotFoundError for a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = _read_folder(path)
    elif path.is_file():
        if _ending(path) is None:
            raise ValueError(f"dataset_name={name}: known endings are {', '.join(ENDINGS)}")
        found = _load_files(_ending(path), str(path))
    elif path.is_absolute() or name.startswith((".", "~", "data/")) or _ending(path):
        raise FileNotFoundError(
            f"dataset_name={name} does not exist; the offline default is made by "
            f"`python -m {maker} --output_dir {name} --size {'nano' if 'nano' in name else 'tiny'}`"
        )
    else:
        hub_name, _, configuration = name.partition(":")
        found = load_dataset(hub_name, configuration or None, streaming=streaming)
    if not isinstance(found, (DatasetDict, IterableDatasetDict)):
        return found, None
    if "train" not in found:
        raise ValueError(f"dataset_name={name} has no split called train, only {', '.join(found)}")
    held_out = next((found[split] for split in HELD_OUT if split in found), None)
    return found["train"], held_out


def _question(row):
    """What a row asks: its `key`, else its first user message, else its text."""
    if row.get("key"):
        return row["key"]
    messages = to_messages(row)
    if messages is None:
        return row["text"]
    return next((message["content"] for message in messages if message["role"] == "user"), messages)


def hold_out(rows, share, seed):
    """(training rows, held-out rows): those that ask the same thing (`key`, else first user message) stay together."""

    def draw(row):
        try:
            question = _question(row)
        except ValueError:  # a bad row is named, or counted, when it is encoded
            question = row
        digest = hashlib.sha256(f"{seed}|{question}".encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    chosen = [draw(row) for row in rows]
    return (rows.select([i for i, out in enumerate(chosen) if not out]),
            rows.select([i for i, out in enumerate(chosen) if out]))  # fmt: skip


def to_messages(row):
    """The conversation of a row, or None for a row of plain text.

    Raises:
        ValueError: if its columns are none of those above, or hold no messages.
    """
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return as_messages(row[name], name)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return as_messages(prompt, "prompt") + as_messages(completion, "completion")
    if row.get("text") is not None:
        return None
    raise ValueError(
        f"columns {', '.join(row)}: expected messages, conversations, prompt and completion, or text; map others with "
        "python -m data_scripts.prepare_sft --columns"
    )


# ---------------------------------------------------------------- encoding


def training_template(tokenizer, multi_turn="split"):
    """The template to render training data with: None for the tokenizer's own, else TRL's marked form of a known one.

    Raises:
        ValueError: if neither marks the assistant's tokens, or if reasoning is not among the trained ones: that of the
            last turn, with `multi_turn="keep"` that of an earlier one too.
    """
    template = None
    if has_generation_markers(tokenizer.chat_template or ""):
        check_training_template(tokenizer)
    else:
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "the tokenizer's chat template has no {% generation %} marks and is none that TRL knows a marked form "
                "of; set chat_template to deepseek_r1 or to a .jinja file with marks, or assistant_only_loss=false"
            ) from error
    probe = []
    for thought, said in (("firstly", "no"), ("because", "yes"))[multi_turn != "keep" :]:
        answer = f"<think>\n{thought}\n</think>\n\n{said}"
        probe += [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    _, labels = render(probe, tokenizer, Encoding(10**6, multi_turn, chat_template=template))
    trained = tokenizer.decode([label for label in labels if label != -100])
    if trained.count("</think>") < len(probe) // 2 or "because" not in trained or "yes" not in trained:
        raise ValueError(
            f"under multi_turn={multi_turn} the chat template trains {trained!r} of {len(probe) // 2} answers with "
            "reasoning: it deletes the reasoning that is to be learned; set chat_template=deepseek_r1"
            + (", or multi_turn=split" if multi_turn == "keep" else "")
        )
    return template


@dataclass(frozen=True)
class Encoding:
    """How conversations become examples; fields as in `SFTRecipeConfig`."""

    max_length: int
    multi_turn: str = "split"
    overlong: str = "shorten"
    assistant_only_loss: bool = True
    errors: str = "strict"
    chat_template: str | None = None  # instead of the tokenizer's own, for training only


@dataclass
class EncodingReport:
    """What became of the conversations, and how long the examples are."""

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    counts: Counter = field(default_factory=Counter)
    first_error: str | None = None

    def lines(self):
        """For the run's log."""
        share = self.trained_tokens / max(self.tokens, 1)
        text = [f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} trained ({share:.0%})"]
        text += [f"{count:,} examples: {status}" for status, count in self.counts.most_common() if status != "kept"]
        return text + ([f"first error: {self.first_error}"] if self.first_error else [])


def _runs(mask):
    """[(start, end)] of the runs of ones."""
    edges = [i for i in range(len(mask) + 1) if (mask[i] if i < len(mask) else 0) != (mask[i - 1] if i else 0)]
    return list(zip(edges[::2], edges[1::2]))


def render(messages, tokenizer, encoding, tools=None):
    """(ids, labels): the whole conversation as the chat template writes it, labels -100 outside what is trained."""
    keep = encoding.multi_turn == "keep"
    rendered = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=encoding.chat_template, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=encoding.assistant_only_loss, **({"past_reasoning": "keep"} if keep else {}),
    )  # fmt: skip
    ids = rendered["input_ids"]
    if not encoding.assistant_only_loss:
        return ids, list(ids)
    runs = _runs(rendered["assistant_masks"])
    if not keep:  # earlier answers are trained in examples of their own
        last_turn = sum(message["role"] == "assistant" for message in messages[user_turns(messages)[-1] :])
        runs = runs[-last_turn:]
    labels = [-100] * len(ids)
    for start, end in runs:
        labels[start:end] = ids[start:end]
    return ids, labels


def _cut_question(messages, tokenizer, excess):
    """The conversation with the middle of its last question left out, `excess` tokens or a little more; or None."""
    place = user_turns(messages)[-1]
    ids = tokenizer(messages[place]["content"], add_special_tokens=False)["input_ids"]
    left = len(ids) - excess - len(tokenizer(GAP, add_special_tokens=False)["input_ids"]) - 2  # seams may not merge
    if left < LEAST_QUESTION:
        return None
    ends = tokenizer.decode(ids[: left - left // 2]), tokenizer.decode(ids[len(ids) - left // 2 :])
    text = ends[0].rstrip(CUT_CHARACTER) + GAP + ends[1].lstrip(CUT_CHARACTER)
    return [*messages[:place], {**messages[place], "content": text}, *messages[place + 1 :]]


def fit(messages, tokenizer, encoding, tools=None):
    """(ids, labels, status): the example in at most `max_length` tokens; ids is None where it is left out.

    What is shortened is what matters least: first the oldest turns go, then the middle of the question. The
    answer is never cut: without its end the model would learn never to stop reasoning.
    """
    ids, labels = render(messages, tokenizer, encoding, tools)
    status, length = "kept", len(ids)
    if length > encoding.max_length and encoding.overlong == "error":
        raise ValueError(
            f"{length} tokens exceed max_length={encoding.max_length}; raise it, or set overlong to shorten or drop"
        )
    while len(ids) > encoding.max_length and encoding.overlong == "shorten":
        shorter, status = drop_oldest_turn(messages), "oldest turns left out to fit max_length"
        if shorter is None:
            status = "middle of the question left out to fit max_length"
            shorter = _cut_question(messages, tokenizer, len(ids) - encoding.max_length)
        if shorter is None:
            break
        messages = shorter
        ids, labels = render(messages, tokenizer, encoding, tools)
    if len(ids) > encoding.max_length:
        return None, None, "left out: longer than max_length"
    return ids, labels, status


def encode_row(row, tokenizer, encoding):
    """[(ids, labels, status)] of one row. Raises ValueError for a conversation that cannot be trained on."""
    messages = to_messages(row)
    if messages is None:
        if encoding.assistant_only_loss:
            raise ValueError("column text has no assistant turns: set assistant_only_loss=false, or give messages")
        ids = tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]
        cut = len(ids) > encoding.max_length
        ids = ids[: encoding.max_length]
        return [(ids, list(ids), "end of the text left out to fit max_length" if cut else "kept")]
    check_conversation(messages)
    parts = [messages] if encoding.multi_turn == "keep" else split_turns(messages)
    parts = parts[-1:] if encoding.multi_turn == "last" else parts
    tools = drop_none(read_json(row.get("tools"), "tools")) or None
    examples = [fit(part, tokenizer, encoding, tools) for part in parts]
    if tools and render(parts[-1], tokenizer, encoding, tools) == render(parts[-1], tokenizer, encoding):
        return [(ids, labels, UNSEEN_TOOLS if status == "kept" else status) for ids, labels, status in examples]
    return examples


def _code_version():
    """A hash of the modules that decide what an example is: `datasets` would hand out what older code had cached."""
    files = [Path(__file__).with_name(name) for name in (Path(__file__).name, "conversations.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _encode_batch(batch, indices, tokenizer, encoding, where, code_version):
    found = {"input_ids": [], "labels": [], "status": [], "trained": []}
    for place, index in enumerate(indices):
        row = {name: values[place] for name, values in batch.items()}
        try:
            examples = encode_row(row, tokenizer, encoding)
        except (ValueError, TemplateError) as error:
            message = f"{where}, row {index}: {error}"
            if encoding.errors == "strict":
                raise ValueError(f"{message} (errors=skip leaves such rows out and counts them)") from error
            examples = [(None, None, f"bad row|{message}")]
        for ids, labels, status in examples:
            trained = 0 if ids is None else sum(label != -100 for label in labels)
            if ids is not None and not trained:
                ids, labels, status = None, None, "left out: nothing to train on"
            values = {"input_ids": ids or [], "labels": labels or [], "status": status, "trained": trained}
            for name, value in values.items():
                found[name].append(value)
    return found


def encode_dataset(rows, tokenizer, encoding, where, workers=None):
    """(data set with `input_ids` and `labels`, EncodingReport).

    Raises:
        ValueError: under `errors="strict"` for the first bad row, naming it; if no example is left.
    """
    if workers is None and len(rows) >= 2 * ROWS_PER_WORKER:  # a thousand rows a second on one core
        workers = min(os.cpu_count() or 1, len(rows) // ROWS_PER_WORKER)
    encoded = rows.map(
        _encode_batch, batched=True, with_indices=True, batch_size=256, num_proc=workers, desc=f"encoding {where}",
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "encoding": encoding, "where": where, "code_version": _code_version()},
    )  # fmt: skip
    report = EncodingReport()
    for status in encoded["status"]:
        kind, _, message = status.partition("|")
        report.counts[kind] += 1
        report.first_error = report.first_error or message or None
    encoded = encoded.filter(lambda sizes: [bool(ids) for ids in sizes], input_columns="input_ids", batched=True)
    report.trained_tokens = sum(encoded["trained"])
    encoded = encoded.remove_columns(["status", "trained"])
    if not len(encoded):
        raise ValueError(f"{where}: no example is left to train on ({'; '.join(report.lines()[1:])})")
    report.examples = len(encoded)
    report.tokens = sum(map(len, encoded["input_ids"]))
    return encoded, report


def checksum(encoded):
    """SHA-256 over all ids and labels, in order: what a resumed run must find unchanged."""
    digest = hashlib.sha256()
    for batch in encoded.with_format("numpy").iter(1000):
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            digest.update(ids.astype("<i8").tobytes() + labels.astype("<i8").tobytes())
    return digest.hexdigest()
