"""What can go wrong, as one family.

    NpllamaError
    ├── CheckpointError   a foreign file (PyTorch, safetensors, params.json, ...) is malformed or not supported
    ├── ModelError        a model directory is missing, incomplete, damaged or does not fit this machine
    ├── ContextError      a text does not fit into the context
    └── UsageError        an argument is out of range or of the wrong kind (also a ValueError)

Every message says what was found, what is needed and what to do, on one line.
"""

from __future__ import annotations

import math
import operator
from typing import Any

QUOTED_CHARACTERS = 80


class NpllamaError(Exception):
    """Base of every error that npllama raises on purpose. Its text is one line, whatever the names in it hold."""

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class CheckpointError(NpllamaError):
    """A foreign checkpoint file is malformed, incomplete or of a kind that is not supported."""


class ModelError(NpllamaError):
    """A model directory is missing, incomplete, damaged or does not fit this machine."""


class ContextError(NpllamaError):
    """A text does not fit into the context."""


class UsageError(NpllamaError, ValueError):
    """An argument is out of range or of the wrong kind."""


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def quote(foreign: object) -> str:
    """Foreign data for a message: one printable line of at most 80 characters, in quotes."""
    text = foreign if isinstance(foreign, str) else repr(foreign)
    shown = ascii(text[: QUOTED_CHARACTERS + 1])[1:-1]
    if len(shown) > QUOTED_CHARACTERS:
        shown = shown[: QUOTED_CHARACTERS - 3] + "..."
    return f"'{shown}'"


def whole_number(value: Any, least: float = -math.inf, most: float = math.inf) -> int | None:
    """A whole number of any type (NumPy's too) as an int; None for what is none, as True is, or out of range."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == "bool":  # NumPy 1 counts its own as numbers
        return None
    if getattr(value, "shape", ()) != ():  # an array of one number is a list
        return None
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if least <= number <= most else None


def checked_flag(name: str, value: bool | None, optional: bool = False) -> bool | None:
    """True or False, or where it is optional None; UsageError for anything else."""
    if not (isinstance(value, bool) or (value is None and optional)):
        raise UsageError(f"{name}={quote(value)}: needs True or False.")
    return value
