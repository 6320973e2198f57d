"""What each kind of stage runs: a recipe, a data script or a command of your own; how its settings are checked.

A stage is called with a command line, `main(argv)` in this process or, with a launcher, as a command; so what runs is
what one can type, and `alone` is that text.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from recipes.pipeline_graph import close_names
from recipes.pipeline_state import process_of
from recipes.pretrain_config import parse_config

ROOT = Path(__file__).resolve().parents[1]
# kind: (module with the settings, their dataclass); main is that of recipes/<kind>.py.
RECIPES = {
    "pretrain": ("pretrain_config", "PretrainConfig"), "sft": ("sft_config", "SFTRecipeConfig"),
    "reward": ("reward_config", "RewardRecipeConfig"), "ppo": ("ppo_config", "PPORecipeConfig"),
    "grpo": ("grpo_config", "GRPORecipeConfig"), "distill": ("distill_config", "DistillRecipeConfig"),
    "eval": ("eval_config", "EvalConfig"),
}  # fmt: skip
KINDS = (*RECIPES, "data", "command")
DATA_MODULES = ("prepare_pretraining", "prepare_sft", "prepare_preferences", "prepare_prompts", "rejection_sampling",
                "worked_documents")  # fmt: skip


class StageError(ValueError):
    """A stage ended without its result; the message says why."""


# ---------------------------------------------------------------- command lines


class _ParserBuilt(Exception):
    pass


def script_parser(module):
    """The argument parser of a data script, which builds it in `main`: taken at the moment when it would parse."""
    def stop(parser, *_):
        raise _ParserBuilt(parser)

    kept, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop
    try:
        module.main([])
    except _ParserBuilt as built:
        return built.args[0]
    finally:
        argparse.ArgumentParser.parse_args = kept
    raise AssertionError(f"{module.__name__}.main parses no arguments")


@contextlib.contextmanager
def errors_raised():
    """Inside, a parser that would end the process with a message raises it as a StageError."""
    def fail(parser, status=0, message=None):
        raise StageError((message or f"ended with code {status}").strip().partition("error: ")[2] or message)

    kept, argparse.ArgumentParser.exit = argparse.ArgumentParser.exit, fail
    try:
        yield
    finally:
        argparse.ArgumentParser.exit = kept


def _check_sayable(stage, values):
    """ValueError for a value that has no words."""
    for flag, value in values.items():
        if value is None or value == []:
            raise ValueError(f"stages.{stage.name}: {flag}={value} cannot be said on a command line; leave it out")


def _words(value):
    """A value as the words that follow its flag."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _recipe_words(stage, values, folder):
    words = ["--config", str(stage.config)] if stage.config else []
    for flag, value in values.items():
        words += [f"--{flag}", *_words(value)]
    words += ["--output_dir", str(folder)]
    return words if stage.kind == "eval" else [*words, "--resume_from_checkpoint", "auto"]


def _script_words(stage, values, folder):
    """Lists repeat a flag or follow it, true is a flag by itself: as the script's parser wants it."""
    parser, words = script_parser(data_module(stage)), []
    actions = parser._option_string_actions
    for flag, value in values.items():
        action = actions.get(f"--{flag}")
        if action is None:
            known = [name[2:] for name in actions if name.startswith("--")]
            raise ValueError(f"stages.{stage.name}: unknown key {flag!r}: {close_names(flag, known)}")
        if action.nargs == 0:
            words += [f"--{flag}"] if value else []
        elif isinstance(value, list) and action.nargs is None:
            words += [word for each in value for word in (f"--{flag}", str(each))]
        else:
            words += [f"--{flag}", *_words(value)]
    return [*words, "--output_dir", str(folder)]


def words_of(graph, name, output_dir):
    """The arguments of a stage's program."""
    stage, folder = graph.stages[name], Path(output_dir, name)
    values = stage.values(graph.names, output_dir)
    _check_sayable(stage, values)
    if stage.kind == "data":
        return _script_words(stage, values, folder)
    if stage.kind == "command":
        flags = [word for flag, value in values.items() for word in (f"--{flag}", *_words(value))]
        return [*flags, "--output_dir", str(folder)]
    return _recipe_words(stage, values, folder)


def program_of(stage, launcher=None):
    """The words in front of them; `launcher`: what starts recipes, e.g. "accelerate launch --num_processes 8"."""
    if stage.kind == "command":
        return stage.command
    if stage.kind == "data":
        return [sys.executable, "-m", f"data_scripts.{stage.module}"]
    return [*(shlex.split(launcher) if launcher else [sys.executable]), str(ROOT / "recipes" / f"{stage.kind}.py")]


def alone(stage, words, launcher=None):
    """The command that runs a stage alone, from the repository's root."""
    here = [word.replace(sys.executable, "python").replace(f"{ROOT}/", "") for word in program_of(stage, launcher)]
    return shlex.join([*here, *(word.replace(f"{ROOT}/", "") for word in words)])


@contextlib.contextmanager
def environment_kept():
    """Inside, `env` of a config sets variables; afterwards they are as before, for the stages that follow."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


# ---------------------------------------------------------------- checks before anything runs


def data_module(stage):
    """The module of data_scripts that a stage of kind data names."""
    if stage.module not in DATA_MODULES:
        raise ValueError(f"stages.{stage.name}.module={stage.module!r} is unknown: "
                         + close_names(stage.module, DATA_MODULES))
    return _module(stage, f"data_scripts.{stage.module}")


def _module(stage, name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # a package that the module needs: its own message says which
            raise
        raise ValueError(f"stages.{stage.name}: {name} is not there in this version") from error


def _check_entry(stage):
    wants = {"data": "module", "command": "command"}.get(stage.kind)
    for key in ("module", "command"):
        if bool(getattr(stage, key)) != (key == wants):
            raise ValueError(f"stages.{stage.name}.{key} is " + ("needed by" if key == wants else "not for")
                             + f" the kind {stage.kind}")
    if stage.config and stage.kind not in RECIPES:
        raise ValueError(f"stages.{stage.name}.config is not for the kind {stage.kind}; use arguments")


def check_stage(graph, name, output_dir):
    """Parses a stage's settings as the stage will; folders that do not exist yet count as present.

    Raises:
        ValueError: what a stage would say later, with its name.
    """
    stage = graph.stages[name]
    _check_entry(stage)
    words = words_of(graph, name, output_dir)
    if stage.kind == "data":
        with errors_raised():
            try:
                script_parser(data_module(stage)).parse_args(words)
            except StageError as error:
                raise ValueError(f"stages.{name}: {error}") from error
    elif stage.kind in RECIPES:
        module, config_class = RECIPES[stage.kind]
        settings = getattr(_module(stage, f"recipes.{module}"), config_class)
        try:
            with errors_raised(), environment_kept():
                parse_config(settings, words)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from error
    return words


# ---------------------------------------------------------------- running


def _run_here(stage, words):
    module = data_module(stage) if stage.kind == "data" else _module(stage, f"recipes.{stage.kind}")
    try:
        with errors_raised(), environment_kept():
            module.main(words)
    except SystemExit as end:
        if end.code:
            raise StageError(f"ended with {end.code!r}") from end
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next stage's batches are of other shapes


def _run_command(command, started):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as process:
        try:
            started(process_of(process.pid))
            code = process.wait()
        except BaseException:  # Ctrl-C, or its number could not be kept: the stage ends with its pipeline
            process.terminate()
            raise
    if code:
        raise StageError(f"the command ended with code {code}; what it said stands above")


def run_stage(stage, words, launcher=None, started=lambda process: None):
    """Runs a stage to its end. `started` gets [pid, time] of a command.

    Raises:
        StageError, or what the stage raised.
    """
    if stage.kind == "command" or launcher:
        try:
            _run_command([*program_of(stage, launcher), *words], started)
        except FileNotFoundError as error:
            raise StageError(f"{error.filename}: no such program") from error
    else:
        _run_here(stage, words)
