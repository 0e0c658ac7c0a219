"""The kernel of q5_format."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from q5_format import LOWEST, NIBBLE_BYTES, Q5

from npllama.execution.kernels import amx
from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import dot8, int8x64, load_codes, store_levels
from npllama.execution.kernels.int8_linear import register_grouped
from npllama.execution.kernels.llvm import broadcast, constant
from npllama.numbers.blocks import BLOCK_ROWS, GROUP

ZERO_POINT = LOWEST
LOWEST_UNPACKED = ZERO_POINT if amx.USED else 0


@intrinsic
def unpack_5bit(typingctx, packed, shift, tops, bit):
    """Codes from 0 to 31: four bits of each byte of packed, above them one bit of each byte of tops."""

    def generate(context, builder, signature, args):
        shift, bit = (broadcast(builder, builder.trunc(a, int8x64.llvm.element), 4 * BLOCK_ROWS) for a in args[1::2])
        low = builder.and_(builder.lshr(args[0], shift), constant(int8x64.llvm, 15))
        top = builder.and_(builder.lshr(args[2], bit), constant(int8x64.llvm, 1))
        return builder.or_(low, builder.shl(top, constant(int8x64.llvm, 4)))

    return int8x64(int8x64, types.int64, int8x64, types.int64), generate


@njit(**INLINE)
def load_columns(codes, begin, v):
    """Codes of the columns 8 v on of the group at codes[begin ...]: two vectors of four columns."""
    packed, tops = load_codes(codes, begin + v * 64), load_codes(codes, begin + NIBBLE_BYTES)
    return unpack_5bit(packed, 0, tops, 2 * v), unpack_5bit(packed, 4, tops, 2 * v + 1)


@njit(**INLINE)
def dot_group(dots, codes, begin, x, at, tile_stride):
    for v in range(GROUP // 8):
        low, high = load_columns(codes, begin, v)
        dots = dot8(dots, low, high, x, at + v * 8, tile_stride)
    return dots


@njit(**INLINE)
def unpack_group(codes, begin, levels, at):
    for v in range(GROUP // 8):
        low, high = load_columns(codes, begin, v)
        store_levels(levels, at + v * 128, low, LOWEST_UNPACKED)
        store_levels(levels, at + v * 128 + 64, high, LOWEST_UNPACKED)


@njit(**INNER)
def level(codes, b, g, r, k):
    pair = np.int64(codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4])
    top = np.int64(codes[b, g, NIBBLE_BYTES + r * 4 + k % 4]) >> (k // 4) & 1
    return np.float32((pair >> (k // 4 % 2 * 4) & 15 | top << 4) + ZERO_POINT)


register_grouped(Q5, 5, ZERO_POINT, dot_group, unpack_group, level)
