"""Number formats of weights: how a matrix is stored, and what its stored numbers mean.

A format is a NamedTuple of arrays, so its type selects the kernel; plain float32 is a plain array.
Axes: a matrix is (rows, columns) = (outputs, inputs); any leading axes are layers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from npllama.errors import UsageError


class F16(NamedTuple):
    """IEEE half precision. bits (..., rows, columns) uint16."""

    bits: np.ndarray


class BF16(NamedTuple):
    """bfloat16: the upper half of a float32. bits (..., rows, columns) uint16."""

    bits: np.ndarray


# Grouped formats: GROUP neighbours of a row share a scale, and ROWS rows stand interleaved in a block, so that a vector
# holds the same columns of many rows and no sum runs across it. Blocks (B) and groups (G) are whole: what is beyond the
# last row or column is zero. The bytes of a block's group are vectors of 64. Byte 4 r + j of vector v is of row r and
#
#     in q8 of column 4 v + j;
#     in q4 of the columns 8 v + j (lower four bits) and 8 v + 4 + j (upper four);
#     in q6, vectors 0 to 3, the same as in q4: the lower four bits of the codes; vectors 4 and 5 are their upper two,
#     bits 2 i and 2 i + 1 of vector 4 + v being of column 16 v + 4 i + j.
#
# Scales have 8 bits (see SCALES) and a factor for each row. Against float16 scales that saves a quarter of a bit per
# weight, for 0.4 % (q4) to 6 % (q8) more squared error.

GROUP = 32
ROWS = 16
Q4_BYTES = ROWS * GROUP // 2


class Q8(NamedTuple):
    """8.25 bits per weight, and 16 per row: w = code * scale * factor, codes from -127 to 127.

    codes (..., B, G, 512) int8, scales (..., B, G, 16) uint8, factors (..., B, 16) uint16 (bfloat16 bits), of
    `rows` rows and `columns` columns.
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


class Q6(NamedTuple):
    """6.25 bits per weight, and 16 per row: w = (code - 32) * scale * factor. The output of q4 models.

    codes (..., B, G, 384) uint8, the rest as in Q8.
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


class Q4(NamedTuple):
    """4.25 bits per weight, and 16 per row: w = Q4_LEVELS[code] * scale * factor, two codes to a byte.

    codes (..., B, G, 256) uint8, the rest as in Q8.
    """

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


Q6_LOWEST = -32
"""What the code 0 of q6 stands for. Its levels span 64 as those of q4 do, and are multiplied in the same way."""

Q4_LEVELS = (-34, -26, -20, -16, -12, -8, -5, -2, 0, 3, 6, 9, 13, 17, 22, 28)
"""What the codes of q4 stand for.

Levels are closer where weights are more frequent; scales have either sign. Against evenly spaced levels the squared
error is 17 % smaller for normally distributed weights, 35 % for long tails. They span at most 64, so that four
products with 8-bit numbers fit into 16 bits. Tried at the same bits: a span of 32 (half of the gain), groups of 64 with
a scale and a minimum (none), groups of 16 (somewhat better, but products a fifth slower).
"""


_SCALE_CODES = np.arange(256, dtype=np.uint16)

SCALES = ((_SCALE_CODES & 0x80) << 8 | (_SCALE_CODES & 0x7F) << 5).view(np.float16).astype(np.float32)
"""What an 8-bit scale stands for: the float16 with its sign, its 2 bits as the exponent's last, its 5 as the mantissa's
first. 0 to 4.8e-4 in 127 steps that grow from 1.9e-6 fourfold, then the negative ones.

A step is at most 1/32 of the scale down to an eighth of the largest scale of a row, then always the same.
"""


class Grouped(NamedTuple):
    """A q8, q6 or q4 matrix unpacked for products in NumPy: w[n, g, k] = levels[g, k, n] * scales[g, n] * factors[n].

    levels (..., G, GROUP, rows) integers as float32, scales (..., G, rows) float32, factors (..., rows) float32.
    """

    levels: np.ndarray
    scales: np.ndarray
    factors: np.ndarray


Coded = Q8 | Q6 | Q4
"""A matrix in a grouped format."""

Weight = np.ndarray | F16 | BF16 | Q8 | Q6 | Q4 | Grouped
"""A matrix in any number format."""


def f16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest float16 (half to even; beyond 65,504: infinity). Any shape, uint16."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (half to even; NaN stays NaN). Any shape, uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def grouped(w: Coded) -> Grouped:
    """Unpack a matrix for products in NumPy."""
    in_blocks = np.moveaxis(_levels(w), -4, -2)  # (..., B, G, ROWS, GROUP) -> (..., G, ROWS, B, GROUP)
    levels = np.moveaxis(in_blocks, (-1, -2), (-3, -2))  # -> (..., G, GROUP, B, ROWS)
    scales = np.swapaxes(SCALES[w.scales], -3, -2)  # (..., B, G, ROWS) -> (..., G, B, ROWS)
    factors = widen(BF16(w.factors))  # (..., B, ROWS)
    parts = (part.reshape(*part.shape[:-2], -1)[..., : w.rows] for part in (levels, scales, factors))
    return Grouped(*(np.ascontiguousarray(part) for part in parts))


def widen(w: np.ndarray | F16 | BF16 | Coded) -> np.ndarray:
    """A matrix in any number format -> the numbers it stands for in float32 (float32 itself is not copied)."""
    if isinstance(w, F16):
        return w.bits.view(np.float16).astype(np.float32)
    if isinstance(w, BF16):
        return (w.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if isinstance(w, Coded):
        groups = _levels(w)  # (..., B, G, ROWS, GROUP)
        groups *= SCALES[w.scales][..., None]  # exact: a level has 8 bits, a scale 6
        groups *= widen(BF16(w.factors))[..., None, :, None]
        rows = np.swapaxes(groups, -3, -2)  # (..., B, ROWS, G, GROUP)
        whole = rows.reshape(*rows.shape[:-4], rows.shape[-4] * ROWS, rows.shape[-2] * GROUP)
        return np.ascontiguousarray(whole[..., : w.rows, : w.columns])
    return w


def widen_rows(w: Weight, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix (N, K) in any number format: (T,) integers -> (T, K) float32, new."""
    if isinstance(w, np.ndarray):
        return w[rows]
    if isinstance(w, Grouped):
        raise TypeError("rows of a Grouped matrix cannot be looked up: it is made for products; take the Coded one")
    if isinstance(w, Coded):
        codes, scales, factors = (part[rows // ROWS] for part in (w.codes, w.scales, w.factors))
        blocks = type(w)(codes, scales, factors, ROWS * len(rows), w.columns)
        return widen(blocks)[np.arange(len(rows)) * ROWS + rows % ROWS]
    return widen(type(w)(*(part[rows] for part in w)))


def _levels(w: Coded) -> np.ndarray:
    """Codes -> the integers they stand for, in the order of rows and columns: (..., B, G, ROWS, GROUP) float32."""
    groups = w.codes.shape[:-1]
    if isinstance(w, Q8):
        vectors = w.codes.astype(np.float32)
    elif isinstance(w, Q4):
        vectors = np.array(Q4_LEVELS, np.float32)[_nibbles(w.codes)]
    else:
        low, tops = _nibbles(w.codes[..., :Q4_BYTES]), w.codes[..., Q4_BYTES:].reshape(*groups, -1, 1, 4 * ROWS)
        high = tops >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # (..., 2, 4, 64)
        vectors = (low | high.reshape(low.shape) << 4).astype(np.float32) + np.float32(Q6_LOWEST)
    vectors = vectors.reshape(*groups, GROUP // 4, ROWS, 4)
    return np.swapaxes(vectors, -3, -2).reshape(*groups, ROWS, GROUP)  # (..., 8, ROWS, 4) -> (..., ROWS, 8, 4)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Two codes to a byte -> a byte each, lower ones of a vector before its upper ones: (..., 256) -> (..., 8, 64)."""
    vectors = packed.reshape(*packed.shape[:-1], -1, 1, 4 * ROWS)
    both = np.concatenate([vectors & 15, vectors >> 4], axis=-2)  # (..., 4, 2, 64)
    return both.reshape(*packed.shape[:-1], -1, 4 * ROWS)


# ---------------------------------------------------------------- activations


SMALLEST_MAGNITUDE = 1e-30
"""A group of activations below it counts as zero: the quotient 127 / magnitude must not overflow."""


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round the input of a product with a q8, q6 or q4 matrix to 8 bits.

        scale[t, g] = max_k |x[t, g, k]| / 127        code[t, g, k] = rint(x[t, g, k] * (127 / max_k |x[t, g, k]|))

    x (T, K) float32. Every operation is float32, half rounds to even; a group that is not finite gets a scale that is
    not finite. Returns codes (T, G, GROUP) int8, zero beyond column K, and scales (T, G) float32.
    """
    T, K = x.shape
    G = -(-K // GROUP)
    groups = np.zeros((T, G * GROUP), np.float32)
    groups[:, :K] = x
    groups = groups.reshape(T, G, GROUP)  # (T, K) -> (T, G, GROUP)
    magnitude = np.abs(groups).max(axis=-1)
    zero = magnitude < np.float32(SMALLEST_MAGNITUDE)
    scale = np.where(zero, np.float32(0), magnitude / np.float32(127))
    with np.errstate(invalid="ignore"):  # infinity times 0, and NaN as an integer: their scale is not finite either
        factor = np.where(zero, np.float32(0), np.float32(127) / np.where(zero, np.float32(1), magnitude))
        return np.rint(groups * factor[..., None]).astype(np.int8), scale


# ---------------------------------------------------------------- float32 -> q8, q6, q4


CHUNK_NUMBERS = 1 << 17
LARGEST_WEIGHT = 1e6  # beyond, a model is broken; and the sums below stay far from the largest float32
MOST_WORKERS = 8
# Levels are integers, so borders between them are multiples of a half: floor(2 w / scale) tells the nearest level.
_Q4_CELLS = (np.arange(2 * Q4_LEVELS[0], 2 * Q4_LEVELS[-1] + 1) + 0.5) / 2
_Q4_NEAREST = np.array(Q4_LEVELS, np.float32)[np.abs(_Q4_CELLS[:, None] - Q4_LEVELS).argmin(axis=1)]
_Q4_CODE = np.searchsorted(Q4_LEVELS, np.arange(Q4_LEVELS[0], Q4_LEVELS[-1] + 1)).astype(np.uint8)


def _nearest_q4(w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """The level nearest to w * inverse: (n, GROUP), (n,) -> (n, GROUP) float32."""
    cell = w * (np.float32(2) * inverse)[:, None]
    cell -= np.float32(2 * Q4_LEVELS[0])
    np.clip(cell, 0, len(_Q4_NEAREST) - 1, out=cell)
    return _Q4_NEAREST.take(cell.astype(np.uint8))


def _nearest_integer(low: int, high: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Makes a function like _nearest_q4 for levels that are all integers from low to high."""

    def nearest(w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        level = np.rint(w * inverse[:, None])
        return np.clip(level, low, high, out=level)

    return nearest


def _vectors(codes: np.ndarray) -> np.ndarray:
    """Codes in the order of rows and columns (b, ROWS, G, GROUP) -> vectors of four columns (b, G, 8, 64)."""
    b, _, G, _ = codes.shape
    return codes.reshape(b, ROWS, G, GROUP // 4, 4).transpose(0, 2, 3, 1, 4).reshape(b, G, GROUP // 4, 4 * ROWS)


def _pack_q8(levels: np.ndarray) -> np.ndarray:
    """Levels (b, ROWS, G, GROUP) -> codes of the blocks (b, G, 512) int8."""
    vectors = _vectors(levels.astype(np.int8))
    return vectors.reshape(*vectors.shape[:2], -1)


def _pack_nibbles(vectors: np.ndarray) -> np.ndarray:
    """Vectors of codes below 16 (b, G, 8, 64) -> two codes to a byte (b, G, 256)."""
    packed: np.ndarray = vectors[:, :, ::2] | vectors[:, :, 1::2] << 4
    return packed.reshape(*vectors.shape[:2], -1)


def _pack_q4(levels: np.ndarray) -> np.ndarray:
    """Levels (b, ROWS, G, GROUP) -> codes of the blocks (b, G, 256) uint8."""
    return _pack_nibbles(_vectors(_Q4_CODE[levels.astype(np.int8) - Q4_LEVELS[0]]))


def _pack_q6(levels: np.ndarray) -> np.ndarray:
    """Levels (b, ROWS, G, GROUP) -> codes of the blocks (b, G, 384) uint8."""
    vectors = _vectors((levels - np.float32(Q6_LOWEST)).astype(np.uint8))
    tops = (vectors >> 4).reshape(*vectors.shape[:2], 2, 4, -1) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    tops = np.bitwise_or.reduce(tops, axis=3)  # (b, G, 2, 4, 64) -> (b, G, 2, 64)
    return np.concatenate([_pack_nibbles(vectors & 15), tops.reshape(*vectors.shape[:2], -1)], axis=-1)


class _Grid(NamedTuple):
    """How a format is quantized. targets: levels near the outermost ones, on which a group's largest number is laid."""

    form: type[Q8] | type[Q6] | type[Q4]
    nearest: Callable[[np.ndarray, np.ndarray], np.ndarray]
    pack: Callable[[np.ndarray], np.ndarray]
    targets: tuple[float, ...]


_GRIDS = {
    "q8": _Grid(Q8, _nearest_integer(-127, 127), _pack_q8, (127.0,)),
    "q6": _Grid(Q6, _nearest_integer(-32, 31), _pack_q6, (-32.4, -31.6, 31)),
    "q4": _Grid(Q4, _nearest_q4, _pack_q4, (-37, -35.2, -33.4, -31.6, -29.8, -28, 23, 24.6, 26.2, 27.8, 29.4, 31)),
}


def quantize(w: np.ndarray, number_format: str) -> Coded:
    """float32 (..., N, K) -> "q8", "q6" or "q4", with scales that make the squared error small.

    Blocks of rows are independent: a matrix may be quantized in pieces, cut at multiples of ROWS rows, and the parts
    joined along the axis of blocks. Raises UsageError for a number that is not finite, or beyond LARGEST_WEIGHT.
    """
    grid = _GRIDS[number_format]
    N, K = w.shape[-2:]
    B, G = -(-N // ROWS), -(-K // GROUP)
    stacked = w.reshape(-1, N, K)
    step = max(1, CHUNK_NUMBERS // (ROWS * G * GROUP))
    pieces = list(itertools.product(range(len(stacked)), range(0, B, step)))
    with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda p: _quantize_blocks(stacked[p[0]], p[1], p[1] + step, grid), pieces))
    codes, scales, factors = (np.concatenate(part) for part in zip(*done, strict=True))
    blocks = (*w.shape[:-2], B)
    return grid.form(
        np.ascontiguousarray(codes.reshape(*blocks, G, -1)),
        np.ascontiguousarray(scales.reshape(*blocks, G, ROWS)),
        factors.reshape(*blocks, ROWS),
        N,
        K,
    )


def _quantize_blocks(w: np.ndarray, begin: int, stop: int, grid: _Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks begin .. stop-1 of a matrix (N, K): codes (b, G, bytes), scales (b, G, ROWS), factors (b, ROWS)."""
    part = w[begin * ROWS : stop * ROWS]
    b, G = -(-len(part) // ROWS), -(-part.shape[1] // GROUP)
    whole = np.zeros((b * ROWS, G * GROUP), np.float32)
    whole[: len(part), : part.shape[1]] = part
    _check_range(whole, begin * ROWS)
    groups = whole.reshape(-1, GROUP)
    wanted = _best_scales(groups, grid)
    factors = bf16_bits(np.abs(wanted).reshape(-1, G).max(axis=1) / SCALES[127])
    scale, levels = _with_stored_scales(groups, wanted, widen(BF16(factors)).repeat(G), grid)
    in_blocks = scale.reshape(b, ROWS, G).transpose(0, 2, 1)
    return grid.pack(levels.reshape(b, ROWS, G, GROUP)), in_blocks, factors.reshape(b, ROWS)


def _with_stored_scales(
    w: np.ndarray, wanted: np.ndarray, factors: np.ndarray, grid: _Grid
) -> tuple[np.ndarray, np.ndarray]:
    """The 8-bit scale above or below the wanted one, whichever leaves the smaller error, and its levels.

    w (n, GROUP), wanted and factors (n,) -> codes of scales (n,) uint8, levels (n, GROUP) float32.
    """
    above = np.searchsorted(SCALES[:127], np.abs(wanted) * _inverse(factors)).clip(1, 127).astype(np.uint8)
    sign = np.where(wanted < 0, np.uint8(128), np.uint8(0))
    codes, levels, errors = [], [], []
    for code in (above, above - 1):
        scale = SCALES[code | sign] * factors
        level = grid.nearest(w, _inverse(scale))
        codes.append(code | sign)
        levels.append(level)
        errors.append(np.square(level * scale[:, None] - w).sum(axis=1))
    below = errors[1] < errors[0]
    return np.where(below, codes[1], codes[0]), np.where(below[:, None], levels[1], levels[0])


def _best_scales(w: np.ndarray, grid: _Grid) -> np.ndarray:
    """The scale of each group: (n, GROUP) -> (n,) float32.

    For given levels q the best scale is w.q / q.q, and leaves the squared error w.w - (w.q)^2 / q.q. So candidates
    are compared by (w.q)^2 / q.q: each target for the largest number, then the best one's levels chosen anew.
    """
    largest = w[np.arange(len(w)), np.abs(w).argmax(axis=1)]
    best, most = np.zeros(len(w), np.float32), np.zeros(len(w), np.float32)
    for target in (*grid.targets, None):
        q = grid.nearest(w, _inverse(best if target is None else largest / np.float32(target)))
        along, length = np.einsum("ng,ng->n", w, q), np.einsum("ng,ng->n", q, q)
        scale = along * _inverse(length)
        better = along * scale > most
        best[better], most[better] = scale[better], (along * scale)[better]
    return best


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 where that is not a finite float32."""
    tiny = np.abs(x) < 1e-37
    return np.where(tiny, np.float32(0), np.float32(1) / np.where(tiny, np.float32(1), x))


def _check_range(w: np.ndarray, first_row: int) -> None:
    """Raise UsageError unless every number is finite and its scale will be."""
    if np.abs(w).max() <= LARGEST_WEIGHT:  # not true for NaN
        return
    row, column = (int(i[0]) for i in np.nonzero(~(np.abs(w) <= LARGEST_WEIGHT)))
    raise UsageError(
        f"row {first_row + row}, column {column} is {w[row, column]}, but weights can be quantized only if they are "
        f"finite and at most {LARGEST_WEIGHT:,.0f}; export as f32, or get an undamaged checkpoint."
    )
