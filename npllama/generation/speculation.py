"""Guesses for the next ids of a text, from what followed the same ids earlier in it: no second model.

A step checks guesses beside the id that is due: each is right if it is the id that is drawn there. So the text is the
one without guesses, and comes sooner where it repeats itself or its prompt.

Known in the field as prompt lookup (transformers' prompt_lookup_num_tokens, llama.cpp's lookup). Differs: how often
such a guess is right is learnt from the text itself, whether it was made or not; and how many are made follows from
that and from what steps cost here. A text that does not repeat itself pays nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Ids
from itertools import accumulate

from npllama.generation.chunks import Pace

MIN_MATCH = 3
"""Ids that have to be the same before the next is guessed."""

MAX_GUESSES = 15
"""Guesses for one text in one step."""

MIN_CHANCE = 0.05
"""A guess that is less likely is not thought about."""

MIN_GAIN = 1.03
"""How much faster guesses have to promise to be: both numbers that say so are estimates."""

LENGTHS = (4, 6, 10, 16, 32)
"""Matches are told apart by their length, up to each of these: the longer one is, the likelier it goes on."""

MAX_RUNS = 1 << 15
"""Runs that are remembered at least, and twice as many at most: a text may have no end."""

MAX_COUNT = 32.0
"""Outcomes that are remembered; older ones count for less and less."""


class Lookup:
    """Finds how one text may go on. A match is a run of the latest ids that stands earlier in the text, too."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # of each run of MIN_MATCH ids: where it last ended
        self._older: dict[tuple[int, ...], int] = {}  # the same of runs that have not come again for long
        self._n = 0  # ids that were seen
        self._source = 0  # what follows the match
        self._match = 0  # its length; 0: there is none
        self._counts = [2.0] * (len(LENGTHS) + 1)  # matches of each length, as if two had been seen before
        self._right = [1.0] * (len(LENGTHS) + 1)  # of them, those that went on

    def see(self, ids: Ids[int]) -> None:
        """Look at the ids that have come to the text."""
        for n in range(self._n + 1, len(ids) + 1):
            if self._match:
                self._learn(ids[self._source] == ids[n - 1])
            if n < MIN_MATCH:
                continue
            run = tuple(ids[n - MIN_MATCH : n])
            if not self._match:
                self._source = self._ends.get(run) or self._older.get(run, 0)
                self._match = MIN_MATCH if self._source else 0
            self._ends[run] = n
            if len(self._ends) >= MAX_RUNS:
                self._older, self._ends = self._ends, {}
        self._n = len(ids)

    def _learn(self, right: bool) -> None:
        """A match has gone on, or has ended."""
        kind = _kind(self._match)
        if self._counts[kind] >= MAX_COUNT:
            self._counts[kind] /= 2
            self._right[kind] /= 2
        self._counts[kind] += 1
        self._right[kind] += right
        self._source, self._match = (self._source + 1, self._match + 1) if right else (0, 0)

    def chances(self, most: int) -> list[float]:
        """How likely it is that the next guess is right, that the two next are, and so on: at most `most`."""
        found: list[float] = []
        chance = 1.0
        for i in range(min(most, MAX_GUESSES) if self._match else 0):
            kind = _kind(self._match + i)
            chance *= self._right[kind] / self._counts[kind]
            if chance < MIN_CHANCE:
                break
            found.append(chance)
        return found

    def guesses(self, ids: Ids[int], n: int) -> list[int]:
        """The next n ids if the match goes on; where it reaches the end of the text, the text goes on as it does."""
        period = len(ids) - self._source
        return [ids[self._source + i % period] for i in range(n)]


def _kind(length: int) -> int:
    return next((i for i, most in enumerate(LENGTHS) if length <= most), len(LENGTHS))


def how_many(chances: Ids[list[float]], n_rows: int, pace: Pace) -> list[int]:
    """How many guesses to check for each of some texts, in a step of n rows besides.

    Most ids per second: sum of chances over seconds, for the best so many of all guesses. chances: of each text.
    """
    n_each = [0] * len(chances)
    now_s = pace.seconds(n_rows)
    if now_s == math.inf:  # not measured yet
        return n_each
    ranking = sorted(((p, i) for i, some in enumerate(chances) for p in some), reverse=True)
    best, n_best = MIN_GAIN * n_rows / now_s, 0
    for n, ids in enumerate(accumulate(p for p, _ in ranking), 1):
        rate = (n_rows + ids) / pace.seconds(n_rows + n)
        if rate > best:
            best, n_best = rate, n
    for _, i in ranking[:n_best]:
        n_each[i] += 1
    return n_each
