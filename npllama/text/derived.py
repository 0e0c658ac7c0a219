"""A vocabulary as files of a model directory: what reading its source file took seconds for, ready to be used.

tokenizer.rules.json    Rules
tokenizer.bytes.npy     uint8, the bytes of all tokens in a row
tokenizer.lengths.npy   int32 (V,), how many each has
tokenizer.merges.npy    int32 (M, 4): left, right, rank, result
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from npllama.errors import ModelError, UsageError, quote
from npllama.system import strict_json
from npllama.text.bpe.added import MAX_LENGTH, AddedToken
from npllama.text.bpe.merging import MAX_IDS
from npllama.text.bpe.splitting import PATTERNS
from npllama.text.derived_names import BYTES, LENGTHS, MERGES, RULES
from npllama.text.vocabulary import MARK, Rules, Vocabulary, problem

MAX_RULES_BYTES = 8 << 20
AGAIN = "export the checkpoint again."


def files_of(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files of a vocabulary: name and content."""
    tokens = vocabulary.tokens
    return {
        RULES: json.dumps(dataclasses.asdict(vocabulary.rules), indent=1).encode("ascii"),
        BYTES: _npy(np.frombuffer(b"".join(tokens), np.uint8)),
        LENGTHS: _npy(np.array([len(token) for token in tokens], "<i4")),
        MERGES: _npy(np.ascontiguousarray(vocabulary.merges, "<i4")),
    }


def vocabulary_of(data: Mapping[str, bytes], folder: Path) -> Vocabulary:
    """The vocabulary of files that `files_of` gave; `folder` is where they lie. Raises ModelError for what is damaged.

    That they are what was exported is for the caller to know, by their sha256; what they say is checked all the same:
    a manifest comes from strangers, too.
    """
    lengths, spelled, merges = (
        _array(folder / name, data[name], dtype, columns)
        for name, dtype, columns in ((LENGTHS, "<i4", None), (BYTES, "|u1", None), (MERGES, "<i4", 4))
    )
    rules = _rules(folder / RULES, data[RULES])
    n = len(lengths)
    if (n and lengths.min() < 0) or lengths.sum(dtype=np.int64) != len(spelled):
        raise ModelError(f"{folder / LENGTHS}: its {n:,} lengths do not add up to {BYTES}; {AGAIN}")
    joined = spelled.tobytes()
    tokens = [joined[start:end] for start, end in pairwise(accumulate(lengths.tolist(), initial=0))]
    vocabulary = Vocabulary(rules, tokens, merges)
    if found := problem(vocabulary):
        raise ModelError(f"{folder}: found {found} in the tokenizer; {AGAIN}")
    return vocabulary


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']+)', 'fortran_order': False, 'shape': \((\d{1,9}),(?: (\d))?\), \} *\n",
    re.DOTALL,
)


def _array(path: Path, data: bytes, dtype: str, columns: int | None) -> np.ndarray:
    """An array of a dtype with so many columns, or of one axis. Only what np.save writes is read."""
    found = _HEADER.match(data)
    fits = found is not None and found[1].decode("latin-1") == dtype and found[3] == (columns and b"%d" % columns)
    if found is None or not fits or int.from_bytes(data[8:10], "little") != found.end() - 10:
        what = quote(data[:80].decode("latin-1"))
        raise ModelError(f"{path}: begins with {what}; an array of {dtype}, columns {columns}, is needed; {AGAIN}")
    if len(data) - found.end() != int(found[2]) * (columns or 1) * np.dtype(dtype).itemsize:
        raise ModelError(f"{path}: is shorter or longer than its shape says; {AGAIN}")
    array = np.frombuffer(data, dtype, offset=found.end())
    return array.reshape(-1, columns) if columns else array


# ---------------------------------------------------------------- rules


def _rules(path: Path, data: bytes) -> Rules:
    """Rules from JSON; ModelError for what is missing, of another kind, or not known."""
    try:
        found = strict_json.parse_object(data, MAX_RULES_BYTES)
    except UsageError as error:
        raise ModelError(f"{path}: {error}; {AGAIN}") from error
    fields = {field.name: str(field.type) for field in dataclasses.fields(Rules)}
    if set(found) != set(fields):
        raise ModelError(f"{path}: has keys {quote(sorted(found))}; those of this version are needed; {AGAIN}")
    values: dict[str, Any] = {}
    for name, kind in fields.items():
        value = _READ[kind](found[name])
        if value is None and "None" not in kind:
            raise ModelError(f"{path}: {name} is {quote(found[name])}, which cannot be; {AGAIN}")
        values[name] = value
    rules = Rules(**values)
    late = any(stage[0] == "metaspace" for stage in rules.stages[1:])
    if late or not all(map(_is_stage, rules.stages)) or not all(map(_is_normalizer, rules.normalizer)):
        raise ModelError(f"{path}: has a pre-tokenizer or normalizer that this version does not know; {AGAIN}")
    return rules


def _is_stage(stage: tuple[str, ...]) -> bool:
    match stage:
        case ("pattern", pattern):
            return pattern in PATTERNS
        case ("metaspace", mark, scheme, split):
            return mark == MARK and scheme in ("always", "first", "never") and split in ("split", "")
    return stage == ("prefix", " ")


def _is_normalizer(step: tuple[str, ...]) -> bool:
    return (len(step) == 2 and step[0] == "prepend") or (len(step) == 3 and step[0] == "replace" and step[1] != "")


def _id(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < MAX_IDS else None


def _ids(value: object) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(_id(i) is not None for i in value) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value) else None


def _steps(value: object) -> tuple[tuple[str, ...], ...] | None:
    if not isinstance(value, list) or not all(isinstance(step, list) and step for step in value):
        return None
    if not all(_text(item) is not None for step in value for item in step):
        return None
    return tuple(map(tuple, value))


def _names(value: object) -> dict[str, int] | None:
    return value if isinstance(value, dict) and all(_id(i) is not None for i in value.values()) else None


def _added(value: object) -> tuple[AddedToken, ...] | None:
    """Added tokens: an id, a content, and flags."""
    fields = [field.name for field in dataclasses.fields(AddedToken)]
    if not isinstance(value, list):
        return None
    for token in value:
        if not isinstance(token, dict) or set(token) != set(fields):
            return None
        if _id(token["id"]) is None or not _text(token["content"]) or len(token["content"]) > 2 * MAX_LENGTH:
            return None
        if not all(isinstance(token[name], bool) for name in fields[2:]):
            return None
    return tuple(AddedToken(**token) for token in value)


_READ = {
    "bool": lambda value: value if isinstance(value, bool) else None,
    "int | None": _id,
    "str": _text,
    "tuple[int, ...]": _ids,
    "tuple[tuple[str, ...], ...]": _steps,
    "tuple[AddedToken, ...]": _added,
    "dict[str, int]": _names,
}
"""How a field of Rules is read, by its type; None for what it cannot be."""
