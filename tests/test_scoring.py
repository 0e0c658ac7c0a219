"""Scores, ranked options, embeddings and perplexity, against what follows from the logits."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, write_any_model, write_model_directory
from slow import COMPILES_AGAIN

import npllama
from npllama.inference import Llama

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = tmp_path_factory.mktemp("scoring") / "model"
    write_model_directory(folder, dataclasses.replace(TINY, max_seq_len=256), seed=3)
    return npllama.load(folder)


def log_probabilities(llm: Llama, ids: list[int]) -> np.ndarray:
    """log p of each id but the first, given those before it; and whether it is the most probable one."""
    logits = llm.logits(ids)[:-1].astype(np.float64)
    return np.array(
        [row[i] - row.max() - math.log(np.exp(row - row.max()).sum()) for row, i in zip(logits, ids[1:], strict=True)]
    )


def test_a_score_is_the_sum_of_the_log_probabilities(llm: Llama) -> None:
    before, ids = llm.tokenizer.encode(PROMPT), llm.tokenizer.encode(PROMPT + " the mat and more")
    score = llm.score(PROMPT, " the mat and more")
    n = len(before)
    assert before == ids[:n]
    np.testing.assert_allclose(score.logprobs, log_probabilities(llm, ids)[n - 1 :], atol=1e-6)
    assert score.logprob == pytest.approx(sum(score.logprobs), abs=1e-9)
    assert score.tokens == ids[n:]
    assert llm.score(before, ids[n:]) == score


def test_a_greedy_continuation_is_known_as_one(llm: Llama) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    greedy = llm.generate(ids, 5, temperature=0).tokens
    assert llm.score(ids, greedy).is_greedy
    other = [*greedy[:3], (greedy[3] + 1) % TINY.vocab_size]
    assert not llm.score(ids, other).is_greedy


def test_an_id_across_the_boundary_is_the_continuations(llm: Llama) -> None:
    whole, cut = llm.tokenizer.encode("the cat"), llm.tokenizer.encode("the c")
    score = llm.score("the c", "at")
    first = next((i for i, (a, b) in enumerate(zip(whole, cut, strict=False)) if a != b), len(cut))
    assert score.tokens == whole[first:]
    np.testing.assert_allclose(score.logprobs, log_probabilities(llm, whole)[first - 1 :], atol=1e-6)


def test_many_scores_are_those_of_each_alone(llm: Llama) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (
            rng.integers(3, TINY.vocab_size, rng.integers(1, 60)).tolist(),
            rng.integers(3, TINY.vocab_size, rng.integers(1, 9)).tolist(),
        )
        for _ in range(40)
    ]
    for (prompt, continuation), found in zip(pairs, llm.score_many(pairs), strict=True):
        expected = log_probabilities(llm, prompt + continuation)[len(prompt) - 1 :]
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)


# Compiled these are slow; NumPy has nothing to compile.
SLOW = () if os.environ.get("NPLLAMA_BACKEND") == "numpy" else (COMPILES_AGAIN,)


@pytest.mark.parametrize(
    ("dtype", "count"),
    [("f32", 300), pytest.param("q8", 1000, marks=SLOW), pytest.param("q4", 300, marks=SLOW)],
)
def test_many_prompts_in_company_give_what_each_gives_alone(dtype: str, count: int, tmp_path: Path) -> None:
    """To the bit with quantized weights, whose products do not depend on how many rows there are."""
    write_any_model(tmp_path / "model", dtype)
    rng = np.random.default_rng(1)

    def ids(most: int) -> list[int]:
        return rng.integers(3, TINY.vocab_size, rng.integers(1, most)).tolist()

    pairs = [(ids(40), ids(6)) for _ in range(count)]
    with npllama.load(tmp_path / "model") as llm:
        scores, vectors = llm.score_many(pairs), llm.embed([prompt for prompt, _ in pairs])
    with npllama.load(tmp_path / "model", parallel=1) as llm:
        alone = [llm.score(*pair) for pair in pairs]
        singly = np.array([llm.embed(prompt) for prompt, _ in pairs])
    if dtype == "f32":
        np.testing.assert_allclose([s.logprob for s in scores], [s.logprob for s in alone], atol=1e-5)
        np.testing.assert_allclose(vectors, singly, atol=1e-6)
    else:
        assert scores == alone
        np.testing.assert_array_equal(vectors.view(np.uint32), singly.view(np.uint32))


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
def test_options_are_ranked_by_their_scores_and_the_prompt_is_read_once(llm: Llama, normalize: str) -> None:
    prompt = PROMPT * 4
    options = [" a", " the mat", " dogs run away", " it"]
    length = {"none": lambda o, s: 1, "tokens": lambda o, s: len(s.tokens), "bytes": lambda o, s: len(o)}[normalize]
    alone = [llm.score(prompt, option) for option in options]
    values = [s.logprob / length(o, s) for o, s in zip(options, alone, strict=True)]
    fed: list[int] = []
    forward = llm.engine.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            llm.engine, "forward", lambda cache, tokens, *rest: fed.append(len(tokens)) or forward(cache, tokens, *rest)
        )
        found = llm.rank(prompt, options, normalize)
    assert sum(fed) <= len(llm.tokenizer.encode(prompt)) + sum(len(s.tokens) for s in alone)
    order = sorted(range(len(options)), key=lambda i: -values[i])
    assert [one.index for one in found] == order
    assert [one.option for one in found] == [options[i] for i in order]
    for one in found:
        assert one.value == pytest.approx(values[one.index], abs=1e-5)
    assert llm.choose(prompt, options, normalize).index == order[0]
    llm.runtime.scheduler.pool.check()
    pool = llm.runtime.scheduler.pool
    assert pool.available == pool.capacity


def test_options_of_ids_and_a_single_option(llm: Llama) -> None:
    assert llm.choose([1, 5, 9], [[7, 8]]).option == [7, 8]
    assert [one.index for one in llm.rank([1, 5, 9], [[7], [7], [8, 9, 10]])][:1] in ([0], [2])
    with pytest.raises(npllama.UsageError, match=r"normalize=.bytes. needs options of text"):
        llm.choose([1, 5, 9], [[7]], "bytes")


def hidden_states(llm: Llama, ids: list[int]) -> np.ndarray:
    """Final hidden states, by the model itself with another output."""
    from npllama import model

    engine = llm.engine
    arguments = engine._arguments(
        engine.new_cache(1, len(ids)),
        *(np.array(a, np.int64) for a in (ids, range(len(ids)), [0] * len(ids), range(len(ids)))),
    )
    return model.forward(
        arguments[0],
        arguments[1],
        arguments[2]._replace(output=np.eye(llm.config.dim, dtype=np.float32)),
        *arguments[3:],
    )


@pytest.mark.parametrize("dtype", ["f32", "q8"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(dtype: str, pooling: str, tmp_path: Path) -> None:
    write_any_model(tmp_path / "model", dtype)
    with npllama.load(tmp_path / "model") as llm:
        texts = [PROMPT, "dogs", PROMPT + " the mat"]
        found = llm.embed(texts, pooling, normalize=False)
        assert (found.shape, found.dtype) == ((3, llm.config.dim), np.float32)
        for text, vector in zip(texts, found, strict=True):
            states = hidden_states(llm, llm.tokenizer.encode(text))
            np.testing.assert_allclose(
                vector, states.mean(axis=0) if pooling == "mean" else states[-1], atol=1e-6, rtol=1e-6
            )
            unit = llm.embed(text, pooling)
            np.testing.assert_allclose(unit, vector / np.linalg.norm(vector), atol=1e-6)


def test_logits_and_embeddings_at_once(llm: Llama) -> None:
    """Both kinds of jobs are under way; each step computes one kind."""
    alone = llm.embed(PROMPT)
    stream = llm.stream(PROMPT, 30, temperature=0)
    first = next(stream)
    np.testing.assert_array_equal(llm.embed(PROMPT), alone)
    text = first.text + "".join(piece.text for piece in stream)
    assert text == llm.generate(PROMPT, 30, temperature=0).text


@pytest.mark.parametrize("n_ctx", [2, 7, None])
def test_perplexity_is_that_of_the_windows(llm: Llama, n_ctx: int | None) -> None:
    text = "the cat sat on the mat and the dog ran away from it " * 3
    ids = llm.tokenizer.encode(text, bos=False)
    step = (n_ctx or llm.context) - 1
    losses = [log_probabilities(llm, [1, *ids[i : i + step]]) for i in range(0, len(ids), step)]
    assert llm.perplexity(text, n_ctx) == pytest.approx(math.exp(-np.concatenate(losses).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: llm.score("", ""), "the continuation has no id of its own"),
        (lambda llm: llm.score("a", [5]), "must both be text, or both lists of ids"),
        (lambda llm: llm.score([1] * 300, [5]), "the context holds"),
        (lambda llm: llm.rank("a", []), "options: needs a list"),
        (lambda llm: llm.rank("a", "bc"), "options: needs a list"),
        (lambda llm: llm.rank("a", ["b"], "words"), "normalize='words' is not known"),
        (lambda llm: llm.embed("a", "max"), "pooling='max' is not known; it needs one of mean, last"),
        (lambda llm: llm.embed([1] * 300), "the context holds"),
        (lambda llm: llm.perplexity("a", 1), "n_ctx=.1.: needs 2 to"),
        (lambda llm: llm.perplexity(""), "no id to predict"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm: Llama, call, said: str) -> None:
    with pytest.raises(npllama.NpllamaError, match=said):
        call(llm)
