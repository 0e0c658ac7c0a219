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
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

from npllama.errors import UsageError, is_unicode, quote

SEPARATORS = (", ", ": ")
"""Between items, and behind a key: those of Python's json, which models have read most often."""

MAX_DEPTH = 100
"""How deep a schema may be nested, with its references too: llguidance reads 128, and its stack bears some hundreds."""

MAX_SHORTEST = 1 << 14
"""Bytes of the shortest JSON; what is longer is left to a search."""

CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00(?:[01][0-9a-f]|7f)")
"""A control character as JSON spells it, but for those that have a letter."""

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema_of(source: object) -> dict[str, Any]:
    """A schema as a dict: of one, of a model of pydantic, or of a dataclass. Raises UsageError for anything else."""
    if isinstance(source, Mapping):
        return _checked(dict(source))
    if isinstance(source, type) and callable(method := getattr(source, "model_json_schema", None)):
        try:
            return _checked(method())
        except UsageError:
            raise
        except Exception as error:  # (a class of the caller's may raise anything)
            raise UsageError(f"json_schema: {source.__name__} gives no schema ({_first_line(error)}).") from error
    if isinstance(source, type) and dataclasses.is_dataclass(source):
        types_ = TypeSchemas()
        schema = types_.of(source)
        return _checked({**schema, "$defs": types_.definitions})
    raise UsageError(
        f"json_schema={quote(source)}: needs a schema as a dict, a model of pydantic or a dataclass (the class itself)."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {quote(str(error))}"


def _checked(schema: object) -> dict[str, Any]:
    """A schema that is JSON, and that llguidance takes for what it is. Raises UsageError."""
    if not isinstance(schema, dict):
        raise UsageError(f"json_schema: is {quote(schema)}; a dict is needed.")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        _check(schema, 0)
        _check_references(schema, schema, 0, set())
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"json_schema: is no JSON ({_first_line(error)}); numbers, text, lists and dicts are needed."
        ) from error
    if not is_unicode(text):
        raise _refused("a text in it has half of a surrogate pair")
    return schema


def _refused(why: str) -> UsageError:
    return UsageError(f"json_schema cannot be followed: {why}; change it.")


def _check(schema: Any, depth: int) -> None:
    """Refuse what llguidance takes for what it is not, or does not bear.

    A key that comes twice counts twice there; of the ways to write a character only one is allowed here, so that no key
    is written in two, which leaves none for most control characters; and whole numbers are those of a float64.
    """
    if depth > MAX_DEPTH:
        raise _refused(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, int) and not isinstance(schema, bool) and abs(schema) >= 1 << 53:
        raise _refused(f"{quote(schema)} is beyond 2^53")
    if isinstance(schema, list):
        for one in schema:
            _check(one, depth + 1)
    if not isinstance(schema, dict):
        return
    if wrong := [key for key in schema if not isinstance(key, str)]:
        raise _refused(f"the key {quote(wrong[0])} is no text")
    if "x-guidance" in schema:
        raise _refused("x-guidance changes what a schema means")
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, (int, float)) and least > max(1, len(required) if isinstance(required, list) else 0):
        raise _refused(f"minProperties: {least} is more than the properties that are required")
    literal = [schema.get(word) for word in ("const", "enum", "required")], list(schema)
    if found := CONTROL.search(json.dumps(literal)):
        raise _refused(f"a text in it has the character {found[0]}, which would not be written")
    for value in schema.values():
        _check(value, depth + 1)


def _check_references(root: dict[str, Any], schema: Any, depth: int, known: set[str]) -> None:
    """Refuse what is nested too deep with its references, each followed where it comes first, as llguidance does."""
    if depth > MAX_DEPTH:
        raise _refused(f"with its references it is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, list):
        for one in schema:
            _check_references(root, one, depth + 1, known)
    if not isinstance(schema, dict):
        return
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in known:
        known.add(reference)
        _check_references(root, referred(root, reference), depth + 1, known)
    for word, value in schema.items():
        if word not in ("$defs", "definitions"):
            _check_references(root, value, depth + 1, known)


def referred(root: dict[str, Any], reference: str) -> Any:
    """What a reference into the same schema means; None for any other."""
    found: Any = root if reference.startswith("#") else None
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, dict) else None
    return found


def literals(schema: Any) -> Iterator[Any]:
    """All values of const and enum that have a fraction in them: not every float is written as it is."""
    if isinstance(schema, list):
        for one in schema:
            yield from literals(one)
    if isinstance(schema, dict):
        named = ([schema["const"]] if "const" in schema else []) + [*_listed(schema.get("enum"))]
        yield from (value for value in named if _has_fraction(value))
        for word, value in schema.items():
            if word not in ("const", "enum", "default", "examples"):
                yield from literals(value)


def whole(value: Any) -> Any:
    """The same value, 2.0 as 2."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _has_fraction(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else _listed(value)
    return isinstance(value, float) or any(map(_has_fraction, inside))


class TypeSchemas:
    """Schemas of types as they are written in a dataclass, and the definitions that they refer to."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self._names: dict[type, str] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type. Raises UsageError for one that JSON does not have."""
        if isinstance(kind, Hashable) and kind in _SIMPLE:
            return {"type": _SIMPLE[kind]}
        if kind is Any:
            return {}
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Literal:
            return {"enum": list(arguments)}
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self.of(one) for one in arguments]}
        if origin is list and arguments:
            return {"type": "array", "items": self.of(arguments[0])}
        if origin is tuple and arguments and Ellipsis not in arguments:
            items = [self.of(one) for one in arguments]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        if origin is dict and arguments and arguments[0] is str:
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return {"enum": [member.value for member in kind]}
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return self._of_dataclass(kind)
        raise UsageError(
            f"json_schema: the type {quote(kind)} has no schema here; use str, int, float, bool, None, list[...], "
            f"tuple[...], dict[str, ...], Literal, an Enum, a union or a dataclass, or a model of pydantic."
        )

    def _of_dataclass(self, kind: type) -> dict[str, Any]:
        name = self._names.get(kind)
        if name is None:
            name = self._names[kind] = f"{kind.__name__}{len(self._names) or ''}"
            try:
                hints = typing.get_type_hints(kind)
            except Exception as error:  # (an annotation may be any text)
                raise UsageError(f"json_schema: the types of {kind.__name__}: {_first_line(error)}.") from error
            fields = [field for field in dataclasses.fields(kind) if field.init]
            self.definitions[name] = {
                "type": "object",
                "properties": {field.name: self.of(hints[field.name]) for field in fields},
                "required": [field.name for field in fields],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}


# ---------------------------------------------------------------- the shortest JSON


class Shortest:
    """The shortest JSON that fits a schema, by what `cost` says of a text. Whoever uses it checks that it fits."""

    def __init__(self, schema: dict[str, Any], cost: Callable[[str], float]) -> None:
        self._root, self._cost = schema, cost
        self._known: dict[int, str | None] = {}  # by the identity of a schema; None too while it is looked at

    def text(self) -> str | None:
        """None where none is found: a pattern, or keywords that belong together, are left to a search."""
        return self._of(self._root)

    def _best(self, texts: Iterable[str | None]) -> str | None:
        return min((text for text in texts if text is not None), key=self._cost, default=None)

    def _of(self, schema: Any) -> str | None:
        if schema is True or schema == {}:
            return self._best(["0", "1", "{}", "[]", '""', "null"])
        if not isinstance(schema, dict):
            return None
        if id(schema) not in self._known:
            self._known[id(schema)] = None
            found = self._written(schema)
            self._known[id(schema)] = found if found is not None and len(found) <= MAX_SHORTEST else None
        return self._known[id(schema)]

    def _written(self, schema: dict[str, Any]) -> str | None:
        if "const" in schema:
            return _dumped(schema["const"])
        if "enum" in schema:
            return self._best(map(_dumped, schema["enum"]))
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema and (word != "allOf" or len(schema[word]) == 1):
                return self._best(self._of(one) for one in schema[word])
        if "$ref" in schema:
            return self._of(referred(self._root, schema["$ref"]))
        kinds = schema.get("type", list(_WRITERS))
        return self._best(_WRITERS[kind](self, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds))

    def _object(self, schema: dict[str, Any]) -> str | None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        names = [name for name in properties if name in required]
        names += [name for name in required if name not in properties]
        values = [self._of(properties.get(name, schema.get("additionalProperties", True))) for name in names]
        if None in values or schema.get("minProperties", 0) > len(names):
            return None
        pairs = [f"{_dumped(name)}{SEPARATORS[1]}{value}" for name, value in zip(names, values, strict=True)]
        return "{" + SEPARATORS[0].join(pairs) + "}"

    def _array(self, schema: dict[str, Any]) -> str | None:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        n = schema.get("minItems", 0)
        values = [self._of(first[i] if i < len(first) else rest) for i in range(min(n, MAX_SHORTEST))]
        if None in values or sum(map(len, filter(None, values))) > MAX_SHORTEST:
            return None
        return "[" + SEPARATORS[0].join(filter(None, values)) + "]"

    def _string(self, schema: dict[str, Any]) -> str | None:
        if "pattern" in schema or "format" in schema:
            return None
        return f'"{"a" * min(schema.get("minLength", 0), MAX_SHORTEST)}"'

    def _number(self, schema: dict[str, Any]) -> str | None:
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


_WRITERS: dict[str, Callable[[Shortest, dict[str, Any]], str | None]] = {
    "object": Shortest._object,
    "array": Shortest._array,
    "string": Shortest._string,
    "number": Shortest._number,
    "integer": Shortest._number,
    "boolean": lambda shortest, schema: shortest._best(["true", "false"]),
    "null": lambda shortest, schema: "null",
}


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=SEPARATORS)
