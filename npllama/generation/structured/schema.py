"""JSON Schemas: of Python's types, and the shortest JSON that fits one.

Source: json-schema.org, draft 2020-12.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from npllama.errors import UsageError, quote

SEPARATORS = (", ", ": ")
"""Between items, and behind a key: those of Python's json, which models have read most often."""

MAX_DEPTH = 32
"""References into each other that are followed to find the shortest JSON."""

CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00(?:[01][0-9a-f]|7f)")
"""A control character as JSON spells it, but for those that have a letter."""

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema_of(source: object) -> dict[str, Any]:
    """A schema as a dict: of one, of a model of pydantic, or of a dataclass. Raises UsageError for anything else."""
    if isinstance(source, Mapping):
        return _as_json(dict(source))
    if isinstance(source, type) and callable(method := getattr(source, "model_json_schema", None)):
        return _as_json(method())
    if isinstance(source, type) and dataclasses.is_dataclass(source):
        definitions: dict[str, Any] = {}
        schema = _of_type(source, definitions)
        return {**schema, "$defs": definitions}
    raise UsageError(
        f"json_schema={quote(source)}: needs a schema as a dict, a model of pydantic or a dataclass (the class itself)."
    )


def check_schema(schema: Any) -> None:
    """Refuse what llguidance takes for what it is not. Raises UsageError.

    A key that comes twice counts twice there; and of the ways to write a character only one is allowed here, so that no
    key is written in two, which leaves none for most control characters.
    """
    if isinstance(schema, list):
        for one in schema:
            check_schema(one)
    if not isinstance(schema, dict):
        return
    least = schema.get("minProperties", 0)
    required = schema.get("required", [])
    if isinstance(least, (int, float)) and least > max(1, len(required) if isinstance(required, list) else 0):
        raise UsageError(
            f"json_schema cannot be followed: minProperties: {least} is more than the properties that are required; "
            f"change it."
        )
    literal = [schema.get(word) for word in ("const", "enum", "required")], list(schema)
    if found := CONTROL.search(json.dumps(literal)):
        raise UsageError(
            f"json_schema cannot be followed: a text in it has the character {found[0]}, which would not be written; "
            f"leave it out."
        )
    for word, value in schema.items():
        if word not in ("const", "enum", "default", "examples"):
            check_schema(value)


def _as_json(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"json_schema: is no JSON ({error}); numbers, text, lists and dicts are needed.") from error
    return schema


def _of_type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type as it is written in a dataclass. Raises UsageError for one that JSON does not have."""
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if kind is Any:
        return {}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of_type(one, definitions) for one in arguments]}
    if origin is list and arguments:
        return {"type": "array", "items": _of_type(arguments[0], definitions)}
    if origin is tuple and arguments and Ellipsis not in arguments:
        items = [_of_type(one, definitions) for one in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _of_type(arguments[1], definitions)}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _of_dataclass(kind, definitions)
    raise UsageError(
        f"json_schema: the type {quote(kind)} has no schema here; use str, int, float, bool, None, list[...], "
        f"tuple[...], dict[str, ...], Literal, an Enum, a union or a dataclass, or a model of pydantic."
    )


def _of_dataclass(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__qualname__
    if name not in definitions:
        definitions[name] = {}  # it may have itself in it
        hints = typing.get_type_hints(kind)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        definitions[name] = {
            "type": "object",
            "properties": {field.name: _of_type(hints[field.name], definitions) for field in fields},
            "required": [field.name for field in fields],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


# ---------------------------------------------------------------- the shortest JSON


class Shortest:
    """The shortest JSON that fits a schema, by what `cost` says of a text. Whoever uses it checks that it fits."""

    def __init__(self, schema: dict[str, Any], cost: Callable[[str], float]) -> None:
        self._root, self._cost = schema, cost

    def text(self) -> str | None:
        """None where none is found: a pattern, or keywords that belong together, are left to a search."""
        return self._of(self._root, 0)

    def _best(self, texts: Iterable[str | None]) -> str | None:
        return min((text for text in texts if text is not None), key=self._cost, default=None)

    def _of(self, schema: Any, depth: int) -> str | None:
        if schema is True or schema == {}:
            return self._best(["0", "1", "{}", "[]", '""', "null"])
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return None
        if "const" in schema:
            return _dumped(schema["const"])
        if "enum" in schema:
            return self._best(map(_dumped, schema["enum"]))
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema and (word != "allOf" or len(schema[word]) == 1):
                return self._best(self._of(one, depth) for one in schema[word])
        if "$ref" in schema:
            return self._of(self._resolved(schema["$ref"]), depth + 1)
        kinds = schema.get("type", list(_WRITERS))
        return self._best(
            _WRITERS[kind](self, schema, depth) for kind in ([kinds] if isinstance(kinds, str) else kinds)
        )

    def _resolved(self, reference: object) -> Any:
        found: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, dict) else None
        return found

    def _object(self, schema: dict[str, Any], depth: int) -> str | None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        names = [name for name in properties if name in required]
        names += [name for name in required if name not in properties]
        values = [self._of(properties.get(name, schema.get("additionalProperties", True)), depth + 1) for name in names]
        if None in values or schema.get("minProperties", 0) > len(names):
            return None
        pairs = [f"{_dumped(name)}{SEPARATORS[1]}{value}" for name, value in zip(names, values, strict=True)]
        return "{" + SEPARATORS[0].join(pairs) + "}"

    def _array(self, schema: dict[str, Any], depth: int) -> str | None:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        n = schema.get("minItems", 0)
        values = [self._of(first[i] if i < len(first) else rest, depth + 1) for i in range(min(n, 1 << 16))]
        return None if None in values else "[" + SEPARATORS[0].join(filter(None, values)) + "]"

    def _string(self, schema: dict[str, Any], depth: int) -> str | None:
        if "pattern" in schema or "format" in schema:
            return None
        return f'"{"a" * min(schema.get("minLength", 0), 1 << 16)}"'

    def _number(self, schema: dict[str, Any], depth: int) -> str | None:
        low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
        high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
        step = schema.get("multipleOf", 1)
        near = [0, *(math.floor(end / step) * step + more for end in (low, high) if math.isfinite(end)
                     for more in (-step, 0, step, 2 * step))]  # fmt: skip
        fit = [n for n in near if _fits(n, schema)]
        return self._best(map(_dumped, fit))


def _fits(n: float, schema: dict[str, Any]) -> bool:
    return schema.get("minimum", -math.inf) <= n <= schema.get("maximum", math.inf) and schema.get(
        "exclusiveMinimum", -math.inf
    ) < n < schema.get("exclusiveMaximum", math.inf)


_WRITERS: dict[str, Callable[[Shortest, dict[str, Any], int], str | None]] = {
    "object": Shortest._object,
    "array": Shortest._array,
    "string": Shortest._string,
    "number": Shortest._number,
    "integer": Shortest._number,
    "boolean": lambda shortest, schema, depth: shortest._best(["true", "false"]),
    "null": lambda shortest, schema, depth: "null",
}


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=SEPARATORS)
