"""Intel's AMX: codes of two tiles of tokens times those of a block, a group at a time.

A tile register has up to 16 rows of 64 bytes. One holds a group of a block as the formats store it, four columns of
its 16 rows to a register row; two hold the same columns of 8 tokens each, a token to a row; two hold the 32-bit sums.
The sums are exact, so they are those of the other forms of the product.
"""

from __future__ import annotations

import ctypes
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.int8_dot import DOT, TOKEN_TILE, int32x16, map_tokens
from npllama.execution.kernels.llvm import address, call, i8, i32, i64
from npllama.execution.kernels.target import TRIPLE, has
from npllama.numbers.blocks import BLOCK_ROWS, GROUP

TOKENS = 2 * TOKEN_TILE
"""Tokens of one product."""

LEVELS_BYTES = BLOCK_ROWS * GROUP
"""Bytes of a block's group, unpacked to one byte per weight."""

N_SUMS = TOKENS * BLOCK_ROWS
"""Sums of one product."""

SUMS, INPUT, WEIGHTS = (0, 1), (2, 3), 4
"""Numbers of the tile registers."""

SHAPES = (
    dict.fromkeys(SUMS, (TOKEN_TILE, 4 * BLOCK_ROWS))
    | dict.fromkeys(INPUT, (TOKEN_TILE, GROUP))
    | {WEIGHTS: (GROUP // 4, 4 * BLOCK_ROWS)}
)
"""Rows of each register, and bytes of a row."""

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def request_permission() -> bool:
    """Ask Linux for the use of AMX, which it grants to a process only then."""
    if not sys.platform.startswith("linux") or not TRIPLE.startswith("x86_64"):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


USED = DOT == "vnni" and has("amx-tile") and has("amx-int8") and request_permission()
"""Whether kernels are compiled for AMX. The CPU's features do not say it all: the system decides too."""


@intrinsic
def configure(typingctx):
    """Give this thread the tile registers, until `release`."""

    def generate(context, builder, signature, args):
        setting = bytearray(64)  # the kind of setting; from byte 16 on bytes of a row, from 48 on rows
        setting[0] = 1
        for register, (rows, n_bytes) in SHAPES.items():
            setting[16 + 2 * register], setting[48 + register] = n_bytes, rows
        where = cgutils.global_constant(builder, "amx_setting", ir.Constant(ir.ArrayType(i8, 64), setting))
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), llvm.cast(builder, where, i8))
        return llvm.nothing(context)

    return types.void(), generate


@intrinsic
def release(typingctx):
    """Give the registers back: the system need not keep them when another thread runs."""

    def generate(context, builder, signature, args):
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return llvm.nothing(context)

    return types.void(), generate


def _unit(builder, name, register, *operands):
    """An AMX instruction on a tile register."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), ir.Constant(i8, register), *operands)


@intrinsic
def dot_products(typingctx, x, at, tile_stride, levels, begin, sums, i):
    """Set the i-th N_SUMS numbers of sums, token by token: sum_k x[m, k] * the levels of row n from `begin` on.

    Tokens m = 0 .. TOKEN_TILE-1 stand in x[at ...], those of the next tile tile_stride bytes later.
    """

    def generate(context, builder, signature, args):
        x, at, tile_stride, levels, begin, sums, i = args

        def place(argument, array, offset):
            return llvm.cast(builder, address(context, builder, signature.args[argument], array, offset), i8)

        _unit(builder, "tileloadd64", WEIGHTS, place(3, levels, begin), ir.Constant(i64, 4 * BLOCK_ROWS))
        for tile in range(2):
            _unit(builder, "tilezero", SUMS[tile])
            _unit(builder, "tileloadd64", INPUT[tile], place(0, x, at), ir.Constant(i64, GROUP))
            _unit(builder, "tdpbssd", SUMS[tile], ir.Constant(i8, INPUT[tile]), ir.Constant(i8, WEIGHTS))
            at = builder.add(at, tile_stride)
        start = builder.mul(i, ir.Constant(i64, N_SUMS))
        for tile in range(2):
            into = builder.add(start, ir.Constant(i64, tile * N_SUMS // 2))
            _unit(builder, "tilestored64", SUMS[tile], place(5, sums, into), ir.Constant(i64, 4 * BLOCK_ROWS))
        return llvm.nothing(context)

    return types.void(x, types.intp, types.intp, levels, types.intp, sums, types.intp), generate


@intrinsic
def load_sums(typingctx, sums, i):
    """The i-th N_SUMS numbers of sums: for each token a sum for every row."""
    many = types.UniTuple(int32x16, TOKENS)

    def generate(context, builder, signature, args):
        first = builder.mul(args[1], ir.Constant(i64, N_SUMS))
        start = address(context, builder, signature.args[0], args[0], first)

        def load(_, m):
            return llvm.load(builder, llvm.gep(builder, start, i32, m * BLOCK_ROWS), int32x16.llvm, 4)

        return map_tokens(builder, load, ir.Constant(context.get_value_type(many), ir.Undefined))

    return many(sums, types.intp), generate


@intrinsic
def bytes_to_line(typingctx, array):
    """Bytes from an array's beginning to the next cache line: rows that cross lines load more slowly."""

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], args[0], ir.Constant(i64, 0))
        return builder.and_(builder.neg(builder.ptrtoint(start, i64)), ir.Constant(i64, 63))

    return types.int64(array), generate
