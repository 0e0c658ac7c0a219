"""Byte pair encoding: merge neighbours, the most frequent pair of the training text first.

A word begins as symbols: the ids of its bytes, or of its characters. A table says which pairs of neighbours may become
one symbol, and with which rank. Again and again the pair of the lowest rank is merged, the leftmost among equals, until
no two neighbours are in the table. With the merges (a, b) -> ab of rank 0, (b, c) -> bc of rank 1, (ab, c) -> abc of
rank 2:

    a b c b c  ->  ab c b c  ->  ab c bc  ->  abc bc

Source: Sennrich, Haddow & Birch 2016, arXiv:1508.07909, section 3.2; on bytes: Radford et al. 2019, section 2.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np

BITS = 20
"""Ids, and the ids of what a merge makes, are below 2^20: a pair of them is one key, a rank and an id are one value."""
MAX_IDS = 3 << 17
"""Half as many again as the largest vocabularies have (2^18); a file of more would take seconds to read."""
_MASK = (1 << BITS) - 1
_NONE = 1 << 62
_DEAD = -1
_POSITION_BITS = 40
_POSITION = (1 << _POSITION_BITS) - 1
_SHORT = 100  # symbols; beyond, the heap's n log n is faster than n^2 in C

MergeTable = dict[int, int]
"""left << 20 | right -> rank << 20 | the id that they become."""


def merge_table(merges: np.ndarray) -> MergeTable:
    """The table of merges (n, 4), whole numbers: left, right, rank, result. Of two for one pair the last counts."""
    left, right, rank, result = merges.astype(np.int64).T
    keys, values = left << BITS | right, rank << BITS | result
    return dict(zip(keys.tolist(), values.tolist(), strict=True))


def merge(symbols: Sequence[int], table: MergeTable) -> list[int]:
    """Merge until no two neighbours are in the table; a symbol below 0 merges with nothing. Time: n log n."""
    return _merge_short(symbols, table) if len(symbols) <= _SHORT else _merge_long(symbols, table)


def _merge_short(symbols: Sequence[int], table: MergeTable) -> list[int]:
    """By definition: the rank of each pair of neighbours in a list, the lowest is taken."""
    ids = list(symbols)
    ranks = [table.get(a << BITS | b, _NONE) >> BITS for a, b in itertools.pairwise(ids)]
    while ranks:
        lowest = min(ranks)
        if lowest == _NONE >> BITS:
            break
        i = ranks.index(lowest)
        ids[i : i + 2] = [table[ids[i] << BITS | ids[i + 1]] & _MASK]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = table.get(ids[i - 1] << BITS | ids[i], _NONE) >> BITS
        if i < len(ranks):
            ranks[i] = table.get(ids[i] << BITS | ids[i + 1], _NONE) >> BITS
    return ids


def _merge_long(symbols: Sequence[int], table: MergeTable) -> list[int]:
    """The same with a queue of (rank, position) in one number, and a list linked in both directions.

    A merged symbol stays where its left half was. An entry of the queue whose pair is gone by now is passed over. The
    queue is a heap for the pairs that merging makes, and a sorted list for those of the beginning, which is faster.
    """
    n, get = len(symbols), table.get
    ids = [*symbols, _DEAD]  # a key with something below 0 is below 0, and in no table: no end is checked
    left, right = list(range(-1, n)), [*range(1, n + 1), n]
    values = [get(a << BITS | b, _NONE) for a, b in itertools.pairwise(symbols)]
    first = sorted([v >> BITS << _POSITION_BITS | i for i, v in enumerate(values) if v != _NONE], reverse=True)
    heap: list[int] = []
    while first or heap:
        entry = first.pop() if not heap or (first and first[-1] < heap[0]) else heappop(heap)
        i = entry & _POSITION
        j = right[i]
        value = get(ids[i] << BITS | ids[j])
        if value is None or value >> BITS != entry >> _POSITION_BITS:
            continue
        merged = ids[i] = value & _MASK
        ids[j] = _DEAD
        after = right[i] = right[j]
        left[after] = i
        for start, key in ((i, merged << BITS | ids[after]), (left[i], ids[left[i]] << BITS | merged)):
            value = get(key)
            if value is not None:
                heappush(heap, value >> BITS << _POSITION_BITS | start)
    return _alive(ids, right, n)


def _alive(ids: Sequence[int], right: Sequence[int], n: int) -> list[int]:
    """The symbols of a linked list from its first to the n-th place."""
    found, i = [], 0
    while i < n:
        found.append(ids[i])
        i = right[i]
    return found


class WordCache(dict[str, tuple[int, ...]]):
    """The ids of words met lately: texts repeat their words.

    Two generations stand for least recently used: when the young one is full it becomes the old one, and a word of
    the old one that is met again is young again. Long words, which hardly repeat, are not kept.
    """

    CAPACITY = 1 << 15
    LONGEST = 64

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self._encode = encode
        self._old: dict[str, tuple[int, ...]] = {}

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._old.get(word)
        if ids is None:
            ids = tuple(self._encode(word))
        if len(word) <= self.LONGEST:
            if len(self) >= self.CAPACITY:
                self._old = dict(self)
                self.clear()
            self[word] = ids
        return ids
