"""q6: 6.25 bits per weight, and 16 per row. The output of q4 models, where an error reaches every token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.groups import GroupedFormat, pack_nibbles, unpack_nibbles
from npllama.numbers.rounding import Nearest

Q6_LOWEST = -32
"""What the code 0 stands for. Levels span 64 as those of q4 do, and are multiplied in the same way."""

NIBBLE_BYTES = BLOCK_ROWS * GROUP // 2
"""Bytes of a block's group that hold the lower four bits of its codes."""

_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]


class Q6(NamedTuple):
    """w = (code - 32) * scale * factor.

    codes (..., B, Q, 384) uint8: vectors 0 to 3 are the lower four bits, as in q4.Q4; vectors 4 and 5 the upper two:
    bits 2 i and 2 i + 1 of byte 4 r + j of vector 4 + v are of row r, column 16 v + 4 i + j. The rest as in q8.Q8.
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


class Q6Format(GroupedFormat):
    """Levels from -32 to 31."""

    name = title = "q6"
    weight = Q6
    kernel = "npllama.execution.kernels.q6"
    code_bits = 6
    targets = (-32.4, -31.6, 31)

    def levels(self, codes: np.ndarray) -> np.ndarray:
        low = unpack_nibbles(codes[..., :NIBBLE_BYTES])
        tops = codes[..., NIBBLE_BYTES:].reshape(*codes.shape[:-1], -1, 1, 4 * BLOCK_ROWS)
        high = tops >> _SHIFTS & 3  # (..., 2, 4, 64)
        return (low | high.reshape(low.shape) << 4).astype(np.float32) + np.float32(Q6_LOWEST)

    @property
    def rule(self) -> Nearest:
        return Nearest(Q6_LOWEST, Q6_LOWEST + 63)

    def pack(self, levels: np.ndarray) -> np.ndarray:
        vectors = (levels - np.float32(Q6_LOWEST)).astype(np.uint8)
        tops = (vectors >> 4).reshape(*vectors.shape[:2], 2, 4, -1) << _SHIFTS
        tops = np.bitwise_or.reduce(tops, axis=3)  # (b, Q, 2, 4, 64) -> (b, Q, 2, 64)
        return np.concatenate([pack_nibbles(vectors & 15), tops.reshape(*vectors.shape[:2], -1)], axis=-1)


FORMAT = Q6Format()
