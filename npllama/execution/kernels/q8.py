"""The kernel of q8: a group of a block is 8 vectors of 64 codes, four columns of 16 rows each (see numbers/)."""

from __future__ import annotations

import numpy as np
from numba import njit

from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import (
    UNSIGNED_BIAS,
    dot4_signed,
    load_codes,
    opaque_count,
    store_levels,
    to_unsigned,
)
from npllama.execution.kernels.int8_linear import register_grouped
from npllama.execution.kernels.prefetch import bytes_line
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.q8 import Q8


@njit(**INLINE)
def dot_group(dots, codes, begin, x, at, tile_stride):
    for v in range(opaque_count(GROUP // 4)):
        bytes_line(codes, begin + v * 64)
        dots = dot4_signed(dots, to_unsigned(load_codes(codes, begin + v * 64)), x, at + v * 4, tile_stride)
    return dots


@njit(**INLINE)
def unpack_group(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 4)):
        bytes_line(codes, begin + v * 64)
        store_levels(levels, at + v * 64, load_codes(codes, begin + v * 64), 0)


@njit(**INNER)
def level(codes, b, g, r, k):
    return np.float32(codes[b, g, k // 4 * 4 * BLOCK_ROWS + r * 4 + k % 4])


register_grouped(Q8, 8, -UNSIGNED_BIAS, dot_group, unpack_group, level, dot_unpacked=dot_group)
