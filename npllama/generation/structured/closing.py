"""How a text can be completed, searched for byte by byte, then written with the fewest ids.

A text is completed soonest by what closes things, so that is tried first. The search is bounded: what it finds is
short and need not be the shortest, and what it does not find may exist. `by_ids` is exact where few texts fit.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from npllama.generation.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

FIRST = b'"a@.}]0:,-/ '
"""Bytes that are tried first: they close what JSON opens, are the shortest values, or stand between parts."""

MAX_STATES = 1500
"""States of the matcher that a search looks at."""

BYTES_PER_DETOUR = 16
"""A search tries one detour (a byte that is not its first choice) before so many more bytes of the path it is on."""

MAX_IDS, MAX_WIDTH, MAX_BY_IDS = 64, 24, 500
"""Of a search by ids: ids behind a state, states it goes on from (beyond these it is not exact), states in all."""


class _Branch(NamedTuple):
    """A state of the matcher, the bytes up to there, the bytes that are left to try, and what came of those tried."""

    cost: int
    order: int
    state: LLMatcher
    text: bytes
    left: list[int]
    masks: set[bytes]


class ClosingSearch:
    """Searches in the states of a matcher over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        singles = {piece[0]: ids[-1] for piece, ids in vocabulary.ids.items() if len(piece) == 1}
        order = sorted(singles, key=lambda byte: (FIRST.find(byte) if byte in FIRST else len(FIRST), byte))
        self._bytes = [bytes([byte]) for byte in order]
        self._ids = np.array([singles[byte] for byte in order], np.int64)
        lengths = np.array([len(piece) for piece in vocabulary.pieces])
        self._longest_first = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]

    def text(self, matcher: LLMatcher) -> bytes | None:
        """Bytes that complete the text: the path with the fewest detours first, a long one counting as several.

        Of bytes behind which the same ids may come, one is tried; the same byte twice in a row comes last.
        """
        first = matcher.deep_copy()
        text = self._follow(first)
        if first.is_accepting():
            return text
        heap = [_Branch(0, 0, first, text, self._next(first.compute_bitmask(), text[-1:]), set())]
        for count in range(1, MAX_STATES):
            if not heap:
                return None
            branch = heapq.heappop(heap)
            if not branch.left:
                continue
            n = branch.left.pop(0)
            state, is_new = branch.state.deep_copy(), False
            if state.consume_token(int(self._ids[n])):
                text = branch.text + self._bytes[n] + self._follow(state)
                if state.is_accepting():
                    return text
                mask = state.compute_bitmask()
                is_new = mask not in branch.masks
            if is_new:
                branch.masks.add(mask)
                heapq.heappush(heap, _Branch(branch.cost + 1, count, state, text, self._next(mask, text[-1:]), set()))
            heapq.heappush(heap, branch._replace(cost=branch.cost + (BYTES_PER_DETOUR if is_new else 0), order=count))
        return None

    def _follow(self, state: LLMatcher) -> bytes:
        """Let a state go on with the bytes that have to come, which are returned."""
        forced: bytes = b"" if state.is_accepting() else state.compute_ff_bytes()
        ids = self._vocabulary.fewest(forced) if forced else None
        return forced if ids is not None and state.consume_tokens(list(ids)) else b""

    def _next(self, mask: bytes, last: bytes) -> list[int]:
        """Which of the single bytes a mask allows, by number, in the order of trying; the latest one comes last."""
        return sorted(_allowed(mask, self._ids).tolist(), key=lambda n: self._bytes[n] == last)

    def by_ids(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """The fewest ids that complete the text, at most so many: of all that may come where those are few."""
        pieces = self._vocabulary.pieces
        level: list[tuple[LLMatcher, bytes, list[int]]] = [(matcher.deep_copy(), b"", [])]
        known = {b""}
        if matcher.is_accepting():
            return []
        states = 0
        for _ in range(most):
            states += len(level)
            if not level or states > MAX_BY_IDS:
                return None
            following = []
            for state, text, ids in level:
                for token in self._promising(state):
                    longer = text + pieces[token]
                    if longer not in known:
                        known.add(longer)
                        after = state.deep_copy()
                        after.consume_token(token)
                        if after.is_accepting():
                            return [*ids, token]
                        following.append((after, longer, [*ids, token]))
            following.sort(key=lambda one: -len(one[1]))
            level = [*following[: MAX_WIDTH // 2], *following[MAX_WIDTH // 2 :][-MAX_WIDTH // 2 :]]
        return None

    def _promising(self, state: LLMatcher) -> list[int]:
        """The ids that write something and may come; of many the longest ones and the single bytes."""
        mask = state.compute_bitmask()
        ids = self._longest_first[_allowed(mask, self._longest_first)]
        if len(ids) > MAX_IDS:
            return [*ids[: MAX_IDS // 4].tolist(), *self._ids[self._next(mask, b"")][:MAX_IDS].tolist()]
        found: list[int] = ids.tolist()
        return found


def _allowed(mask: bytes, ids: np.ndarray) -> np.ndarray:
    """Which of some ids, by their index, a mask of a bit for each id allows."""
    bits = np.frombuffer(mask, np.uint8)
    return np.flatnonzero(bits[ids >> 3] >> (ids & 7) & 1)
