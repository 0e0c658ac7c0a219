"""q8: 8.25 bits per weight, and 16 per row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.groups import GroupedFormat
from npllama.numbers.rounding import Nearest


class Q8(NamedTuple):
    """w = code * scale * factor, codes from -127 to 127, of `rows` rows and `columns` columns.

    codes (..., B, Q, 512) int8: byte 4 r + j of vector v is of row r, column 4 v + j. scales (..., B, Q, 16) uint8 (see
    blocks.SCALES), factors (..., B, 16) uint16 (bfloat16 bits).
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


class Q8Format(GroupedFormat):
    """Levels are the codes themselves."""

    name = title = "q8"
    weight = Q8
    kernel = "npllama.execution.kernels.q8"
    code_bits, code_dtype = 8, "|i1"
    targets = (127.0,)

    def levels(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.float32).reshape(*codes.shape[:-1], GROUP // 4, 4 * BLOCK_ROWS)

    @property
    def rule(self) -> Nearest:
        return Nearest(-127, 127)

    def pack(self, levels: np.ndarray) -> np.ndarray:
        return levels.astype(np.int8).reshape(*levels.shape[:2], -1)


FORMAT = Q8Format()
