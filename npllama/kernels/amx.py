"""The CPU's matrix unit (Intel's AMX): codes of two tiles of tokens times those of a block, a group at a time.

Its registers have up to 16 lines of 64 bytes. One holds what a group of a block stands for, in the order in which the
formats store it, four columns of the 16 rows to a line; two hold the same columns of 8 tokens each, a token to a line;
two the sums of their products, of 32 bits. The sums are exact, so they are those of the other forms of the product.
"""

from __future__ import annotations

import ctypes
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllama.kernels.int8_dot import (
    DOT,
    TOKEN_TILE,
    add_scaled_ir,
    element,
    float32x16,
    int8x64,
    int32x16,
    map_tokens,
    token_pointer,
)
from npllama.kernels.simd import TRIPLE, address, call, constant, has, i8, i64, read, write
from npllama.numbers.blocks import BLOCK_ROWS, GROUP

TOKENS = 2 * TOKEN_TILE
"""Tokens that the unit takes at once."""

LEVELS_BYTES = BLOCK_ROWS * GROUP
COUNTS = TOKENS * BLOCK_ROWS
"""Bytes of a block's group as the unit reads it, and numbers in its sums."""

SUMS, INPUT, WEIGHTS = (0, 1), (2, 3), 4
SHAPES = (
    dict.fromkeys(SUMS, (TOKEN_TILE, 4 * BLOCK_ROWS))
    | dict.fromkeys(INPUT, (TOKEN_TILE, GROUP))
    | {WEIGHTS: (GROUP // 4, 4 * BLOCK_ROWS)}
)
"""What the registers are used for; lines, and bytes of a line."""

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def request_permission() -> bool:
    """Ask Linux for the unit, which a process may use only after that. It is asked at every start."""
    if not sys.platform.startswith("linux") or not TRIPLE.startswith("x86_64"):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


USED = DOT == "vnni" and has("amx-tile") and has("amx-int8") and request_permission()
"""Whether kernels are compiled for the unit. The target's features do not say it all: the system decides too."""


@intrinsic
def configure(typingctx):
    """Give this thread the registers; until `release` the system keeps them for it."""

    def generate(context, builder, signature, args):
        setting = bytearray(64)  # the kind of setting; from byte 16 on bytes of a line, from 48 on lines
        setting[0] = 1
        for register, (lines, n_bytes) in SHAPES.items():
            setting[16 + 2 * register], setting[48 + register] = n_bytes, lines
        value = ir.Constant(ir.ArrayType(i8, 64), setting)
        where = cgutils.global_constant(builder, "matrix_unit", value)
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(where, i8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release(typingctx):
    """Give the registers back: what they hold need not be kept when another thread runs."""

    def generate(context, builder, signature, args):
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def count_products(typingctx, x, at, tile_stride, levels, begin, sums, i):
    """Set the i-th COUNTS numbers of sums, token by token: sum_k x[m, k] * the levels of row n from `begin` on.

    Tokens m = 0 .. TILE-1 stand in x[at ...], the next TILE so much further.
    """

    def generate(context, builder, signature, args):
        x, at, tile_stride, levels, begin, sums, i = args

        def line(array_type, array, offset):
            return builder.bitcast(address(context, builder, array_type, array, offset), i8.as_pointer())

        def unit(name, register, *operands):
            call(builder, f"llvm.x86.{name}", ir.VoidType(), ir.Constant(i8, register), *operands)

        x_type, levels_type, sums_type = signature.args[0], signature.args[3], signature.args[5]
        unit("tileloadd64", WEIGHTS, line(levels_type, levels, begin), ir.Constant(i64, 4 * BLOCK_ROWS))
        for tile in range(2):
            unit("tilezero", SUMS[tile])
            unit("tileloadd64", INPUT[tile], line(x_type, x, at), ir.Constant(i64, GROUP))
            unit("tdpbssd", SUMS[tile], ir.Constant(i8, INPUT[tile]), ir.Constant(i8, WEIGHTS))
            at = builder.add(at, tile_stride)
        start = builder.mul(i, ir.Constant(i64, COUNTS))
        for tile in range(2):
            into = builder.add(start, ir.Constant(i64, tile * COUNTS // 2))
            unit("tilestored64", SUMS[tile], line(sums_type, sums, into), ir.Constant(i64, 4 * BLOCK_ROWS))
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, levels, types.intp, sums, types.intp), generate


@intrinsic
def add_scaled_products(typingctx, total, sums, i, scale, array, offset, tile_stride):
    """codes.add_scaled with the i-th COUNTS numbers of sums; the scales of the second tile stand so much further."""

    def generate(context, builder, signature, args):
        total, sums, i, scale, array, offset, tile_stride = args
        start = address(context, builder, signature.args[1], sums, builder.mul(i, ir.Constant(i64, COUNTS)))
        scales = address(context, builder, signature.args[4], array, offset)

        def add(total_m, m):
            count = read(builder, element(builder, start, m * BLOCK_ROWS), int32x16.llvm, 4)
            return add_scaled_ir(builder, total_m, count, scale, token_pointer(builder, scales, m, tile_stride))

        return map_tokens(builder, add, total)

    return total(total, sums, types.intp, float32x16, array, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def store_levels(typingctx, array, offset, value, shift):
    """Write codes plus a number to int8 array[offset] on."""

    def generate(context, builder, signature, args):
        array, offset, value, _ = args
        levels = builder.add(value, constant(int8x64.llvm, shift.literal_value))
        write(builder, levels, address(context, builder, signature.args[0], array, offset))
        return context.get_dummy_value()

    return types.void(array, types.intp, int8x64, shift), generate


@intrinsic
def bytes_to_line(typingctx, array):
    """Bytes from an array's beginning to the next line of memory: what crosses lines is read at half the speed."""

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], args[0], ir.Constant(i64, 0))
        return builder.and_(builder.neg(builder.ptrtoint(start, i64)), ir.Constant(i64, 63))

    return types.int64(array), generate
