"""The kernels of q4_0, q4_1, iq4_nl, q5_0, q5_1 and q8_0: float16 scales, and minimums in two of them (see numbers/).

    y[t, n] = sum_g (w . x) * (w_scale[n, g] * x_scale[t, g]) + w_minimum[n, g] * (x_sum[t, g] * x_scale[t, g])

w . x are the integer products of a group as in int8_linear.py, x_sum the sum of its codes.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from npllama.execution.kernels import amx, llvm
from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import (
    UNSIGNED_BIAS,
    as_lanes,
    dot4_signed,
    dot8,
    float32x16,
    int8x64,
    int32x16,
    load_codes,
    load_corrections,
    make_lookup,
    map_tokens,
    opaque_count,
    scaled,
    store_levels,
    to_unsigned,
    token_pointer,
)
from npllama.execution.kernels.int8_linear import Scaling, add_one_scale, register_grouped
from npllama.execution.kernels.ir_math import widen_f16
from npllama.execution.kernels.llvm import address, broadcast, constant, f32, i8, i16, i32
from npllama.execution.kernels.prefetch import packed_line
from npllama.execution.kernels.q4 import make_four_bits
from npllama.execution.kernels.q8 import dot_group as dot_bytes
from npllama.execution.kernels.q8 import unpack_group as unpack_bytes
from npllama.execution.kernels.simd import f16_to_f32
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.ggml import IQ4_LEVELS, IQ4_NL, NIBBLE_BYTES, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

# ---------------------------------------------------------------- scales


@intrinsic
def load_halves(typingctx, array, offset):
    """The float16 of 16 rows, bits in a uint16 array, from array[offset] on, widened."""

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], *args)
        return widen_f16(builder, llvm.load(builder, start, ir.VectorType(i16, BLOCK_ROWS), 2))

    return float32x16(array, types.intp), generate


@intrinsic(prefer_literal=True)
def no_corrections(typingctx, array, offset, tile_stride, n_tokens):
    """0 for each token and row: what `corrections` hold is the sum of the codes, for minimums."""
    many = types.UniTuple(int32x16, n_tokens.literal_value)

    def generate(context, builder, signature, args):
        return ir.Constant(context.get_value_type(many), None)

    return many(array, types.intp, types.intp, n_tokens), generate


@intrinsic
def add_with_minimum(typingctx, total, dots, scale, minimum, scales, sums, offset, tile_stride):
    """int8_dot.add_scaled, and for each token minimum * (the sum of its codes * its scale). Token 0's: [offset]."""

    def generate(context, builder, signature, args):
        total, dots, scale, minimum, scales, sums, offset, tile_stride = args
        first_scale, first_sum = (
            address(context, builder, signature.args[i], array, offset) for i, array in ((4, scales), (5, sums))
        )

        def add(total_m, m):
            x_scale = token_pointer(builder, first_scale, f32, m, tile_stride)
            count = llvm.load(builder, token_pointer(builder, first_sum, i32, m, tile_stride), i32)
            x_sum = builder.fmul(builder.sitofp(count, f32), llvm.load(builder, x_scale, f32))
            products = scaled(builder, builder.extract_value(dots, m), scale, x_scale)
            least = builder.fmul(minimum, broadcast(builder, x_sum, BLOCK_ROWS))
            return builder.fadd(total_m, builder.fadd(products, least))

        return map_tokens(builder, add, total)

    signature = total(total, dots, float32x16, float32x16, scales, sums, types.intp, types.intp)
    return signature, generate


@njit(**INLINE)
def load_half(w, group):
    return load_halves(w.scales, group * BLOCK_ROWS)


@njit(**INLINE)
def load_half_and_minimum(w, group):
    return load_halves(w.scales, group * 2 * BLOCK_ROWS), load_halves(w.scales, (group * 2 + 1) * BLOCK_ROWS)


@njit(**INLINE)
def add_half_and_minimum(total, dots, both, x, at, tile_stride):
    return add_with_minimum(total, dots, both[0], both[1], x.scales, x.corrections, at, tile_stride)


@njit(**INLINE)
def as_it_is(total, w, b):
    return total


@njit(**INNER)
def scale_half(w, b, g, r, level):
    return level * f16_to_f32(w.scales[b, g, 0, r])


@njit(**INNER)
def scale_half_and_minimum(w, b, g, r, level):
    return level * f16_to_f32(w.scales[b, g, 0, r]) + f16_to_f32(w.scales[b, g, 1, r])


HALF = Scaling(load_corrections, load_half, add_one_scale, as_it_is, scale_half, 1)
HALF_AND_MINIMUM = Scaling(
    no_corrections, load_half_and_minimum, add_half_and_minimum, as_it_is, scale_half_and_minimum, 1
)


# ---------------------------------------------------------------- codes

look_up_low, look_up_high = make_lookup(IQ4_LEVELS, signed=True)
low_nibbles, high_nibbles = make_lookup(range(16))


@njit(**INLINE)
def dot_iq4(dots, codes, begin, x, at, tile_stride):
    """Levels of iq4_nl span more than dot8 takes, so they are multiplied as those of q8."""
    for v in range(opaque_count(GROUP // 8)):
        packed_line(codes, begin + v * 64)
        pairs = load_codes(codes, begin + v * 64)
        dots = dot4_signed(dots, to_unsigned(look_up_low(pairs)), x, at + v * 8, tile_stride)
        dots = dot4_signed(dots, to_unsigned(look_up_high(pairs)), x, at + v * 8 + 4, tile_stride)
    return dots


@njit(**INLINE)
def unpack_iq4(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 8)):
        packed_line(codes, begin + v * 64)
        pairs = load_codes(codes, begin + v * 64)
        store_levels(levels, at + v * 128, look_up_low(pairs), 0)
        store_levels(levels, at + v * 128 + 64, look_up_high(pairs), 0)


@intrinsic
def with_fifth_bit(typingctx, nibbles, tops, bit):
    """Codes below 16, and 16 more where this bit of tops is set."""

    def generate(context, builder, signature, args):
        nibbles, tops, bit = args
        pairs = as_lanes(builder, tops, i16)  # x86 shifts no bytes
        at = broadcast(builder, builder.trunc(bit, i16), pairs.type.count)
        fifth = as_lanes(builder, builder.lshr(pairs, at), i8)
        sixteen = builder.shl(
            as_lanes(builder, builder.and_(fifth, constant(fifth.type, 1)), i16), constant(at.type, 4)
        )
        return builder.or_(nibbles, as_lanes(builder, sixteen, i8))

    return int8x64(int8x64, int8x64, types.int64), generate


@njit(**INLINE)
def load_fives(codes, begin, v):
    """Codes of the columns 8 v on of the group at codes[begin ...]: two vectors of four columns."""
    pairs, tops = load_codes(codes, begin + v * 64), load_codes(codes, begin + NIBBLE_BYTES)
    return with_fifth_bit(low_nibbles(pairs), tops, 2 * v), with_fifth_bit(high_nibbles(pairs), tops, 2 * v + 1)


@njit(**INLINE)
def dot_fives(dots, codes, begin, x, at, tile_stride):
    packed_line(codes, begin + NIBBLE_BYTES)
    for v in range(opaque_count(GROUP // 8)):
        packed_line(codes, begin + v * 64)
        low, high = load_fives(codes, begin, v)
        dots = dot8(dots, low, high, x, at + v * 8, tile_stride)
    return dots


def make_five_bits(lowest):
    """unpack_group and level for codes of five bits, of which 0 stands for the lowest level."""
    lowest_unpacked = lowest if amx.USED else 0

    @njit(**INLINE)
    def unpack_group(codes, begin, levels, at):
        packed_line(codes, begin + NIBBLE_BYTES)
        for v in range(opaque_count(GROUP // 8)):
            packed_line(codes, begin + v * 64)
            low, high = load_fives(codes, begin, v)
            store_levels(levels, at + v * 128, low, lowest_unpacked)
            store_levels(levels, at + v * 128 + 64, high, lowest_unpacked)

    @njit(**INNER)
    def level(codes, b, g, r, k):
        pair = np.int64(codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4])
        fifth = np.int64(codes[b, g, NIBBLE_BYTES + r * 4 + k % 4]) >> (k // 4) & 1
        return np.float32((pair >> (k // 4 % 2 * 4) & 15 | fifth << 4) + lowest)

    return unpack_group, level


@njit(**INNER)
def level_of_byte(codes, b, g, r, k):
    return np.float32(np.int8(codes[b, g, k // 4 * 4 * BLOCK_ROWS + r * 4 + k % 4]))


# ---------------------------------------------------------------- formats

SUMS = 1
"""The lowest level of a format with minimums is 0, and what its corrections count are the codes themselves."""

_, _, level_of_iq4 = make_four_bits(IQ4_LEVELS)

dot_q4_0, unpack_q4_0, level_of_q4_0 = make_four_bits(range(-8, 8))
dot_q4_1, unpack_q4_1, level_of_q4_1 = make_four_bits(range(16))
unpack_q5_0, level_of_q5_0 = make_five_bits(-16)
unpack_q5_1, level_of_q5_1 = make_five_bits(0)

register_grouped(Q4_0, 4, -8, dot_q4_0, unpack_q4_0, level_of_q4_0, HALF)
register_grouped(Q4_1, 4, SUMS, dot_q4_1, unpack_q4_1, level_of_q4_1, HALF_AND_MINIMUM)
register_grouped(IQ4_NL, 4, -UNSIGNED_BIAS, dot_iq4, unpack_iq4, level_of_iq4, HALF, dot_bytes)
register_grouped(Q5_0, 5, -16, dot_fives, unpack_q5_0, level_of_q5_0, HALF)
register_grouped(Q5_1, 5, SUMS, dot_fives, unpack_q5_1, level_of_q5_1, HALF_AND_MINIMUM)
register_grouped(Q8_0, 8, -UNSIGNED_BIAS, dot_bytes, unpack_bytes, level_of_byte, HALF, dot_bytes)
