"""How a long prompt is cut into calls, what calls cost, and how far back positions see.

A call takes a second or two, so that an interrupt is served. The length follows from the model's size and not from a
clock, so that the same prompt is always cut the same way. Only beside texts that are being written is a part as short
as these need it, by what calls have cost here so far.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from npllama.cache import KVCache
from npllama.config import ModelConfig
from npllama.errors import UsageError
from npllama.execution.engine import Engine
from npllama.weights import layer_products

CHUNK_OPERATIONS = 1.2e12
MAX_CHUNK = 512
MIN_SINKS = 4
"""First positions that stay in sight of a text that slides: arXiv:2309.17453, section 3.2."""

MAX_STALL = 2.2
"""How much longer than without a prompt a step may take, with a part of one."""

MIN_PART = 8
"""Ids of a prompt that a step reads at least."""

REMEMBERED = 5
"""Batching of a kind whose median counts: one that was disturbed does not."""


def chunk_tokens(config: ModelConfig) -> int:
    """Tokens of a prompt to read in one call: a power of two from 8 to 512, fewer the larger the model."""
    affordable = int(CHUNK_OPERATIONS / (2 * layer_products(config)))
    return max(8, min(MAX_CHUNK, 1 << (affordable.bit_length() - 1 if affordable else 0)))


def feed(
    engine: Engine, cache: KVCache, ids: list[int], chunk: int, start: int = 0, every: bool = False
) -> Iterator[np.ndarray]:
    """Feed a text from position `start` on to sequence 0, chunk by chunk: logits of a chunk's last row, or of all."""
    for first in range(start, len(ids), chunk):
        stop = min(len(ids), first + chunk)
        n = stop - first
        out = range(n) if every else range(n - 1, n)
        yield engine.forward(cache, ids[first:stop], range(first, stop), [0] * n, list(out))


class Pace:
    """Seconds of steps: of those that only write, by their rows; of an id of a prompt beside them."""

    def __init__(self) -> None:
        self._latest: dict[int, deque[float]] = {}
        self._rows: list[int] = []  # of which steps were measured, ascending
        self._id_s = 0.0

    def record(self, n_written: int, n_read: int, seconds: float) -> None:
        """A step of so many rows that were written, and so many ids of prompts, has taken so long."""
        if n_read == 0:
            self._record_rows(n_written, seconds)
            return
        step_s = self.seconds(n_written) if n_written else 0.0
        each = max(1e-9, seconds - (step_s if step_s < math.inf else 0.0)) / n_read
        self._id_s = each if not self._id_s else 0.7 * self._id_s + 0.3 * each

    def _record_rows(self, n: int, seconds: float) -> None:
        latest = self._latest.get(n)
        if latest is None:
            latest = self._latest[n] = deque(maxlen=REMEMBERED)
            bisect.insort(self._rows, n)
        latest.append(seconds)

    def _median(self, n: int) -> float:
        latest = self._latest[n]
        return sorted(latest)[len(latest) // 2]

    def seconds(self, n: int) -> float:
        """Of a step of n rows: measured, or on the line through the nearest that were; without end far beyond these.

        So twice as many rows as ever are tried, and no more at once.
        """
        rows = self._rows
        at = bisect.bisect_left(rows, n)
        if at < len(rows) and (rows[at] == n or at == 0):
            return self._median(rows[at])
        if not rows or n > 2 * rows[-1]:
            return math.inf
        if len(rows) == 1:
            return self._median(rows[0])
        b = min(at, len(rows) - 1)
        fewer_s, more_s = self._median(rows[b - 1]), self._median(rows[b])
        slope = max(0.0, more_s - fewer_s) / (rows[b] - rows[b - 1])
        return fewer_s + slope * (n - rows[b - 1])

    def part(self, n_written: int, most: int) -> int:
        """How many ids of prompts a step may read beside n rows that are written; none before a step was measured."""
        step_s = self.seconds(n_written)
        if step_s == math.inf:
            return 0
        if not self._id_s:
            return MIN_PART
        return max(MIN_PART, min(most, int((MAX_STALL - 1) * step_s / self._id_s)))


class Sight(NamedTuple):
    """What the positions of a text see: the last `window` ones, and the first n_sink."""

    window: int
    n_sink: int

    @classmethod
    def sliding(cls, context: int, sliding_window: int | None, n_keep: int) -> Sight:
        """For a text without end in a context: the last positions, and n_keep first ones, at least four.

        A model that was trained with a sliding window keeps it, and needs no sinks. Raises UsageError when more than
        half of the context is to be kept.
        """
        n_sink = max(n_keep, 0 if sliding_window else min(MIN_SINKS, context // 2))
        if n_sink > context // 2:
            raise UsageError(
                f"n_keep={n_keep}: at most half of the context, {context // 2} positions, can be kept; keep fewer, or "
                f"load the model with a larger context."
            )
        return cls(sliding_window or context - n_sink, n_sink)
