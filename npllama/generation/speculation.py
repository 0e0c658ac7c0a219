"""Guesses for the next ids of a text, from what followed the same ids earlier in it: no second model.

A step checks guesses beside the id that is due: each is right if it is the id that is drawn there. So the text is the
one without guesses, and comes sooner where it repeats itself or its prompt.

Known in the field as prompt lookup (transformers' prompt_lookup_num_tokens, llama.cpp's lookup). Differs: how often
such a guess is right is learnt from the text itself, whether it was made or not; and how many are made follows from
that and from what steps cost here. A text that does not repeat itself pays nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Ids
from itertools import accumulate

from npllama.generation.chunks import Pace

RUNS = (3, 2, 1)
"""Ids that have to be the same before the next is guessed: where more are, these are looked for first."""

MAX_GUESSES = 15
"""Guesses for one text in one step."""

MIN_CHANCE = 0.05
"""A guess that is less likely is not thought about."""

MIN_GAIN = 1.03
"""How much faster guesses have to promise to be: both numbers that say so are estimates."""

LENGTHS = (1, 2, 3, 4, 6, 10, 16, 32)
"""Matches are told apart by their length, up to each of these: the longer one is, the likelier it goes on."""

FIRST_CHANCE = 0.3
"""That a match of one id goes on, before any has."""

PRIOR = 2.0
"""As many outcomes of shorter matches count for a match of a length that was not seen yet."""

MAX_RUNS = 1 << 15
"""Runs of a length that are remembered at least, and twice as many at most: a text may have no end."""

MAX_COUNT = 32.0
"""Outcomes that are remembered; older ones count for less and less."""

ID_BITS = 21
"""Of an id in a run. Larger ids would be taken for each other, which costs a guess."""

LONG, RECENT = 8, 64
"""A text repeats itself if it had so long a match among so many of the latest ids."""


class _Runs:
    """Where each run of n ids last ended in a text. A run is one number: its ids side by side."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._run, self._mask = 0, (1 << n * ID_BITS) - 1
        self._ends: dict[int, int] = {}
        self._older: dict[int, int] = {}  # the same of runs that have not come again for long

    def __len__(self) -> int:
        return len(self._ends) + len(self._older)

    def exchange(self, token: int, end: int) -> int:
        """Add the next id of the text, the end-th: where the run that ends with it has ended before; 0: nowhere."""
        self._run = run = (self._run << ID_BITS | token) & self._mask
        if end < self.n:
            return 0
        found = self._ends.get(run) or self._older.get(run, 0)
        self._ends[run] = end
        if len(self._ends) >= MAX_RUNS:
            self._older, self._ends = self._ends, {}
        return found


class Lookup:
    """Finds how one text may go on. A match is a run of the latest ids that stands earlier in the text, too."""

    def __init__(self) -> None:
        self._runs = [_Runs(n) for n in RUNS]
        self._n = 0  # ids that were seen
        self._source = 0  # what follows the match
        self._match = 0  # its length; 0: there is none
        self._long_at = -RECENT  # where a match last was long
        self._counts = [0.0] * (len(LENGTHS) + 1)  # matches of each length
        self._right = [0.0] * (len(LENGTHS) + 1)  # of them, those that went on
        self._chances: list[float] = []  # how likely a match of each length goes on; empty: to be estimated anew

    def see(self, ids: Ids[int]) -> None:
        """Look at the ids that have come to the text."""
        for n in range(self._n + 1, len(ids) + 1):
            if self._match:
                self._learn(ids[self._source] == ids[n - 1], n)
            for runs in self._runs:
                before = runs.exchange(ids[n - 1], n)
                if before and not self._match:
                    self._source, self._match = before, runs.n
        self._n = len(ids)

    def _learn(self, right: bool, n: int) -> None:
        """A match has gone on, or has ended, with the n-th id."""
        kind = _kind(self._match)
        if self._counts[kind] >= MAX_COUNT:
            self._counts[kind] /= 2
            self._right[kind] /= 2
        self._counts[kind] += 1
        self._right[kind] += right
        self._chances = []
        self._source, self._match = (self._source + 1, self._match + 1) if right else (0, 0)
        if self._match >= LONG:
            self._long_at = n

    def _estimates(self) -> list[float]:
        """How likely a match of each length goes on: as often as it has, and as shorter ones do."""
        found, chance = [], FIRST_CHANCE
        for right, count in zip(self._right, self._counts, strict=True):
            chance = (right + PRIOR * chance) / (count + PRIOR)
            found.append(chance)
        return found

    @property
    def repeats(self) -> bool:
        """Whether the text repeats itself, or its prompt, where it is now."""
        return self._n - self._long_at < RECENT

    def chances(self, most: int) -> list[float]:
        """How likely it is that the next guess is right, that the two next are, and so on: at most `most`."""
        found: list[float] = []
        if not self._match:
            return found
        self._chances = self._chances or self._estimates()
        chance = 1.0
        for i in range(min(most, MAX_GUESSES)):
            chance *= self._chances[_kind(self._match + i)]
            if chance < MIN_CHANCE:
                break
            found.append(chance)
        return found

    def guesses(self, ids: Ids[int], n: int) -> list[int]:
        """The next n ids if the match goes on; where it reaches the end of the text, the text goes on as it does."""
        period = len(ids) - self._source
        return [ids[self._source + i % period] for i in range(n)]


def _kind(length: int) -> int:
    return bisect_left(LENGTHS, length)


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
