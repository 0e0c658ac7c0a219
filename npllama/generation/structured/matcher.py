"""What knows which ids may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Matcher(Protocol):
    """A text under way that has a form. Ids write bytes; the ids that end a text may come where it is complete."""

    def copy(self) -> Matcher:
        """One that goes on by itself."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""

    def mask(self) -> np.ndarray:
        """Which ids may come next, those that end a text too: (V,) bool, the caller's own."""

    def take(self, token: int) -> None:
        """An id comes, one of those that may."""

    def forced(self) -> Sequence[int]:
        """The ids that write what has to come next in any case, perhaps none."""

    def completes(self, ids: Sequence[int]) -> bool:
        """Whether the text is complete with these ids behind it."""

    def closing(self, token: int | None, old: Sequence[int], most: int) -> list[int] | None:
        """At most so many ids that complete the text behind an id (None: as it is), or None where none are found.

        old: ids that complete it as it is.
        """
