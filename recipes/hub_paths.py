"""Paths of this machine, which a card and uploaded settings show by their last component only."""

import re
import shlex
from pathlib import Path, PurePosixPath

import yaml

# An absolute path of two or more components within a text; not the end of a URL, a relative path or an HTML tag.
WITHIN = re.compile(r"(?:(?<=file://)|(?<![\w.~/<]))/(?:[^\s/'\"`,;:|<>(){}\[\]]+/)+[^\s/'\"`,;:|<>(){}\[\]]*")
MOST = 300  # characters of what is taken for a path as a whole: it may hold spaces


def without_paths(value, found=None):
    """`value` (text, list or dict) with absolute paths shortened; `found`: a dict that gets {path: what is shown}."""
    found = {} if found is None else found
    if isinstance(value, dict):
        shorten = lambda key, entry: _command(entry, found) if key == "command" else without_paths(entry, found)
        return {without_paths(key, found): shorten(key, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry, found) for entry in value]
    if not isinstance(value, str):
        return value
    if value.startswith("/") and "\n" not in value and ",/" not in value and len(value) < MOST:
        return _name(value, found)
    return WITHIN.sub(lambda match: _name(match[0], found), value)


def _name(path, found):
    found[path] = PurePosixPath(path).name or path
    return found[path]


def _command(text, found):
    """A command line, whose words may be paths with spaces or `--option=path`."""
    try:
        words = [word.partition("=") for word in shlex.split(text)]
    except (ValueError, AttributeError):
        return without_paths(text, found) if isinstance(text, str) else text
    return shlex.join("".join(without_paths(part, found) for part in word) for word in words)


def public_results(files):
    """`files` ({name: Path or bytes}) with the paths that config.yaml names shortened there and in other results."""
    if "config.yaml" not in files:
        return files
    read = lambda content: (content if isinstance(content, bytes) else Path(content).read_bytes()).decode()
    found, files = {}, dict(files)
    config = without_paths(yaml.safe_load(read(files["config.yaml"])), found)
    if not found:
        return files
    files["config.yaml"] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    for name in files.keys() & {"eval.json", "metrics.jsonl", "report.html"}:
        text = shorter = read(files[name])
        for path in sorted(found, key=len, reverse=True):
            shorter = shorter.replace(path, found[path]) if len(path) > 1 else shorter
        if shorter != text:
            files[name] = shorter.encode()
    return files
