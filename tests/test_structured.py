"""Text of a given form is always whole, whatever cuts it; what cannot be followed is refused beforehand."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import random
import re
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest
import tiny_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

import npllama
from npllama import UsageError
from npllama.generation.structured.constraint import Constraint
from npllama.generation.structured.structures import Structures, checked_structure
from npllama.generation.structured.vocabulary import Vocabulary
from npllama.inference import DEMO, Llama
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.protocol import Tokenizer
from npllama.text.readers.tokenizer_json import read_tokenizer_json


@pytest.fixture(scope="module")
def llm() -> Llama:
    return npllama.load(DEMO)


def demo_tokenizer() -> Tokenizer:
    with npllama.load(DEMO, backend="numpy") as llm:
        return llm.tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "SentencePiece": demo_tokenizer,
    "byte level": lambda: BpeTokenizer(read_tokenizer_json(tiny_bpe.written(tiny_bpe.byte_level()))),
    "characters": lambda: BpeTokenizer(read_tokenizer_json(tiny_bpe.written(tiny_bpe.characters()))),
}


def vocabulary_of(name: str) -> Vocabulary:
    tokenizer = TOKENIZERS[name]()
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.special("<|end_of_text|>")
    return Vocabulary(tokenizer, tokenizer.n_pieces + 5, [eos])


@pytest.fixture(scope="module", params=TOKENIZERS)
def structures(request: pytest.FixtureRequest) -> Structures:
    return Structures(vocabulary_of(request.param))


def walk(structures: Structures, constraint: Constraint, most: int, seed: int) -> bytes:
    """A text whose ids come by chance, as from a model that knows nothing: at most so many, then what closes it."""
    rng, ids = random.Random(seed), []
    ends = structures._vocabulary.ends
    while len(ids) < most:
        allowed = np.flatnonzero(constraint.mask())
        token = int(rng.choice(allowed if rng.random() < 0.5 else allowed[:40]))
        said = constraint.take(token, most - len(ids))
        if said in ("full", "stop"):
            ids += constraint.closing
            break
        ids += [] if token in ends else [token]
        if said == "over":
            break
    assert len(ids) <= most
    return b"".join(structures._vocabulary.pieces[i] for i in ids)


# ---------------------------------------------------------------- JSON by a schema

SIMPLE = st.sampled_from(
    [
        {"type": "string"},
        {"type": "integer"},
        {"type": "number"},
        {"type": ["boolean", "null"]},
        {"enum": ["a", "bc", 1, None, "déjà"]},
        {"const": [1, "x"]},
        {"type": "string", "minLength": 3, "maxLength": 5},
        {"type": "integer", "minimum": 12, "maximum": 1200},
        {"type": "number", "exclusiveMinimum": 0.5, "maximum": 3.25},
        {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]+$"},
        {"type": "integer", "multipleOf": 7},
        {"type": "string", "format": "date"},
        {},
    ]
)
NAMES = st.sampled_from(["a", "b", "name", "x y", "é", '"q"'])


def larger(part: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, part, max_size=4)
    more = st.one_of(st.none(), st.just(False), part)
    return st.one_of(
        st.builds(
            lambda items, n, m: {"type": "array", "items": items, "minItems": n, "maxItems": n + m},
            *(part, st.integers(0, 3), st.integers(0, 3)),
        ),
        st.builds(
            lambda has, required, rest: (
                {"type": "object", "properties": has, "required": required}
                | ({} if rest is None else {"additionalProperties": rest})
            ),
            *(properties, st.lists(NAMES, unique=True, max_size=3), more),
        ),
        st.builds(
            lambda word, of: {word: of},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(part, min_size=1, max_size=3),
        ),
        st.builds(
            lambda first: {"type": "array", "prefixItems": first, "items": False},
            st.lists(part, min_size=1, max_size=3),
        ),
        st.builds(
            lambda of, n: {"type": "object", "patternProperties": {"^a": of}, "maxProperties": n},
            part,
            st.integers(1, 2),
        ),
    )


@settings(max_examples=120)
@given(st.recursive(SIMPLE, larger, max_leaves=6), st.sampled_from([0, 1, 2, 4, 8, 16, 40, 120]), st.integers(0, 2**30))
def check_schemas(structures: Structures, counts: dict[str, int], schema: Any, most: int, seed: int) -> None:
    try:
        constraint = structures.constraint(checked_structure({"json_schema": schema}), most, ())
    except UsageError as error:
        counts["refused"] += (
            re.match("json_schema(: no text that fits was| cannot be followed:)", str(error)) is not None
        )
        return
    found = json.loads(walk(structures, constraint, most, seed))
    jsonschema.Draft202012Validator(schema).validate(found)
    counts["whole"] += 1


def test_json_by_a_schema_is_whole_and_valid_whatever_its_length(structures: Structures) -> None:
    counts = {"whole": 0, "refused": 0}
    check_schemas(structures, counts)
    assert counts["whole"] > 30
    assert counts["refused"] > 5


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, '"if", "then"'),
        ({"contains": {"type": "string"}}, "contains"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}], "x-guidance": {"coerce_one_of": True}}, "x-guidance"),
        ({"items": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"const": -(2**63)}, "beyond 2^53"),
        ({"enum": [{"a": 123456789.123456789}]}, "would be written as another number"),
        ({"const": "a\ud800"}, "half of a surrogate pair"),
        ({"properties": {1: {}}}, "the key '1' is no text"),
        ({"default": [[[[{"a": [[]]}]]]] * 2, "items": json.loads('{"items": ' * 120 + "{}" + "}" * 120)}, "100 deep"),
        ({"type": "string", "format": "sonnet"}, "Unknown format: sonnet"),
        ({"type": "object", "minProperties": 2, "required": ["a"]}, "minProperties: 2"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://localhost/other"}, "is not present"),
        ({"type": "strig"}, "strig"),
        ({"enum": ["a", "b\0c"]}, r"the character \u0000"),
        ({"properties": {"a\x1b": {}}}, r"the character \u001b"),
    ],
)
def test_keywords_that_cannot_be_followed_are_refused_by_name(llm: Llama, schema: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match="json_schema cannot be followed") as caught:
        llm.generate("a", json_schema=schema)
    assert said in str(caught.value)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Pet:
    name: str
    kind: Literal["cat", "dog"]
    legs: int | None
    colours: list[Colour]
    parent: Pet | None
    size: tuple[int, float]
    more: dict[str, bool]


class Model(pydantic.BaseModel):
    name: str
    pets: list[str]


def test_the_schema_of_a_type_is_that_of_its_fields(llm: Llama) -> None:
    found = json.loads(llm.generate("a", max_tokens=150, seed=3, temperature=1.5, json_schema=Pet).text)
    assert list(found) == [field.name for field in dataclasses.fields(Pet)]
    assert found["kind"] in ("cat", "dog")
    assert set(found["colours"]) <= {"red", "blue"}
    assert found["legs"] is None or isinstance(found["legs"], int)
    assert len(found["size"]) == 2
    text = llm.generate("a", max_tokens=80, seed=3, temperature=1.5, json_schema=Model).text
    assert Model.model_validate_json(text)
    for wrong in (Pet, Model, 3, "{}", [1]):
        if wrong not in (Pet, Model):
            with pytest.raises(UsageError, match="needs a schema as a dict, a model of pydantic or a dataclass"):
                llm.generate("a", json_schema=wrong)
    with pytest.raises(UsageError, match="has no schema here"):
        llm.generate("a", json_schema=dataclasses.make_dataclass("Odd", [("x", complex)]))


@pytest.mark.parametrize("step", [lambda to: to, lambda to: {"type": "array", "items": to}], ids=["alone", "nested"])
def test_a_chain_of_references_is_read_or_refused(llm: Llama, step: Callable[[Any], Any]) -> None:
    def chain(n: int) -> dict[str, Any]:
        steps = {f"a{i}": step({"$ref": f"#/$defs/a{i + 1}"}) for i in range(n)}
        return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{n}": {"const": 1}}}

    assert llm.generate("a", max_tokens=60, json_schema=chain(25)).text
    with pytest.raises(UsageError, match="with its references it is nested more than 100 deep"):
        llm.generate("a", json_schema=chain(3000))


def test_what_is_no_json_or_no_schema_is_one_line(llm: Llama) -> None:
    missing = dataclasses.make_dataclass("D", [("x", "Missing")])
    for wrong in ({"const": float("nan")}, {"maximum": float("inf")}, {"const": 10**400}, {"const": b"x"}, missing,
                  dataclasses.make_dataclass("D", [("x", [])]), dataclasses.make_dataclass("D", [("x", Literal[b"x"])]),
                  type("Odd", (), {"model_json_schema": lambda: 1 / 0})):  # fmt: skip
        with pytest.raises(UsageError, match="json_schema") as caught:
            llm.generate("a", json_schema=wrong)
        assert "\n" not in str(caught.value)
    for option in ("regex", "grammar"):
        with pytest.raises(UsageError, match="surrogate"):
            llm.generate("a", **{option: "\ud800"})
        with pytest.raises(UsageError, match="at most 262,144 are read"):
            llm.generate("a", **{option: "a" * 300_000})
    with pytest.raises(UsageError, match="more than 10,000"):
        llm.generate("a", choices=itertools.repeat("a"))


def test_numbers_with_a_fraction_are_written_as_they_are(llm: Llama) -> None:
    for value in (-2.0, 0.1, [1.5, {"a": 3.0}]):
        assert json.loads(llm.generate("a", json_schema={"enum": [value]}).text) == value


def test_types_of_one_name_stay_apart(llm: Llama) -> None:
    one, other = (dataclasses.make_dataclass("Same", [(name, bool)]) for name in "xy")
    both = dataclasses.make_dataclass("Both", [("p", one), ("q", other)])
    found = json.loads(llm.generate("a", max_tokens=60, json_schema=both).text)
    assert (list(found["p"]), list(found["q"])) == (["x"], ["y"])


def test_schemas_that_refer_to_themselves_are_read_once(structures: Structures) -> None:
    twice = {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}
    schema = {"$ref": "#/$defs/a", "$defs": {"a": twice}}
    for _ in range(20):
        schema["$defs"]["a"] = {"anyOf": [schema["$defs"]["a"], {"$ref": "#/$defs/a"}]}
    constraint = structures.constraint(checked_structure({"json_schema": schema}), 40, ())
    assert isinstance(json.loads(walk(structures, constraint, 40, 1)), list)


@pytest.mark.parametrize(
    "options",
    [
        {"json_schema": {"type": "string", "format": "email"}},
        {"json_schema": {"type": "string", "pattern": "^[^@]+@[a-z]+\\.com$"}},
        {"json_schema": {"type": "array", "items": {"type": "string", "format": "date-time"}, "minItems": 2}},
        {"regex": "(ab|ba){9}[0-9]+!"},
        {"grammar": 'start: a "END"\na[suffix="x"]: /[a-z]+/'},
    ],
)
def test_what_needs_a_search_is_found(structures: Structures, options: dict[str, Any]) -> None:
    structures.constraint(checked_structure(options), 200, ())


# ---------------------------------------------------------------- what fits, and what is refused


def fewest_ids(vocabulary: Vocabulary, text: str) -> int:
    """How few ids write a text, by trying all first pieces."""
    known = {b"": 0}

    def count(data: bytes) -> int:
        if data not in known:
            pieces = [p for p in {data[:n] for n in range(1, len(data) + 1)} if p in vocabulary.ids]
            known[data] = 1 + min((count(data[len(p) :]) for p in pieces), default=1000)
        return known[data]

    return count(text.encode())


LANGUAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "choices": ({"choices": ["the cat", "them", "z", ""]}, ["the cat", "them", "z", ""]),
    "regex": (
        {"regex": "(the|when){1,2}[!?]?"},
        [a + b + c for a in ("the", "when") for b in ("", "the", "when") for c in ("", "!", "?")],
    ),
    "letters": ({"regex": "[a-c]{4}"}, ["".join(four) for four in itertools.product("abc", repeat=4)]),
    "grammar": ({"grammar": 'start: "(" (start | "x") ")"'}, ["(" * n + "x" + ")" * n for n in range(1, 20)]),
    "schema": (
        {
            "json_schema": {
                "anyOf": [{"enum": ["elephants", 7]}, {"type": "array", "items": {"const": 1}, "maxItems": 2}]
            }
        },
        ['"elephants"', "7", "[]", "[1]", "[1, 1]"],
    ),
    "long": (
        {"json_schema": {"type": "array", "items": {"enum": ["night", "day"]}, "minItems": 3, "maxItems": 3}},
        [json.dumps(list(three)) for three in itertools.product(["night", "day"], repeat=3)],
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_refused_is_what_no_text_fits(structures: Structures, name: str) -> None:
    options, texts = LANGUAGES[name]
    need = min(fewest_ids(structures._vocabulary, text) for text in texts)
    for most in range(need + 6):
        if most < need:
            with pytest.raises(UsageError, match=f"no text that fits was found in {most} tokens; raise max_tokens"):
                structures.constraint(checked_structure(options), most, ())
            continue
        constraint = structures.constraint(checked_structure(options), most, ())
        for seed in range(8):
            assert walk(structures, constraint.copy(), most, seed).decode() in texts
