"""Byte pair encoding itself: the merges of symbols, and the cache of words."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.text.bpe import merging as bpe
from npllama.text.bpe.merging import WordCache, merge, merge_table


def table(*merges: tuple[int, int, int, int]) -> bpe.MergeTable:
    return merge_table(np.array(merges, dtype=np.int32).reshape(-1, 4))


def by_definition(symbols: list[int], merges: list[tuple[int, int, int, int]]) -> list[int]:
    """Look at every pair of neighbours, merge the lowest rank, the leftmost among equals, and begin again."""
    known = {(left, right): (rank, result) for left, right, rank, result in merges}
    while True:
        found = [(known[pair][0], i) for i, pair in enumerate(pairwise(symbols)) if pair in known]
        if not found:
            return symbols
        i = min(found)[1]
        symbols = [*symbols[:i], known[symbols[i], symbols[i + 1]][1], *symbols[i + 2 :]]


A, B, C, AB, BC, ABC = range(6)
TEXTBOOK = ((A, B, 0, AB), (B, C, 1, BC), (AB, C, 2, ABC))


def test_the_example_of_the_module_is_true() -> None:
    assert merge([A, B, C, B, C], table(*TEXTBOOK)) == [ABC, BC]


def test_of_pairs_with_one_rank_the_leftmost_is_merged() -> None:
    assert merge([A, A, A], table((A, A, 0, AB))) == [AB, A]
    assert merge([A, B, C], table((A, B, 5, AB), (B, C, 5, BC))) == [AB, C]


def test_the_last_of_two_merges_of_one_pair_counts() -> None:
    assert merge([A, B, C], table((A, B, 0, AB), (B, C, 1, BC), (A, B, 2, AB))) == [A, BC]


def test_a_symbol_below_zero_merges_with_nothing() -> None:
    assert merge([A, -1, B, C], table(*TEXTBOOK)) == [A, -1, BC]


MERGES = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 5), st.integers(0, 7)),
    max_size=20,
    unique_by=lambda merge: merge[:2],
)


@given(symbols=st.lists(st.integers(-1, 5), max_size=40), merges=MERGES)
def test_short_and_long_words_merge_by_definition(symbols: list[int], merges: list[tuple[int, int, int, int]]) -> None:
    expected = by_definition(symbols, merges)
    assert bpe._merge_short(symbols, table(*merges)) == expected
    assert bpe._merge_long(symbols, table(*merges)) == expected


class Counting(dict[int, int]):
    """A table that counts how often it is asked."""

    asked = 0

    def get(self, key: int, default: int | None = None) -> int | None:  # type: ignore[override]
        self.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize("n", [20_000, 80_000])
def test_a_long_word_of_one_letter_takes_few_steps_for_each_letter(n: int) -> None:
    doubling = Counting(table(*((i, i, i, i + 1) for i in range(8))))
    assert len(merge([0] * n, doubling)) == n // 256 + bin(n % 256).count("1")
    assert doubling.asked < 7 * n


def test_a_long_word_of_many_letters_takes_few_steps_for_each_letter() -> None:
    rng = random.Random(1)
    merges = Counting(table(*((a, b, rng.randrange(400), 20 * a + b + 20) for a in range(20) for b in range(20))))
    merge([rng.randrange(20) for _ in range(50_000)], merges)
    assert merges.asked < 7 * 50_000


# --- the cache


def test_a_word_is_encoded_once_while_it_is_remembered() -> None:
    asked: list[str] = []
    cache = WordCache(lambda word: asked.append(word) or [len(word)])  # type: ignore[func-returns-value]
    assert [cache[word] for word in ("to", "be", "to")] == [(2,), (2,), (2,)]
    assert asked == ["to", "be"]


def test_the_cache_forgets_what_was_not_met_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WordCache, "CAPACITY", 10)
    asked: list[str] = []
    cache = WordCache(lambda word: asked.append(word) or [])  # type: ignore[func-returns-value]
    for i in range(100):
        assert cache["often"] == ()
        assert cache[str(i)] == ()
        assert len(cache) + len(cache._old) <= 20
    assert asked.count("often") == 1
    assert cache["0"] == ()
    assert asked.count("0") == 2


def test_long_words_are_not_remembered() -> None:
    cache = WordCache(lambda word: [1])
    assert cache["a" * 65] == (1,)
    assert not cache
