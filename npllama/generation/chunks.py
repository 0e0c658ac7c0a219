"""How a long prompt is cut into calls.

A call takes a second or two, so that an interrupt is served. The length follows from the model's size and not from a
clock, so that the same prompt is always cut the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from npllama.cache import KVCache
from npllama.config import ModelConfig
from npllama.execution.engine import Engine
from npllama.weights import layer_products

CHUNK_OPERATIONS = 1.2e12
MAX_CHUNK = 512


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
