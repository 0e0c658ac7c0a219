"""How a long prompt is cut into calls.

A prompt is read in chunks of a second or two, so that an interrupt is served. The length follows from the model's size
alone and not from a clock, so that the same prompt is always cut the same way.
"""

from __future__ import annotations

from npllama.config import ModelConfig

CHUNK_OPERATIONS = 1.2e12
MOST_CHUNK = 512


def chunk_tokens(c: ModelConfig) -> int:
    """Tokens of a prompt to read in one call: a power of two from 8 to 512, fewer the larger the model."""
    block = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.hidden_dim
    affordable = int(CHUNK_OPERATIONS / (2 * c.n_layers * block))
    return max(8, min(MOST_CHUNK, 1 << (affordable.bit_length() - 1 if affordable else 0)))
