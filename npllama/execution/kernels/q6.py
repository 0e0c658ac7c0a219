"""The kernel of q6: lower four bits packed as in q4, upper two bits in two more vectors (see numbers/)."""

from __future__ import annotations

import numpy as np
from numba import njit

from npllama.execution.kernels import amx
from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import dot8, load_codes, opaque_count, store_levels, unpack_6bit
from npllama.execution.kernels.int8_linear import register_grouped
from npllama.execution.kernels.prefetch import packed_line
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.q6 import NIBBLE_BYTES, Q6, Q6_LOWEST

LOWEST_UNPACKED = Q6_LOWEST if amx.USED else 0


@njit(**INLINE)
def load_columns(codes, begin, v):
    """Unsigned codes of the columns 16 v on of the group at codes[begin ...]: four vectors."""
    packed_line(codes, begin + v * 128)
    packed_line(codes, begin + v * 128 + 64)
    packed_line(codes, begin + NIBBLE_BYTES + v * 64)
    tops = load_codes(codes, begin + NIBBLE_BYTES + v * 64)
    low, high = load_codes(codes, begin + v * 128), load_codes(codes, begin + v * 128 + 64)
    return unpack_6bit(low, tops, 0), unpack_6bit(low, tops, 1), unpack_6bit(high, tops, 2), unpack_6bit(high, tops, 3)


@njit(**INLINE)
def dot_group(dots, codes, begin, x, at, tile_stride):
    for v in range(opaque_count(GROUP // 16)):
        a, b, c, d = load_columns(codes, begin, v)
        dots = dot8(dots, a, b, x, at + v * 16, tile_stride)
        dots = dot8(dots, c, d, x, at + v * 16 + 8, tile_stride)
    return dots


@njit(**INLINE)
def unpack_group(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 16)):
        a, b, c, d = load_columns(codes, begin, v)
        store_levels(levels, at + v * 256, a, LOWEST_UNPACKED)
        store_levels(levels, at + v * 256 + 64, b, LOWEST_UNPACKED)
        store_levels(levels, at + v * 256 + 128, c, LOWEST_UNPACKED)
        store_levels(levels, at + v * 256 + 192, d, LOWEST_UNPACKED)


@njit(**INNER)
def level(codes, b, g, r, k):
    pair = np.int64(codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4])
    tops = np.int64(codes[b, g, NIBBLE_BYTES + k // 16 * 4 * BLOCK_ROWS + r * 4 + k % 4])
    low, top = pair >> (k // 4 % 2 * 4) & 15, tops >> (k // 4 % 4 * 2) & 3
    return np.float32((low | top << 4) + Q6_LOWEST)


register_grouped(Q6, 6, Q6_LOWEST, dot_group, unpack_group, level)
