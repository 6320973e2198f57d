"""Rows of conversations from files, folders and Hub data sets, whatever their columns are called.

Understood without a mapping (the first that is present):

| columns                                     | read as                                                           |
|---------------------------------------------|-------------------------------------------------------------------|
| `messages`, `conversations`, `conversation` | turns with role/from and content/value                            |
| `prompt` and `completion` that hold turns   | one conversation                                                  |
| those of FIELDS for question and answer     | one question and its answer, with reasoning and system if present |
| `instruction` with `input`                  | the question in two parts, as in Alpaca's sets                    |

`{"question": "problem", "answer": "solution"}` says otherwise: the column that each of our fields is in; it goes
before all of the above.
"""

import json
from dataclasses import dataclass

from data_scripts.reasoning.traces import content as put_together
from data_scripts.row_files import read_rows
from recipes.conversations import CLOSE, OPEN, as_messages, check_conversation
from recipes.task_base import split_of
from recipes.tasks import TASKS
from recipes.text_files import BadInput, ReadReport

FIELDS = {"messages": ("messages", "conversations", "conversation"),
          "question": ("question", "problem", "instruction", "prompt", "input"),
          "answer": ("answer", "solution", "response", "output", "completion"),
          "reasoning": ("reasoning", "thought", "thinking", "reasoning_content"), "system": ("system",)}
# Columns that are taken over; others are dropped, and so is what is not of the default's type.
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


def _column(row, field, columns):
    if field in columns:
        if columns[field] not in row:
            raise ValueError(f"no column {columns[field]!r} for {field}; columns present: {', '.join(row)}; "
                             "name the right one with --columns")
        return row[columns[field]]
    return next((row[name] for name in FIELDS[field] if row.get(name) is not None), None)


def _text(value, field):
    if not isinstance(value, str):
        raise BadInput(f"{field} is a {type(value).__name__}, expected text")
    return value


def _with_content(message):
    """A message whose `reasoning_content` has moved into its content, where all rows of a set have it."""
    reasoning, text = message.get("reasoning_content"), message["content"]
    kept = {name: message[name] for name in ("role", "content", "tool_calls") if name in message}
    if reasoning and isinstance(text, str) and CLOSE not in text:
        kept["content"] = put_together(_text(reasoning, "reasoning_content"), text)
    return kept


def to_messages(row, columns):
    """The conversation of a row.

    Raises:
        ValueError: if no column is known, naming those that are present and how to map them.
    """
    if "messages" in columns or not {"question", "answer"} & set(columns):
        turns = _column(row, "messages", columns)
        if turns is None and isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            turns = [*row["prompt"], *row["completion"]]
        if turns is not None:
            return [_with_content(message) for message in as_messages(turns, columns.get("messages", "messages"))]
    question, answer = _column(row, "question", columns), _column(row, "answer", columns)
    if question is None or answer is None:
        raise ValueError(f"no conversation in the columns {', '.join(row) or '(none)'}: pass --columns messages=NAME, "
                         "or --columns question=NAME,answer=NAME (reasoning=NAME,system=NAME as well if there are)")
    question, answer = _text(question, "question"), _text(answer, "answer")
    if "question" not in columns and question == row.get("instruction") and row.get("input"):
        question = f"{question}\n\n{_text(row['input'], 'input')}"
    reasoning, system = _column(row, "reasoning", columns), _column(row, "system", columns)
    answer = put_together(_text(reasoning, "reasoning"), answer) if reasoning and CLOSE not in answer else answer
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def problem_key(name, key, question):
    """What tells a problem of a task apart: its key, or the question where the task has no other key.

    Raises:
        ValueError: if there is no key and the task's problems have one.
    """
    if not key and getattr(TASKS[name], "key", None) is not None:
        raise ValueError(f"problems of {name} are told apart by a key, not by their prompt; give the column key "
                         "(metadata['key'] of the problem), so that test problems can be kept out")
    return key or question


def problem_side(name, key):
    """The side of a task's problem; all of an evaluation set is on the test side."""
    return split_of(key) if "train" in TASKS[name].splits else "test"


def _passed_on(row, messages):
    """The columns of PASSED_ON; a row that names a task gets the key that decides on its side."""
    found = {name: row.get(name) if type(row.get(name)) is type(default) else default
             for name, default in PASSED_ON.items()}
    if found["task"] in TASKS:
        question = next(message["content"] for message in messages if message["role"] == "user")
        found["key"] = problem_key(found["task"], found["key"], question)
    return found


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
            passed_on = _passed_on(row, messages)
            json.dumps([messages, passed_on], ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be
        except ValueError as error:
            message = str(error) if str(error).startswith(place) else f"{place}: {error}"
            if errors == "strict":
                raise ValueError(f"{message}; repair the row or pass --errors skip") from error
            report.add(message)
            continue
        if longest and max(len(message["content"] or "") for message in messages) > longest:
            report.too_long += 1
            continue
        yield {"messages": messages, **passed_on}
