"""Dot products of one row of x with some rows of w, each sum in a register of its own: for few tokens (GEMV).

A dot product is summed in WIDTH lanes, lane i taking the columns i, i + WIDTH, ...; then the lanes are added by halves.
That order does not depend on how many rows are read at once.

Columns that do not fill a vector are read as the last WIDTH columns of w's row, which overlap the vector before.
`copy_row` has put zeros into x in place of what overlaps.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.flags import INNER
from npllama.execution.kernels.ir_math import multiply_add, widen_bf16, widen_f16
from npllama.execution.kernels.llvm import f32, i16, i64
from npllama.execution.kernels.simd import bits16, floats, load, load_last, noinline, store
from npllama.execution.kernels.target import NO_PREFETCH, WIDTH

PREFETCH_BYTES = 4096
"""How far ahead of the numbers that are read memory is prefetched."""


class StridedRows(NamedTuple):
    """Rows of a matrix: where the first begins, and how many elements lie from one to the next.

    The pointer does not keep its array alive: take it from an argument of the function, whose caller holds it.
    """

    start: object
    stride: int


class Reader(NamedTuple):
    """How w is read: LLVM's type of its elements, and a function (builder, pointer) -> WIDTH float32."""

    element: ir.Type
    read: object


def _read_f32(builder, pointer):
    return llvm.load(builder, pointer, floats.llvm, 4)


def _read_f16(builder, pointer):
    return widen_f16(builder, llvm.load(builder, pointer, bits16, 2))


def _read_bf16(builder, pointer):
    return widen_bf16(builder, llvm.load(builder, pointer, bits16, 2))


def _with_prefetch(read):
    """The same reading, with memory prefetched; not where this CPU is faster without."""
    if NO_PREFETCH:
        return read

    def read_and_prefetch(builder, pointer):
        llvm.prefetch(builder, pointer, PREFETCH_BYTES)
        return read(builder, pointer)

    return read_and_prefetch


F32_READER = Reader(f32, _read_f32)
F16_READER = Reader(i16, _with_prefetch(_read_f16))
BF16_READER = Reader(i16, _with_prefetch(_read_bf16))


def make_dots(n_rows, reader):
    """The products of one row of x and n_rows rows of w: y[r, 0] = sum_k x[0, k] * w[r, k]."""

    @intrinsic
    def dots(typingctx, x, w, y, columns):
        def generate(context, builder, signature, args):
            x, w, y, columns = args
            x_row, w_rows = _rows(builder, x, f32, 1)[0], _rows(builder, w, reader.element, n_rows)
            sums = _sum_products(builder, x_row, w_rows, columns, reader)
            for lanes, place in zip(sums, _rows(builder, y, f32, n_rows), strict=True):
                total = llvm.reduce(builder, builder.fadd, llvm.load(builder, lanes, floats.llvm))
                llvm.store(builder, total, place)
            return llvm.nothing(context)

        return types.void(x, w, y, types.intp), generate

    return dots


def _rows(builder, rows, element, n):
    """Pointers to the first n of some StridedRows."""
    start, stride = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
    return [llvm.gep(builder, start, element, builder.mul(stride, ir.Constant(i64, m))) for m in range(n)]


def _sum_products(builder, x_row, w_rows, columns, reader):
    """A variable for each row of w: the lanes of its product with x's row, after a loop over the columns."""
    sums = [llvm.variable(builder, floats.llvm, llvm.constant(floats.llvm, 0.0)) for _ in w_rows]
    last = builder.sub(columns, ir.Constant(i64, WIDTH))  # where w's last, perhaps overlapping, vector begins
    with llvm.loop(builder, 0, columns, WIDTH) as k:
        j = builder.select(builder.icmp_signed("<", k, last), k, last)
        x = _read_f32(builder, llvm.gep(builder, x_row, f32, k))
        for lanes, row in zip(sums, w_rows, strict=True):
            w = reader.read(builder, llvm.gep(builder, row, reader.element, j))
            llvm.store(builder, multiply_add(builder, x, w, llvm.load(builder, lanes, floats.llvm)), lanes)
    return sums


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


@njit(**INNER)
def copy_row(x, at, columns, out, out_at):
    """Copy a row of x: whole vectors, then the rest at the end of a vector of zeros."""
    noinline()
    whole = columns // WIDTH * WIDTH
    for k in range(0, whole, WIDTH):
        store(out, out_at + k, load(x, at + k))
    if whole < columns:
        store(out, out_at + whole, load_last(x, at + columns - WIDTH, columns - whole))
