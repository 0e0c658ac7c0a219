"""A number format that the package does not have: 5 bits per weight, levels from -16 to 15. Registers itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.numbers import register
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.groups import GroupedFormat, pack_nibbles, unpack_nibbles
from npllama.numbers.rounding import integers_nearest

LOWEST = -16
NIBBLE_BYTES = BLOCK_ROWS * GROUP // 2
_SHIFTS = np.arange(8, dtype=np.uint8)[:, None]


class Q5(NamedTuple):
    """w = (code - 16) * scale * factor.

    codes (..., B, Q, 320) uint8: vectors 0 to 3 are the lower four bits, as in q4; bit v of vector 4 is the upper bit
    of the codes of columns 4 v to 4 v + 3.
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


class Q5Format(GroupedFormat):
    """Levels from -16 to 15."""

    name = title = "q5"
    weight = Q5
    kernel = "q5_kernel"
    code_bits = 5
    targets = (-16.4, -15.6, 15)

    def levels(self, codes: np.ndarray) -> np.ndarray:
        low = unpack_nibbles(codes[..., :NIBBLE_BYTES])
        high = codes[..., None, NIBBLE_BYTES:] >> _SHIFTS & 1  # (..., 8, 64)
        return (low | high << 4).astype(np.float32) + np.float32(LOWEST)

    def nearest(self, w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        return integers_nearest(w, inverse, LOWEST, LOWEST + 31)

    def pack(self, levels: np.ndarray) -> np.ndarray:
        vectors = (levels - np.float32(LOWEST)).astype(np.uint8)
        tops = np.bitwise_or.reduce((vectors >> 4) << _SHIFTS, axis=2)
        return np.concatenate([pack_nibbles(vectors & 15), tops], axis=-1)


FORMAT = register(Q5Format())
