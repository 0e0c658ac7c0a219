"""ops.linear and ops.embed compiled for float32, float16 and bfloat16.

Few tokens: the weights stream by once, straight from the mapped file, and memory is the limit. Many tokens: strips of
weights are widened into a buffer in the first-level cache while all tokens pass, and arithmetic is the limit. Either
way a thread owns whole outputs, each summed in an order that depends on the shape of w alone and on which of the two
ways it goes: so logits are the same to the bit for any number of threads, and nearly the same for another chunk.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.core.errors import NumbaTypeError
from numba.extending import overload

from npllama import ops
from npllama.kernels import gemm_f32, gemv_f32, simd
from npllama.kernels.elementwise import is_format
from npllama.kernels.embedding import embed_q4, embed_q6, embed_q8
from npllama.kernels.flags import INNER, INNER_PARALLEL
from npllama.kernels.fused_inputs import MAX_FUSED, outputs, padded_to_max, part_of_each
from npllama.kernels.gemm_f32 import PANEL
from npllama.kernels.gemv_f32 import StridedRows, copy_row, make_dots
from npllama.kernels.int8_linear import linears_q4, linears_q6, linears_q8
from npllama.kernels.simd import WIDTH, num_threads, pointer, round_to_width, thread_bounds
from npllama.numbers.bf16 import BF16
from npllama.numbers.f16 import F16
from npllama.numbers.q4 import Q4
from npllama.numbers.q6 import Q6
from npllama.numbers.q8 import Q8

MAX_GEMV_TOKENS = 8
"""Up to so many tokens, w is read where it lies; for more, copying it costs less than it saves."""

MAX_STRIP_COLUMNS = 512
"""Columns of a strip, at most: ROWS x 512 x 4 bytes stay in the first-level cache."""

MAX_PANELS = 5 if gemm_f32.TILE_ROWS == 8 else 8
"""Panels of tokens in turn: 512 columns of them stay in the second-level cache."""

CHUNK_ROWS = 8 * gemm_f32.TILE_ROWS
"""Rows of w whose sums are kept apart before they are written, turned, to y."""

SERIAL_BELOW = 1 << 16
"""Products of a call (rows x columns x tokens) below which one thread is sooner done than two have met."""


def make_gemv(read, n_streams):
    """A thread's part for few tokens, y's columns start .. stop-1: w is read once through. Needs K >= WIDTH.

    So many rows are read at the same time, far apart: memory gives more to several streams than to one.
    """
    dots, dot = make_dots(n_streams, read), make_dots(1, read)

    @njit(**INNER)
    def gemv(x, w, y, start, stop):
        simd.noinline()
        T, K = x.shape
        N, stride = w.shape[0], K + WIDTH
        work = np.empty(T * stride, np.float32)
        for t in range(T):
            copy_row(x, t * K, K, work, t * stride)
        apart = (stop - start) // n_streams
        for n in range(start, start + apart):
            for t in range(T):
                weights, numbers = StridedRows(pointer(w, n * K), apart * K), StridedRows(pointer(work, t * stride), 0)
                dots(numbers, weights, StridedRows(pointer(y, t * N + n), apart), K)
        for n in range(start + apart * n_streams, stop):
            for t in range(T):
                weights, numbers = StridedRows(pointer(w, n * K), 0), StridedRows(pointer(work, t * stride), 0)
                dot(numbers, weights, StridedRows(pointer(y, t * N + n), 0), K)

    return gemv


@njit(**INNER)
def strip_columns(K):
    """Columns of a strip: nearly equal strips of whole vectors."""
    strips = (K + MAX_STRIP_COLUMNS - 1) // MAX_STRIP_COLUMNS
    return round_to_width((K + strips - 1) // strips)


def make_widen(load, load_last):
    """Copies columns of rows into a strip of float32; what is no whole vector as one that overlaps the last."""

    @njit(**INNER)
    def widen(w, n, n_rows, k, columns, strip, stride):
        simd.noinline()
        K, whole = w.shape[1], columns // WIDTH * WIDTH
        for row in range(n_rows):
            at, to = (n + row) * K + k, row * stride
            for i in range(0, whole, WIDTH):
                simd.store(strip, to + i, load(w, at + i))
            if whole < columns:
                rest = columns - whole
                simd.store_last(strip, to + columns - WIDTH, load_last(w, at + columns - WIDTH, rest), rest)

    return widen


def make_gemm(load, load_last):
    """A thread's part for the tokens first .. first+T-1, packed in panels; y's columns start .. stop-1."""
    widen = make_widen(load, load_last)

    @njit(**INNER)
    def gemm(panels, first, T, w, y, start, stop):
        simd.noinline()
        K, size = w.shape[1], strip_columns(w.shape[1])
        strip_stride, sums_stride = size + WIDTH, (T + PANEL - 1) // PANEL * PANEL
        strip = np.zeros(gemm_f32.TILE_ROWS * strip_stride, np.float32)
        sums = np.empty(CHUNK_ROWS * sums_stride, np.float32)
        for chunk in range(start, stop, CHUNK_ROWS):
            chunk_rows = min(CHUNK_ROWS, stop - chunk)
            for k in range(0, K, size):
                columns = min(size, K - k)
                for n in range(0, chunk_rows, gemm_f32.TILE_ROWS):
                    widen(w, chunk + n, min(gemm_f32.TILE_ROWS, chunk_rows - n), k, columns, strip, strip_stride)
                    for t in range(0, T, PANEL):
                        tokens, out = pointer(panels, t * K + k * PANEL), pointer(sums, n * sums_stride + t)
                        weights, n_tokens = pointer(strip, 0), min(PANEL, T - t)
                        gemm_f32.gemm_tile(n_tokens, weights, strip_stride, tokens, out, sums_stride, columns, k == 0)
            gemm_f32.unpack_sums(sums, sums_stride, chunk_rows, y, first, T, chunk)

    return gemm


@njit(**INNER_PARALLEL)
def pack_in_threads(x, first, T, panels, parts):
    """Turn the tokens first .. first+T-1 of x into panels: the vectors' lanes are divided among the threads."""
    K, n_vectors = x.shape[1], (T + WIDTH - 1) // WIDTH
    for p in prange(parts):
        thread = np.int64(p)
        for v in range(thread * n_vectors // parts, (thread + 1) * n_vectors // parts):
            t = v * WIDTH
            at = t // PANEL * PANEL * K + t % PANEL
            gemm_f32.pack_tokens(x, first + t, min(WIDTH, T - t), panels, at)


def make_float_linears(read, n_streams, load, load_last):
    """ops.linears for one number format: how few tokens read it, how to read a vector and the last lanes of one."""
    gemv, gemm = make_gemv(read, n_streams), make_gemm(load, load_last)

    @njit(**INNER)
    def gemv_share(x, ws, ys, part, parts):
        """A thread's part of every matrix, one matrix after the other."""
        for i in range(len(ws)):
            start, stop = thread_bounds(part, parts, ws[i].shape[0])
            gemv(x, ws[i], ys[i], start, stop)

    @njit(**INNER_PARALLEL)
    def gemv_in_threads(x, ws, ys, parts):
        for part in prange(parts):
            gemv_share(x, ws, ys, np.int64(part), parts)

    @njit(**INNER_PARALLEL)
    def gemm_in_threads(panels, first, T, ws, ys, parts):
        for p in prange(parts):
            for i in range(len(ws)):
                start, stop = thread_bounds(np.int64(p), parts, ws[i].shape[0])
                gemm(panels, first, T, ws[i], ys[i], start, stop)

    @njit(**INNER)
    def linears(x, ws):
        T, K = x.shape
        rows, parts = 0, num_threads()
        for w in ws:
            rows += w.shape[0]
        ys = outputs(T, ws)
        if T <= MAX_GEMV_TOKENS and K >= WIDTH:
            if rows * K * T < SERIAL_BELOW:
                gemv_share(x, ws, ys, np.int64(0), np.int64(1))
            else:
                gemv_in_threads(x, ws, ys, parts)
            return ys
        most = min(T, MAX_PANELS * PANEL)
        panels = np.empty((most + PANEL - 1) // PANEL * PANEL * K, np.float32)
        for first in range(0, T, most):
            n_tokens = min(most, T - first)
            pack_in_threads(x, first, n_tokens, panels, parts)
            gemm_in_threads(panels, first, n_tokens, ws, ys, parts)
        return ys

    return linears


def from_bits(linears):
    """The same for weights whose one part is what `linears` takes: F16 and BF16."""

    @njit(**INNER)
    def linears_from_bits(x, ws):
        return linears(x, part_of_each(ws, 0))

    return linears_from_bits


def make_float_embed(load, load_last):
    """ops.embed for one number format."""

    @njit(**INNER)
    def embed(table, tokens):
        T, D = tokens.shape[0], table.shape[1]
        x = np.empty((T, D), np.float32)
        whole = D // WIDTH * WIDTH
        for t in range(T):
            at = tokens[t] * D
            for d in range(0, whole, WIDTH):
                simd.store(x, t * D + d, load(table, at + d))
            if whole < D:
                last = D - WIDTH
                simd.store_last(x, t * D + last, load_last(table, at + last, D - whole), D - whole)
        return x

    return embed


# Measured with 1 to 6 streams, asked for 0 to 8 KB ahead: float32 is fastest when left alone, 16 bits gain a tenth
# where vector.UNASKED is not.
linears_f32 = make_float_linears(gemv_f32.read_f32, 4, simd.load, simd.load_last)
linears_f16 = from_bits(
    make_float_linears(gemv_f32.with_prefetch(gemv_f32.read_f16), 2, simd.load_f16, simd.load_last_f16)
)
linears_bf16 = from_bits(
    make_float_linears(gemv_f32.with_prefetch(gemv_f32.read_bf16), 2, simd.load_bf16, simd.load_last_bf16)
)
embed_f32 = make_float_embed(simd.load, simd.load_last)
embed_f16 = make_float_embed(simd.load_f16, simd.load_last_f16)
embed_bf16 = make_float_embed(simd.load_bf16, simd.load_last_bf16)


KERNELS = {F16: linears_f16, BF16: linears_bf16, Q8: linears_q8, Q6: linears_q6, Q4: linears_q4}


@overload(ops.linear)
def _linear(x, w):
    return lambda x, w: ops.linears(x, (w,))[0]


@overload(ops.linears)
def _linears(x, ws):
    if len(ws) > MAX_FUSED:
        raise NumbaTypeError(f"linears: {len(ws)} matrices at once; the kernels take 1 to {MAX_FUSED}")
    if not isinstance(ws, types.UniTuple):  # of several formats
        if len(ws) == 2:
            return lambda x, ws: (ops.linear(x, ws[0]), ops.linear(x, ws[1]))
        return lambda x, ws: (ops.linear(x, ws[0]), ops.linear(x, ws[1]), ops.linear(x, ws[2]))
    w = ws.dtype
    if isinstance(w, types.Array) and w.dtype == types.float32:
        return padded_to_max(linears_f32, ws)
    for form, kernel in KERNELS.items():
        if is_format(w, form):
            return padded_to_max(kernel, ws)
    raise NumbaTypeError(f"linear: no kernel for weights of type {w}")


@overload(ops.embed)
def _embed(table, tokens):
    if isinstance(table, types.Array) and table.dtype == types.float32:
        return lambda table, tokens: embed_f32(table, tokens)
    if is_format(table, F16):
        return lambda table, tokens: embed_f16(table.bits, tokens)
    if is_format(table, BF16):
        return lambda table, tokens: embed_bf16(table.bits, tokens)
    if is_format(table, Q8):
        return lambda table, tokens: embed_q8(table, tokens)
    if is_format(table, Q6):
        return lambda table, tokens: embed_q6(table, tokens)
    if is_format(table, Q4):
        return lambda table, tokens: embed_q4(table, tokens)
    raise NumbaTypeError(f"embed: no kernel for a table of type {table}")
