"""Products of many tokens with float32 rows (GEMM): lanes are tokens, numbers of w are broadcast.

    sums[n, t] = (first: 0, else sums[n, t]) + sum_k w[n, k] * x[t, k]        k = 0 .. columns-1, in ascending order

Tokens are packed in panels: PANEL of them transposed, so that a vector holds one column of WIDTH tokens. Each loaded
vector serves TILE_ROWS rows of w, each broadcast number VECTORS vectors of tokens; the sums fill the registers. No sum
runs across lanes, so a token's result does not depend on its neighbours.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.flags import INNER
from npllama.execution.kernels.ir_math import multiply_add
from npllama.execution.kernels.llvm import f32, i64
from npllama.execution.kernels.simd import floats, load_scalar, noinline, pointer
from npllama.execution.kernels.target import REGISTERS, WIDTH

TILE_ROWS, VECTORS = (8, 3) if REGISTERS >= 32 else (6, 2)
"""Rows of w and vectors of tokens of a tile: its sums and operands just fit into the registers."""

PANEL = VECTORS * WIDTH
"""Tokens of a panel."""


def make_gemm_tile(vectors):
    """The tile of TILE_ROWS rows of w and so many vectors of tokens."""

    @intrinsic
    def gemm_tile(typingctx, w, w_stride, x, sums, sums_stride, columns, first):
        def generate(context, builder, signature, args):
            w, w_stride, x, sums, sums_stride, columns, first = args
            w_rows, sum_rows = _rows(builder, w, w_stride), _rows(builder, sums, sums_stride)
            totals = [_start_sums(builder, row, vectors, first) for row in sum_rows]
            with cgutils.for_range(builder, columns) as loop:
                _add_column(builder, w_rows, x, loop.index, totals)
            for row, row_totals in zip(sum_rows, totals, strict=True):
                for v, total in enumerate(row_totals):
                    llvm.store(builder, llvm.load(builder, total, floats.llvm), _vector(builder, row, v), 4)
            return llvm.nothing(context)

        return types.void(w, types.intp, x, sums, types.intp, types.intp, types.boolean), generate

    return gemm_tile


def _rows(builder, start, stride):
    """Pointers to the TILE_ROWS rows of a matrix."""
    return [llvm.gep(builder, start, f32, builder.mul(stride, ir.Constant(i64, n))) for n in range(TILE_ROWS)]


def _vector(builder, start, v):
    """Pointer to the v-th vector of a row."""
    return llvm.gep(builder, start, f32, v * WIDTH)


def _start_sums(builder, row, vectors, first):
    """A variable for each vector of a row of sums: zero in the first strip of columns, else what is there."""
    zero, totals = llvm.constant(floats.llvm, 0.0), [llvm.variable(builder, floats.llvm) for _ in range(vectors)]
    for v, total in enumerate(totals):
        old = llvm.load(builder, _vector(builder, row, v), floats.llvm, 4)
        llvm.store(builder, builder.select(first, zero, old), total)
    return totals


def _add_column(builder, w_rows, x, k, totals):
    """Add the products of column k to every sum."""
    at = llvm.gep(builder, x, f32, builder.mul(k, ir.Constant(i64, PANEL)))
    tokens = [llvm.load(builder, _vector(builder, at, v), floats.llvm, 4) for v in range(len(totals[0]))]
    for row, row_totals in zip(w_rows, totals, strict=True):
        weight = llvm.broadcast(builder, llvm.load(builder, llvm.gep(builder, row, f32, k), f32), WIDTH)
        for token, total in zip(tokens, row_totals, strict=True):
            new = multiply_add(builder, weight, token, llvm.load(builder, total, floats.llvm))
            llvm.store(builder, new, total)


narrow_tile, medium_tile, wide_tile = (make_gemm_tile(n) for n in (1, 2, VECTORS))


@njit(**INNER)
def gemm_tile(n_tokens, w, w_stride, x, sums, sums_stride, columns, first):
    """The tile for the first n_tokens of a panel: as many vectors as they need."""
    noinline()
    if n_tokens > (VECTORS - 1) * WIDTH:
        wide_tile(w, w_stride, x, sums, sums_stride, columns, first)
    elif n_tokens > WIDTH:
        medium_tile(w, w_stride, x, sums, sums_stride, columns, first)
    else:
        narrow_tile(w, w_stride, x, sums, sums_stride, columns, first)


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


@njit(**INNER)
def pack_tokens(x, t, n_tokens, into, at):
    """Lay out the tokens t .. t+n_tokens-1 of x (T, K), at most WIDTH, as one vector's lanes of a panel."""
    noinline()
    K = x.shape[1]
    if K < WIDTH:
        for k in range(K):
            for lane in range(WIDTH):
                into[at + k * PANEL + lane] = load_scalar(x, (t + min(lane, n_tokens - 1)) * K + k)
        return
    for k in range(0, K, WIDTH):
        k = min(k, K - WIDTH)
        transpose_square(pointer(x, t * K + k), K, n_tokens - 1, pointer(into, at + k * PANEL), PANEL)


@njit(**INNER)
def unpack_sums(sums, stride, n_rows, y, t, n_tokens, n):
    """Write sums (n_rows, stride) to y[t .., n ..], transposed: y (T, N)."""
    noinline()
    N = y.shape[1]
    for i in range(0, n_rows, WIDTH):
        for j in range(0, n_tokens, WIDTH):
            if i + WIDTH <= n_rows and j + WIDTH <= n_tokens:
                transpose_square(pointer(sums, i * stride + j), stride, WIDTH, pointer(y, (t + j) * N + n + i), N)
            else:
                for token in range(j, min(j + WIDTH, n_tokens)):
                    for row in range(i, min(i + WIDTH, n_rows)):
                        y[t + token, n + row] = sums[row * stride + token]
