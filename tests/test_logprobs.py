"""logprobs: what the model thought of each id, and of others that might have come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from command_line import Done

import npllama
from npllama import UsageError
from npllama.generation.sampling.logprobs import TokenLogprobs
from npllama.inference import DEMO, Llama

PROMPT = "Once upon a time"
IN_NUMPY = os.environ.get("NPLLAMA_BACKEND") == "numpy"
TOLERANCE = 1e-4 if IN_NUMPY else 1e-6
"""NumPy's products round otherwise where they have another number of rows; compiled ones do not."""
BETWEEN_CALLS = TOLERANCE if IN_NUMPY else 0.0
"""A guess adds rows to a step, and how long steps take decides whether one is made: no matter to compiled products."""


@pytest.fixture(scope="module")
def llm() -> Llama:
    return npllama.load(DEMO)


def expected(llm: Llama, tokens: list[int]) -> np.ndarray:
    """log softmax (n, V) where each of the ids behind the prompt was drawn, from `logits` alone."""
    ids = llm.tokenizer.encode(PROMPT)
    logits = llm.logits([*ids, *tokens])[len(ids) - 1 : -1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 0, "typical_p": 0.9}, {"mirostat": 2}])
def test_they_are_the_models_own_whatever_the_sampling(llm: Llama, options: dict[str, object]) -> None:
    r = llm.generate(PROMPT, 20, seed=4, logprobs=3, **options)
    assert r.tokens == llm.generate(PROMPT, 20, seed=4, **options).tokens
    assert r.logprobs is not None
    assert [one.token for one in r.logprobs] == r.tokens
    all_of_them = expected(llm, r.tokens)
    for one, row in zip(r.logprobs, all_of_them, strict=True):
        assert one.bytes == llm.tokenizer.piece(one.token)
        assert one.logprob == pytest.approx(row[one.token], abs=TOLERANCE)
        best = np.argsort(-row, kind="stable")[:3]
        assert [item.token for item in one.top] == best.tolist()
        np.testing.assert_allclose([item.logprob for item in one.top], row[best], atol=TOLERANCE)
        assert one.sampled_logprob is None
        assert one.sampled_top == ()
    assert b"".join(one.bytes for one in r.logprobs).decode() == r.text


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"samplers": "top_k;temperature"}, {"regex": "[a-z ,.]+"}])
def test_after_sampling_they_are_of_what_was_drawn_from(llm: Llama, options: dict[str, object]) -> None:
    common = {"seed": 4, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "temperature": 0.7, **options}
    r = llm.generate(PROMPT, 12, logprobs=5, post_sampling_probs=True, **common)
    assert r.tokens == llm.generate(PROMPT, 12, **common).tokens
    for one, row in zip(r.logprobs or (), expected(llm, r.tokens), strict=True):
        chances = {item.token: np.exp(item.logprob) for item in one.sampled_top}
        assert sum(chances.values()) == pytest.approx(1)
        assert one.sampled_logprob == pytest.approx(np.log(chances[one.token]))
        if options.get("temperature") == 0:
            assert one.sampled_logprob == 0
        elif "regex" not in options:
            heated = np.exp(np.sort(row)[::-1][:5] / 0.7)
            np.testing.assert_allclose(list(chances.values()), heated / heated.sum(), atol=TOLERANCE)


def test_what_was_left_out_has_no_probability(llm: Llama) -> None:
    r = llm.generate(
        PROMPT, 6, seed=1, logprobs=40, post_sampling_probs=True, temperature=1e-4, top_k=0, top_p=1.0, min_p=0.0
    )
    assert all(np.isfinite([item.logprob for item in one.sampled_top]).all() for one in r.logprobs or ())


def assert_same(found: Iterable[TokenLogprobs | None], wanted: Sequence[TokenLogprobs] | None) -> None:
    """Equal in everything but logarithms, which may differ by BETWEEN_CALLS."""
    assert wanted
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        near = [pytest.approx(item.logprob, abs=BETWEEN_CALLS, rel=0) for item in (other, *other.top)]
        assert [item.logprob for item in (one, *one.top)] == near
        assert [item[:3] for item in one.top] == [item[:3] for item in other.top]
        assert replace(one, logprob=None, top=()) == replace(other, logprob=None, top=())


def test_pieces_carry_them_in_a_stream_and_in_chat(llm: Llama) -> None:
    r = llm.generate(PROMPT, 10, seed=1, logprobs=1)
    pieces = [piece for piece in llm.stream(PROMPT, 10, seed=1, logprobs=1) if piece.token is not None]
    assert [piece.token for piece in pieces] == r.tokens
    assert_same((piece.logprobs for piece in pieces), r.logprobs)
    assert all(piece.logprobs is None for piece in llm.stream(PROMPT, 5, seed=1))
    assert llm.generate(PROMPT, 5, seed=1).logprobs is None
    with npllama.load(DEMO, chat_format="alpaca") as talking:
        answer = talking.chat([{"role": "user", "content": "Hello"}], max_tokens=5, logprobs=2)
        assert [len(one.top) for one in answer.result.logprobs or ()] == [2] * len(answer.result.tokens)


def test_in_company_they_are_those_alone(llm: Llama) -> None:
    prompts = [PROMPT, "The cat", "A dog"]
    alone = [llm.generate(p, 8, seed=i, logprobs=2) for i, p in enumerate(prompts)]
    handles = [llm.submit(p, 8, seed=i, logprobs=2) for i, p in enumerate(prompts)]
    for handle, one in zip(handles, alone, strict=True):
        assert_same(handle.result(60).logprobs or (), one.logprobs)


def test_what_closes_a_text_was_not_asked_for(llm: Llama) -> None:
    r = llm.generate(PROMPT, 8, seed=1, logprobs=1, regex="[a-z ]{12,}!")
    assert r.finish_reason == "closed"
    asked = [one.logprob is not None for one in r.logprobs or ()]
    assert asked == sorted(asked, reverse=True)
    assert not asked[-1]
    assert len(asked) == len(r.tokens)


@pytest.mark.parametrize("wrong", [-1, 1001, True, "2", 1.5])
def test_a_number_out_of_range_is_refused(llm: Llama, wrong: object) -> None:
    with pytest.raises(UsageError, match=r"logprobs=.*: needs how many alternatives, 0 to 1000"):
        llm.generate(PROMPT, 1, logprobs=wrong)


def test_after_sampling_needs_a_number(llm: Llama) -> None:
    with pytest.raises(UsageError, match="post_sampling_probs=True: needs logprobs="):
        llm.generate(PROMPT, 1, post_sampling_probs=True)
    with pytest.raises(UsageError, match="post_sampling_probs='x': needs True or False"):
        llm.generate(PROMPT, 1, logprobs=1, post_sampling_probs="x")


def test_json_on_the_command_line_shows_them(call: Callable[..., Done]) -> None:
    found = json.loads(call("generate", PROMPT, "-n", 4, "-s", 1, "--json", "--logprobs", 2).text)
    with npllama.load(DEMO) as llm:
        same: list[TokenLogprobs] = llm.generate(PROMPT, 4, seed=1, logprobs=2).logprobs or []
    assert [one["token"] for one in found["logprobs"]] == [one.token for one in same]
    assert found["logprobs"][0]["bytes"] == list(same[0].bytes)
    assert len(found["logprobs"][0]["top"]) == 2
    assert "sampled_top" not in found["logprobs"][0]
    lines = b'{"prompt": "a", "max_tokens": 2, "logprobs": 1, "post_sampling_probs": true}\n'
    answer = json.loads(call("generate", "--jsonl", stdin=lines).text)
    assert len(answer["logprobs"][0]["sampled_top"]) == 1
    for arguments, said in (
        (("--logprobs", 2), "give --json or --jsonl"),
        (("--post-sampling-probs",), "needs --logprobs"),
    ):
        done = call("generate", PROMPT, *arguments)
        assert done.code == 2
        assert said in done.err
