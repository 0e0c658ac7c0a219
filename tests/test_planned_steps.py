"""Several steps in one compiled call: the ids are those of single steps, whatever ends them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, write_any_model, write_model_directory

import npllama
from npllama.errors import ModelError
from npllama.execution.drawing.plan import NOT_DRAWN
from npllama.generation import batching
from npllama.generation.completion import Completion
from npllama.generation.sampling.ahead import Ahead, plan_of
from npllama.generation.sampling.basic import Allowed, Changes, Draw, draw_rows
from npllama.inference import Llama
from npllama.options import SamplingOptions

COMPILED = os.environ.get("NPLLAMA_BACKEND") != "numpy"
CONFIG = dataclasses.replace(TINY, max_seq_len=256, vocab_size=2000)
PROMPTS = [[1, 40, 50, 60], [1, 99], [1, 7, 300, 8, 9, 10]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "model"
    write_any_model(path, "q4" if COMPILED else "f32", CONFIG)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Llama:
    with npllama.load(folder, backend="numba" if COMPILED else "numpy", speculation=False) as opened:
        yield opened


@pytest.fixture
def gone(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call went that was given a plan. Each may go as far as it can, whatever steps cost."""
    return counted(llm, monkeypatch)


def counted(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    run_steps = llm.engine.run_steps

    def counting(*arguments: Any) -> list[list[int]]:
        ids = run_steps(*arguments)
        counts.append(len(ids))
        return ids

    monkeypatch.setattr(llm.engine, "run_steps", counting)
    monkeypatch.setattr(batching, "AHEAD_S", 1e6)
    return counts


def step_by_step(llm: Llama, monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(batching, "MAX_AHEAD", 1)
        return llm.generate(*arguments, **options)


def flat(found: Any) -> list[npllama.inference.Result]:
    return [one for some in found for one in flat(some)] if isinstance(found, list) else [found]


def facts(result: npllama.inference.Result) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason, result.usage.completion_tokens


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "seed": 3},
    {"temperature": 1.6, "top_p": 0.8, "min_p": 0.02, "top_k": 5, "seed": 4},
    {"temperature": 1.0, "top_k": 20, "ignore_eos": True, "seed": 5},
    {"temperature": 0.0, "ignore_eos": True, "logit_bias": {5: 3.0, 17: -2.0, 40: -np.inf}},
    {"temperature": 1.2, "top_k": 9, "min_tokens": 9, "seed": 6},
    {"temperature": 1.2, "top_k": 20, "stop": ["e", "th"], "seed": 7},
    {"temperature": 1.0, "top_k": 20, "seed": 8, "n": 3},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_texts_are_those_of_single_steps(
    llm: Llama, gone: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for prompts in (PROMPTS, PROMPTS[0]):
        expected = step_by_step(llm, monkeypatch, prompts, 45, **options)
        gone.clear()
        assert [*map(facts, flat(llm.generate(prompts, 45, **options)))] == [*map(facts, flat(expected))]
        assert (max(gone, default=0) > 3) == COMPILED, "several steps were gone at once, where they can be"
    llm.runtime.scheduler.pool.check()


@pytest.mark.parametrize(
    "options", [{"repeat_penalty": 1.3}, {"bad_words": ("e",)}, {"logprobs": 2}, {"top_k": 0}, {"dry_multiplier": 0.5}]
)
def test_what_takes_more_than_logits_goes_step_by_step(llm: Llama, gone: list[int], options: dict[str, Any]) -> None:
    llm.generate(PROMPTS, 12, **{"temperature": 1.0, "top_k": 9, "seed": 1, **options})
    assert not any(gone)


def test_ends_of_texts_end_the_steps(llm: Llama, gone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = llm.generate(PROMPTS[0], 30, temperature=0.0, ignore_eos=True).tokens
    ending = next(i for i, token in enumerate(first) if i > 3 and token not in first[:i])
    started = Completion.begin

    def begin(job: Completion) -> None:
        job.end_at([first[ending]])
        started(job)

    monkeypatch.setattr(Completion, "begin", begin)
    gone.clear()
    found = llm.generate([PROMPTS[0], PROMPTS[1]], 30, temperature=0.0)
    assert (found[0].tokens, found[0].finish_reason) == (first[:ending], "stop")
    assert llm.generate(PROMPTS[1], 30, temperature=0.0).tokens == found[1].tokens
    if COMPILED:
        assert ending in gone or ending - 1 in gone, "the call ended with the step that drew it"


def test_a_session_goes_on_where_a_stop_string_cut_its_text(
    llm: Llama, gone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def both() -> tuple[list[int], bytes]:
        session = llm.session()
        session.append(PROMPTS[2])
        session.generate(40, temperature=1.3, top_k=20, stop=["a", "o"], seed=11)
        session.append([9, 10])
        session.generate(20, temperature=0.0)
        return session.tokens, session.logits.tobytes()

    with monkeypatch.context() as patch:
        patch.setattr(batching, "MAX_AHEAD", 1)
        expected = both()
    assert both() == expected
    llm.runtime.scheduler.pool.check()


def test_a_stream_is_not_run_far_ahead_of(llm: Llama, gone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor ahead at all where its reader drives: what has come is what was read."""
    monkeypatch.setattr("npllama.generation.completion.MAX_UNREAD", 5)
    options = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    whole = llm.generate(PROMPTS[0], **options).text
    gone.clear()
    assert "".join(piece.text for piece in llm.stream(PROMPTS[0], **options)) == whole
    assert not gone

    async def read() -> str:
        return "".join([piece.text async for piece in llm.astream(PROMPTS[0], **options)])

    assert asyncio.run(read()) == whole
    assert (1 < max(gone, default=0) <= 5) == COMPILED


def test_texts_that_slide_are_those_of_single_steps(
    llm: Llama, gone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temperature": 1.1, "top_k": 20, "seed": 2, "context_policy": "slide", "ignore_eos": True}
    expected = step_by_step(llm, monkeypatch, PROMPTS[:2], 600, **options)
    found = llm.generate(PROMPTS[:2], 600, **options)
    assert [*map(facts, found)] == [*map(facts, expected)]
    assert found[0].slid_tokens > 300
    assert (max(gone, default=0) > 3) == COMPILED


def test_damage_is_told_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the embedding that is not finite: the text ends with the error when its id is fed, and not before."""
    weights = write_model_directory(tmp_path / "sound", CONFIG, seed=5)
    with npllama.load(tmp_path / "sound", backend="numba" if COMPILED else "numpy", speculation=False) as sound:
        tokens = sound.generate(PROMPTS[1], 30, temperature=0.0, ignore_eos=True).tokens
    bad = next(i for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    weights["tok_embeddings"][tokens[bad]] = np.nan
    write_model_directory(tmp_path / "bad", CONFIG, weights=weights)
    with npllama.load(tmp_path / "bad", backend="numba" if COMPILED else "numpy", speculation=False) as damaged:
        counts = counted(damaged, monkeypatch)
        handle = damaged.submit(PROMPTS[1], 30, temperature=0.0, ignore_eos=True)
        with pytest.raises(ModelError, match="not all finite"):
            handle.result(60)
        assert damaged.generate(PROMPTS[1], bad, temperature=0.0, ignore_eos=True).tokens == tokens[:bad]
        assert (max(counts, default=0) > 3) == COMPILED
        damaged.runtime.scheduler.pool.check()


def test_steps_of_a_plan_are_calls_and_draws(llm: Llama) -> None:
    """Bit by bit beside calls of one step and draws from their logits, options and changes mixed."""
    if not COMPILED:
        assert llm.engine.run_steps(llm.engine.new_cache(1, 8), [1], [0], [0], plan(llm, 1, 4)) == []
        return
    n, R = 7, 10
    cache, other = llm.engine.new_cache(R, n), llm.engine.new_cache(R, n)
    tokens = [*range(20, 20 + R)]
    found = llm.engine.run_steps(cache, tokens, [0] * R, range(R), plan(llm, R, n))
    assert len(found) == n
    assert cache.length.tolist() == [n] * R
    texts = ahead(llm, R, n)
    for step in range(n):
        logits = llm.engine.forward(other, tokens, [step] * R, range(R), range(R))
        draws = [one.draw._replace(number=one.numbers[step]) for one in texts]
        tokens = draw_rows(logits, draws, llm.engine.top_k, llm.engine.draw)
        assert tokens == found[step]
    for a, b in ((cache.k, other.k), (cache.v, other.v)):
        assert np.array_equal(a, b)


def ahead(llm: Llama, R: int, n: int) -> list[Ahead]:
    rng, V = np.random.default_rng(0), llm.config.vocab_size
    options = [SamplingOptions().changed({"temperature": t, "top_k": k}) for t, k in ((0.0, 40), (1.0, 3), (2.0, 4))]
    changes = [None, Changes({5: -np.inf, 30: 4.0}), Changes({2: -np.inf})]
    return [
        Ahead(Draw(Allowed(V), (), options[r % 3], 0.0, changes[r % 2 + r % 3 // 2]), rng.random(n).tolist(), ())
        for r in range(R)
    ]


def plan(llm: Llama, R: int, n: int) -> Any:
    made = plan_of(ahead(llm, R, n), n, lambda n_ids: 5)
    assert made is not None
    assert (made.drawn == NOT_DRAWN).all()
    return made


@pytest.mark.skipif(not COMPILED, reason="compiled execution")
def test_one_compiled_function_serves_all_plans(llm: Llama, gone: list[int]) -> None:
    for options in OPTIONS:
        llm.generate(PROMPTS, 10, **options)
    assert max(gone) > 3
    assert llm.engine.compiled is not None
    logits = np.zeros((1, CONFIG.vocab_size), np.float32)
    logits.flags.writeable = False  # another type for Numba
    assert llm.engine.top_k(logits, 2).tolist() == [[0, 1]]
    with npllama.load(llm._opened.path, backend="numba") as other:
        assert other.engine.compiled._make_steps() is not None
    assert len(llm.engine.compiled._make_steps().signatures) == 1


@pytest.mark.skipif(not COMPILED, reason="compiled execution")
def test_without_a_way_to_call_compiled_code_steps_are_single(
    folder: Path, monkeypatch: pytest.MonkeyPatch, llm: Llama
) -> None:
    from npllama.execution.kernels import compile as compiler

    usual = compiler.compile_once

    def lacking(function: Any, *others: Any) -> bool:
        if function.__name__ == "run":
            raise AttributeError("get_function_type")
        return usual(function, *others)

    expected = llm.generate(PROMPTS, 20, temperature=0.0)
    for part, stand_in in (("native_address", lambda *arguments: 0), ("compile_once", lacking)):
        with npllama.load(folder, backend="numba", speculation=False) as other, monkeypatch.context() as patch:
            patch.setattr(compiler, part, stand_in)
            counts = counted(other, patch)
            assert [*map(facts, other.generate(PROMPTS, 20, temperature=0.0))] == [*map(facts, expected)]
            assert not any(counts)
