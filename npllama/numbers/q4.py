"""q4: 4.25 bits per weight, and 16 per row; a codebook of sixteen levels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.numbers.groups import GroupedFormat, pack_nibbles, unpack_nibbles
from npllama.numbers.rounding import Nearest

Q4_CODEBOOK = (-34, -26, -20, -16, -12, -8, -5, -2, 0, 3, 6, 9, 13, 17, 22, 28)
"""The codebook: what each code stands for.

Levels are closer where weights are more frequent; scales have either sign. They span at most 64, so that four products
with 8-bit numbers fit into 16 bits.
"""

# Levels are integers, so borders between them are multiples of a half: floor(2 w / scale) tells the nearest level.
_CELLS = (np.arange(2 * Q4_CODEBOOK[0], 2 * Q4_CODEBOOK[-1] + 1) + 0.5) / 2
_NEAREST = np.array(Q4_CODEBOOK, np.float32)[np.abs(_CELLS[:, None] - Q4_CODEBOOK).argmin(axis=1)]
_RULE = Nearest(Q4_CODEBOOK[0], Q4_CODEBOOK[-1], tuple(_NEAREST.tolist()))
_CODE = np.searchsorted(Q4_CODEBOOK, np.arange(Q4_CODEBOOK[0], Q4_CODEBOOK[-1] + 1)).astype(np.uint8)


class Q4(NamedTuple):
    """w = Q4_CODEBOOK[code] * scale * factor.

    codes (..., B, Q, 256) uint8, two to a byte: byte 4 r + j of vector v holds row r's columns 8 v + j (lower four
    bits) and 8 v + 4 + j (upper four). The rest as in q8.Q8.
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


class Q4Format(GroupedFormat):
    """The output matrix of a q4 model is q6."""

    name = title = "q4"
    weight = Q4
    kernel = "npllama.execution.kernels.q4"
    output = "q6"
    code_bits = 4
    targets = (-37, -35.2, -33.4, -31.6, -29.8, -28, 23, 24.6, 26.2, 27.8, 29.4, 31)

    def levels(self, codes: np.ndarray) -> np.ndarray:
        return np.array(Q4_CODEBOOK, np.float32)[unpack_nibbles(codes)]

    @property
    def rule(self) -> Nearest:
        return _RULE

    def pack(self, levels: np.ndarray) -> np.ndarray:
        return pack_nibbles(_CODE[levels.astype(np.int8) - Q4_CODEBOOK[0]])


FORMAT = Q4Format()
