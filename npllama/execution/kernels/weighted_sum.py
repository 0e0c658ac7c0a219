"""Weighted sums of float32 rows in float64, whose lanes are columns: the two products of attention.

sum[m, j] = (first: 0, else rescale[m] * sum[m, j]) + sum_i weight[m, i] * number[i, j]     i = 0 .. n-1, ascending
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.flags import INNER
from npllama.execution.kernels.ir_math import multiply_add
from npllama.execution.kernels.llvm import f32, f64, i64
from npllama.execution.kernels.simd import doubles, noinline
from npllama.execution.kernels.strided_rows import skip_columns, skip_rows
from npllama.execution.kernels.target import REGISTERS, WIDTH, WIDTH64

TILE_ROWS = 8 if REGISTERS >= 32 else 6
"""Rows of weights that are summed together."""


def make_weighted_sum(rows, vectors):
    """The sums of so many rows of weights, and so many vectors of columns."""

    @intrinsic
    def weighted_sum(typingctx, weights, numbers, n, sums, rescale, first):
        def generate(context, builder, signature, args):
            weights, numbers, n, sums, rescale, first = args
            pointers = [_columns(builder, _row(builder, sums, f64, index(m)), f64, vectors) for m in range(rows)]
            factors = builder.extract_value(rescale, 0)
            totals = [
                _start_sums(builder, row_pointers, factors, index(m), first) for m, row_pointers in enumerate(pointers)
            ]
            weight_rows = [_row(builder, weights, f64, index(m)) for m in range(rows)]
            with llvm.loop(builder, 0, n) as i:
                _add_row(builder, weight_rows, _row(builder, numbers, f32, i), i, totals)
            for row_totals, row_pointers in zip(totals, pointers, strict=True):
                for total, at in zip(row_totals, row_pointers, strict=True):
                    llvm.store(builder, llvm.load(builder, total, doubles.llvm), at, 8)
            return llvm.nothing(context)

        return types.void(weights, numbers, types.intp, sums, rescale, types.boolean), generate

    return weighted_sum


def index(m):
    """An LLVM integer."""
    return ir.Constant(i64, m)


def _row(builder, matrix, element, m):
    """Pointer to row m of StridedRows."""
    start, stride = builder.extract_value(matrix, 0), builder.extract_value(matrix, 1)
    return llvm.gep(builder, start, element, builder.mul(stride, m))


def _columns(builder, row, element, vectors):
    """Pointers to the first vectors of a row."""
    return [llvm.gep(builder, row, element, v * WIDTH64) for v in range(vectors)]


def _broadcast(builder, pointer, i):
    """The i-th float64 in all lanes."""
    return llvm.broadcast(builder, llvm.load(builder, llvm.gep(builder, pointer, f64, i), f64), WIDTH64)


def _start_sums(builder, row_pointers, factors, m, first):
    """A variable for each vector of a row of sums: zero, or what is there times the row's factor."""
    zero, factor = llvm.constant(doubles.llvm, 0.0), _broadcast(builder, factors, m)
    old = [builder.fmul(llvm.load(builder, at, doubles.llvm, 8), factor) for at in row_pointers]
    return [llvm.variable(builder, doubles.llvm, builder.select(first, zero, value)) for value in old]


def _add_row(builder, weight_rows, row, i, totals):
    """Add row i of the numbers, times its weights, to every sum."""
    half = ir.VectorType(f32, WIDTH64)
    numbers = [
        builder.fpext(llvm.load(builder, at, half, 4), doubles.llvm)
        for at in _columns(builder, row, f32, len(totals[0]))
    ]
    for weight_row, row_totals in zip(weight_rows, totals, strict=True):
        weight = _broadcast(builder, weight_row, i)
        for number, total in zip(numbers, row_totals, strict=True):
            new = multiply_add(builder, weight, number, llvm.load(builder, total, doubles.llvm))
            llvm.store(builder, new, total)


tile_sum = make_weighted_sum(TILE_ROWS, 2)
# Of a row alone as many columns at once as there are, up to four vectors of float32: sums of few would wait for each
# other's additions.
row_sum_4, row_sum_3, row_sum_2, row_sum_1 = (make_weighted_sum(1, 2 * n) for n in (4, 3, 2, 1))


@njit(**INNER)
def weighted_sums(M, weights, numbers, n, sums, rescale, first, columns):
    """The sums of M rows of weights, for so many columns, a multiple of WIDTH."""
    noinline()
    m = 0
    while m + TILE_ROWS <= M:
        w, s, r = skip_rows(weights, m), skip_rows(sums, m), skip_rows(rescale, m)
        for j in range(0, columns, WIDTH):
            tile_sum(w, skip_columns(numbers, j), n, skip_columns(s, j), r, first)
        m += TILE_ROWS
    while m < M:
        w, s, r = skip_rows(weights, m), skip_rows(sums, m), skip_rows(rescale, m)
        for j in range(0, columns, 4 * WIDTH):
            numbers_j, s_j = skip_columns(numbers, j), skip_columns(s, j)
            if columns - j >= 4 * WIDTH:
                row_sum_4(w, numbers_j, n, s_j, r, first)
            elif columns - j == 3 * WIDTH:
                row_sum_3(w, numbers_j, n, s_j, r, first)
            elif columns - j == 2 * WIDTH:
                row_sum_2(w, numbers_j, n, s_j, r, first)
            else:
                row_sum_1(w, numbers_j, n, s_j, r, first)
        m += 1
