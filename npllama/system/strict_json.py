"""JSON from files that others have made: one value, no surprises, bounded work.

Python's own reader accepts NaN, repeated keys (the last wins), numbers without end and nesting until the stack is gone;
all of these are refused here.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from npllama.errors import UsageError, quote
from npllama.system import signatures

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 18  # every such number fits a signed 64-bit integer

# An open string ends with the text: each match succeeds where it starts, so the scan takes one pass whatever the text.
_STRING_OR_NO_BRACKET = re.compile(r'"[^"]*(?:"|\Z)|[^"\[\]{}]+')


def parse(data: bytes, max_bytes: int = MAX_BYTES, max_digits: int = MAX_DIGITS) -> object:
    """Read one JSON value from UTF-8 bytes.

    Raises UsageError for more than `max_bytes`, bytes that are not UTF-8, nesting deeper than 32, a repeated key, NaN
    or infinity, a whole number of more than `max_digits`, and whatever else is not JSON. Source: RFC 8259; stricter.
    """
    text = _decoded(data, max_bytes)
    _check_depth(text)
    with _one_error():
        value: object = _decoder(max_digits).decode(text)
    return value


def parse_first(data: bytes) -> tuple[object, int]:
    """The JSON value that `data` begins with, as `parse` reads it, and its size in bytes; UsageError."""
    text = data.decode("utf-8", "ignore")  # the last character may be cut off
    _check_depth(text)
    with _one_error():
        value, end = _decoder(MAX_DIGITS).raw_decode(text)
    return value, len(text[:end].encode())


def _decoded(data: bytes, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise UsageError(f"{len(data):,} bytes of JSON, but at most {max_bytes:,} are read; this is another file")
    if what := signatures.named(data[: signatures.HEAD]):
        raise UsageError(f"it is {what}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"byte {error.start} is not UTF-8, but JSON must be; the file is damaged") from error


@contextmanager
def _one_error() -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UsageError(f"not JSON ({error.msg} at {where}); the file is damaged or incomplete") from error


def parse_object(data: bytes, max_bytes: int = MAX_BYTES, max_digits: int = MAX_DIGITS) -> dict[str, object]:
    """Read one JSON object, as `parse` does; any other value is a UsageError."""
    value = parse(data, max_bytes, max_digits)
    if not isinstance(value, dict):
        raise UsageError(f"holds a JSON {type(value).__name__}, but an object {{...}} is needed; this is another file")
    return value


def _check_depth(text: str) -> None:
    depth = 0
    # Two backslashes escape no quote. A group for escapes would do, but take memory for each of them.
    without_escapes = text.replace("\\\\", "").replace('\\"', "")
    for bracket in _STRING_OR_NO_BRACKET.sub("", without_escapes):
        depth += 1 if bracket in "{[" else -1
        if depth > MAX_DEPTH:
            raise UsageError(f"JSON nested deeper than {MAX_DEPTH} levels; no config looks like that")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UsageError(f"key {quote(twice)} stands twice in one object; keep the one that is meant")
    return found


def _refuse(constant: str) -> object:
    raise UsageError(f"the number {constant} is not JSON; a finite number is needed")


def _whole(digits: str, max_digits: int) -> int:
    if len(digits.lstrip("-")) > max_digits:
        raise UsageError(f"a whole number of {len(digits)} digits is more than the {max_digits} that are read")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise UsageError(f"the number {quote(digits)} is too large; a finite number is needed")
    return value


def _decoder(max_digits: int) -> json.JSONDecoder:
    whole = functools.partial(_whole, max_digits=max_digits)
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=whole, parse_float=_finite)
