"""Rows of conversations from files, folders and Hub data sets, whatever their columns are called.

Understood without a mapping (the first that is present):

| columns                                          | read as                                                    |
|--------------------------------------------------|------------------------------------------------------------|
| `messages`, `conversations`, `conversation`      | turns with role/from and content/value                     |
| `prompt` and `completion` that hold turns        | one conversation                                           |
| `question`, `problem`, `instruction`, `prompt`, `input` and `answer`, `solution`, `response`, `output`, `completion`, optionally `reasoning`, `thought`, `thinking`, `reasoning_content`, `system` | one question and its answer |

`{"question": "problem", "answer": "solution"}` says otherwise: the column that each of our fields is in.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from data_scripts.traces import content as put_together
from recipes.conversations import CLOSE, OPEN, check_conversation
from recipes.text_files import BadInput, ReadReport, is_local, is_saved_dataset, list_files

FIELDS = {"messages": ("messages", "conversations", "conversation"),
          "question": ("question", "problem", "instruction", "prompt", "input"),
          "answer": ("answer", "solution", "response", "output", "completion"),
          "reasoning": ("reasoning", "thought", "thinking", "reasoning_content"), "system": ("system",)}
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
              "observation": "tool", "function": "tool"}
# Columns that are taken over as they are; others are dropped.
PASSED_ON = {"task": "", "difficulty": 0, "style": "", "key": "", "licence": ""}


def parse_columns(text):
    """'question=problem,answer=solution' -> {"question": "problem", "answer": "solution"}."""
    columns = {}
    for part in filter(None, (text or "").split(",")):
        field, _, column = part.strip().partition("=")
        if field not in FIELDS or not column:
            raise ValueError(f"columns {text!r}: {part.strip()!r} must be FIELD=COLUMN, with FIELD one of "
                             f"{', '.join(FIELDS)}")
        columns[field] = column
    return columns


def _json_rows(path):
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
                yield place, row if isinstance(row, dict) else BadInput(f"{place} holds no object")
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield place, BadInput(f"{place} is not JSON in UTF-8 ({error})")


def _parquet_rows(path):
    from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1_000):
        for row in batch.to_pylist():
            yield f"{path} row {number}", row
            number += 1


def read_rows(location):
    """Yield (place, row or BadInput) of a file, a folder, a saved data set or a Hub name (streamed, split train)."""
    if is_local(location) and not is_saved_dataset(location):
        for path in list_files(location):
            if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
                yield from _json_rows(path)
            elif path.name.lower().endswith(".parquet"):
                yield from _parquet_rows(path)
            else:
                raise ValueError(f"{path} is no set of conversations: give .jsonl, .jsonl.gz or .parquet files")
        return
    import datasets

    if is_saved_dataset(location):
        loaded = datasets.load_from_disk(str(Path(location).expanduser()))
        rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        name, _, configuration = str(location).partition(":")
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    for number, row in enumerate(rows):
        yield f"{location} row {number}", row


def _column(row, field, columns):
    if field in columns:
        if columns[field] not in row:
            raise ValueError(f"no column {columns[field]!r} for {field}; columns present: {', '.join(row)}; "
                             "name the right one with --columns")
        return row[columns[field]]
    return next((row[name] for name in FIELDS[field] if row.get(name) is not None), None)


def _turn(message):
    """One turn under our names; `reasoning_content` moves into the content."""
    if not isinstance(message, dict):
        raise BadInput(f"a turn is a {type(message).__name__}, expected role and content")
    role = message.get("role", message.get("from"))
    text = message.get("content", message.get("value"))
    turn = {"role": ROLE_NAMES.get(role, role), "content": text}
    if message.get("reasoning_content") and isinstance(text, str) and CLOSE not in text:
        turn["content"] = put_together(message["reasoning_content"], text)
    if message.get("tool_calls"):
        turn["tool_calls"] = message["tool_calls"]
    return turn


def to_messages(row, columns):
    """The conversation of a row.

    Raises:
        ValueError: if no column is known, naming those that are present and how to map them.
    """
    turns = _column(row, "messages", columns)
    if turns is None and isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        turns = [*row["prompt"], *row["completion"]]
    if turns is not None:
        return [_turn(message) for message in turns]
    question, answer = _column(row, "question", columns), _column(row, "answer", columns)
    if question is None or answer is None:
        raise ValueError(f"no conversation in the columns {', '.join(row) or '(none)'}: pass --columns messages=NAME, or "
                         "--columns question=NAME,answer=NAME (reasoning=NAME,system=NAME as well if there are)")
    reasoning, system = _column(row, "reasoning", columns), _column(row, "system", columns)
    turns = [{"role": "user", "content": question},
             {"role": "assistant", "content": put_together(reasoning, answer) if reasoning else answer}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def with_blocks(messages, direct_answers):
    """Direct answers as the set wants them: with an "empty_block" of reasoning before them, or "bare".

    A prompt for generation ends in "<think>\\n"; an answer without any block would never follow it.
    """
    def put(message):
        text = message["content"]
        if message["role"] != "assistant" or not isinstance(text, str) or not text.strip():
            return message
        if direct_answers == "empty_block" and CLOSE not in text and OPEN not in text:
            return {**message, "content": put_together("", text)}
        if direct_answers == "bare" and text.startswith(put_together("", " ").rstrip()):
            return {**message, "content": text.partition(CLOSE)[2].strip()}
        return message
    return [put(message) for message in messages]


@dataclass
class RowReport(ReadReport):
    """Also counts rows that were left out for their length, which is no error."""

    too_long: int = 0


def conversations(location, columns=None, errors="strict", report=None, direct_answers="empty_block", longest=None):
    """Yield rows {"messages", and what PASSED_ON names} of a location, each checked.

    Args:
        errors: "strict" stops at the first bad row, naming file, line and reason; "skip" counts it in `report`.
        longest: characters; rows with a longer turn are left out and counted, in both cases.
    """
    report = RowReport() if report is None else report
    for place, row in read_rows(location):
        try:
            if isinstance(row, BadInput):
                raise row
            messages = with_blocks(to_messages(row, columns or {}), direct_answers)
            check_conversation(messages)
        except ValueError as error:
            message = str(error) if str(error).startswith(place) else f"{place}: {error}"
            if errors == "strict":
                raise ValueError(f"{message}; repair the row or pass --errors skip") from error
            report.add(message)
            continue
        if longest and max(len(message["content"] or "") for message in messages) > longest:
            report.too_long += 1
            continue
        yield {"messages": messages, **{name: row.get(name, default) for name, default in PASSED_ON.items()}}
