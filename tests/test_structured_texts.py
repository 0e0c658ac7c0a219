"""Texts of a given form as a model writes them: alone, in company, in chat and on the command line."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from command_line import Done

import npllama
from npllama import UsageError
from npllama.inference import DEMO, Llama

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return npllama.load(DEMO)


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
