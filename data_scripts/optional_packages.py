"""Packages that only the corpus scripts need."""

import importlib


def require(module, what="this step"):
    """The optional module of this name.

    Raises:
        ImportError: it is not installed; the message says what it is for and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module.partition('.')[0]} is not installed ({error}); it is needed for {what}: "
                          "pip install -e '.[corpus]'") from error
