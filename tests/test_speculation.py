"""Guesses for the next ids: the text is the one without them, and they are made where it pays."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, write_any_model

import npllama
from npllama.generation import batching
from npllama.generation.chunks import Pace
from npllama.generation.speculation import MAX_GUESSES, Lookup, how_many
from npllama.inference import Llama

COMPILED = os.environ.get("NPLLAMA_BACKEND") != "numpy"
FORMAT = "q4" if COMPILED else "f32"


def paced(seconds: dict[int, float]) -> Pace:
    pace = Pace()
    for n, s in seconds.items():
        pace.record(n, 0, s)
    return pace


def looked(ids: Sequence[int]) -> Lookup:
    lookup = Lookup()
    lookup.see(ids)
    return lookup


# ---------------------------------------------------------------- what is guessed


def test_what_followed_the_same_ids_is_guessed() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4]
    lookup = looked(ids)
    assert len(lookup.chances(3)) == 3
    assert lookup.guesses(ids, 3) == [5, 6, 7]
    assert looked([*ids, 9]).chances(3) == []
    short = looked([1, 2, 3, 4, 1])
    assert short.guesses([1, 2, 3, 4, 1], 2) == [2, 3]
    assert short.chances(3)[0] < lookup.chances(3)[0], "one id says less than three"


def test_the_longest_run_that_came_before_is_followed() -> None:
    ids = [1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 3, 8, 1, 2, 3]
    assert looked(ids).guesses(ids, 1) == [4]
    assert looked([*ids[:-2], 2]).guesses([*ids[:-2], 2], 1) == [3]
    other = [*ids[:-3], 2, 3]
    assert looked(other).guesses(other, 1) == [6], "of equal runs the latest"


def test_a_text_repeats_itself_while_a_long_match_is_near() -> None:
    line = [*range(100, 130)]
    assert not looked(line).repeats
    assert not looked([*line, *line[:7]]).repeats
    again = looked([*line, *line[:15]])
    assert again.repeats
    assert looked([*line, *line[:15], *range(200, 240)]).repeats
    assert not looked([*line, *line[:15], *range(200, 280)]).repeats


def test_a_text_that_repeats_its_end_is_guessed_to_go_on_so() -> None:
    ids = [5, 1, 2, 1, 2, 1, 2, 1]
    assert looked(ids).guesses(ids, 5) == [2, 1, 2, 1, 2]


def test_a_match_that_goes_on_is_kept_although_its_end_stands_later_too() -> None:
    ids = [1, 2, 3, 4, 5, 6, 2, 3, 4, 9, 9, 1, 2, 3, 4]
    assert looked(ids).guesses(ids, 1) == [5]


def test_looking_step_by_step_is_looking_at_once() -> None:
    ids = np.random.default_rng(0).integers(0, 4, 300).tolist()
    lookup = Lookup()
    for n in range(1, 301):
        lookup.see(ids[:n])
        again = looked(ids[:n])
        assert (lookup.chances(9), lookup._source) == (again.chances(9), again._source)


def test_runs_of_an_endless_text_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npllama.generation.speculation.MAX_RUNS", 100)
    ids = np.random.default_rng(3).permutation(5000).tolist()
    lookup = looked(ids)
    assert all(len(runs) <= 200 for runs in lookup._runs)
    assert looked([*ids, *ids[-60:-50]]).guesses([*ids, *ids[-60:-50]], 2) == ids[-50:-48]
    assert looked([*ids, *ids[:10]]).chances(1) == []
    assert looked([*ids, *ids[-60:-50]]).chances(1)[0] > 0.5


def test_chances_follow_what_the_text_was_like() -> None:
    repeating = looked([*range(50)] * 3)
    random_ids = np.random.default_rng(1).integers(0, 6, 2000).tolist()
    while not (chances := looked(random_ids).chances(20)):
        random_ids.pop()
    assert repeating.chances(20)[0] > 0.9
    assert len(repeating.chances(20)) == MAX_GUESSES
    assert chances[0] < 0.3


def test_what_short_matches_were_like_counts_for_longer_ones() -> None:
    sure, vain = looked([*range(50), *range(5)]), looked([i for n in range(60) for i in (7, 1000 + n)])
    assert sure.chances(1)[0] > 0.7, "no match of five ids was seen, but four shorter ones went on"
    vain.see([*[i for n in range(60) for i in (7, 1000 + n)], 7])
    assert vain.chances(1) == []
    assert looked([*range(9), 0]).chances(0) == []


# ---------------------------------------------------------------- how many


def test_as_many_guesses_are_made_as_pay() -> None:
    sure = [0.9**i for i in range(1, 16)]
    free = paced(dict.fromkeys(range(1, 40), 1.0))
    dear = paced({n: float(n) for n in range(1, 40)})
    tiles = paced({n: 1.0 + (n - 1) // 4 for n in range(1, 40)})
    assert how_many([sure], 1, free) == [15]
    assert how_many([sure], 1, dear) == [0]
    assert how_many([sure], 1, tiles) == [3]
    assert how_many([[0.01]], 1, free) == [0], "what promises next to nothing is left"
    assert how_many([sure, [], [0.3, 0.1]], 3, tiles) == [1, 0, 0], "the likeliest first, into what is free"
    assert how_many([sure], 1, Pace()) == [0]


def test_more_rows_than_ever_are_tried_by_doubling() -> None:
    pace = paced({1: 1.0})
    assert [pace.seconds(n) for n in (1, 2, 3)] == [1.0, 1.0, math.inf]
    pace.record(2, 0, 1.5)
    assert [pace.seconds(n) for n in (2, 3, 4, 5)] == [1.5, 2.0, 2.5, math.inf]


def test_a_step_that_was_disturbed_does_not_count() -> None:
    pace = paced({1: 1.0})
    for seconds in (1.1, 50.0, 0.9, 1.0):
        pace.record(1, 0, seconds)
    assert pace.seconds(1) == 1.0


# ---------------------------------------------------------------- the text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculation") / "model"
    write_any_model(path, FORMAT, dataclasses.replace(TINY, max_seq_len=256))
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> Llama:
    return npllama.load(folder, speculation=False, backend="numba" if COMPILED else "numpy")


@pytest.fixture(scope="module")
def guessing(folder: Path) -> Llama:
    return npllama.load(folder, backend="numba" if COMPILED else "numpy")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Guesses are made wherever there are chances, and Lookup finds some that are wrong. Rewinds are counted."""

    def all_of_them(chances: list[list[float]], n_rows: int, pace: Pace) -> list[int]:
        return [len(some) for some in chances]

    found = [0, 0]
    n_right = batching._n_right

    def counted(job: batching.Job, length: int) -> int:
        n = n_right(job, length)
        found[0] += n
        found[1] += len(job.draft) - n
        return n

    monkeypatch.setattr(batching, "how_many", all_of_them)
    monkeypatch.setattr(batching, "_n_right", counted)
    return found


LOOPING = {"temperature": 0.3, "top_k": 3}
PROMPTS = [[1, 20, 21, 22, 23, 20, 21, 22], [1, *range(30, 60), *range(30, 40)], [1, 7], [1, *([5, 6, 7, 8] * 20)]]


def same(one: npllama.inference.Result, other: npllama.inference.Result) -> bool:
    return (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        LOOPING,
        {"temperature": 0.1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.05, "repeat_penalty": 1.02},
        {"temperature": 0.1, "mirostat": 2, "mirostat_tau": 1.0},
        {"temperature": 0.0, "n": 3},
        {**LOOPING, "n": 3},
        {**LOOPING, "min_tokens": 50, "logit_bias": {2: 30.0}},
        {**LOOPING, "bad_words": ["ab", "!"], "ignore_eos": True, "logit_bias": {6: 0.5}},
    ],
)
def test_the_text_is_the_one_without_guesses(
    plain: Llama, guessing: Llama, counts: list[int], options: dict[str, float]
) -> None:
    for prompt in PROMPTS:
        one, other = (llm.generate(prompt, 60, seed=3, **options) for llm in (plain, guessing))
        pairs = zip(one, other, strict=True) if "n" in options else [(one, other)]
        assert all(same(*pair) for pair in pairs)
    assert min(counts) > 0, "some are right and some are wrong"
    guessing.runtime.scheduler.pool.check()


def test_texts_in_company_are_those_without_guesses(plain: Llama, guessing: Llama, counts: list[int]) -> None:
    alone = [plain.generate(p, 50, seed=9, **LOOPING).tokens for p in PROMPTS[:1]]
    many = guessing.generate(PROMPTS * 3, 50, seed=9, **LOOPING)
    assert many[0].tokens == alone[0]
    assert [r.text for r in many] == [r.text for r in plain.generate(PROMPTS * 3, 50, seed=9, **LOOPING)]
    assert min(counts) > 0
    pool = guessing.runtime.scheduler.pool
    pool.check()
    assert pool.available == pool.capacity


def test_texts_that_slide_are_those_without_guesses(folder: Path, counts: list[int]) -> None:
    texts = []
    for speculation in (True, False):
        with npllama.load(folder, speculation=speculation, context=64) as llm:
            r = llm.generate(PROMPTS[0], 300, seed=1, context_policy="slide", **LOOPING)
            texts.append(r.text)
            assert r.slid_tokens > 200
            llm.runtime.scheduler.pool.check()
    assert texts[0] == texts[1]
    assert min(counts) > 0


@pytest.mark.parametrize("n", range(30, 40))
def test_texts_end_within_guesses_where_they_end_without(
    plain: Llama, guessing: Llama, counts: list[int], n: int
) -> None:
    options = {"temperature": 0.0, "seed": 0}
    whole = plain.generate(PROMPTS[3], 60, **options)
    pieces = [plain.tokenizer.decode(whole.tokens[:i]) for i in (n, n + 2)]
    stop = pieces[1][len(pieces[0]) :]
    for limits in ({"max_tokens": n}, {"max_tokens": 60, "stop": [stop] if stop else None}):
        assert same(plain.generate(PROMPTS[3], **limits, **options), guessing.generate(PROMPTS[3], **limits, **options))
    assert counts[0] > 0


def test_an_end_of_text_within_guesses_ends_the_text(
    plain: Llama, guessing: Llama, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = plain.generate(PROMPTS[3], 60, temperature=0.0).tokens
    end = next(t for t in tokens[20:] if tokens.index(t) >= 3)
    for llm in (plain, guessing):
        ended = dataclasses.replace(llm.config, eos_token_ids=(end,))
        monkeypatch.setattr(llm, "_model", dataclasses.replace(llm._model, config=ended))
    one, other = (llm.generate(PROMPTS[3], 60, temperature=0.0) for llm in (plain, guessing))
    assert one.finish_reason == "stop"
    assert same(one, other)


def test_a_text_that_is_repeated_takes_fewer_calls(guessing: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = guessing.engine.forward

    def counted(cache, tokens, *rest):
        calls.append(len(tokens))
        return forward(cache, tokens, *rest)

    monkeypatch.setattr(guessing.engine, "forward", counted)
    monkeypatch.setattr(batching, "MAX_AHEAD", 1)
    monkeypatch.setattr(Pace, "seconds", lambda self, n: 1.0)
    tokens = guessing.generate(PROMPTS[3], 120, temperature=0.0).tokens
    assert len(set(tokens[-60:])) < 20, "this test needs a text that repeats itself"
    assert len(calls) < 90
    calls.clear()
    monkeypatch.setattr(Pace, "seconds", lambda self, n: float(n))
    assert guessing.generate(PROMPTS[3], 120, temperature=0.0).tokens == tokens
    assert len(calls) == 120, "where rows cost what calls cost, nothing is guessed"


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_speculation_is_on_or_off(folder: Path, value: object) -> None:
    with pytest.raises(npllama.UsageError, match=r"speculation=.*: needs True or False"):
        npllama.load(folder, speculation=value)
