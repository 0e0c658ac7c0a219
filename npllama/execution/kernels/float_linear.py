"""The kernels of float32, float16 and bfloat16 weights.

Few tokens (GEMV): the weights stream by once, straight from the mapped file; memory is the limit. Many tokens (GEMM):
strips of weights are widened into a buffer in L1 while all tokens pass; arithmetic is the limit.

A thread owns whole outputs, and each of the two ways has one order of addition (see kernels/__init__.py).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from npllama.execution.kernels import simd
from npllama.execution.kernels.abandon import abandoned
from npllama.execution.kernels.flags import INNER, INNER_PARALLEL
from npllama.execution.kernels.formats import register
from npllama.execution.kernels.fused_inputs import outputs, part_of_each
from npllama.execution.kernels.gemm_f32 import PANEL, TILE_ROWS, gemm_tile, pack_tokens, unpack_sums
from npllama.execution.kernels.gemv_f32 import BF16_READER, F16_READER, F32_READER, StridedRows, copy_row, make_dots
from npllama.execution.kernels.simd import (
    noinline,
    num_threads,
    pointer,
    round_to_width,
    store,
    store_last,
    thread_bounds,
)
from npllama.execution.kernels.target import WIDTH
from npllama.numbers.bf16 import BF16
from npllama.numbers.f16 import F16

MAX_GEMV_TOKENS = 8
"""Up to so many tokens w is read where it lies; for more, a copy of it costs less than it saves."""

MAX_STRIP_COLUMNS = 512
"""Columns of a strip, at most: TILE_ROWS x 512 x 4 bytes stay in L1."""

MAX_PANELS = 5 if TILE_ROWS == 8 else 8
"""Panels of tokens in turn: 512 columns of them stay in L2."""

CHUNK_ROWS = 8 * TILE_ROWS
"""Rows of w whose sums are kept in a buffer before they are written to y, transposed."""

SERIAL_BELOW = 1 << 16
"""Below so many products (rows x columns x tokens), starting threads costs more than it saves."""


# ---------------------------------------------------------------- few tokens


def make_gemv(reader, n_streams):
    """A thread's part for few tokens, y's columns start .. stop-1: w is read once through. Needs K >= WIDTH.

    n_streams rows, far apart, are read at the same time: memory gives more to several streams than to one.
    """
    dots, dot = make_dots(n_streams, reader), make_dots(1, reader)

    @njit(**INNER)
    def gemv(x, w, y, start, stop):
        noinline()
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


def make_gemv_shares(gemv):
    """A thread's part of every matrix, one after the other; and all parts, on all threads."""

    @njit(**INNER)
    def gemv_share(x, ws, ys, part, parts):
        for i in range(len(ws)):
            start, stop = thread_bounds(part, parts, ws[i].shape[0])
            gemv(x, ws[i], ys[i], start, stop)

    @njit(**INNER_PARALLEL)
    def gemv_in_threads(x, ws, ys, parts):
        for part in prange(parts):
            gemv_share(x, ws, ys, np.int64(part), parts)

    return gemv_share, gemv_in_threads


# ---------------------------------------------------------------- many tokens


@njit(**INNER)
def strip_columns(K):
    """Columns of a strip: nearly equal strips of whole vectors."""
    strips = (K + MAX_STRIP_COLUMNS - 1) // MAX_STRIP_COLUMNS
    return round_to_width((K + strips - 1) // strips)


def make_widen(load, load_last):
    """Copies columns of rows into a strip of float32. What fills no vector is copied as one that overlaps the last."""

    @njit(**INNER)
    def widen(w, n, n_rows, k, columns, strip, stride):
        noinline()
        K, whole = w.shape[1], columns // WIDTH * WIDTH
        for row in range(n_rows):
            at, to = (n + row) * K + k, row * stride
            for i in range(0, whole, WIDTH):
                store(strip, to + i, load(w, at + i))
            if whole < columns:
                rest = columns - whole
                store_last(strip, to + columns - WIDTH, load_last(w, at + columns - WIDTH, rest), rest)

    return widen


def make_gemm(load, load_last):
    """A thread's part for the tokens first .. first+T-1, packed in panels; y's columns start .. stop-1."""
    widen = make_widen(load, load_last)

    @njit(**INNER)
    def gemm(panels, first, T, w, y, start, stop):
        noinline()
        K, size = w.shape[1], strip_columns(w.shape[1])
        strip_stride, sums_stride = size + WIDTH, (T + PANEL - 1) // PANEL * PANEL
        strip = np.zeros(TILE_ROWS * strip_stride, np.float32)
        sums = np.empty(CHUNK_ROWS * sums_stride, np.float32)
        for chunk in range(start, stop, CHUNK_ROWS):
            chunk_rows = min(CHUNK_ROWS, stop - chunk)
            for k in range(0, K, size):
                columns = min(size, K - k)
                for n in range(0, chunk_rows, TILE_ROWS):
                    widen(w, chunk + n, min(TILE_ROWS, chunk_rows - n), k, columns, strip, strip_stride)
                    for t in range(0, T, PANEL):
                        tokens, out = pointer(panels, t * K + k * PANEL), pointer(sums, n * sums_stride + t)
                        weights, n_tokens = pointer(strip, 0), min(PANEL, T - t)
                        gemm_tile(n_tokens, weights, strip_stride, tokens, out, sums_stride, columns, k == 0)
            unpack_sums(sums, sums_stride, chunk_rows, y, first, T, chunk)

    return gemm


def make_gemm_in_threads(gemm):
    """All threads' parts of every matrix."""

    @njit(**INNER_PARALLEL)
    def gemm_in_threads(panels, first, T, ws, ys, parts):
        for p in prange(parts):
            for i in range(len(ws)):
                start, stop = thread_bounds(np.int64(p), parts, ws[i].shape[0])
                gemm(panels, first, T, ws[i], ys[i], start, stop)

    return gemm_in_threads


@njit(**INNER_PARALLEL)
def pack_in_threads(x, first, T, panels, parts):
    """Pack the tokens first .. first+T-1 of x into panels: the vectors' lanes are divided among the threads."""
    K, n_vectors = x.shape[1], (T + WIDTH - 1) // WIDTH
    for p in prange(parts):
        thread = np.int64(p)
        for v in range(thread * n_vectors // parts, (thread + 1) * n_vectors // parts):
            t = v * WIDTH
            at = t // PANEL * PANEL * K + t % PANEL
            pack_tokens(x, first + t, min(WIDTH, T - t), panels, at)


# ---------------------------------------------------------------- a format


def make_linears(reader, n_streams, load, load_last):
    """ops.linears for one format. reader, n_streams: for few tokens; load, load_last: for many."""
    gemv_share, gemv_in_threads = make_gemv_shares(make_gemv(reader, n_streams))
    gemm_in_threads = make_gemm_in_threads(make_gemm(load, load_last))

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
            if abandoned():
                return ys
            n_tokens = min(most, T - first)
            pack_in_threads(x, first, n_tokens, panels, parts)
            gemm_in_threads(panels, first, n_tokens, ws, ys, parts)
        return ys

    return linears


def make_embed(load, load_last):
    """ops.embed for one format, whose table is an array."""

    @njit(**INNER)
    def embed(table, tokens):
        T, D = tokens.shape[0], table.shape[1]
        x = np.empty((T, D), np.float32)
        whole = D // WIDTH * WIDTH
        for t in range(T):
            at = tokens[t] * D
            for d in range(0, whole, WIDTH):
                store(x, t * D + d, load(table, at + d))
            if whole < D:
                last = D - WIDTH
                store_last(x, t * D + last, load_last(table, at + last, D - whole), D - whole)
        return x

    return embed


def register_bits(weight, reader, n_streams, load, load_last):
    """Register a format that is one array of bits."""
    linears, embed = make_linears(reader, n_streams, load, load_last), make_embed(load, load_last)

    @njit(**INNER)
    def linears_of_bits(x, ws):
        return linears(x, part_of_each(ws, 0))

    @njit(**INNER)
    def embed_of_bits(table, tokens):
        return embed(table.bits, tokens)

    register(weight, linears_of_bits, embed_of_bits)


# float32 is fastest with four streams and without prefetching, 16 bits with two and with it.
register(np.ndarray, make_linears(F32_READER, 4, simd.load, simd.load_last), make_embed(simd.load, simd.load_last))
register_bits(F16, F16_READER, 2, simd.load_f16, simd.load_last_f16)
register_bits(BF16, BF16_READER, 2, simd.load_bf16, simd.load_last_bf16)
