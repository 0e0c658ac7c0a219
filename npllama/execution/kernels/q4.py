"""The kernel of q4: two codes to a byte, looked up in a codebook of 16 levels (see numbers/)."""

from __future__ import annotations

import numpy as np
from numba import njit

from npllama.execution.kernels import amx
from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import dot8, load_codes, make_lookup, opaque_count, prefetch_line, store_levels
from npllama.execution.kernels.int8_linear import PREFETCH_BYTES, register_grouped
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.q4 import Q4, Q4_CODEBOOK

LOWEST_UNPACKED = Q4_CODEBOOK[0] if amx.USED else 0
CODEBOOK = np.array(Q4_CODEBOOK, np.float32)
look_up_low, look_up_high = make_lookup(Q4_CODEBOOK)


@njit(**INLINE)
def dot_group(dots, codes, begin, x, at, tile_stride):
    for v in range(opaque_count(GROUP // 8)):
        prefetch_line(codes, begin + v * 64 + PREFETCH_BYTES, 64)
        pairs = load_codes(codes, begin + v * 64)
        dots = dot8(dots, look_up_low(pairs), look_up_high(pairs), x, at + v * 8, tile_stride)
    return dots


@njit(**INLINE)
def unpack_group(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 8)):
        prefetch_line(codes, begin + v * 64 + PREFETCH_BYTES, 64)
        pairs = load_codes(codes, begin + v * 64)
        store_levels(levels, at + v * 128, look_up_low(pairs), LOWEST_UNPACKED)
        store_levels(levels, at + v * 128 + 64, look_up_high(pairs), LOWEST_UNPACKED)


@njit(**INNER)
def level(codes, b, g, r, k):
    pair = codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4]
    shift = 4 if k % 8 >= 4 else 0  # two expressions of unlike integers would be unified to a float
    return CODEBOOK[(pair >> shift) & 15]


register_grouped(Q4, 4, Q4_CODEBOOK[0], dot_group, unpack_group, level)
