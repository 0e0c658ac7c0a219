"""The kernel of q4: two codes to a byte, looked up in a codebook of 16 levels (see numbers/)."""

from __future__ import annotations

import numpy as np
from numba import njit

from npllama.execution.kernels import amx
from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import dot8, load_codes, make_lookup, opaque_count, store_levels
from npllama.execution.kernels.int8_linear import register_grouped
from npllama.execution.kernels.prefetch import packed_line
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.q4 import Q4, Q4_CODEBOOK


def make_four_bits(codebook):
    """dot_group, unpack_group and level (see int8_linear.register_grouped) for 16 levels that span at most 64."""
    lowest_unpacked = codebook[0] if amx.USED else 0
    levels_of_codes = np.array(codebook, np.float32)
    look_up_low, look_up_high = make_lookup(codebook)

    @njit(**INLINE)
    def dot_group(dots, codes, begin, x, at, tile_stride):
        for v in range(opaque_count(GROUP // 8)):
            packed_line(codes, begin + v * 64)
            pairs = load_codes(codes, begin + v * 64)
            dots = dot8(dots, look_up_low(pairs), look_up_high(pairs), x, at + v * 8, tile_stride)
        return dots

    @njit(**INLINE)
    def unpack_group(codes, begin, levels, at):
        for v in range(opaque_count(GROUP // 8)):
            packed_line(codes, begin + v * 64)
            pairs = load_codes(codes, begin + v * 64)
            store_levels(levels, at + v * 128, look_up_low(pairs), lowest_unpacked)
            store_levels(levels, at + v * 128 + 64, look_up_high(pairs), lowest_unpacked)

    @njit(**INNER)
    def level(codes, b, g, r, k):
        pair = codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4]
        shift = 4 if k % 8 >= 4 else 0  # two expressions of unlike integers would be unified to a float
        return levels_of_codes[(pair >> shift) & 15]

    return dot_group, unpack_group, level


register_grouped(Q4, 4, Q4_CODEBOOK[0], *make_four_bits(Q4_CODEBOOK))
