"""The kernels of float32, float16 and bfloat16 weights: one tile, and so one order of addition, for 1, 8 or 512 tokens.

Few tokens are limited by memory: w is read where it lies, row by row. Many are limited by arithmetic: some rows of w
are copied, widened to float32, for all tokens; a strip of columns at a time, so that the rows of a tile stay in L1
while the tokens pass, which stay in L2, and the lanes of the sums are kept from one strip to the next. See
float_tile.py for the order.

A thread owns whole outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from npllama.execution.kernels import simd
from npllama.execution.kernels.abandon import abandoned
from npllama.execution.kernels.flags import INNER, INNER_PARALLEL
from npllama.execution.kernels.float_tile import (
    BF16_READER,
    F16_READER,
    F32_READER,
    SINGLE_ROWS,
    TILE_ROWS,
    TILE_TOKENS,
    Columns,
    full_tile,
    make_tiles,
    pack_tokens,
)
from npllama.execution.kernels.formats import register
from npllama.execution.kernels.fused_inputs import outputs, part_of_each
from npllama.execution.kernels.simd import (
    horizontal_sum,
    mul,
    noinline,
    num_threads,
    pointer,
    round_to_width,
    store,
    store_last,
    thread_bounds,
)
from npllama.execution.kernels.strided_rows import StridedRows, skip_columns
from npllama.execution.kernels.target import REGISTERS, WIDTH
from npllama.numbers.bf16 import BF16
from npllama.numbers.f16 import F16

CHUNK_ROWS = (8 if REGISTERS >= 32 else 12) * TILE_ROWS
"""Rows of w that are copied at a time: the more, the less often all tokens are read; the fewer, the fewer sums."""

MAX_CHUNK_SUMS = CHUNK_ROWS + max(TILE_ROWS * (TILE_ROWS - 1), SINGLE_ROWS * (SINGLE_ROWS - 1))
"""Sums of a token in a chunk, at most: those twice, too, that two streams of rows share."""

MAX_STRIP_COLUMNS = 768 if REGISTERS >= 32 else 1024
"""Columns of a strip, at most: so many of the rows of a tile stay in L1, and of MAX_KEPT_TOKENS tokens in L2."""

MAX_KEPT_TOKENS = 32 * TILE_TOKENS
"""Tokens in turn where rows are cut: they and their kept lanes stay in L2."""

MIN_COPIED_TOKENS = 8 * TILE_TOKENS
"""From so many tokens on, a copy of w costs less than it saves. For fewer, rows are not cut either."""

SERIAL_BELOW = 1 << 16
"""Below so many products (rows x columns x tokens), starting threads costs more than it saves."""

PACK_SERIAL_BELOW = 1 << 14
"""The same for numbers of x that are packed."""


# ---------------------------------------------------------------- the input


@njit(**INNER)
def pack(x, panels, part, parts):
    """A thread's part of the panels of x: TILE_TOKENS tokens in each, fewer in the last."""
    T, K = x.shape
    n_panels = (T + TILE_TOKENS - 1) // TILE_TOKENS
    for t in range(part * n_panels // parts * TILE_TOKENS, (part + 1) * n_panels // parts * TILE_TOKENS, TILE_TOKENS):
        pack_tokens(x, t, min(TILE_TOKENS, T - t), panels, t * round_to_width(K))


@njit(**INNER_PARALLEL)
def pack_in_threads(x, panels, parts):
    for part in prange(parts):
        pack(x, panels, np.int64(part), parts)


@njit(**INNER)
def packed(x, parts):
    """The panels of x, one after the other."""
    noinline()
    panels = np.empty((x.shape[0], round_to_width(x.shape[1])), np.float32)
    if x.size < PACK_SERIAL_BELOW:
        pack(x, panels, np.int64(0), np.int64(1))
    else:
        pack_in_threads(x, panels, parts)
    return panels


# ---------------------------------------------------------------- products


class Part(NamedTuple):
    """A part of y: the tokens t .. t_stop-1, and `rows` rows of w from the n-th on."""

    t: int
    t_stop: int
    n: int
    rows: int


def make_multiply_part(tile):
    """A function (panels, w, columns, lanes, y, part): some columns of the part's rows, which w begins with.

    The rows of a tile lie far `apart`: memory gives more to several streams than to one. Where a tile does not divide
    their number, the last rows of one stream are the first ones of the next.
    """

    @njit(**INNER)
    def multiply_part(panels, w, columns, lanes, y, part):
        noinline()
        N, K = y.shape[1], panels.shape[1]
        for t in range(part.t, part.t_stop, TILE_TOKENS):
            n_tokens = min(TILE_TOKENS, part.t_stop - t)
            n_rows = SINGLE_ROWS if n_tokens == 1 else TILE_ROWS
            apart = part.rows // n_rows
            rows, panel = StridedRows(w.start, apart * w.stride), pointer(panels, t * K)
            for i in range(part.rows - (n_rows - 1) * apart):
                kept = (t % MAX_KEPT_TOKENS * MAX_CHUNK_SUMS + i * n_tokens * n_rows) * WIDTH
                into = StridedRows(pointer(y, t * N + part.n + i), N)
                tile(n_tokens, panel, skip_columns(rows, i * w.stride), columns, pointer(lanes, kept), into, apart)

    return multiply_part


@njit(**INNER)
def multiply_copied(panels, copied, columns, lanes, y, part):
    """The same for whole tiles of copied rows, which begin with the part's first: w of a tile stays in L1."""
    noinline()
    N, K, apart = y.shape[1], panels.shape[1], part.rows // TILE_ROWS
    for i in range(part.rows - (TILE_ROWS - 1) * apart):
        rows = skip_columns(StridedRows(copied.start, apart * copied.stride), i * copied.stride)
        for t in range(part.t, part.t_stop, TILE_TOKENS):
            kept = (t % MAX_KEPT_TOKENS * MAX_CHUNK_SUMS + i * TILE_TOKENS * TILE_ROWS) * WIDTH
            into = StridedRows(pointer(y, t * N + part.n + i), N)
            full_tile(pointer(panels, t * K), rows, columns, pointer(lanes, kept), into, apart)


def make_copy_rows(load):
    """A function (w, n, rows, copy, stride): w's rows from the n-th on, as float32.

    What fills no vector is copied with what is before it, as the tile reads it.
    """

    @njit(**INNER)
    def copy_rows(w, n, rows, copy, stride):
        noinline()
        K = w.shape[1]
        for row in range(rows):
            for k in range(0, K, WIDTH):
                store(copy, row * stride + k, load(w, (n + row) * K + min(k, K - WIDTH)))

    return copy_rows


@njit(**INNER)
def strip_columns(T, K):
    """Columns of a strip: nearly equal strips of whole vectors."""
    strips = 1 if T < MIN_COPIED_TOKENS else (K + MAX_STRIP_COLUMNS - 1) // MAX_STRIP_COLUMNS
    return round_to_width((K + strips - 1) // strips)


def make_multiply_rows(reader, load):
    """A function (panels, w, y, start, stop): the rows start .. stop-1 of w times all tokens."""
    multiply_part, copy_rows = make_multiply_part(make_tiles(reader)), make_copy_rows(load)

    @njit(**INNER)
    def multiply_rows(panels, w, y, start, stop):
        noinline()
        (T, padded), K = panels.shape, w.shape[1]
        size, copies = strip_columns(T, K), T >= MIN_COPIED_TOKENS
        chunk = CHUNK_ROWS if T > TILE_TOKENS else max(stop - start, 1)
        in_turn = MAX_KEPT_TOKENS if size < padded else max(T, 1)
        stride = padded + WIDTH  # rows a power of two apart would fall into the same sets of L1
        copy = np.empty(CHUNK_ROWS * stride if copies else 0, np.float32)
        lanes = np.empty(MAX_KEPT_TOKENS * MAX_CHUNK_SUMS * WIDTH if size < padded else 0, np.float32)
        for n in range(start, stop, chunk):
            rows, n_rows = StridedRows(pointer(w, n * K), K), min(chunk, stop - n)
            if copies:
                copy_rows(w, n, n_rows, copy, stride)
            for t in range(0, T, in_turn):
                t_stop = min(t + in_turn, T)
                whole = t + (t_stop - t) // TILE_TOKENS * TILE_TOKENS if t_stop - t >= MIN_COPIED_TOKENS else t
                for k in range(0, padded, size):
                    end, copied = min(k + size, padded), StridedRows(pointer(copy, 0), stride)
                    multiply_copied(panels, copied, Columns(k, end, padded), lanes, y, Part(t, whole, n, n_rows))
                    multiply_part(panels, rows, Columns(k, end, K), lanes, y, Part(whole, t_stop, n, n_rows))

    return multiply_rows


def make_shares(multiply_rows):
    """A thread's part of every matrix, one after the other; and all parts, on all threads."""

    @njit(**INNER)
    def share(panels, ws, ys, part, parts):
        for i in range(len(ws)):
            start, stop = thread_bounds(part, parts, ws[i].shape[0])
            multiply_rows(panels, ws[i], ys[i], start, stop)

    @njit(**INNER_PARALLEL)
    def share_in_threads(panels, ws, ys, parts):
        for part in prange(parts):
            share(panels, ws, ys, np.int64(part), parts)

    return share, share_in_threads


def make_multiply_narrow(load_last):
    """The product of fewer columns than a vector has lanes: the same order, the lanes before them zero."""

    @njit(**INNER)
    def multiply_narrow(x, w, y):
        noinline()
        K = x.shape[1]
        for n in range(w.shape[0]):
            weights = load_last(w, n * K + K - WIDTH, K)
            for t in range(x.shape[0]):
                y[t, n] = horizontal_sum(mul(simd.load_last(x, t * K + K - WIDTH, K), weights))

    return multiply_narrow


# ---------------------------------------------------------------- a format


def make_linears(reader, load, load_last):
    """ops.linears for one format; the three read the same."""
    share, share_in_threads = make_shares(make_multiply_rows(reader, load))
    multiply_narrow = make_multiply_narrow(load_last)

    @njit(**INNER)
    def linears(x, ws):
        T, K = x.shape
        ys = outputs(T, ws)
        if abandoned():
            return ys
        if K < WIDTH:
            for i in range(len(ws)):
                multiply_narrow(x, ws[i], ys[i])
            return ys
        rows, parts = 0, num_threads()
        for w in ws:
            rows += w.shape[0]
        panels = packed(x, parts)
        if rows * K * T < SERIAL_BELOW:
            share(panels, ws, ys, np.int64(0), np.int64(1))
        else:
            share_in_threads(panels, ws, ys, parts)
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


def register_bits(weight, reader, load, load_last):
    """Register a format that is one array of bits."""
    linears, embed = make_linears(reader, load, load_last), make_embed(load, load_last)

    @njit(**INNER)
    def linears_of_bits(x, ws):
        return linears(x, part_of_each(ws, 0))

    @njit(**INNER)
    def embed_of_bits(table, tokens):
        return embed(table.bits, tokens)

    register(weight, linears_of_bits, embed_of_bits)


register(np.ndarray, make_linears(F32_READER, simd.load, simd.load_last), make_embed(simd.load, simd.load_last))
register_bits(F16, F16_READER, simd.load_f16, simd.load_last_f16)
register_bits(BF16, BF16_READER, simd.load_bf16, simd.load_last_bf16)
