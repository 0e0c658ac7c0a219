"""Rows of matrices by pointers: where they lie, moving along them, and transposing some."""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.llvm import f32, i64
from npllama.execution.kernels.simd import floats
from npllama.execution.kernels.target import WIDTH


class StridedRows(NamedTuple):
    """Rows of a matrix: where the first begins, and how many elements lie from one to the next.

    The pointer does not keep its array alive: take it from an argument of the function, whose caller holds it.
    """

    start: object
    stride: int


def row_pointers(builder, rows, element, n):
    """Pointers to the first n of some StridedRows."""
    start, stride = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
    return [llvm.gep(builder, start, element, builder.mul(stride, ir.Constant(i64, m))) for m in range(n)]


@intrinsic
def skip_rows(typingctx, rows, n):
    """The rows from the n-th on."""

    def generate(context, builder, signature, args):
        rows, n = args
        start, stride = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
        element = llvm.element_type(context, signature.args[0].types[0])
        return builder.insert_value(rows, llvm.gep(builder, start, element, builder.mul(stride, n)), 0)

    return rows(rows, types.intp), generate


@intrinsic
def skip_columns(typingctx, rows, k):
    """The rows from their column k on."""

    def generate(context, builder, signature, args):
        rows, k = args
        element = llvm.element_type(context, signature.args[0].types[0])
        return builder.insert_value(rows, llvm.gep(builder, builder.extract_value(rows, 0), element, k), 0)

    return rows(rows, types.intp), generate


@intrinsic
def transpose_square(typingctx, source, source_stride, last, target, target_stride):
    """Write WIDTH rows of WIDTH numbers as columns: target[j, i] = source[min(i, last), j]."""

    def generate(context, builder, signature, args):
        source, source_stride, last, target, target_stride = args
        rows = []
        for i in range(WIDTH):
            index = ir.Constant(i64, i)
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
            row = llvm.gep(builder, source, f32, builder.mul(source_stride, index))
            rows.append(llvm.load(builder, row, floats.llvm, 4))
        for j, column in enumerate(_transpose(builder, rows)):
            to = llvm.gep(builder, target, f32, builder.mul(target_stride, ir.Constant(i64, j)))
            llvm.store(builder, column, to, 4)
        return llvm.nothing(context)

    return types.void(source, types.intp, types.intp, target, types.intp), generate


def _transpose(builder, rows):
    """WIDTH vectors -> their columns, by rounds of interleaving: each brings rows together that are half apart."""
    low = [lane // 2 + lane % 2 * WIDTH for lane in range(WIDTH)]
    high = [lane + WIDTH // 2 for lane in low]
    done = 1
    while done < WIDTH:
        pairs = list(zip(rows[: WIDTH // 2], rows[WIDTH // 2 :], strict=True))
        rows = [llvm.shuffle(builder, a, b, lanes) for a, b in pairs for lanes in (low, high)]
        done *= 2
    return rows
