"""One text under way: what may come next, and the closing that is kept beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Literal

import numpy as np

from npllama.generation.structured.matcher import Matcher
from npllama.generation.structured.vocabulary import Vocabulary


class Constraint:
    """What a text has to be. closing: ids that complete it as it is; overruled: options that could not be followed."""

    def __init__(self, vocabulary: Vocabulary, matcher: Matcher, closing: Sequence[int], stops: Iterable[str]) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher
        self._ends = set(vocabulary.ends)
        self.closing = list(closing)
        self.overruled: set[str] = set()
        self._stops = [stop.encode("utf-8", "surrogatepass") for stop in stops]
        self._reach = max(map(len, self._stops), default=1) - 1
        self._tail = b""
        self.forced: list[int] = []
        self._look_ahead()

    def copy(self) -> Constraint:
        """The same for another text, before anything was taken."""
        twin = copy(self)
        twin._matcher, twin.overruled = self._matcher.copy(), set()
        twin.closing, twin.forced, twin._ends = list(self.closing), list(self.forced), set(self._ends)
        return twin

    def end_at(self, ids: Iterable[int]) -> None:
        """These ids end the text too, where it is complete."""
        self._ends.update(ids)

    def mask(self) -> np.ndarray:
        """Which ids may come next: (V,) bool."""
        if self.forced:
            mask = np.zeros(self._vocabulary.vocab_size, bool)
            mask[self.forced[0]] = True
            return mask
        mask = self._matcher.mask()
        if self._matcher.is_complete:
            mask[list(self._ends)] = True
        return mask

    def take(self, token: int, left: int) -> Literal["over", "full", "stop"] | None:
        """An id comes that may, as one of at most so many; `closing` then completes the text.

        None where the text goes on. "over": it is complete, and nothing may follow. Otherwise the id is not taken:
        "full", behind it no closing was found; "stop", it would write a stop string.
        """
        if token in self._ends:
            self.closing = []
            return "over"
        tail = self._tail + self._vocabulary.pieces[token]
        if any(stop in tail for stop in self._stops):
            if not self.forced:
                self._check_stops()
                return "stop"
            self.overruled.add("stop")
        closing = self._closing_behind(token, left - 1)
        if closing is None:
            return "full"
        self._matcher.take(token)
        self.closing, self._tail = closing, tail[len(tail) - min(len(tail), self._reach) :]
        self.forced = self.forced[1:]
        if not self.forced:
            self._look_ahead()
        return "over" if self._matcher.is_over else None

    def _closing_behind(self, token: int, most: int) -> list[int] | None:
        if self.forced and self._forced_closes and len(self.forced) - 1 <= most:
            return self.forced[1:]
        return self._matcher.closing(token, self.closing, most)

    def _look_ahead(self) -> None:
        """Which ids have to come next, and whether they complete the text."""
        self.forced = list(self._matcher.forced())
        self._forced_closes = bool(self.forced) and self._matcher.completes(self.forced)

    def _check_stops(self) -> None:
        """Say so where what closes the text has a stop string in it."""
        text = self._tail + b"".join([self._vocabulary.pieces[i] for i in self.closing])
        if any(stop in text for stop in self._stops):
            self.overruled.add("stop")
