"""How a long prompt is cut into calls, and how far back its positions see.

A call takes a second or two, so that an interrupt is served. The length follows from the model's size and not from a
clock, so that the same prompt is always cut the same way.
"""

from __future__ import annotations

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
