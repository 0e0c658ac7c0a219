"""Texts in company: several completions, beginnings that are found again, texts without end, memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, write_any_model, write_model_directory
from slow import COMPILES_AGAIN

import npllama
from npllama.generation import batching
from npllama.inference import Llama

COMPILED = os.environ.get("NPLLAMA_BACKEND") != "numpy"
CONTEXT = 256


def config(**changes: int) -> object:
    return dataclasses.replace(TINY, max_seq_len=CONTEXT, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "model"
    write_model_directory(path, config(), seed=3)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Llama:
    return npllama.load(folder)


def fed(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids each call of the model gets from now on; each call is one step."""
    counts: list[int] = []
    forward = llm.engine.forward
    monkeypatch.setattr(batching, "MAX_AHEAD", 1)

    def counted(cache, tokens, *rest):
        counts.append(len(tokens))
        return forward(cache, tokens, *rest)

    monkeypatch.setattr(llm.engine, "forward", counted)
    return counts


def ids_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, n).tolist()


def test_several_completions_read_the_prompt_once_and_are_those_of_as_many_prompts(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids_of(0, 150)
    one_by_one = [r.text for r in llm.generate([prompt] * 4, 12, seed=5)]
    with npllama.load(llm._opened.path) as fresh:
        counts = fed(fresh, monkeypatch)
        found = fresh.generate(prompt, 12, seed=5, n=4)
        assert sum(counts) <= 150 + 4 * 12
        assert [r.text for r in found] == one_by_one
        assert len(set(one_by_one)) > 1
        assert [r.usage.cached_tokens for r in found] == [0, 150, 150, 150]
        pool = fresh.runtime.scheduler.pool
        pool.check()
        assert pool.available == pool.capacity


def test_completions_of_several_prompts_come_as_lists(llm: Llama) -> None:
    found = llm.generate(["a", "the cat"], 5, n=3, seed=1)
    assert [len(group) for group in found] == [3, 3]
    assert found[0][0].text == llm.generate("a", 5, seed=1).text
    assert len(llm.generate(["a"], 5, n=2)) == 1


@pytest.mark.parametrize("n", [0, -1, True, 1.5, "2", 5000])
def test_a_number_of_completions_out_of_range_is_refused(llm: Llama, n: object) -> None:
    with pytest.raises(npllama.UsageError, match=r"n=.*: needs how many completions, 1 to"):
        llm.generate("a", n=n)


def test_what_was_read_a_moment_ago_is_not_read_again(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ids_of(1, 200)
    first = llm.generate(prompt, 10, seed=2)
    counts = fed(llm, monkeypatch)
    again = llm.generate(prompt, 10, seed=2)
    assert (again.usage.cached_tokens, counts[0]) == (192, 8)
    assert again.text == first.text
    turn = llm.generate([*prompt, *first.tokens, *ids_of(2, 20)], 5)
    assert turn.usage.cached_tokens == 192 + (64 if 200 + len(first.tokens) > 256 else 0)
    assert llm.generate(ids_of(3, 100), 5).usage.cached_tokens == 0
    assert llm.generate(prompt, 5, context_policy="slide").usage.cached_tokens == 0, "its positions see something else"


def test_logits_of_every_id_are_computed_though_their_keys_are_there(llm: Llama) -> None:
    prompt = ids_of(4, 130)
    first = llm.logits(prompt)
    np.testing.assert_allclose(llm.logits(prompt), first, atol=1e-5)


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_ragged_prompts_give_in_company_what_they_give_alone(folder: Path, parallel: int) -> None:
    prompts = [ids_of(10 + i, n) for i, n in enumerate((3, 100, 7, 200, 64, 65, 1, 30, 129, 12))]
    with npllama.load(folder) as alone, npllama.load(folder, parallel=parallel) as company:
        expected = [alone.generate(prompt, 20, seed=i).text for i, prompt in enumerate(prompts)]
        streams = [company.stream(prompt, 20, seed=i) for i, prompt in enumerate(prompts)]
        found = ["" for _ in prompts]
        while streams_left := [i for i, s in enumerate(streams) if s is not None]:
            for i in streams_left:
                try:
                    found[i] += next(streams[i]).text
                except StopIteration:
                    streams[i] = None
        assert found == expected
        company.runtime.scheduler.pool.check()


@pytest.mark.parametrize("n_blocks", [4, 5, 9])
def test_a_pool_of_one_context_serves_any_number_of_texts(folder: Path, n_blocks: int) -> None:
    prompts = [ids_of(30 + i, n) for i, n in enumerate((120, 90, 200, 10, 70, 150))]
    with npllama.load(folder) as alone:
        expected = [r.text for r in alone.generate(prompts, 40, seed=1)]
        block = 64 * alone.engine.cache_bytes_per_position
    with npllama.load(folder, kv_memory=n_blocks * block) as tight:
        assert tight.runtime.scheduler.pool.capacity == n_blocks
        assert [r.text for r in tight.generate(prompts, 40, seed=1)] == expected
        tight.runtime.scheduler.pool.check()
        assert tight.runtime.scheduler.pool.available == n_blocks


def test_less_memory_than_one_context_is_refused_with_the_arithmetic(folder: Path) -> None:
    with pytest.raises(npllama.UsageError, match=r"holds 0 blocks .* a text of 256 needs 4 \(\d+ bytes\)"):
        npllama.load(folder, kv_memory=1000)
    for value in (0, -1, 1.5, "many"):
        with pytest.raises(npllama.UsageError, match="kv_memory="):
            npllama.load(folder, kv_memory=value)
    for value in (0, -1, 1.5, "many", 10**6):
        with pytest.raises(npllama.UsageError, match="parallel="):
            npllama.load(folder, parallel=value)


# ---------------------------------------------------------------- texts without end


def test_below_the_context_a_sliding_text_is_that_of_stop(llm: Llama) -> None:
    prompt = ids_of(46, 30)
    stop = llm.generate(prompt, -1, temperature=0)
    slide = llm.generate(prompt, 400, temperature=0, context_policy="slide")
    assert stop.finish_reason == "length"
    n = len(stop.tokens)
    assert n == CONTEXT - 30
    assert slide.tokens[:n] == stop.tokens
    assert len(slide.tokens) > n
    assert (stop.slid_tokens, slide.slid_tokens) == (0, 30 + len(slide.tokens) - CONTEXT)


@pytest.mark.parametrize("n_keep", [0, 70])
def test_a_sliding_text_is_what_its_window_and_sinks_give(llm: Llama, n_keep: int) -> None:
    prompt = ids_of(41, 300)
    found = llm.generate(prompt, 60, temperature=0, context_policy="slide", n_keep=n_keep)
    n_sink = max(4, n_keep)
    ids = [*prompt, *found.tokens]
    cache = llm.engine.new_cache(1, len(ids), CONTEXT - n_sink, n_sink)
    logits = llm.engine.forward(cache, ids, range(len(ids)), [0] * len(ids), range(299, len(ids) - 1))
    assert logits.argmax(axis=1).tolist() == found.tokens


def test_a_sliding_text_takes_constant_memory(llm: Llama) -> None:
    pool = llm.runtime.scheduler.pool
    stream = llm.stream(ids_of(42, 10), 900, temperature=0, context_policy="slide")
    held = []
    for i, _ in enumerate(stream):
        if i % 64 == 63:
            held.append(int((pool.cache.table >= 0).sum()))
    assert len(held) == 14
    assert max(held) <= CONTEXT // 64 + 2
    assert held[5:] == held[5:6] * len(held[5:])


def test_a_model_with_a_window_slides_without_sinks(tmp_path: Path) -> None:
    write_model_directory(tmp_path / "model", config(sliding_window=20), seed=4)
    with npllama.load(tmp_path / "model") as llm:
        prompt = ids_of(43, 240)
        stop = llm.generate(prompt, -1, temperature=0)
        slide = llm.generate(prompt, 60, temperature=0, context_policy="slide")
        assert slide.tokens[: len(stop.tokens)] == stop.tokens
        assert len(slide.tokens) == 60


def test_perplexity_of_a_sliding_text_is_that_of_one_long_text(llm: Llama) -> None:
    ids = ids_of(44, 500)
    cache = llm.engine.new_cache(1, 500, CONTEXT - 4, 4)
    logits = llm.engine.forward(cache, ids, range(500), [0] * 500, range(499)).astype(np.float64)
    losses = (
        np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - logits[range(499), ids[1:]]
    )
    assert llm.perplexity(ids, context_policy="slide") == pytest.approx(np.exp(losses.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context_policy": "shift"}, "context_policy='shift' is not known; it needs one of stop, slide"),
        ({"context_policy": "slide", "n_keep": 129}, "at most half of the context, 128 positions"),
        ({"n_keep": -1}, "n_keep=.-1.: needs"),
    ],
)
def test_policies_that_are_none_are_refused(llm: Llama, options: dict[str, object], said: str) -> None:
    with pytest.raises(npllama.UsageError, match=said):
        llm.generate("a", 5, **options)


@pytest.mark.skipif(not COMPILED, reason="compiled execution: not in the run of NumPy's")
@pytest.mark.parametrize("kv_dtype", ["f32", pytest.param("q8", marks=COMPILES_AGAIN)])
def test_company_prefixes_and_pools_change_no_bit(kv_dtype: str, tmp_path: Path) -> None:
    write_any_model(tmp_path / "model", "q4")
    texts: list[list[str]] = []
    for options in ({}, {"parallel": 3}, {"kv_memory": 1}):
        with npllama.load(tmp_path / "model", kv_dtype=kv_dtype, backend="numba") as probe:
            least = probe.runtime._full * probe.runtime._block_bytes
        if "kv_memory" in options:
            options = {"kv_memory": least}
        with npllama.load(tmp_path / "model", kv_dtype=kv_dtype, backend="numba", **options) as llm:
            vocabulary = llm.config.vocab_size
            prompts = [[i % vocabulary for i in ids_of(50 + i, n)] for i, n in enumerate((3, 40, 17, 30, 50))]
            texts.append([r.text for r in llm.generate(prompts, 10, seed=3)])
            texts.append([r.text for r in llm.generate(prompts, 10, seed=3)])
    assert all(one == texts[0] for one in texts)
