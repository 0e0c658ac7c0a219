"""ops.linear and ops.embed compiled for float32, float16 and bfloat16.

Few tokens: the weights stream by once, straight from the mapped file, and memory is the limit. Many tokens: blocks of
weights are widened into a buffer that stays in the second-level cache while all tokens pass, and arithmetic is the
limit. Both are made of the same tiles (tile.py) over the same blocks of columns, so a row of y is the same to the bit
whatever rows stand beside it. Each thread owns a contiguous part of y's columns.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.core.errors import NumbaTypeError
from numba.extending import overload

from npllama import ops
from npllama.kernels import tile, vector
from npllama.kernels.embedding import embed_q4, embed_q8
from npllama.kernels.flags import INNER, INNER_PARALLEL, SERIAL
from npllama.kernels.quantized import linear_q4, linear_q8
from npllama.kernels.steps import is_format
from npllama.kernels.tile import ROWS, SIZES, Rows, copy_row, make_dot, make_multiply, multiply_floats
from npllama.kernels.vector import WIDTH, num_threads, pointer
from npllama.quant import BF16, F16, Q4, Q8

MOST_COLUMNS = 1024
"""Columns of a block, at most: a tile's rows of x must fit in the first-level cache (6 x 1,024 x 4 bytes)."""

BLOCK_ROWS = 128
"""Rows of a block of widened weights: 128 x 1,024 x 4 bytes are half of a second-level cache."""

TILE = SIZES[0]
"""Tokens of the largest tile."""

STREAMED = 2
"""Up to so many tokens, rows of w are read one after the other: memory gives what lies in one line fastest."""

FEW = 2 * TILE
"""Up to so many tokens, copying the weights costs more than it saves."""

ALONE = 1 << 16
"""Products of a call (rows x columns x tokens) below which one thread is sooner done than two have met."""


@njit(**INNER)
def block_columns(K):
    """Columns of a block: nearly equal blocks of whole vectors, by K alone, so that sums are the same in every call."""
    blocks = (K + MOST_COLUMNS - 1) // MOST_COLUMNS
    return ((K + blocks - 1) // blocks + WIDTH - 1) // WIDTH * WIDTH


def make_streamed(dot):
    """A thread's part for a token or two, y's columns start .. stop-1: w is read once through. Needs K >= WIDTH."""

    @njit(**INNER)
    def streamed(x, w, y, start, stop, work):
        vector.keep_apart()
        T, K = x.shape
        size, stride = block_columns(K), K + WIDTH
        for t in range(T):
            copy_row(x, t * K, K, work, t * stride)
        for n in range(start, stop):
            for t in range(T):
                sum_of_blocks = np.float32(0)
                for k in range(0, K, size):
                    numbers, weights = Rows(pointer(work, t * stride + k), 0), Rows(pointer(w, n * K + k), 0)
                    sum_of_blocks += dot(numbers, weights, min(size, K - k))
                y[t, n] = sum_of_blocks

    return streamed


def make_few(multiply):
    """A thread's part for few tokens, y's columns start .. stop-1: w is read where it lies. Needs K >= WIDTH."""

    @njit(**INNER)
    def few(x, w, y, start, stop, work, spare):
        vector.keep_apart()
        T, K = x.shape
        N, size, stride = w.shape[0], block_columns(K), K + WIDTH
        for t in range(T):
            copy_row(x, t * K, K, work, t * stride)
        for n in range(start, stop, ROWS):
            for k in range(0, K, size):
                numbers, weights = Rows(pointer(work, k), stride), Rows(pointer(w, n * K + k), K)
                out = Rows(pointer(y, n), N)
                multiply(T, numbers, weights, stop - n, out, min(size, K - k), k == 0, spare)

    return few


def make_many(multiply, load, load_last):
    """A thread's part for many tokens, y's columns start .. stop-1: w is widened block by block into `work`."""

    @njit(**INNER)
    def many(x, w, y, start, stop, work, spare):
        vector.keep_apart()
        T, K = x.shape
        N, size = w.shape[0], block_columns(K)
        stride = size + WIDTH  # not a power of two: such rows would fight for the same places in the cache
        block = TILE * stride + WIDTH  # work: TILE rows of x, a vector that may be overlapped, BLOCK_ROWS rows of w
        for first in range(start, stop, BLOCK_ROWS):
            n_rows = min(BLOCK_ROWS, stop - first)
            for k in range(0, K, size):
                columns = min(size, K - k)
                for n in range(n_rows):
                    at, to = (first + n) * K + k, block + n * stride
                    for i in range(0, columns // WIDTH * WIDTH, WIDTH):
                        vector.store(work, to + i, load(w, at + i))
                    if columns % WIDTH:
                        last = columns - WIDTH
                        vector.store(work, to + last, load_last(w, at + last, min(columns, WIDTH)))
                for t in range(0, T, TILE):
                    tokens = min(TILE, T - t)
                    for m in range(tokens):
                        copy_row(x, (t + m) * K + k, columns, work, m * stride)
                    for n in range(0, n_rows, ROWS):
                        numbers, weights = (
                            Rows(pointer(work, 0), stride),
                            Rows(pointer(work, block + n * stride), stride),
                        )
                        out = Rows(pointer(y, t * N + first + n), N)
                        multiply(tokens, numbers, weights, n_rows - n, out, columns, k == 0, spare)

    return many


def make_linear(read, load, load_last):
    """ops.linear for one number format: how a tile reads it, how to read a vector and the last lanes of one."""
    multiply = multiply_floats if read is tile.read_float else make_multiply(read)
    streamed = make_streamed(make_dot(read))
    few, many = make_few(multiply), make_many(multiply_floats, load, load_last)

    @njit(**INNER)
    def part(x, w, y, start, stop):
        T, K = x.shape
        spare = np.empty(max(T, TILE) * ROWS, np.float32)
        if T <= STREAMED and K >= WIDTH:
            streamed(x, w, y, start, stop, np.empty(T * (K + WIDTH), np.float32))
        elif T <= FEW and K >= WIDTH:
            few(x, w, y, start, stop, np.empty(T * (K + WIDTH), np.float32), spare)
        else:
            many(
                x, w, y, start, stop, np.zeros((TILE + BLOCK_ROWS + 1) * (block_columns(K) + WIDTH), np.float32), spare
            )

    @njit(**INNER_PARALLEL)
    def in_threads(x, w, y):
        N, parts = w.shape[0], num_threads()
        size = ((N + parts - 1) // parts + ROWS - 1) // ROWS * ROWS
        for p in prange(parts):
            start = np.int64(p) * size
            part(x, w, y, min(start, N), min(start + size, N))

    @njit(**SERIAL)
    def linear(x, w):
        T, K = x.shape
        N = w.shape[0]
        y = np.empty((T, N), np.float32)
        if N * K * T < ALONE:
            part(x, w, y, np.int64(0), N)
        else:
            in_threads(x, w, y)
        return y

    return linear


def make_embed(load, load_last):
    """ops.embed for one number format."""

    @njit(**SERIAL)
    def embed(table, tokens):
        T, D = tokens.shape[0], table.shape[1]
        x = np.empty((T, D), np.float32)
        whole = D // WIDTH * WIDTH
        for t in range(T):
            at = tokens[t] * D
            for d in range(0, whole, WIDTH):
                vector.store(x, t * D + d, load(table, at + d))
            if whole < D:
                last = D - WIDTH
                vector.store_last(x, t * D + last, load_last(table, at + last, D - whole), D - whole)
        return x

    return embed


linear_f32 = make_linear(tile.read_float, vector.load, vector.load_last)
linear_f16 = make_linear(tile.read_half, vector.load_half, vector.load_last_half)
linear_bf16 = make_linear(tile.read_brain, vector.load_brain, vector.load_last_brain)
embed_f32 = make_embed(vector.load, vector.load_last)
embed_f16 = make_embed(vector.load_half, vector.load_last_half)
embed_bf16 = make_embed(vector.load_brain, vector.load_last_brain)


@overload(ops.linear)
def _linear(x, w):
    if isinstance(w, types.Array) and w.dtype == types.float32:
        return lambda x, w: linear_f32(x, w)
    if is_format(w, F16):
        return lambda x, w: linear_f16(x, w.bits)
    if is_format(w, BF16):
        return lambda x, w: linear_bf16(x, w.bits)
    if is_format(w, Q8):
        return lambda x, w: linear_q8(x, w)
    if is_format(w, Q4):
        return lambda x, w: linear_q4(x, w)
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
    if is_format(table, Q4):
        return lambda table, tokens: embed_q4(table, tokens)
    raise NumbaTypeError(f"embed: no kernel for a table of type {table}")
