"""The CPU's matrix unit (Intel's AMX): codes of 16 tokens times codes of 16 rows of a block, a group at a time.

It has registers of 16 lines of 64 bytes and multiplies two of them in 16 cycles. One holds a group of 16 tokens, a
token to a line; the other a group of a block as its formats store it, four columns of the 16 rows to a line; the third
their products, summed in 32 bits. The sums are exact, so they are those of the other forms of the product.
"""

from __future__ import annotations

import ctypes
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npllama.kernels.codes import DOT, codes, counts, each, element, numbers
from npllama.kernels.vector import X86, address, broadcast, call, constant, has, i8, i64, read, write
from npllama.quant import GROUP, ROWS

TOKENS = 16
"""Tokens of a tile."""

LEVELS_BYTES = ROWS * GROUP
COUNTS = TOKENS * ROWS
"""Bytes of a block's group as the unit reads it, and numbers in its sums."""

SUMS, INPUT, WEIGHTS = range(3)
SHAPES = {SUMS: (TOKENS, 4 * ROWS), INPUT: (TOKENS, GROUP), WEIGHTS: (GROUP // 4, 4 * ROWS)}
"""What the registers are used for; lines, and bytes of a line."""

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def permitted() -> bool:
    """Ask Linux for the unit, which a process may use only after that. It is asked at every start."""
    if not sys.platform.startswith("linux") or not X86:
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


USED = DOT == "vnni" and has("amx-int8") and permitted()
"""Whether kernels are compiled for the unit: the one thing they depend on that is no feature of the target."""


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
def count_products(typingctx, x, at, levels, begin, sums, i):
    """Set the i-th COUNTS numbers of sums: [m, n] = sum_k x[at + 32 m + k] * the levels of row n from `begin` on."""

    def generate(context, builder, signature, args):
        def move(name, register, array, offset, stride):
            where = builder.bitcast(
                address(context, builder, signature.args[array], args[array], offset), i8.as_pointer()
            )
            call(builder, f"llvm.x86.{name}", ir.VoidType(), ir.Constant(i8, register), where, ir.Constant(i64, stride))

        registers = [ir.Constant(i8, register) for register in (SUMS, INPUT, WEIGHTS)]
        call(builder, "llvm.x86.tilezero", ir.VoidType(), registers[SUMS])
        move("tileloadd64", INPUT, 0, args[1], GROUP)
        move("tileloadd64", WEIGHTS, 2, args[3], 4 * ROWS)
        call(builder, "llvm.x86.tdpbssd", ir.VoidType(), *registers)
        move("tilestored64", SUMS, 4, builder.mul(args[5], ir.Constant(i64, COUNTS)), 4 * ROWS)
        return context.get_dummy_value()

    return types.void(x, types.intp, levels, types.intp, sums, types.intp), generate


@intrinsic
def add_scaled_products(typingctx, total, sums, i, scale, array, offset):
    """codes.add_scaled with the i-th COUNTS numbers of sums."""

    def generate(context, builder, signature, args):
        total, sums, i, scale, array, offset = args
        start = address(context, builder, signature.args[1], sums, builder.mul(i, ir.Constant(i64, COUNTS)))
        pointer = address(context, builder, signature.args[4], array, offset)

        def add(total_m, m):
            number = builder.sitofp(read(builder, element(builder, start, m * ROWS), counts.llvm, 4), numbers.llvm)
            x_scale = broadcast(builder, builder.load(element(builder, pointer, m)), ROWS)
            return builder.fadd(total_m, builder.fmul(number, builder.fmul(scale, x_scale)))

        return each(builder, add, total)

    return total(total, sums, types.intp, numbers, array, types.intp), generate


@intrinsic(prefer_literal=True)
def store_levels(typingctx, array, offset, value, shift):
    """Write codes plus a number to int8 array[offset] on."""

    def generate(context, builder, signature, args):
        array, offset, value, _ = args
        levels = builder.add(value, constant(codes.llvm, shift.literal_value))
        write(builder, levels, address(context, builder, signature.args[0], array, offset))
        return context.get_dummy_value()

    return types.void(array, types.intp, codes, shift), generate


@intrinsic
def to_line(typingctx, array):
    """Bytes from an array's beginning to the next line of memory: what crosses lines is read at half the speed."""

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], args[0], ir.Constant(i64, 0))
        return builder.and_(builder.neg(builder.ptrtoint(start, i64)), ir.Constant(i64, 63))

    return types.int64(array), generate
