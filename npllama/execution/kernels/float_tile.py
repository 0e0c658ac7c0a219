"""The tile of float32, float16 and bfloat16 products: a few rows of w times a few tokens, each sum in a register.

    y[t, n] = sum_k x[t, k] * w[n, k]

A sum has WIDTH lanes. Lane i adds the products of the columns i, i + WIDTH, ... in ascending order, and at the end the
lanes are added by halves: lane i + lane i + WIDTH/2, and so on. That order depends on K alone, not on how many tokens
or rows a tile has, nor on where columns are cut: between two cuts the lanes are kept as they are.

Columns that fill no vector are read as the last WIDTH columns of w's row, which overlap the vector before. In place of
what overlaps, x as `pack_tokens` lays it out has zeros.
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
from npllama.execution.kernels.prefetch import halves_ahead
from npllama.execution.kernels.simd import bits16, floats, load, load_last, noinline, store
from npllama.execution.kernels.strided_rows import row_pointers
from npllama.execution.kernels.target import REGISTERS, WIDTH

TILE_ROWS, TILE_TOKENS = (6, 4) if REGISTERS >= 32 else (3, 4)
"""Rows of w of a tile, and its tokens, at most: sums, rows and one vector of x just fit into 32 or 16 registers."""

SINGLE_ROWS = 4
"""Rows of w for a token alone."""


# ---------------------------------------------------------------- reading


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
    """The same reading, with memory prefetched."""

    def read_and_prefetch(builder, pointer):
        halves_ahead(builder, pointer)
        return read(builder, pointer)

    return read_and_prefetch


F32_READER = Reader(f32, _read_f32)
F16_READER = Reader(i16, _with_prefetch(_read_f16))
BF16_READER = Reader(i16, _with_prefetch(_read_bf16))


@njit(**INNER)
def pack_tokens(x, t, n, panel, at):
    """Lay out the tokens t .. t+n-1 of x (T, K) for a tile: a vector of each in turn, from panel[at] on."""
    noinline()
    K = x.shape[1]
    whole = K // WIDTH * WIDTH
    for m in range(n):
        row, to = (t + m) * K, at + m * WIDTH
        for k in range(0, whole, WIDTH):
            store(panel, to + k * n, load(x, row + k))
        if whole < K:
            store(panel, to + whole * n, load_last(x, row + K - WIDTH, K - whole))


# ---------------------------------------------------------------- the tile


class Columns(NamedTuple):
    """The columns start .. stop-1 of rows of K; all but K are multiples of WIDTH, and stop may lie beyond it."""

    start: int
    stop: int
    K: int


def make_tile(n_rows, n_tokens, reader):
    """The tile of so many rows and tokens, for some of the columns.

    tile(panel, w, columns, lanes, y, apart): token m times row r goes to y[m, r * apart], once the last columns are
    added. `lanes` keeps the sums from one call to the next.
    """

    @intrinsic
    def tile(typingctx, panel, w, columns, lanes, y, apart):
        def generate(context, builder, signature, args):
            panel, w, columns, lanes, y, apart = args
            start, stop, K = (builder.extract_value(columns, i) for i in range(3))
            kept = [llvm.gep(builder, lanes, f32, i * WIDTH) for i in range(n_rows * n_tokens)]
            sums = _start_sums(builder, kept, builder.icmp_signed("==", start, ir.Constant(i64, 0)))
            w_rows = row_pointers(builder, w, reader.element, n_rows)
            last = builder.sub(K, ir.Constant(i64, WIDTH))  # where w's last, perhaps overlapping, vector begins
            with llvm.loop(builder, start, stop, WIDTH) as k:
                j = builder.select(builder.icmp_signed("<", k, last), k, last)
                weights = [reader.read(builder, llvm.gep(builder, row, reader.element, j)) for row in w_rows]
                x = llvm.gep(builder, panel, f32, builder.mul(k, ir.Constant(i64, n_tokens)))
                _add_products(builder, x, weights, sums)
            totals = [llvm.load(builder, total, floats.llvm) for total in sums]
            with builder.if_else(builder.icmp_signed("<", stop, K)) as (unfinished, finished):
                with unfinished:
                    for total, place in zip(totals, kept, strict=True):
                        llvm.store(builder, total, place, 4)
                with finished:
                    _store_reduced(builder, totals, row_pointers(builder, y, f32, n_tokens), n_rows, apart)
            return llvm.nothing(context)

        return types.void(panel, w, columns, lanes, y, types.intp), generate

    return tile


def _start_sums(builder, kept, first):
    """A variable for each sum: zero with the first columns, else what was kept."""
    sums = [llvm.variable(builder, floats.llvm, llvm.constant(floats.llvm, 0.0)) for _ in kept]
    with builder.if_then(builder.not_(first)):
        for total, place in zip(sums, kept, strict=True):
            llvm.store(builder, llvm.load(builder, place, floats.llvm, 4), total)
    return sums


def _add_products(builder, x, weights, sums):
    """Add the products of one vector of every token with one of every row; sums: token by token."""
    for i, total in enumerate(sums):
        m, r = divmod(i, len(weights))
        if r == 0:
            numbers = llvm.load(builder, llvm.gep(builder, x, f32, m * WIDTH), floats.llvm, 4)
        llvm.store(builder, multiply_add(builder, numbers, weights[r], llvm.load(builder, total, floats.llvm)), total)


def _store_reduced(builder, totals, y_rows, n_rows, apart):
    """Write the sum of each vector's lanes to its place in y."""
    targets = [
        llvm.gep(builder, row, f32, builder.mul(apart, ir.Constant(i64, r))) for row in y_rows for r in range(n_rows)
    ]
    for total, place in zip(llvm.reduce_each(builder, builder.fadd, totals), targets, strict=True):
        llvm.store(builder, total, place)


def make_tiles(reader):
    """A function (n_tokens, ...): the tile of 1 .. TILE_TOKENS tokens."""
    one = make_tile(SINGLE_ROWS, 1, reader)
    two, three, four = (make_tile(TILE_ROWS, n, reader) for n in (2, 3, TILE_TOKENS))

    @njit(**INNER)
    def tile(n_tokens, panel, w, columns, lanes, y, apart):
        noinline()
        if n_tokens == 1:
            one(panel, w, columns, lanes, y, apart)
        elif n_tokens == 2:
            two(panel, w, columns, lanes, y, apart)
        elif n_tokens == 3:
            three(panel, w, columns, lanes, y, apart)
        else:
            four(panel, w, columns, lanes, y, apart)

    return tile


full_tile = make_tile(TILE_ROWS, TILE_TOKENS, F32_READER)
