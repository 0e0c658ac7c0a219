"""Single values of foreign configs: fetch one, check that it is a number in its range, show it in a message.

Every function here raises UsageError; a caller who knows the file adds its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npllama.errors import UsageError, quote


def need(config: Mapping[str, object], key: str) -> Any:
    """The value of a key that must be there."""
    value = config.get(key)
    if value is None:
        raise UsageError(f"{key} is missing; the config is incomplete or of another architecture")
    return value


def get(config: Mapping[str, object], key: str, default: object) -> Any:
    """The value of a key; its default where the key is absent or null."""
    value = config.get(key)
    return default if value is None else value


def whole(name: str, value: object, least: int, largest: int) -> int:
    """A whole number in a range (True and 1.0 are none)."""
    if type(value) is not int or not least <= value <= largest:
        raise UsageError(f"{name} is {show(value)}, but a whole number from {least:,} to {largest:,} is needed")
    return value


def number(name: str, value: object, above: float, largest: float) -> float:
    """A number in a range that does not contain its lower end; NaN lies in none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= largest:
        raise UsageError(f"{name} is {show(value)}, but a number above {above:g} and up to {largest:g} is needed")
    return float(value)


def show(value: object) -> str:
    """A foreign value for a message; containers by their type alone, as their text may be without end."""
    if isinstance(value, (int, float, bool)) and not (isinstance(value, int) and value.bit_length() > 64):
        return repr(value)
    return quote(value) if isinstance(value, str) or value is None else f"a {type(value).__name__}"
