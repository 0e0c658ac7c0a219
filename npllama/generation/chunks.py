"""How a long prompt is cut into calls.

A call takes a second or two, so that an interrupt is served. The length follows from the model's size and not from a
clock, so that the same prompt is always cut the same way.
"""

from __future__ import annotations

from npllama.config import ModelConfig
from npllama.weights import layer_products

CHUNK_OPERATIONS = 1.2e12
MAX_CHUNK = 512


def chunk_tokens(config: ModelConfig) -> int:
    """Tokens of a prompt to read in one call: a power of two from 8 to 512, fewer the larger the model."""
    affordable = int(CHUNK_OPERATIONS / (2 * layer_products(config)))
    return max(8, min(MAX_CHUNK, 1 << (affordable.bit_length() - 1 if affordable else 0)))
