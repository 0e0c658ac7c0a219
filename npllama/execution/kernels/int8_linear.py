"""ops.linears and ops.embed for grouped formats: codes times codes in integers, scaled once per group.

    y[t, n] = w_factor[n] * sum_g (sum_k w_code[n, g, k] * x_code[t, g, k]) * (w_scale[n, g] * x_scale[t, g])

The inner sum is exact. The outer one runs over g in ascending order, for each y on its own; why that matters is said
in kernels/__init__.py.

A tile is a block (16 rows of w) times M tokens. A format brings functions for one group of a block: see
`register_grouped`. How sums of a group are scaled, and that there are factors, is said by its `Scaling`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from npllama.execution.kernels import amx, int8_narrow
from npllama.execution.kernels.abandon import abandoned
from npllama.execution.kernels.amx import (
    LEVELS_BYTES,
    N_SUMS,
    bytes_to_line,
    configure,
    dot_products,
    load_sums,
    release,
)
from npllama.execution.kernels.amx import TOKENS as AMX_TOKENS
from npllama.execution.kernels.flags import INLINE, INNER, INNER_PARALLEL
from npllama.execution.kernels.formats import register
from npllama.execution.kernels.fused_inputs import outputs_of, pointers_of, pointers_of_each, rows_of_each
from npllama.execution.kernels.int8_dot import (
    TOKEN_TILE,
    add_scaled,
    dot8,
    load_codes,
    load_corrections,
    load_scales,
    scale_rows,
    store_tile,
    zeros,
)
from npllama.execution.kernels.int8_input import (
    Wanted,
    addresses,
    empty_input,
    n_wide_tiles,
    quantize_input,
    tile_tokens,
)
from npllama.execution.kernels.int8_narrow import (
    CENTER,
    as_they_are,
    bytes_as_they_are,
    dot_signed_levels,
    dot_unsigned_levels,
    dot_wide_levels,
    make_narrow_tile,
    make_unpack_wide,
    make_unpacked,
)
from npllama.execution.kernels.prefetch import bytes_group, packed_group
from npllama.execution.kernels.simd import bf16_to_f32, keep_alive, noinline, num_threads, pointer
from npllama.execution.kernels.target import REGISTERS
from npllama.numbers.blocks import BLOCK_ROWS, GROUP, SCALES

TILES_AT_ONCE = 2 if REGISTERS >= 32 else 1
"""Wide tiles that codes meet at the same time, as many as registers hold the sums of."""

UNPACKS = amx.USED or TILES_AT_ONCE == 1
"""Whether codes are unpacked once for many tokens; else each time for two wide tiles, which costs no more."""

STRIP_BYTES = 1 << 18
"""Bytes of codes that are used for all tokens before the next: they stay in L2, unpacked (twice as many) too."""

SERIAL_BELOW = 1 << 18
"""Below so many products, starting threads costs more than it saves."""

MIN_TILES_UNPACKED = 4
"""Wide tiles from which on it pays to unpack codes once for all."""

GROUPS_AHEAD, SUM_BUFFERS = 3, 4
"""AMX multiplies a group so many groups before its sums are scaled and added; buffers for sums."""


# ---------------------------------------------------------------- tiles


class Blocks(NamedTuple):
    """A matrix, and pointers to its codes (B, G, bytes), scales (B, G, ...), factors (B, 16) of formats with them.

    Pointers, because threads that count references to an array wait for each other.
    """

    codes: object
    scales: object
    factors: object
    n_groups: int
    rows: int


class Scaling(NamedTuple):
    """How the sums of a group become numbers, and what a row's number is: each njit(**INLINE), but `start`, `scale`.

    start: int8_dot.load_corrections, or no_corrections; what products are added to.
    load(w, group): the scales of a group's rows.
    add(total, dots, scales, x, at, tile_stride): for each token, total plus its sums of a group, scaled by these.
    finish(total, w, b): for each token, its total over all groups times what belongs to the rows of block b.
    scale(w, b, g, r, level): njit(**INNER), one weight from its level.
    factors: the part of a weight that is Blocks.factors; where it has none its scales, which nobody reads there.
    """

    start: Callable[..., Any]
    load: Callable[..., Any]
    add: Callable[..., Any]
    finish: Callable[..., Any]
    scale: Callable[..., Any]
    factors: int


@njit(**INLINE)
def load_8_bit(w, group):
    return load_scales(w.scales, group * BLOCK_ROWS)


@njit(**INLINE)
def add_one_scale(total, dots, scale, x, at, tile_stride):
    return add_scaled(total, dots, scale, x.scales, at, tile_stride)


@njit(**INLINE)
def times_factors(total, w, b):
    return scale_rows(total, w.factors, b * BLOCK_ROWS)


@njit(**INNER)
def scale_8_bit(w, b, g, r, level):
    return level * SCALES[w.scales[b, g, r]] * bf16_to_f32(w.factors[b, r])


EIGHT_BIT = Scaling(load_corrections, load_8_bit, add_one_scale, times_factors, scale_8_bit, 2)
"""8-bit scales, and a bfloat16 factor for each row: q8, q6, q4."""


def make_tile(dot_group, group_bytes, M, prefetch_group, scaling):
    """The tile of block b and the M tokens from `first` on. The block's codes, packed or not, begin at codes[begin].

    prefetch_group: one of prefetch.py, or stays_in_cache.
    """
    start, load, add, finish = scaling.start, scaling.load, scaling.add, scaling.finish

    @njit(**INLINE)
    def tile(w, b, codes, begin, x, first, y):
        G = w.n_groups
        total, tile_stride = zeros(M), G * TOKEN_TILE
        for g in range(G):
            here, at = begin + g * group_bytes, first * G + g * min(M, TOKEN_TILE)
            prefetch_group(codes, here, group_bytes)
            dots = start(x.corrections, at, tile_stride, M)
            dots = dot_group(dots, codes, here, x.codes, at * GROUP, tile_stride)
            total = add(total, dots, load(w, b * G + g), x, at, tile_stride)
        total, N = finish(total, w, b), w.rows
        store_tile(y, first * N + b * BLOCK_ROWS, N, total, x.n_tokens - first, N - b * BLOCK_ROWS)

    return tile


@njit(**INLINE)
def stays_in_cache(codes, begin, n_bytes):
    """In the place of prefetch_group, for what was unpacked a moment ago."""


def packed_bytes(code_bits):
    """Bytes of a group of packed codes."""
    return BLOCK_ROWS * GROUP * code_bits // 8


def group_prefetch(code_bits):
    """How groups of packed codes, or of those of 8 bits, are prefetched."""
    return packed_group if code_bits < 8 else bytes_group


@njit(**INLINE)
def dot_unsigned(dots, levels, begin, x, at, tile_stride):
    """dot_group for codes that were unpacked to unsigned levels up to 64."""
    for v in range(GROUP // 8):
        low, high = load_codes(levels, begin + v * 128), load_codes(levels, begin + v * 128 + 64)
        dots = dot8(dots, low, high, x, at + v * 8, tile_stride)
    return dots


def is_wide(dot_unpacked):
    """Whether codes for many tokens are widened to 16 bits: signed ones by AVX2."""
    return int8_narrow.USED and dot_unpacked is not dot_unsigned


def make_amx_tile(scaling):
    """Two wide tiles, from token `first` on, of block b, whose levels begin at levels[begin].

    AMX multiplies later groups while the sums of one are scaled and added.
    """
    load, add, finish = scaling.load, scaling.add, scaling.finish

    @njit(**INLINE)
    def tile(w, b, levels, begin, x, first, y, sums):
        G = w.n_groups
        total, tile_stride = zeros(AMX_TOKENS), G * TOKEN_TILE
        for g in range(-GROUPS_AHEAD, G):
            if g + GROUPS_AHEAD < G:
                later = g + GROUPS_AHEAD
                x_at, w_at = (first * G + later * TOKEN_TILE) * GROUP, begin + later * LEVELS_BYTES
                dot_products(x.codes, x_at, tile_stride * GROUP, levels, w_at, sums, later % SUM_BUFFERS)
            if g >= 0:
                dots = load_sums(sums, g % SUM_BUFFERS)
                total = add(total, dots, load(w, b * G + g), x, first * G + g * TOKEN_TILE, tile_stride)
        total, N = finish(total, w, b), w.rows
        store_tile(y, first * N + b * BLOCK_ROWS, N, total, x.n_tokens - first, N - b * BLOCK_ROWS)

    return tile


# ---------------------------------------------------------------- strips of blocks


def make_multiply_amx(scaling):
    """A function for the first n wide tiles of the blocks begin .. stop-1, whose levels stand at levels[0]."""
    tile = make_amx_tile(scaling)

    @njit(**INNER)
    def multiply(w, levels, x, y, begin, stop, n):
        noinline()
        G, sums = w.n_groups, np.empty(SUM_BUFFERS * N_SUMS + 15, np.int32)
        sums = sums[bytes_to_line(sums) // 4 :]
        configure()
        for first in range(0, n * TOKEN_TILE, AMX_TOKENS):
            for b in range(begin, stop):
                tile(w, b, levels, (b - begin) * G * LEVELS_BYTES, x, first, y, sums)
        release()

    return multiply


def make_multiply_simd(scaling, dot_unpacked):
    """The same with vector instructions."""
    if int8_narrow.USED:
        dot_levels = dot_unsigned_levels if dot_unpacked is dot_unsigned else dot_wide_levels
        tile = make_narrow_tile(as_they_are, LEVELS_BYTES, dot_levels, TOKEN_TILE, scaling)
    else:
        tile = make_tile(dot_unpacked, LEVELS_BYTES, TOKEN_TILE, stays_in_cache, scaling)

    @njit(**INNER)
    def multiply(w, levels, x, y, begin, stop, n):
        noinline()
        G = w.n_groups
        for first in range(0, n * TOKEN_TILE, TOKEN_TILE):
            for b in range(begin, stop):
                tile(w, b, levels, (b - begin) * G * LEVELS_BYTES, x, first, y)

    return multiply


@cache
def make_multiply_unpacked(scaling, dot_unpacked):
    """Formats that scale alike share the code that multiplies what was unpacked."""
    return make_multiply_amx(scaling) if amx.USED else make_multiply_simd(scaling, dot_unpacked)


def make_unpack(unpack_group, code_bits):
    """A function (w, begin, stop): the levels of the blocks begin .. stop-1, from the start of a cache line on."""
    group_bytes, prefetch_group = packed_bytes(code_bits), group_prefetch(code_bits)

    @njit(**INNER)
    def unpack(w, begin, stop):
        noinline()
        G = w.n_groups
        n_groups = (stop - begin) * G
        buffer = np.empty(n_groups * LEVELS_BYTES + 63, np.int8)
        levels = buffer[bytes_to_line(buffer) :]
        for group in range(n_groups):
            at = (begin * G + group) * group_bytes
            prefetch_group(w.codes, at, group_bytes)
            unpack_group(w.codes, at, levels, group * LEVELS_BYTES)
        return levels

    return unpack


def make_unpacked_strip(unpack_group, code_bits, scaling, dot_unpacked):
    """A function (x, w, y, begin, stop) that unpacks the codes of some blocks once and multiplies them with all tokens.

    It returns how many wide tiles it has done: none where there are few, or where there is nothing to unpack.
    """
    if is_wide(dot_unpacked):
        unpack = make_unpack_wide(levels_in_place(unpack_group, code_bits), packed_bytes(code_bits))
    elif not UNPACKS or (code_bits >= 8 and not amx.USED):
        return nothing_unpacked
    else:
        unpack = make_unpack(unpack_group, code_bits)
    multiply = make_multiply_unpacked(scaling, dot_unpacked)
    at_once = AMX_TOKENS // TOKEN_TILE if amx.USED else 1

    @njit(**INNER)
    def strip(x, w, y, begin, stop):
        n = n_wide_tiles(x.n_tokens) // at_once * at_once
        if n < MIN_TILES_UNPACKED:
            return 0
        multiply(w, unpack(w, begin, stop), x, y, begin, stop, n)
        return n

    return strip


@njit(**INLINE)
def nothing_unpacked(x, w, y, begin, stop):
    """The same for codes that are multiplied as they are."""
    return 0


def levels_in_place(unpack_group, code_bits):
    """The `levels_of` (see int8_narrow.make_narrow_tile) of packed codes."""
    if code_bits >= 8:
        return bytes_as_they_are
    return make_unpacked(unpack_group, packed_bytes(code_bits), group_prefetch(code_bits))


def make_packed_tile(dot_group, unpack_group, code_bits, M, scaling, dot_unpacked):
    """The tile of M tokens whose codes are unpacked for all of them at once."""
    group_bytes = packed_bytes(code_bits)
    if not int8_narrow.USED or M < int8_narrow.TOKENS:
        return make_tile(dot_group, group_bytes, M, group_prefetch(code_bits), scaling)
    dot_levels = dot_unsigned_levels if dot_unpacked is dot_unsigned else dot_signed_levels
    return make_narrow_tile(levels_in_place(unpack_group, code_bits), group_bytes, dot_levels, M, scaling)


def make_multiply_packed(dot_group, unpack_group, code_bits, scaling, dot_unpacked):
    """A function (x, w, y, begin, stop, first): one tile of the tokens from `first` on, of the blocks begin .. stop-1.

    It returns how many tokens these are.
    """
    widest, wide, four, two, one = (
        make_packed_tile(dot_group, unpack_group, code_bits, M, scaling, dot_unpacked)
        for M in (TILES_AT_ONCE * TOKEN_TILE, TOKEN_TILE, 4, 2, 1)
    )
    group_bytes = packed_bytes(code_bits)

    @njit(**INNER)
    def multiply(x, w, y, begin, stop, first):
        noinline()
        T, block_bytes = x.n_tokens, w.n_groups * group_bytes
        n = tile_tokens(T, first)
        if TILES_AT_ONCE == 2 and first + TOKEN_TILE < n_wide_tiles(T) * TOKEN_TILE:
            n = TILES_AT_ONCE * TOKEN_TILE
        for b in range(begin, stop):
            at = b * block_bytes
            if n == 1:
                one(w, b, w.codes, at, x, first, y)
            elif n == 2:
                two(w, b, w.codes, at, x, first, y)
            elif n == 4:
                four(w, b, w.codes, at, x, first, y)
            elif TILES_AT_ONCE == 1 or n == TOKEN_TILE:
                wide(w, b, w.codes, at, x, first, y)
            else:
                widest(w, b, w.codes, at, x, first, y)
        return n

    return multiply


def make_multiply_blocks(dot_group, unpack_group, code_bits, scaling, dot_unpacked):
    """A function (x, w, y, begin, stop): the rows of y of the blocks begin .. stop-1, strip by strip."""
    unpacked_strip = make_unpacked_strip(unpack_group, code_bits, scaling, dot_unpacked)
    multiply_packed = make_multiply_packed(dot_group, unpack_group, code_bits, scaling, dot_unpacked)
    group_bytes = packed_bytes(code_bits)

    @njit(**INNER)
    def multiply_blocks(x, w, y, begin, stop):
        noinline()
        strip = max(1, STRIP_BYTES // (w.n_groups * group_bytes))
        for low in range(begin, stop, strip):
            high = min(low + strip, stop)
            if abandoned():
                return
            first = unpacked_strip(x, w, y, low, high) * TOKEN_TILE
            while first < x.n_tokens:
                first += multiply_packed(x, w, y, low, high, first)

    return multiply_blocks


# ---------------------------------------------------------------- a format


def make_shares(multiply_blocks):
    """A thread's part, neighbouring blocks of every matrix, one matrix after the other; and all, on all threads."""

    @njit(**INNER)
    def share(x, codes, scales, factors, n_groups, rows, ys, part, parts):
        for i in range(len(codes)):
            n_blocks = (rows[i] + BLOCK_ROWS - 1) // BLOCK_ROWS
            w = Blocks(codes[i], scales[i], factors[i], n_groups, rows[i])
            multiply_blocks(x, w, ys[i], part * n_blocks // parts, (part + 1) * n_blocks // parts)

    @njit(**INNER_PARALLEL)
    def share_in_threads(x, codes, scales, factors, n_groups, rows, ys, parts):
        for part in prange(parts):
            share(x, codes, scales, factors, n_groups, rows, ys, np.int64(part), parts)

    return share, share_in_threads


@njit(**INNER)
def many_wide(T, wide):
    """Whether T tokens are so many that their codes are wanted in 16 bits, by a format that can use them."""
    return wide and n_wide_tiles(T) >= MIN_TILES_UNPACKED


def make_linears(share, share_in_threads, wanted, factors_part):
    """ops.linears for one format: quantize x, then multiply block by block."""
    lowest, start, wide = wanted

    @njit(**INNER)
    def multiply_all(x, K, into, codes, scales, factors, n_groups, rows, outs):
        noinline()
        if abandoned():
            return
        T, n_threads = into.n_tokens, num_threads()
        quantize_input(x, K, Wanted(np.int32(lowest), np.int32(start), many_wide(T, wide)), into, n_threads)
        if T * K * (rows[0] + rows[1] + rows[2]) < SERIAL_BELOW:
            share(into, codes, scales, factors, n_groups, rows, outs, np.int64(0), np.int64(1))
        else:
            share_in_threads(into, codes, scales, factors, n_groups, rows, outs, n_threads)

    @njit(**INNER)
    def linears(x, ws):
        (T, K), rows = x.shape, rows_of_each(ws)
        n_groups = (K + GROUP - 1) // GROUP
        ys, into = outputs_of(T, rows), empty_input(T, n_groups, many_wide(T, wide))
        codes, scales, factors = pointers_of_each(ws, 0), pointers_of_each(ws, 1), pointers_of_each(ws, factors_part)
        outs = pointers_of(ys)
        multiply_all(pointer(x, 0), K, addresses(into), codes, scales, factors, n_groups, rows, outs)
        keep_alive(into)
        return ys

    return linears


def make_embed(level, scale):
    """ops.embed for one format: one row out of the block in which it stands interleaved with 15 others."""

    @njit(**INNER)
    def embed(table, tokens):
        T, D = tokens.shape[0], table.columns
        x = np.empty((T, D), np.float32)
        for t in range(T):
            b, r = tokens[t] // BLOCK_ROWS, tokens[t] % BLOCK_ROWS
            for g in range(table.scales.shape[1]):
                for k in range(min(GROUP, D - g * GROUP)):
                    x[t, g * GROUP + k] = scale(table, b, g, r, level(table.codes, b, g, r, k))
        return x

    return embed


def register_grouped(
    weight, code_bits, lowest, dot_group, unpack_group, level, scaling=EIGHT_BIT, dot_unpacked=dot_unsigned
):
    """Register a grouped format by its kernels for one group of a block, all njit(**INLINE) but `level`, njit(**INNER).

    weight: a NamedTuple with the fields of numbers.q4.Q4, or those that `scaling` reads; code_bits of a weight; lowest:
    what is to be added to the codes that `dot_group` multiplies by, minus their zero point.

    dot_group(dots, codes, begin, x, at, tile_stride): dots plus, for each token, its codes from x[at] on times the
    group at codes[begin]; prefetches line by line what lies ahead (prefetch.py).
    unpack_group(codes, begin, levels, at): the group unpacked to levels[at ...], four columns of its 16 rows to 64
    bytes: signed for AMX, else as dot_unpacked takes them, for dot_unsigned less the lowest.
    level(codes, b, g, r, k): one weight's integer as float32.
    """
    multiply = make_multiply_blocks(dot_group, unpack_group, code_bits, scaling, dot_unpacked)
    start = CENTER + (lowest if scaling.start is load_corrections else 0)
    linears = make_linears(*make_shares(multiply), (lowest, start, is_wide(dot_unpacked)), scaling.factors)
    register(weight, linears, make_embed(level, scaling.scale))
