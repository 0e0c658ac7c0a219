"""ops.linears for q8, q6 and q4: codes times codes in integers, scaled once per group.

    y[t, n] = w_factor[n] * sum_g (sum_k w_code[n, g, k] * x_code[t, g, k]) * (w_scale[n, g] * x_scale[t, g])

The inner sum is exact. The outer one runs over g in ascending order, for each y on its own, whatever is computed
beside it: a row of y has the same bits in every batch, in every chunk, on any number of threads, and in NumPy.

A tile is a block (16 rows of w) times M tokens. The quantized input of its tokens stands together, group by group, so
that a tile reads it from fixed places: group g of token first + m has the index first * G + g * M + m.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from npllama.kernels import amx
from npllama.kernels.amx import COUNTS, LEVELS_BYTES, TOKENS, add_scaled_products, count_products, store_levels
from npllama.kernels.flags import INNER, INNER_PARALLEL
from npllama.kernels.fused_inputs import outputs, part_of_each
from npllama.kernels.int8_dot import (
    TOKEN_TILE,
    UNSIGNED_BIAS,
    abs_max,
    add_scaled,
    dot4_signed,
    dot8,
    high_levels,
    load_codes,
    load_corrections,
    load_scales,
    low_levels,
    opaque_count,
    prefetch_group,
    prefetch_line,
    round_group,
    scale_rows,
    store_tile,
    to_unsigned,
    unpack_6bit,
    zeros,
)
from npllama.kernels.simd import NO_PREFETCH, PREFETCH_LINES, REGISTERS, noinline, num_threads
from npllama.numbers.activations import SMALLEST_MAGNITUDE
from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.q4 import Q4_CODEBOOK
from npllama.numbers.q6 import NIBBLE_BYTES, Q6_LOWEST

TILES_AT_ONCE = 2 if REGISTERS >= 32 else 1
"""Wide tiles that a strip of codes meets at the same time, where registers hold their sums.

Unpacked once for all tokens, and for two tiles at once: q4 1.12 times as fast by AVX-512 as unpacked for each tile, of
which the two tiles are 1.05; by AVX2 1.07. q8, which has nothing to unpack, gains nothing by two tiles (0.97 to 1.05).
"""

STRIP_BYTES = 1 << 18
"""Codes of this many bytes are used for all tokens before the next.

They stay in the core's second cache, as does what q4 and q6 are unpacked to: up to twice as many bytes.
"""

SERIAL_BELOW = 1 << 18
SERIAL_QUANTIZE_BELOW = 1 << 15
"""Products, and numbers to quantize, below which entering a parallel region costs more than it saves."""

PREFETCH_BYTES = 4096 if PREFETCH_LINES else 8192
"""A tile asks the memory for codes so many bytes before it needs them: what it would otherwise wait for most.

On Zen 5 without: 64 GB/s instead of 85 for a single token in q4. Two or four blocks of a single token at once, far
apart in w, are no faster than one block asked for ahead, and slower while the memory is busy with others.
"""

MIN_TILES_UNPACKED = 4
"""Wide tiles from which on it pays to unpack codes for them: 16 tokens are as fast without."""

GROUPS_AHEAD, SUM_BUFFERS = 3, 4
"""The matrix unit counts a group so many groups before its sums are added up; sums that are kept for that.

One group earlier: 0 to 2 % slower. Two: 1 to 6 %. Four: 4 % slower to 2 % faster.
"""

INLINE = {**INNER, "forceinline": True}


class QuantizedInput(NamedTuple):
    """Quantized input in the order of the tiles: codes (T*G*GROUP,) int8, scales (T*G,) float32, starts (T*G,) int32.

    starts: the sum of the group's codes times what w's codes are too large by, the other way round.
    """

    codes: np.ndarray
    scales: np.ndarray
    corrections: np.ndarray


class Blocks(NamedTuple):
    """What a tile needs of a matrix: codes (B, G, bytes), scales (B, G, BLOCK_ROWS), factors (B, BLOCK_ROWS)."""

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray


@njit(**INNER)
def group_scale(x, begin):
    """quantize_rows for the group from x[begin] on: its scale, and the factor of its numbers."""
    magnitude = abs_max(x, begin)
    if magnitude < np.float32(SMALLEST_MAGNITUDE):
        return np.float32(0), np.float32(0)
    return magnitude / np.float32(127), np.float32(127) / magnitude


@njit(**INNER)
def quantize_group(x, begin, lowest, into, at):
    """One group of activations.quantize_rows: the numbers from x[begin] on become group `at`."""
    scale, factor = group_scale(x, begin)
    into.corrections[at] = lowest * round_group(x, begin, factor, into.codes, at * GROUP)
    into.scales[at] = scale


@njit(**INNER)
def n_wide_tiles(T):
    """How many tiles of T tokens are wide; more than half a tile of tokens is worth one, filled up with zeros."""
    return (T + (TOKEN_TILE - 1) // 2) // TOKEN_TILE


@njit(**INNER)
def n_tiles(T):
    """The tiles of T tokens: wide ones, then single tokens."""
    return n_wide_tiles(T) + max(0, T - n_wide_tiles(T) * TOKEN_TILE)


@njit(**INNER)
def quantize_tiles(x, lowest, into, begin, stop):
    """activations.quantize_rows for the tiles begin .. stop-1."""
    T, K = x.shape
    whole, G, wide = K // GROUP, (K + GROUP - 1) // GROUP, n_wide_tiles(T)
    rest = np.zeros((1, GROUP), np.float32)
    for i in range(begin, stop):
        M = TOKEN_TILE if i < wide else 1
        first = i * TOKEN_TILE if i < wide else wide * TOKEN_TILE + i - wide
        for m in range(M):
            n_groups = whole if first + m < T else 0
            for g in range(n_groups):
                quantize_group(x, (first + m) * K + g * GROUP, lowest, into, first * G + g * M + m)
            for g in range(n_groups, G):
                for k in range(GROUP):
                    inside = first + m < T and g * GROUP + k < K
                    rest[0, k] = x[first + m, g * GROUP + k] if inside else np.float32(0)
                quantize_group(rest, 0, lowest, into, first * G + g * M + m)


@njit(**INNER_PARALLEL)
def quantize_in_threads(x, lowest, into, n_threads):
    """quantize_tiles for all tiles, on all threads."""
    n = n_tiles(x.shape[0])
    for p in prange(n_threads):
        thread = np.int64(p)
        quantize_tiles(x, lowest, into, thread * n // n_threads, (thread + 1) * n // n_threads)


# A group's codes, from codes[begin] on, times those of each token, from x[at] on, added to its counts.


@njit(**INLINE)
def dot_q4(count, codes, begin, x, at, tile_stride):
    for v in range(opaque_count(GROUP // 8)):
        prefetch_line(codes, begin + v * 64 + PREFETCH_BYTES, 64)
        pairs = load_codes(codes, begin + v * 64)
        count = dot8(count, low_levels(pairs), high_levels(pairs), x, at + v * 8, tile_stride)
    return count


@njit(**INLINE)
def load_q6(codes, begin, v):
    """Codes of the columns 16 v on of the group at codes[begin ...]: four vectors."""
    prefetch_line(codes, begin + v * 128 + PREFETCH_BYTES, 128)
    prefetch_line(codes, begin + NIBBLE_BYTES + v * 64 + PREFETCH_BYTES, 64)
    tops = load_codes(codes, begin + NIBBLE_BYTES + v * 64)
    first, second = load_codes(codes, begin + v * 128), load_codes(codes, begin + v * 128 + 64)
    return (
        unpack_6bit(first, tops, 0),
        unpack_6bit(first, tops, 1),
        unpack_6bit(second, tops, 2),
        unpack_6bit(second, tops, 3),
    )


@njit(**INLINE)
def dot_q6(count, codes, begin, x, at, tile_stride):
    for v in range(opaque_count(GROUP // 16)):
        a, b, c, d = load_q6(codes, begin, v)
        count = dot8(count, a, b, x, at + v * 16, tile_stride)
        count = dot8(count, c, d, x, at + v * 16 + 8, tile_stride)
    return count


@njit(**INLINE)
def dot_q8(count, codes, begin, x, at, tile_stride):
    for v in range(opaque_count(GROUP // 4)):
        prefetch_line(codes, begin + v * 64 + PREFETCH_BYTES, 64)
        count = dot4_signed(count, to_unsigned(load_codes(codes, begin + v * 64)), x, at + v * 4, tile_stride)
    return count


@njit(**INLINE)
def dot_unpacked(count, levels, begin, x, at, tile_stride):
    for v in range(GROUP // 8):
        low, high = load_codes(levels, begin + v * 128), load_codes(levels, begin + v * 128 + 64)
        count = dot8(count, low, high, x, at + v * 8, tile_stride)
    return count


# A group's codes, from codes[begin] on, unpacked to what they stand for, four columns of its rows to 64 bytes, from
# levels[at] on: as integers for the matrix unit, else less the lowest, as `dot_levels` takes them.

LOWEST_Q4, LOWEST_Q6 = (Q4_CODEBOOK[0], Q6_LOWEST) if amx.USED else (0, 0)


@njit(**INLINE)
def unpack_q4(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 8)):
        prefetch_line(codes, begin + v * 64 + PREFETCH_BYTES, 64)
        pairs = load_codes(codes, begin + v * 64)
        store_levels(levels, at + v * 128, low_levels(pairs), LOWEST_Q4)
        store_levels(levels, at + v * 128 + 64, high_levels(pairs), LOWEST_Q4)


@njit(**INLINE)
def unpack_q6(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 16)):
        a, b, c, d = load_q6(codes, begin, v)
        store_levels(levels, at + v * 256, a, LOWEST_Q6)
        store_levels(levels, at + v * 256 + 64, b, LOWEST_Q6)
        store_levels(levels, at + v * 256 + 128, c, LOWEST_Q6)
        store_levels(levels, at + v * 256 + 192, d, LOWEST_Q6)


@njit(**INLINE)
def unpack_q8(codes, begin, levels, at):
    for v in range(opaque_count(GROUP // 4)):
        prefetch_line(codes, begin + v * 64 + PREFETCH_BYTES, 64)
        store_levels(levels, at + v * 64, load_codes(codes, begin + v * 64), 0)


def make_int8_tile(dot_group, group_bytes, M, prefetches):
    """The tile of block b and the M tokens from `first` on. The block's codes, packed or not, begin at codes[begin].

    asks: whether it asks the memory for a group at once.
    """

    @njit(**INLINE)
    def tile(w, b, codes, begin, x, first, y):
        G = w.scales.shape[1]
        total, tile_stride = zeros(M), G * TOKEN_TILE
        for g in range(G):
            here, at = begin + g * group_bytes, first * G + g * min(M, TOKEN_TILE)
            if prefetches:
                prefetch_group(codes, here + PREFETCH_BYTES, group_bytes)
            count = dot_group(
                load_corrections(x.corrections, at, tile_stride, M), codes, here, x.codes, at * GROUP, tile_stride
            )
            total = add_scaled(total, count, load_scales(w.scales, (b * G + g) * BLOCK_ROWS), x.scales, at, tile_stride)
        T, N = y.shape
        total = scale_rows(total, w.factors, b * BLOCK_ROWS)
        store_tile(y, first * N + b * BLOCK_ROWS, N, total, T - first, N - b * BLOCK_ROWS)

    return tile


@njit(**INLINE)
def amx_tile(w, b, levels, begin, x, first, y, sums):
    """Two wide tiles, from token `first` on, of block b, whose levels begin at levels[begin].

    The matrix unit counts the products of later groups while the sums of one are scaled and added.
    """
    G = w.scales.shape[1]
    total, tile_stride = zeros(TOKENS), G * TOKEN_TILE
    for g in range(-GROUPS_AHEAD, G):
        if g + GROUPS_AHEAD < G:
            later, at = g + GROUPS_AHEAD, first * G + (g + GROUPS_AHEAD) * TOKEN_TILE
            count_products(
                x.codes,
                at * GROUP,
                tile_stride * GROUP,
                levels,
                begin + later * LEVELS_BYTES,
                sums,
                later % SUM_BUFFERS,
            )
        if g >= 0:
            group, at = b * G + g, first * G + g * TOKEN_TILE
            scale = load_scales(w.scales, group * BLOCK_ROWS)
            total = add_scaled_products(total, sums, g % SUM_BUFFERS, scale, x.scales, at, tile_stride)
    T, N = y.shape
    total = scale_rows(total, w.factors, b * BLOCK_ROWS)
    store_tile(y, first * N + b * BLOCK_ROWS, N, total, T - first, N - b * BLOCK_ROWS)


def make_unpack(unpack_group, group_bytes):
    """A function (w, begin, stop): the levels of the blocks begin .. stop-1, at the beginning of a line of memory."""

    @njit(**INNER)
    def unpack(w, begin, stop):
        noinline()
        G = w.scales.shape[1]
        n_groups = (stop - begin) * G
        buffer = np.empty(n_groups * LEVELS_BYTES + 63, np.int8)
        levels = buffer[amx.bytes_to_line(buffer) :]
        for group in range(n_groups):
            at = (begin * G + group) * group_bytes
            prefetch_group(w.codes, at + PREFETCH_BYTES, group_bytes)
            unpack_group(w.codes, at, levels, group * LEVELS_BYTES)
        return levels

    return unpack


@njit(**INNER)
def multiply_amx(w, levels, x, y, begin, stop, n):
    """The first n wide tiles of the blocks begin .. stop-1, whose levels stand at levels[0]."""
    noinline()
    G, sums = w.scales.shape[1], np.empty(SUM_BUFFERS * COUNTS + 15, np.int32)
    sums = sums[amx.bytes_to_line(sums) // 4 :]
    amx.configure()
    for first in range(0, n * TOKEN_TILE, TOKENS):
        for b in range(begin, stop):
            amx_tile(w, b, levels, (b - begin) * G * LEVELS_BYTES, x, first, y, sums)
    amx.release()


unpacked_tile = make_int8_tile(dot_unpacked, LEVELS_BYTES, TILES_AT_ONCE * TOKEN_TILE, False)


@njit(**INNER)
def multiply_simd(w, levels, x, y, begin, stop, n):
    """The same by vectors."""
    noinline()
    G = w.scales.shape[1]
    for first in range(0, n * TOKEN_TILE, TILES_AT_ONCE * TOKEN_TILE):
        for b in range(begin, stop):
            unpacked_tile(w, b, levels, (b - begin) * G * LEVELS_BYTES, x, first, y)


def make_unpacked_strip(unpack, multiply, at_once):
    """A function (x, w, y, begin, stop) that multiplies the blocks begin .. stop-1; how many wide tiles it has done.

    Their codes are unpacked once for all tokens. multiply: takes so many tiles at once.
    """

    @njit(**INNER)
    def strip(x, w, y, begin, stop):
        n = n_wide_tiles(y.shape[0]) // at_once * at_once
        if n < MIN_TILES_UNPACKED:
            return 0
        multiply(w, unpack(w, begin, stop), x, y, begin, stop, n)
        return n

    return strip


@njit(**INLINE)
def nothing_unpacked(x, w, y, begin, stop):
    """The same where there is nothing to unpack."""
    return 0


def make_int8_linears(dot_group, unpack_group, code_bits, lowest):
    """ops.linears for a format. shift: what is to be added to its codes, as the tiles see them."""
    group_bytes, prefetches = BLOCK_ROWS * GROUP * code_bits // 8, code_bits < 8 or not NO_PREFETCH
    wide_tile, single_tile = (make_int8_tile(dot_group, group_bytes, M, prefetches) for M in (TOKEN_TILE, 1))
    if amx.USED:
        whole_strip = make_unpacked_strip(make_unpack(unpack_group, group_bytes), multiply_amx, TOKENS // TOKEN_TILE)
    elif group_bytes < LEVELS_BYTES:
        whole_strip = make_unpacked_strip(make_unpack(unpack_group, group_bytes), multiply_simd, TILES_AT_ONCE)
    else:
        whole_strip = nothing_unpacked

    @njit(**INNER)
    def blocks(x, w, y, begin, stop):
        """The rows of y of the blocks begin .. stop-1, strip by strip."""
        noinline()
        T, block_bytes = y.shape[0], w.codes.shape[1] * w.codes.shape[2]
        strip = max(1, STRIP_BYTES // block_bytes)
        for low in range(begin, stop, strip):
            high = min(low + strip, stop)
            for i in range(whole_strip(x, w, y, low, high), n_wide_tiles(T)):
                for b in range(low, high):
                    wide_tile(w, b, w.codes, b * block_bytes, x, i * TOKEN_TILE, y)
            for first in range(n_wide_tiles(T) * TOKEN_TILE, T):
                for b in range(low, high):
                    single_tile(w, b, w.codes, b * block_bytes, x, first, y)

    @njit(**INNER)
    def share(x, codes, scales, factors, ys, part, parts):
        """A thread's part: neighbouring blocks of every matrix, one matrix after the other."""
        for i in range(len(codes)):
            B = codes[i].shape[0]
            w = Blocks(codes[i], scales[i], factors[i])
            blocks(x, w, ys[i], part * B // parts, (part + 1) * B // parts)

    @njit(**INNER_PARALLEL)
    def share_in_threads(x, codes, scales, factors, ys, parts):
        for part in prange(parts):
            share(x, codes, scales, factors, ys, np.int64(part), parts)

    @njit(**INNER)
    def linears(x, ws):
        T, G = x.shape[0], ws[0].scales.shape[1]
        n, n_threads = max(T, n_wide_tiles(T) * TOKEN_TILE) * G, num_threads()
        into = QuantizedInput(np.empty(n * GROUP, np.int8), np.empty(n, np.float32), np.empty(n, np.int32))
        if n * GROUP < SERIAL_QUANTIZE_BELOW:
            quantize_tiles(x, np.int32(lowest), into, np.int64(0), n_tiles(T))
        else:
            quantize_in_threads(x, np.int32(lowest), into, n_threads)
        rows = 0
        for w in ws:
            rows += w.rows
        ys = outputs(T, ws)
        codes, scales, factors = part_of_each(ws, 0), part_of_each(ws, 1), part_of_each(ws, 2)
        if n * GROUP * rows < SERIAL_BELOW:
            share(into, codes, scales, factors, ys, np.int64(0), np.int64(1))
        else:
            share_in_threads(into, codes, scales, factors, ys, n_threads)
        return ys

    return linears


linears_q4 = make_int8_linears(dot_q4, unpack_q4, 4, Q4_CODEBOOK[0])
linears_q6 = make_int8_linears(dot_q6, unpack_q6, 6, Q6_LOWEST)
linears_q8 = make_int8_linears(dot_q8, unpack_q8, 8, -UNSIGNED_BIAS)
