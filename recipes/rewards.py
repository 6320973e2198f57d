"""Rule rewards of reinforcement learning, by name, with the signature of TRL's reward functions.

    rewards = get_rewards(["accuracy", "format", "my_rewards.py:politeness"], {"length": {"buffer": 64}})
    rewards[0](prompts=..., completions=..., completion_ids=..., **columns)    # one number or None for each completion

| name            | reward                                                            | range       | source           |
|-----------------|-------------------------------------------------------------------|-------------|------------------|
| `accuracy`      | the task's verifier accepts the answer; None where a row has none | 0, 1        | R1, Sec. 2.2.2   |
| `code`          | the program passes the row's tests in the sandbox (or the share)  | 0, 1        | R1, Sec. 2.2.2   |
| `format`        | the form that the prompt asks for: reasoning, then an answer      | 0, 1        | R1, Sec. 2.2.2   |
| `language`      | share of the reasoning's words in the language's script           | [0, 1]      | R1, Sec. 2.3.2   |
| `length`        | soft punishment of completions close to the token limit           | [-1, 0]     | DAPO, Eq. 13     |
| `length_group`  | shorter than the prompt's other samples; wrong ones at most 0     | [-0.5, 0.5] | k1.5, Sec. 2.3.3 |
| `length_cosine` | verdict scaled by length; instead of `accuracy`                   | [-1, 1]     | arXiv:2502.03373 |
| `repetition`    | minus the share of n-grams that occurred earlier in the text      | [-1, 0]     | ours             |

R1 is arXiv:2501.12948, DAPO arXiv:2503.14476, Kimi k1.5 arXiv:2501.12599. A reward model's folder is a name too:
`recipes/rl_rewards.py`. Which to take, what they cost and how to write one: docs/rewards.md. Model output is parsed,
never run outside of the sandbox.
"""

import difflib
import functools
import importlib.util
import inspect
import json
import re
from pathlib import Path

from data_scripts.finetuning.rejection_rules import repetition, scripts
from recipes.conversations import CLOSE, OPEN
from recipes.reward_code import code_reward
from recipes.reward_format import STYLES, form_of, has_form, template_form
from recipes.reward_shaping import by_group, cosine_reward, group_length_reward, overlong_punishment
from recipes.task_base import Problem
from recipes.tasks import score

VERIFIER_COLUMNS = ("task", "index", "question", "reference", "metadata")
# Scripts (first words of Unicode names) that a language is written in. Languages of one script are not told apart.
LANGUAGES = {
    "ar": {"ARABIC"}, "de": {"LATIN"}, "el": {"GREEK"}, "en": {"LATIN"}, "es": {"LATIN"}, "fr": {"LATIN"},
    "he": {"HEBREW"}, "hi": {"DEVANAGARI"}, "ja": {"HIRAGANA", "KATAKANA", "CJK"}, "ko": {"HANGUL"},
    "ru": {"CYRILLIC"}, "th": {"THAI"}, "zh": {"CJK"},
}  # fmt: skip
UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI"}  # written without spaces: every letter counts as a word


def completion_text(completion):
    """The text of a completion: a string, or its messages' contents joined."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


# ---------------------------------------------------------------- the rewards


def _accuracy_of(text, fields, untagged):
    task, index, question, reference, metadata = fields
    if task is None or reference is None or question is None:
        return None
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
    return float(score(text, Problem(task, index, question, reference, metadata), untagged).correct)


_JUDGED = {}  # of the last batch: several rewards of a run need the verdicts, and a program takes seconds to verify


def accuracy_reward(prompts, completions, untagged="unparsable", **columns):
    """1.0 where the verifier of the row's task accepts the answer, else 0.0; None for a row without a verifier.

    Args:
        columns: those of VERIFIER_COLUMNS, as `data_scripts/prepare_prompts.py` writes them.
        untagged: what a completion without `</think>` is: "unparsable" (wrong), or the "whole" is the answer.
    """
    if columns.get("task") is None:
        return [None] * len(completions)
    missing = [name for name in VERIFIER_COLUMNS if columns.get(name) is None]
    if missing:
        raise ValueError(
            f"the reward accuracy needs the column{'s' * (len(missing) > 1)} {', '.join(missing)} beside task; "
            "make the prompts with python -m data_scripts.prepare_prompts"
        )
    judged, found = {}, []
    for completion, fields in zip(completions, zip(*(columns[name] for name in VERIFIER_COLUMNS))):
        text = completion_text(completion)
        key = (text, untagged, json.dumps(fields, default=str))
        known = judged if key in judged else _JUDGED
        judged[key] = known[key] if key in known else _accuracy_of(text, fields, untagged)
        found.append(judged[key])
    _JUDGED.clear()
    _JUDGED.update(judged)
    return found


def format_reward(prompts, completions, style="auto", opened=None, template=None, **columns):
    """1.0 for reasoning and an answer in the form that the prompt asks for, else 0.0 (`recipes/reward_format.py`).

    Args:
        style: "think", "answer" (R1-Zero's tags), or "auto": what the prompt asks for.
        opened: whether the prompts end inside `<think>`; None: read off them where it can be. Where it cannot, for
            messages without `template`, a completion may open `<think>` or not.
        template: what `template_form(tokenizer)` says of the chat template; `run_settings` puts it here.
    """
    if style not in STYLES:
        raise ValueError(f"reward_kwargs.format.style={style!r} must be one of {', '.join(STYLES)}")
    forms = [form_of(prompt, style, opened, template) for prompt in prompts]
    return [float(has_form(completion_text(text), *form)) for text, form in zip(completions, forms)]


@functools.lru_cache(maxsize=1 << 16)
def _scripts_of(word):
    return tuple(scripts(word).items())


def language_share(text, target):
    """Share of a text's words in the scripts of the language `target`; 1.0 for signs and numbers alone, 0.0 for
    nothing."""
    if not text.strip():
        return 0.0
    wanted, inside, total = LANGUAGES[target], 0, 0
    for word in re.findall(r"[^\W\d_]+", text):
        # Words recur; the runs of unspaced scripts do not, and would fill the cache.
        for script, letters in _scripts_of(word) if len(word) <= 32 else scripts(word).items():
            count = letters if script in UNSPACED else 1
            total, inside = total + count, inside + count * (script in wanted)
    return inside / total if total else 1.0


def language_reward(prompts, completions, target="en", **columns):
    """Language consistency: the share of target-language words in the reasoning (in all of it without `</think>`)."""
    if not isinstance(target, str) or target not in LANGUAGES:
        raise ValueError(f"reward_kwargs.language.target={target!r} must be one of {', '.join(LANGUAGES)}")
    reasonings = [completion_text(c).partition(CLOSE)[0].lstrip().removeprefix(OPEN) for c in completions]
    return [language_share(reasoning, target) for reasoning in reasonings]


def length_reward(prompts, completions, completion_ids, max_length=None, buffer=None, **columns):
    """Soft overlong punishment.

    Args:
        max_length: tokens at which it is -1; the recipes set it to `max_completion_length`.
        buffer: tokens over which it grows. Default: a fifth of `max_length` (the paper: 4,096 of 20,480).
    """
    buffer = max(1, max_length // 5) if buffer is None and max_length else buffer
    if not max_length or not 0 < buffer <= max_length:
        raise ValueError(
            f"the reward length needs 0 < buffer <= max_length, got buffer={buffer}, max_length={max_length}; set them "
            "as reward_kwargs.length"
        )
    return [overlong_punishment(len(ids), max_length, buffer) for ids in completion_ids]


def length_group_reward(prompts, completions, completion_ids, untagged="unparsable", **columns):
    """Kimi k1.5's length reward, in tokens, among the samples of a prompt; None for a row without a verifier."""
    verdicts = accuracy_reward(prompts, completions, untagged, **columns)

    def of_group(rows):
        judged = [row for row in rows if row[1] is not None]
        found = iter(group_length_reward(*zip(*judged)) if judged else ())
        return [None if verdict is None else next(found) for _, verdict in rows]

    return by_group(prompts, list(zip(map(len, completion_ids), verdicts)), of_group)


def length_cosine_reward(
    prompts, completions, completion_ids, max_length=None, right=(1.0, 0.5), wrong=(-1.0, -0.5), exceeded=-1.0,
    untagged="unparsable", **columns,
):  # fmt: skip
    """The verdict, scaled by the length along a cosine; None for a row without a verifier.

    Args:
        max_length: tokens of the longest completion; the recipes set it to `max_completion_length`.
        right, wrong: the reward at length 0 and at `max_length` of a right and a wrong answer (values: ours).
        exceeded: the reward at `max_length` and beyond.
    """
    pairs = {"right": right, "wrong": wrong}
    if not max_length or max_length < 0 or any(
        not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs.values()
    ):
        raise ValueError(
            f"the reward length_cosine needs max_length > 0 and two numbers each for right and wrong, got max_length="
            f"{max_length}, right={right}, wrong={wrong}; set them as reward_kwargs.length_cosine"
        )
    verdicts = accuracy_reward(prompts, completions, untagged, **columns)
    return [
        None if verdict is None else cosine_reward(len(ids), verdict == 1, max_length, right, wrong, exceeded)
        for ids, verdict in zip(completion_ids, verdicts)
    ]


def repetition_reward(prompts, completions, ngram=12, **columns):
    """Minus the share of windows of `ngram` words, numbers and signs that occurred earlier in the completion."""
    if ngram < 1:
        raise ValueError(f"reward_kwargs.repetition.ngram={ngram} must be at least 1")
    return [0.0 - repetition(completion_text(completion), ngram) for completion in completions]


REWARDS = {
    "accuracy": accuracy_reward,
    "code": code_reward,
    "format": format_reward,
    "language": language_reward,
    "length": length_reward,
    "length_group": length_group_reward,
    "length_cosine": length_cosine_reward,
    "repetition": repetition_reward,
}
MEASURED_IN_TOKENS = ("length", "length_cosine")  # rewards that need to know the token limit


# ---------------------------------------------------------------- by name


def is_function_path(name):
    """Whether a name means a function in a user's file: path/to/file.py:function."""
    return ".py:" in name


def _load_function(name):
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"reward {name!r}: there is no file {path} in {Path.cwd()}; write path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise: the way to it is chained
        raise ValueError(f"reward {name!r}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, attribute, None)
    if function is None or not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"reward {name!r}: {path} has no function {attribute!r}; it has {', '.join(known) or 'none'}")
    return function


def _with_settings(name, function, settings):
    """The function with its settings given and its registry name, which is what is logged."""
    accepted = inspect.signature(function).parameters
    known = [n for n, p in accepted.items() if p.default is not inspect.Parameter.empty]
    for key in settings:
        if key not in known:  # the others are what the trainer passes
            raise ValueError(f"reward_kwargs.{name} holds {key!r}; {name} takes {', '.join(known) or 'no settings'}")
    if inspect.iscoroutinefunction(function):

        async def bound(*args, **kwargs):
            return await function(*args, **(kwargs | settings))
    else:

        def bound(*args, **kwargs):
            return function(*args, **(kwargs | settings))

    bound = functools.wraps(function)(bound)
    bound.__name__ = name
    return bound


def _by_name(settings):
    """{reward: {argument: value}}, copied. ValueError for another form."""
    settings = dict(settings or {})
    for name, given in settings.items():
        if not isinstance(given, (dict, type(None))):
            raise ValueError(
                f"reward_kwargs.{name}={given!r} must be its settings, e.g. {{{name}: {{argument: value}}}}"
            )
    return {name: dict(given or {}) for name, given in settings.items()}


def get_rewards(names, settings=None):
    """[reward function] for names of REWARDS or `path/to/file.py:function`.

    Args:
        settings: {name: {argument: value}}, for a user's function under its function name.
    Raises:
        ValueError: for an unknown name, listing the known ones, closest first; for unknown settings.
    """
    settings, found = _by_name(settings), []
    for name in names:
        if is_function_path(name):
            function, label = _load_function(name), name.rpartition(":")[2]
        elif name in REWARDS:
            function, label = REWARDS[name], name
        else:
            close = difflib.get_close_matches(str(name), REWARDS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"unknown reward {name!r}; {hint}known are {', '.join(REWARDS)}, a function of yours as "
                "path/to/file.py:function, or a reward model's folder"
            )
        found.append(_with_settings(label, function, settings.pop(label, {})))
    if settings:
        raise ValueError(
            f"reward_kwargs holds {', '.join(settings)}, which is not among the rewards {', '.join(names)}"
        )
    return found


def run_settings(names, settings, tokenizer, max_completion_length, template_kwargs=None):
    """`settings` with what a run knows: the token limit, and for `format` the form of its chat template."""
    known = {name: {"max_length": max_completion_length} for name in MEASURED_IN_TOKENS}
    known["format"] = {"template": template_form(tokenizer, template_kwargs)}
    settings = _by_name(settings)
    for name in known.keys() & set(names):
        settings[name] = known[name] | settings.get(name, {})
    return settings
