"""The input of a quantized product, rounded to 8 bits as activations.quantize_rows does it, in the order of the tiles.

Tokens stand in wide tiles of TOKEN_TILE, and what is left in a tile of 1, 2 or 4. The groups of a tile's tokens stand
together: group g of token first + m of a tile of M has the index first * n_groups + g * M + m.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from npllama.execution.kernels import int8_narrow
from npllama.execution.kernels.flags import INLINE, INNER, INNER_PARALLEL
from npllama.execution.kernels.int8_dot import TOKEN_TILE, abs_max, round_group
from npllama.execution.kernels.int8_narrow import STARTS, store_starts, widen_group
from npllama.execution.kernels.simd import load_scalar, pointer, store_scalar
from npllama.numbers.activations import MIN_MAGNITUDE
from npllama.numbers.blocks import GROUP

SERIAL_BELOW = 1 << 15
"""Below so many numbers, starting threads costs more than it saves."""


USED_STARTS = STARTS if int8_narrow.USED else 0


class QuantizedInput(NamedTuple):
    """Input in the order of the tiles, g groups of all tokens: codes (g * GROUP,) int8, scales, corrections (g,).

    corrections int32: minus the zero point of w's codes, times the sum of the group's codes. starts (g * STARTS,)
    int32 and wide (g * GROUP,) int16, the codes again: see int8_narrow.py; nothing where they are not used. Arrays, or
    pointers in their place.
    """

    codes: object
    scales: object
    corrections: object
    starts: object
    wide: object
    n_tokens: int


class Wanted(NamedTuple):
    """What sums of codes are multiplied by: int32, `lowest` for corrections, `start` for the first of STARTS.

    wide: whether codes are wanted in 16 bits too.
    """

    lowest: np.int32
    start: np.int32
    wide: bool


@njit(**INNER)
def group_scale(x, begin):
    """quantize_rows for the group from x[begin] on: its scale, and the factor of its numbers."""
    magnitude = abs_max(x, begin)
    if magnitude < np.float32(MIN_MAGNITUDE):
        return np.float32(0), np.float32(0)
    return magnitude / np.float32(127), np.float32(127) / magnitude


@njit(**INLINE)
def keep_for_narrow_tiles(total, wanted, into, at):
    """What tiles of AVX2 want of the codes of group `at` besides, and their sum."""
    if wanted.wide:
        widen_group(into.codes, into.wide, at * GROUP)
    return store_starts(into.codes, at * GROUP, wanted.start, into.starts, at * STARTS)


@njit(**INLINE)
def keep_nothing(total, wanted, into, at):
    """The same for other tiles."""
    return total


keep_more = keep_for_narrow_tiles if int8_narrow.USED else keep_nothing


@njit(**INNER)
def quantize_group(x, begin, wanted, into, at):
    """One group of activations.quantize_rows: the numbers from x[begin] on become group `at`."""
    scale, factor = group_scale(x, begin)
    store_scalar(into.scales, at, scale)
    total = keep_more(round_group(x, begin, factor, into.codes, at * GROUP), wanted, into, at)
    store_scalar(into.corrections, at, wanted.lowest * total)


@njit(**INNER)
def quantize_rest(x, begin, n, wanted, into, at):
    """The same of a group that has n numbers, filled up with wanted."""
    rest = np.zeros(GROUP, np.float32)
    for k in range(n):
        rest[k] = load_scalar(x, begin + k)
    quantize_group(rest, 0, wanted, into, at)


@njit(**INNER)
def n_wide_tiles(T):
    """How many tiles of T tokens are wide. More than half a tile of tokens is worth one, filled up with wanted."""
    return (T + (TOKEN_TILE - 1) // 2) // TOKEN_TILE


@njit(**INNER)
def tile_tokens(T, first):
    """Tokens of the tile that begins with one: behind the wide tiles 0, 1, 2 or 4. Three are filled up with wanted."""
    if first < n_wide_tiles(T) * TOKEN_TILE:
        return TOKEN_TILE
    return 4 if T - first == 3 else max(0, T - first)


@njit(**INNER)
def n_tiles(T):
    """The tiles of T tokens: wide ones, then the last."""
    wide = n_wide_tiles(T)
    return wide + (1 if wide * TOKEN_TILE < T else 0)


@njit(**INNER)
def quantize_tiles(x, K, wanted, into, begin, stop):
    """activations.quantize_rows for the tiles begin .. stop-1 of rows of K numbers."""
    T, whole, G = into.n_tokens, K // GROUP, (K + GROUP - 1) // GROUP
    for i in range(begin, stop):
        first = i * TOKEN_TILE
        M = tile_tokens(T, first)
        for m in range(M):
            row, at = (first + m) * K, first * G + m
            n_groups = whole if first + m < T else 0
            for g in range(n_groups):
                quantize_group(x, row + g * GROUP, wanted, into, at + g * M)
            for g in range(n_groups, G):
                n = K - g * GROUP if first + m < T else 0
                quantize_rest(x, row + g * GROUP, n, wanted, into, at + g * M)


@njit(**INNER_PARALLEL)
def quantize_in_threads(x, K, wanted, into, n_threads):
    """quantize_tiles for all tiles, on all threads."""
    n = n_tiles(into.n_tokens)
    for p in prange(n_threads):
        thread = np.int64(p)
        quantize_tiles(x, K, wanted, into, thread * n // n_threads, (thread + 1) * n // n_threads)


@njit(**INNER)
def input_groups(T, n_groups):
    """Groups of the quantized input of T tokens, those of the tokens that fill up tiles included."""
    wide = n_wide_tiles(T) * TOKEN_TILE
    return (wide + tile_tokens(T, wide)) * n_groups


@njit(**INNER)
def empty_input(T, n_groups, wide):
    """Arrays for the quantized input of T tokens."""
    n = input_groups(T, n_groups)
    codes, scales, corrections = np.empty(n * GROUP, np.int8), np.empty(n, np.float32), np.empty(n, np.int32)
    starts, again = np.empty(n * USED_STARTS, np.int32), np.empty(n * GROUP if wide else 0, np.int16)
    return QuantizedInput(codes, scales, corrections, starts, again, T)


@njit(**INNER)
def addresses(into):
    """The same as pointers, which count no references. The caller keeps the arrays alive."""
    codes, scales, corrections = pointer(into.codes, 0), pointer(into.scales, 0), pointer(into.corrections, 0)
    return QuantizedInput(codes, scales, corrections, pointer(into.starts, 0), pointer(into.wide, 0), into.n_tokens)


@njit(**INNER)
def quantize_input(x, K, wanted, into, n_threads):
    """Quantize rows of K numbers. Pointers."""
    T = into.n_tokens
    if T * K < SERIAL_BELOW:
        quantize_tiles(x, K, wanted, into, np.int64(0), n_tiles(T))
    else:
        quantize_in_threads(x, K, wanted, into, n_threads)
