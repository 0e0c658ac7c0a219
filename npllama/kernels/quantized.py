"""ops.linear for q8 and q4: codes times codes in integers, scaled once per group.

    y[t, n] = sum_g (sum_k w_code[n, g, k] * x_code[t, g, k]) * (w_scale[n, g] * x_scale[t, g])

The inner sum is exact. The outer one runs over g in ascending order, for each y on its own, whatever is computed
beside it: a row of y has the same bits in every batch, in every chunk, on any number of threads.

A tile is a block (16 rows of w) times M tokens. The quantized input of its tokens stands together, group by group, so
that a tile reads it from fixed places: group g of token first + m has the index first * G + g * M + m.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import get_num_threads, njit, prange

from npllama.kernels.codes import (
    SIGN_FLIP,
    add_scaled,
    dot_levels,
    dot_signed_codes,
    flip_sign,
    high_levels,
    largest,
    load_codes,
    load_scales,
    low_levels,
    round_group,
    start_counts,
    store_rows,
    zeros,
)
from npllama.kernels.flags import PARALLEL, SERIAL
from npllama.kernels.vector import WIDE
from npllama.quant import GROUP, Q4_LEVELS, ROWS, SMALLEST_MAGNITUDE

TILE = 8 if WIDE else 4
"""Tokens of a wide tile: so many that integers and floats of all stay in registers."""

STRIP_BYTES = 1 << 18
"""Codes of this many bytes are used for all tokens before the next: they stay in the core's second cache."""

LEAST_PARALLEL = 1 << 15
"""Products below which entering a parallel region costs more than it saves."""

Q8_BLOCK = ROWS * GROUP
Q4_BLOCK = Q8_BLOCK // 2

INLINE = {**SERIAL, "forceinline": True}


class Input(NamedTuple):
    """Quantized input in the order of the tiles: codes (T*G*GROUP,) int8, scales (T*G,) float32, starts (T*G,) int32.

    starts: the sum of the group's codes times what w's codes are too large by, the other way round.
    """

    codes: np.ndarray
    scales: np.ndarray
    starts: np.ndarray


@njit(**SERIAL)
def quantize_group(x, begin, shift, into, at):
    """One group of quant.quantize_rows: the numbers from x[begin] on become group `at`."""
    magnitude = largest(x, begin)
    scale, factor = np.float32(0), np.float32(0)
    if not magnitude < np.float32(SMALLEST_MAGNITUDE):
        scale, factor = magnitude / np.float32(127), np.float32(127) / magnitude
    into.starts[at] = shift * round_group(x, begin, factor, into.codes, at * GROUP)
    into.scales[at] = scale


@njit(**SERIAL)
def quantize_tiles(x, shift, into, begin, stop):
    """quant.quantize_rows for the tiles begin .. stop-1; of all tiles, the last T % TILE are single tokens."""
    T, K = x.shape
    whole, G, wide = K // GROUP, (K + GROUP - 1) // GROUP, T // TILE
    rest = np.zeros((1, GROUP), np.float32)
    for i in range(begin, stop):
        M = TILE if i < wide else 1
        first = i * TILE if i < wide else wide * TILE + i - wide
        for m in range(M):
            for g in range(whole):
                quantize_group(x, (first + m) * K + g * GROUP, shift, into, first * G + g * M + m)
            if whole < G:
                for k in range(K - whole * GROUP):
                    rest[0, k] = x[first + m, whole * GROUP + k]
                quantize_group(rest, 0, shift, into, first * G + whole * M + m)


@njit(**PARALLEL)
def quantize_parallel(x, shift, into, n_tiles, n_threads):
    """quantize_tiles on all threads."""
    for p in prange(n_threads):
        thread = np.int64(p)
        quantize_tiles(x, shift, into, thread * n_tiles // n_threads, (thread + 1) * n_tiles // n_threads)


def make_tile_q4(M):
    """The tile of a q4 block and M tokens."""

    @njit(**INLINE)
    def tile(w, b, x, first, y):
        G = w.scales.shape[1]
        total = zeros(M)
        for g in range(G):
            block, at = b * G + g, first * G + g * M
            count = start_counts(x.starts, at, M)
            for v in range(GROUP // 8):
                pairs = load_codes(w.codes, block * Q4_BLOCK + v * 64)
                count = dot_levels(count, low_levels(pairs), high_levels(pairs), x.codes, at * GROUP + v * 8)
            total = add_scaled(total, count, load_scales(w.scales, block * ROWS), x.scales, at)
        N = y.shape[1]
        store_rows(y, first * N + b * ROWS, N, total, N - b * ROWS)

    return tile


def make_tile_q8(M):
    """The tile of a q8 block and M tokens."""

    @njit(**INLINE)
    def tile(w, b, x, first, y):
        G = w.scales.shape[1]
        total = zeros(M)
        for g in range(G):
            block, at = b * G + g, first * G + g * M
            count = start_counts(x.starts, at, M)
            for v in range(GROUP // 4):
                code = flip_sign(load_codes(w.codes, block * Q8_BLOCK + v * 64))
                count = dot_signed_codes(count, code, x.codes, at * GROUP + v * 4)
            total = add_scaled(total, count, load_scales(w.scales, block * ROWS), x.scales, at)
        N = y.shape[1]
        store_rows(y, first * N + b * ROWS, N, total, N - b * ROWS)

    return tile


def make_linear(make_tile, shift):
    """ops.linear for a format. shift: what is to be added to its codes, as the tiles see them."""
    wide_tile, single_tile = make_tile(TILE), make_tile(1)

    @njit(**SERIAL)
    def blocks(x, w, y, begin, stop):
        """The rows of y of the blocks begin .. stop-1, strip by strip."""
        T = y.shape[0]
        strip = max(1, STRIP_BYTES // (w.codes.shape[1] * w.codes.shape[2]))
        for low in range(begin, stop, strip):
            high = min(low + strip, stop)
            for first in range(0, T - TILE + 1, TILE):
                for b in range(low, high):
                    wide_tile(w, b, x, first, y)
            for first in range(T - T % TILE, T):
                for b in range(low, high):
                    single_tile(w, b, x, first, y)

    @njit(**PARALLEL)
    def blocks_parallel(x, w, y, n_threads):
        """Each thread owns neighbouring blocks."""
        B = w.codes.shape[0]
        for p in prange(n_threads):
            thread = np.int64(p)
            blocks(x, w, y, thread * B // n_threads, (thread + 1) * B // n_threads)

    @njit(**SERIAL)
    def linear(x, w):
        T, B, G = x.shape[0], w.scales.shape[0], w.scales.shape[1]
        into = Input(np.empty(T * G * GROUP, np.int8), np.empty(T * G, np.float32), np.empty(T * G, np.int32))
        y = np.empty((T, w.rows), np.float32)
        n_tiles, n_threads = T // TILE + T % TILE, get_num_threads()
        if T * G * GROUP < LEAST_PARALLEL:
            quantize_tiles(x, np.int32(shift), into, np.int64(0), n_tiles)
        else:
            quantize_parallel(x, np.int32(shift), into, n_tiles, n_threads)
        if T * G * GROUP * w.rows < LEAST_PARALLEL:
            blocks(into, w, y, np.int64(0), B)
        else:
            blocks_parallel(into, w, y, n_threads)
        return y

    return linear


linear_q4 = make_linear(make_tile_q4, Q4_LEVELS[0])
linear_q8 = make_linear(make_tile_q8, -SIGN_FLIP)
