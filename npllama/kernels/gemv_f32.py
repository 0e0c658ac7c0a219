"""Dot products of one row with some rows of a matrix, each sum in a register of its own: for few tokens.

A dot product is summed in WIDTH lanes, lane i taking the columns i, i + WIDTH, ...; then the lanes are added by halves.
That order does not depend on how many rows are read at once: so an output depends on its two rows alone, to the bit.

Columns that do not fill a vector are one more vector, which overlaps the whole ones: the last WIDTH columns of w's row,
times those of x, where `copy_row` has put zeros in place of what overlaps.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from npllama.kernels import simd
from npllama.kernels.flags import INNER
from npllama.kernels.simd import WIDTH, bits16, floats, i64, load, load_last, store


class StridedRows(NamedTuple):
    """Rows of a matrix: where the first begins, and how many elements further the next does.

    The pointer does not keep its array alive: take it from an argument of the function, whose caller holds it.
    """

    start: object
    stride: int


def read_f32(builder, pointer):
    """WIDTH float32."""
    return simd.read(builder, pointer, floats.llvm, 4)


def read_f16(builder, pointer):
    """WIDTH float16 -> float32."""
    return simd.widen_f16(builder, simd.read(builder, pointer, bits16, 2))


def read_bf16(builder, pointer):
    """WIDTH bfloat16 -> float32."""
    return simd.widen_bf16(builder, simd.read(builder, pointer, bits16, 2))


PREFETCH_BYTES = 4096
"""Bytes from the numbers that are read to those that are asked for."""


def with_prefetch(read):
    """The same reading, and memory asked for what comes AHEAD bytes later."""
    if simd.NO_PREFETCH:
        return read

    def read_and_prefetch(builder, pointer):
        simd.prefetch(builder, builder.bitcast(pointer, simd.i8.as_pointer()), PREFETCH_BYTES)
        return read(builder, pointer)

    return read_and_prefetch


def make_dots(rows, read):
    """The products of one row of x and `rows` rows of w, which `read` reads: y[r, 0] = sum_k x[0, k] * w[r, k]."""

    @intrinsic
    def dots(typingctx, x, w, y, columns):
        def generate(context, builder, signature, args):
            x, w, y, columns = args
            sums = _sums(builder, _rows(builder, x, 1)[0], _rows(builder, w, rows), columns, read)
            for one, place in zip(sums, _rows(builder, y, rows), strict=True):
                lanes = simd.reduce_add(builder, builder.load(one), 1)
                builder.store(builder.extract_element(lanes, ir.Constant(simd.i32, 0)), place)
            return context.get_dummy_value()

        return types.void(x, w, y, types.intp), generate

    return dots


def _rows(builder, rows, n):
    """Pointers to the first n of some Rows."""
    start, stride = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
    return [builder.gep(start, [builder.mul(stride, ir.Constant(i64, m))]) for m in range(n)]


def _sums(builder, x_row, w_rows, columns, read):
    """sums[r] = the lanes of the product of x's row and w's row r, after a loop over the columns."""
    zero = simd.constant(floats.llvm, 0.0)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in w_rows]
    width = ir.Constant(i64, WIDTH)
    last = builder.sub(columns, width)  # where w's last, perhaps overlapping, vector begins
    with cgutils.for_range_slice(builder, ir.Constant(i64, 0), columns, width, inc=True) as (k, _):
        j = builder.select(builder.icmp_signed("<", k, last), k, last)
        numbers = read_f32(builder, builder.gep(x_row, [k]))
        for one, row in zip(sums, w_rows, strict=True):
            weights = read(builder, builder.gep(row, [j]))
            builder.store(simd.multiply_add(builder, numbers, weights, builder.load(one)), one)
    return sums


@intrinsic
def skip_rows(typingctx, rows, n):
    """The rows from the n-th on."""

    def generate(context, builder, signature, args):
        rows, n = args
        start, stride = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
        return builder.insert_value(rows, builder.gep(start, [builder.mul(stride, n)]), 0)

    return rows(rows, types.intp), generate


@intrinsic
def skip_columns(typingctx, rows, k):
    """The rows from their column k on."""

    def generate(context, builder, signature, args):
        rows, k = args
        return builder.insert_value(rows, builder.gep(builder.extract_value(rows, 0), [k]), 0)

    return rows(rows, types.intp), generate


@njit(**INNER)
def copy_row(x, at, columns, out, out_at):
    """Copy a row for tiles: whole vectors, then the rest at the end of a vector of zeros."""
    simd.noinline()
    whole = columns // WIDTH * WIDTH
    for k in range(0, whole, WIDTH):
        store(out, out_at + k, load(x, at + k))
    if whole < columns:
        store(out, out_at + whole, load_last(x, at + columns - WIDTH, columns - whole))
