"""How far ahead of what they read kernels prefetch: numbers in memory, which tuning.py sets while a process runs.

They change no bit, and nothing is compiled for them. Which ones are best differs between CPUs, memories and formats:
asked too late, memory is waited for; asked too early, it is gone again from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PACKED, BYTES, HALVES = "packed", "bytes", "halves"
KINDS = (PACKED, BYTES, HALVES)
"""What is read: codes of less than 8 bits, codes of 8 bits, float16 and bfloat16. float32 is not prefetched."""

MAX_AHEAD = 1 << 16


class Prefetch(NamedTuple):
    """How one kind is prefetched. style: "groups" of a block at once to L1, "lines" one by one to L2, or "none"."""

    style: str
    ahead: int = 0

    def __str__(self) -> str:
        return self.style if self.style == "none" else f"{self.style}:{self.ahead}"


NONE = Prefetch("none")
STYLES = ("groups", "lines")

AHEAD = np.zeros((len(KINDS), len(STYLES)), np.int64)
"""Bytes, as kernels read them: 0 where a style is not used."""


def use(kind: str, prefetch: Prefetch) -> None:
    """From now on prefetch a kind so, in all threads."""
    AHEAD[KINDS.index(kind)] = [prefetch.ahead if style == prefetch.style else 0 for style in STYLES]


def used(kind: str) -> Prefetch:
    """How a kind is prefetched now."""
    ahead = AHEAD[KINDS.index(kind)].tolist()
    return next((Prefetch(style, n) for style, n in zip(STYLES, ahead, strict=True) if n), NONE)
