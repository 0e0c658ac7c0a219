"""Text of a given form is always whole, whatever cuts it; what cannot be followed is refused beforehand."""

from __future__ import annotations

import asyncio
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
from command_line import Done
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

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


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


# ---------------------------------------------------------------- texts of a model


@pytest.mark.parametrize("seed", range(6))
def test_at_the_limit_the_text_is_closed(llm: Llama, seed: int) -> None:
    free = llm.generate("Once", max_tokens=200, seed=seed, temperature=1.5, json_schema=PERSON)
    for most in (20, 22, 25, 30):
        r = llm.generate("Once", max_tokens=most, seed=seed, temperature=1.5, json_schema=PERSON)
        jsonschema.validate(json.loads(r.text), PERSON)
        assert len(r.tokens) <= most
        assert r.finish_reason in ("stop", "closed")
        if r.finish_reason == "stop":
            assert r.text == free.text
    with pytest.raises(UsageError, match="no text that fits was found in 9 tokens"):
        llm.generate("Once", max_tokens=9, seed=seed, json_schema=PERSON)


def test_a_stop_string_closes_the_text(llm: Llama) -> None:
    options = {"max_tokens": 60, "seed": 2, "json_schema": PERSON}
    name = json.loads(llm.generate("Once", **options).text)["name"]
    stop = name[-3:]
    r = llm.generate("Once", **options, stop=stop)
    assert stop not in json.loads(r.text)["name"]
    assert (r.finish_reason, r.overruled) == ("closed", ())
    r = llm.generate("Once", **options, stop='"')  # without one there is no such text
    jsonschema.validate(json.loads(r.text), PERSON)
    assert r.overruled == ("stop",)
    r = llm.generate("Once", max_tokens=60, seed=2, regex="[a-z ,]*", stop=",")
    assert "," not in r.text
    assert r.finish_reason == "stop"


def test_out_of_time_the_text_is_closed(llm: Llama) -> None:
    r = llm.generate("Once", max_tokens=-1, seed=1, context_policy="slide", max_time_s=0.4, regex="([a-z]+[ ,])+END")
    assert r.finish_reason == "closed"
    assert re.fullmatch("([a-z]+[ ,])+END", r.text)
    assert len(r.tokens) > 8


def test_a_text_that_is_complete_ends_by_itself(llm: Llama) -> None:
    r = llm.generate("Once", seed=1, choices=[" upon a time", " there was"])
    assert r.finish_reason == "stop"
    assert r.text in (" upon a time", " there was")
    assert llm.generate("Once", max_tokens=0, choices=["", "a"]).text == ""
    r = llm.generate("Once", max_tokens=12, seed=1, regex="[a-z ]*")
    assert r.finish_reason in ("stop", "length")


def test_a_text_may_begin_with_a_space_though_nothing_stands_before_it(llm: Llama) -> None:
    r = llm.generate("", max_tokens=12, seed=0, regex=" [A-Z][a-z ]+")
    assert re.fullmatch(" [A-Z][a-z ]+", r.text)
    assert "".join(p.text for p in llm.stream("", max_tokens=12, seed=0, regex=" [A-Z][a-z ]+")) == r.text


def test_what_has_to_come_is_not_asked_for(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = llm.engine.forward

    def counted(*arguments: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    monkeypatch.setattr(llm.engine, "forward", counted)
    schema = {
        "type": "object",
        "properties": {"the name of the cat": {"enum": ["Tom", "Kit"]}},
        "additionalProperties": False,
    }
    schema["required"] = list(schema["properties"])
    r = llm.generate("Once", seed=1, json_schema=schema)
    assert len(r.tokens) > 12
    assert calls < 5
    assert llm.generate("Once", seed=1, json_schema=schema, logprobs=0).tokens == r.tokens


def test_guesses_beside_what_has_to_come_leave_something_to_ask_for(llm: Llama) -> None:
    pairs = {"type": "array", "items": {"type": "integer"}, "minItems": 2}
    for options in ({"json_schema": pairs}, {"regex": "(ab|ba)+"}):
        for seed in range(20):  # texts that repeat themselves, so that their next ids are guessed
            assert llm.generate("Once", max_tokens=40, temperature=1.5, seed=seed, **options).text


@pytest.mark.parametrize(
    "options", [{"json_schema": PERSON}, {"regex": "([a-z]+ ){3,9}"}, {"choices": ["a b", "a c", "d"]}]
)
def test_in_company_and_with_guesses_the_text_is_the_one_alone(llm: Llama, options: dict[str, Any]) -> None:
    prompts = ["Once", "The cat", "One day a dog", "Once upon a time there was"]
    common = {"max_tokens": 40, "temperature": 1.2, **options}
    alone = [llm.generate(prompt, seed=i, **common) for i, prompt in enumerate(prompts)]
    handles = [llm.submit(prompt, seed=i, **common) for i, prompt in enumerate(prompts)]
    assert [handle.result(60).text for handle in handles] == [r.text for r in alone]
    assert llm.generate(prompts, seed=0, **common)[0].text == alone[0].text
    several = llm.generate(prompts[0], seed=0, n=3, **common)
    assert several[0].text == alone[0].text
    with npllama.load(DEMO, speculation=False) as plain:
        assert [plain.generate(p, seed=i, **common).text for i, p in enumerate(prompts)] == [r.text for r in alone]

    async def read() -> str:
        return "".join([piece.text async for piece in llm.astream(prompts[1], seed=1, **common)])

    assert asyncio.run(read()) == alone[1].text
    session = llm.session(seed=0)
    session.append(prompts[0])
    assert session.generate(**common).text == alone[0].text
    again = session.generate(**common)  # it goes on behind what was closed
    assert again.finish_reason in ("stop", "closed", "length")


def test_the_form_wins_over_what_would_leave_nothing(llm: Llama) -> None:
    r = llm.generate("a", choices=["yes", "no"], bad_words=["y", "n"], temperature=0)
    assert r.text in ("yes", "no")
    assert r.overruled == ("bad_words",)
    assert llm.generate("a", choices=["yes", "no"], bad_words=["y"]).text == "no"
    r = llm.generate("a", choices=["yes"], min_tokens=20, ignore_eos=True)
    assert (r.text, r.finish_reason) == ("yes", "stop")
    r = llm.generate("a", choices=["yes", "no"], logits_processor=lambda ids, logits: np.full_like(logits, -np.inf))
    assert r.overruled == ("logits_processor",)


def test_the_chances_are_those_among_what_may_come(llm: Llama) -> None:
    pieces = [llm.tokenizer.piece(i).decode("utf-8", "replace") for i in range(llm.tokenizer.n_pieces)]
    letters = [i for i, piece in enumerate(pieces) if piece in ("a", "b", "c", "d")]
    logits = llm.logits(llm.tokenizer.encode("Once"))[-1][letters].astype(np.float64)
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    texts = [r.text for r in llm.generate("Once", max_tokens=1, n=600, seed=5, choices=["a", "b", "c", "d"], **off)]
    for letter in "abcd":  # several ids may write one
        p = sum(x for i, x in zip(letters, expected, strict=True) if pieces[i] == letter)
        assert abs(texts.count(letter) / 600 - p) < 5 * np.sqrt(p * (1 - p) / 600) + 1e-9


def test_two_forms_or_none_that_it_could_be_are_refused(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, said in (
        ({"choices": ["a"], "regex": "b"}, "both say what the text is to be"),
        ({"choices": []}, "at least one text"),
        ({"choices": "yes"}, "at least one text"),
        ({"choices": [1]}, "at least one text"),
        ({"regex": ""}, "needs text, a pattern"),
        ({"regex": 3}, "needs text, a pattern"),
        ({"regex": "(a"}, "regex cannot be followed"),
        ({"grammar": "start: missing"}, 'unknown name: "missing"'),
        ({"grammar": 7}, "needs text, a Lark grammar"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            llm.generate("a", **options)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'npllama[structured]'")):
        llm.generate("a", regex="an unusual pattern")
    assert llm.generate("a", choices=["x"]).text == "x"


# ---------------------------------------------------------------- chat, and the command line


def test_an_answer_has_a_form_too(llm: Llama) -> None:
    with npllama.load(DEMO, chat_format="alpaca") as talking:
        messages = [{"role": "user", "content": "Who?"}]
        answer = talking.chat(messages, seed=1, max_tokens=60, json_schema=PERSON)
        jsonschema.validate(json.loads(answer.message["content"]), PERSON)
        stream = talking.chat(messages, stream=True, seed=1, max_tokens=60, json_schema=PERSON)
        assert "".join(piece.text for piece in stream) == answer.message["content"]


def test_the_command_line_has_them_all(call: Callable[..., Done], tmp_path: Any) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(PERSON))
    grammar.write_text('start: "(" /[a-z]/ ")"\n')
    once = ("generate", "-p", "Once", "-n", 30, "-s", 1)
    for arguments in (("-j", json.dumps(PERSON)), ("-jf", schema), ("--json-schema", json.dumps(PERSON))):
        jsonschema.validate(json.loads(call(*once, *arguments).text), PERSON)
    assert call(*once, "--choice", " a", "--choice", "-b").text in (" a\n", "-b\n")
    assert re.fullmatch("[0-9]{3}\n", call(*once, "--regex", "[0-9]{3}").text)
    assert re.fullmatch(r"\([a-z]\)\n", call(*once, "--grammar-file", grammar).text)
    assert re.fullmatch("-+\n", call(*once, "--grammar", 'start: "-"+').text)
    found = json.loads(
        call(*once, "--json", "--choice", "yes", "--choice", "no", "--bad-word", "y", "--bad-word", "n").text
    )
    assert found["overruled"] == ["bad_words"]
    lines = b'{"prompt": "a", "regex": "[0-9]{2}"}\n{"prompt": "a", "regex": "("}\n{"prompt": "a", "choices": ["q"]}\n'
    answers = [json.loads(line) for line in call("generate", "--jsonl", "-n", 9, stdin=lines).text.splitlines()]
    assert re.fullmatch("[0-9]{2}", answers[0]["text"])
    assert "regex cannot be followed" in answers[1]["error"]
    assert answers[2]["text"] == "q"
    for arguments, said in (
        (("-j", "[1"), "not JSON"),
        (("-j", "{}", "-jf", schema), "leave one out"),
        (("--choice", "a", "--regex", "b"), "both say"),
        (("-jf", tmp_path / "none"), "cannot be read"),
    ):
        done = call(*once, *arguments)
        assert done.code != 0
        assert said in done.err
