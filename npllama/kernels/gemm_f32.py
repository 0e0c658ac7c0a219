"""Products of many tokens with float32 rows: lanes are tokens, numbers of w are broadcast.

    sums[n, t] = (first: 0, else sums[n, t]) + sum_k w[n, k] * x[t, k]        k = 0 .. columns-1, in ascending order

The tokens stand in panels: PANEL of them turned, so that a vector holds one column of WIDTH tokens. Each loaded vector
is used for ROWS rows of w, each broadcast number for VECTORS vectors of tokens; the sums fill the registers. No sum
runs across lanes, so a token's result does not depend on its neighbours.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from npllama.kernels import simd
from npllama.kernels.flags import INNER
from npllama.kernels.simd import REGISTERS, WIDTH, floats, i64, load_scalar, pointer

TILE_ROWS, VECTORS = (8, 3) if REGISTERS >= 32 else (6, 2)
PANEL = VECTORS * WIDTH


def make_gemm_tile(vectors):
    """The tile of ROWS rows of w and so many vectors of tokens."""

    @intrinsic
    def gemm_tile(typingctx, w, w_stride, x, sums, sums_stride, columns, first):
        def generate(context, builder, signature, args):
            w, w_stride, x, sums, sums_stride, columns, first = args

            def row(start, stride, n):
                return builder.gep(start, [builder.mul(stride, ir.Constant(i64, n))])

            def lanes(start, v):
                return builder.gep(start, [ir.Constant(i64, v * WIDTH)])

            zero = simd.constant(floats.llvm, 0.0)
            w_rows, sum_rows = (
                [row(p, s, n) for n in range(TILE_ROWS)] for p, s in ((w, w_stride), (sums, sums_stride))
            )
            total = [[cgutils.alloca_once(builder, floats.llvm) for _ in range(vectors)] for _ in w_rows]
            for n, start in enumerate(sum_rows):
                for v in range(vectors):
                    old = simd.read(builder, lanes(start, v), floats.llvm, 4)
                    builder.store(builder.select(first, zero, old), total[n][v])
            with cgutils.for_range(builder, columns) as loop:
                at = builder.gep(x, [builder.mul(loop.index, ir.Constant(i64, PANEL))])
                tokens = [simd.read(builder, lanes(at, v), floats.llvm, 4) for v in range(vectors)]
                for n, start in enumerate(w_rows):
                    weight = simd.broadcast(builder, builder.load(builder.gep(start, [loop.index])), WIDTH)
                    for v in range(vectors):
                        new = simd.multiply_add(builder, weight, tokens[v], builder.load(total[n][v]))
                        builder.store(new, total[n][v])
            for n, start in enumerate(sum_rows):
                for v in range(vectors):
                    simd.write(builder, builder.load(total[n][v]), lanes(start, v), 4)
            return context.get_dummy_value()

        return types.void(w, types.intp, x, sums, types.intp, types.intp, types.boolean), generate

    return gemm_tile


narrow_tile, medium_tile, wide_tile = (make_gemm_tile(n) for n in (1, 2, VECTORS))


@njit(**INNER)
def gemm_tile(n_tokens, w, w_stride, x, sums, sums_stride, columns, first):
    """The tile for the first n_tokens of a panel: as many vectors as they need."""
    simd.noinline()
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
            rows.append(simd.read(builder, builder.gep(source, [builder.mul(source_stride, index)]), floats.llvm, 4))
        low = [lane // 2 + lane % 2 * WIDTH for lane in range(WIDTH)]
        high = [lane + WIDTH // 2 for lane in low]
        done = 1
        while done < WIDTH:  # each round brings rows together that are half of all rows apart
            pairs = list(zip(rows[: WIDTH // 2], rows[WIDTH // 2 :], strict=True))
            rows = [simd.shuffle(builder, a, b, lanes) for a, b in pairs for lanes in (low, high)]
            done *= 2
        for j, column in enumerate(rows):
            to = builder.gep(target, [builder.mul(target_stride, ir.Constant(i64, j))])
            simd.write(builder, column, to, 4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), generate


@njit(**INNER)
def pack_tokens(x, t, n_tokens, into, at):
    """Lay out the tokens t .. t+n_tokens-1 of x (T, K), at most WIDTH, as one vector's lanes of a panel."""
    simd.noinline()
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
    """Write sums (n_rows, stride) to y[t .., n ..], turned: y (T, N)."""
    simd.noinline()
    N = y.shape[1]
    for i in range(0, n_rows, WIDTH):
        for j in range(0, n_tokens, WIDTH):
            if i + WIDTH <= n_rows and j + WIDTH <= n_tokens:
                transpose_square(pointer(sums, i * stride + j), stride, WIDTH, pointer(y, (t + j) * N + n + i), N)
            else:
                for token in range(j, min(j + WIDTH, n_tokens)):
                    for row in range(i, min(i + WIDTH, n_rows)):
                        y[t + token, n + row] = sums[row * stride + token]
