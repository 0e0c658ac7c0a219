"""Ids that must not come and shifted logits, drawn together and fast: the same ids as one by one through the chain."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import numpy as np
import pytest
from helpers import TINY, write_model_directory

import npllama
from npllama.errors import UsageError
from npllama.execution.drawing.top_k import top_k
from npllama.generation.completion import Completion
from npllama.generation.sampling.basic import Allowed, Changes, Draw, draw_rows, uniform
from npllama.generation.sampling.sampler import Model, Sampler
from npllama.options import OFF, SamplingOptions

COMPILED = importlib.util.find_spec("numba") is not None and os.environ.get("NPLLAMA_BACKEND") != "numpy"
ROWS = 8
N_WIDE = 4000
NEVER = -math.inf


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> npllama.Llama:
    path = tmp_path_factory.mktemp("changed") / "model"
    write_model_directory(path)
    with npllama.load(path, backend="numba" if COMPILED else "numpy") as opened:
        yield opened


OPTIONS: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"ignore_eos": True, "temperature": 0.0},
    {"ignore_eos": True, "top_p": 1.0, "min_p": 0.0, "temperature": 3.0},
    {"min_tokens": 12, "top_k": 3},
    {"logit_bias": {5: 2.5, 17: -1.25, 40: NEVER, 299: 9.0}},
    {"logit_bias": {i: math.sqrt(i) - 9 for i in range(200)}, "temperature": 0.0},
    {"logit_bias": dict.fromkeys(range(100), 32.0), "min_p": 0.2},
    {"logit_bias": dict.fromkeys(range(100), -1e30), "top_k": 5},
    {"logit_bias": dict.fromkeys(range(220), NEVER), "temperature": 1e300},
    {"bad_words": ("a", "bc", "the")},
    {"bad_words": ("ab", "cd"), "logit_bias": {3 + ord("b"): 6.0, 3 + ord("a"): 4.0}, "ignore_eos": True},
    {"bad_words": ("e",), "min_tokens": 12, "logit_bias": {1: 3.0}, "top_p": 0.3, "top_k": 20},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_ids", ["pieces", "padded", "wide"])
def test_ids_drawn_together_are_those_of_the_chain(llm: npllama.Llama, options: dict[str, Any], n_ids: str) -> None:
    config = dataclasses.replace(llm.config, vocab_size=N_WIDE) if n_ids != "pieces" else llm.config
    model, sampling = Model(config, llm.tokenizer, top_k), SamplingOptions().changed(options)
    rng = np.random.default_rng(len(repr(options)))
    n_fast, samplers = 0, [Sampler(model, sampling, n_ids == "wide", 10) for _ in range(ROWS)]
    for turn in range(60):
        logits = (rng.standard_normal((ROWS, config.vocab_size)) * 3).astype(np.float32)
        logits = np.round(logits) if turn % 4 == 0 else logits
        texts = [[1, *rng.integers(3 + ord("a"), 3 + ord("h"), 9 + turn % 6).tolist()] for _ in range(ROWS)]
        expected = [s.next_id(logits[i], texts[i], turn, i) for i, s in enumerate(samplers)]
        draws = [s.draw(texts[i], uniform(turn, i, len(texts[i]))) for i, s in enumerate(samplers)]
        assert all(draws), "these leave enough ids"
        before = logits.copy()
        assert draw_rows(logits, draws) == expected
        assert draw_rows(logits[3:4], draws[3:4]) == expected[3:4]
        if COMPILED:
            assert draw_rows(logits, draws, llm.engine.top_k, llm.engine.draw) == expected
        assert np.array_equal(logits, before), "the logits are put back"
        n_fast += sum(draw.changes is not None for draw in draws)
    assert n_fast > 60


def test_texts_with_other_options_are_drawn_together(llm: npllama.Llama) -> None:
    model = Model(llm.config, llm.tokenizer, top_k)
    all_options = [
        SamplingOptions().changed({"temperature": 1.5, **one}) for one in ({}, *OPTIONS[:1], *OPTIONS[3:5], {})
    ]
    logits = np.random.default_rng(1).standard_normal((len(all_options), TINY.vocab_size)).astype(np.float32)
    samplers = [Sampler(model, one, False, 1) for one in all_options]
    expected = [s.next_id(row, [1, 5], 7, 0) for s, row in zip(samplers, logits, strict=True)]
    draws = [s.draw([1, 5], uniform(7, 0, 2)) for s in samplers]
    assert [draw is not None and draw.changes is None for draw in draws] == [True, False, False, False, True]
    assert draw_rows(logits, draws) == expected


# ---------------------------------------------------------------- what has to go through the chain


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True, "repeat_penalty": 1.1},
        {"ignore_eos": True, "top_k": 0},
        {"logit_bias": {3: 32.5}},
        {"logit_bias": {3: -1e31}},
        {"ignore_eos": True, "typical_p": 0.5},
    ],
)
def test_where_float32_or_another_order_would_give_other_ids_nothing_is_drawn_together(
    llm: npllama.Llama, options: dict[str, Any]
) -> None:
    model = Model(llm.config, llm.tokenizer, top_k)
    assert not Sampler(model, SamplingOptions().changed(options), False, 1).is_basic


def test_too_few_ids_that_are_left_are_drawn_by_the_chain(llm: npllama.Llama) -> None:
    model = Model(llm.config, llm.tokenizer, top_k)
    for n_forbidden, possible in ((260, True), (261, False), (300, False)):
        bias = dict.fromkeys(range(n_forbidden), NEVER)
        sampler = Sampler(model, SamplingOptions(logit_bias=bias, top_k=40), False, 1)
        assert (sampler.draw([1], 0.5) is not None) == possible


def test_a_text_of_which_no_id_is_left_fails_alone(llm: npllama.Llama) -> None:
    with pytest.raises(UsageError, match="no token is left that may come next: bad_words, logit_bias, min_tokens"):
        llm.generate("a", 5, logit_bias=dict.fromkeys(range(300), NEVER))
    assert llm.generate("a", 5, seed=1, ignore_eos=True).usage.completion_tokens == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [7, 8, 9])
def test_logits_that_are_not_finite_spoil_their_own_row_also_where_an_id_must_not_come(
    value: float, place: int
) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 600)).astype(np.float32)
    changes = Changes({7: NEVER, 8: 1.0})
    draws = [Draw(Allowed(600), (), SamplingOptions(), 0.5, changes if i else None) for i in range(4)]
    whole = draw_rows(logits, draws)
    logits[2, place] = value
    before = logits.copy()
    assert draw_rows(logits, draws) == [*whole[:2], None, whole[3]]
    assert draw_rows(logits[2:3], draws[2:3]) == [None]
    assert np.array_equal(logits, before, equal_nan=True)


def test_of_logits_that_are_all_the_lowest_none_that_must_not_come_is_drawn() -> None:
    logits = np.full((1, 600), np.finfo(np.float32).min)
    draw = Draw(Allowed(600), (), SamplingOptions(temperature=0.0), 0.5, Changes({0: NEVER}))
    assert draw_rows(logits, [draw]) == [None]


# ---------------------------------------------------------------- texts


TEXTS: list[dict[str, Any]] = [
    {"ignore_eos": True, "n": 3},
    {"min_tokens": 9, "logit_bias": {2: 6.0}},
    {"bad_words": ["a", "ef"], "temperature": 2.0},
    {"bad_words": ["e"], "ignore_eos": True, "n": 2, "temperature": 0.0},
    {"logit_bias": {70: 5.0, 71: 5.0}, "choices": ["red", "green"]},
    {"ignore_eos": True, "logprobs": 2},
]


def said(llm: npllama.Llama, options: dict[str, Any]) -> list[Any]:
    """What comes alone, in company, and in a session that goes on after more was appended."""
    found = [llm.generate("abc", 25, seed=3, **options), *llm.generate(["a", "bb", "ccc"], 25, seed=4, **options)]
    if "n" in options:
        return [(one.tokens, one.text, one.finish_reason) for several in found for one in several]
    with llm.session(seed=5) as session:
        for part in ("b", "c"):
            session.append(part)
            found.append(session.generate(12, **options))
    return [(one.tokens, one.text, one.finish_reason) for one in found]


@pytest.mark.parametrize("options", TEXTS)
def test_texts_are_those_of_the_chain(
    llm: npllama.Llama, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    calls: list[int] = []
    next_id = Sampler.next_id

    def counted(self: Sampler, *arguments: Any) -> int:
        calls.append(1)
        return next_id(self, *arguments)

    monkeypatch.setattr(Sampler, "next_id", counted)
    drawn = said(llm, options)
    assert bool(calls) == bool({"choices", "logprobs"} & options.keys())
    monkeypatch.setattr(Completion, "draws", lambda self: [])
    calls.clear()
    assert said(llm, options) == drawn
    assert calls
    assert len(set(map(repr, drawn))) > 1


def test_min_tokens_counts_up_to_the_id_drawn(llm: npllama.Llama) -> None:
    ends = dict.fromkeys(llm.config.eos_token_ids, 30.0)
    for n in (1, 4):
        sampling = dataclasses.replace(OFF, top_k=1, logit_bias=tuple(ends.items()), min_tokens=n)
        assert llm.generate("abc", 20, sampling=sampling).usage.completion_tokens == n
