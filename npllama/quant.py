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


# Grouped formats: GROUP neighbours of a row share a float16 scale, and ROWS rows stand interleaved in a block, so that
# a vector holds the same columns of many rows and no sum runs across it. Blocks (B) and groups (G) are whole: what is
# beyond the last row or column is zero. The bytes of a block's group are vectors of 64. Byte 4 r + j of vector v is of
# row r and, in q8, of column 4 v + j; in q4 its lower half is of column 8 v + j, its upper half of column 8 v + 4 + j.

GROUP = 32
ROWS = 16


class Q8(NamedTuple):
    """8.5 bits per weight: w = code * scale, codes from -127 to 127.

    codes (..., B, G, 512) int8, scales (..., B, G, 16) uint16 (float16 bits), of `rows` rows and `columns` columns.
    """

    codes: np.ndarray
    scales: np.ndarray
    rows: int
    columns: int


class Q4(NamedTuple):
    """4.5 bits per weight: w = Q4_LEVELS[code] * scale, two codes to a byte.

    codes (..., B, G, 256) uint8, scales (..., B, G, 16) uint16 (float16 bits), of `rows` rows and `columns` columns.
    """

    codes: np.ndarray
    scales: np.ndarray
    rows: int
    columns: int


Q4_LEVELS = (-34, -26, -20, -16, -12, -8, -5, -2, 0, 3, 6, 9, 13, 17, 22, 28)
"""What the codes of q4 stand for.

Levels are closer where weights are more frequent; scales have either sign. Against evenly spaced levels the squared
error is 17 % smaller for normally distributed weights, 35 % for long tails. They span at most 64, so that four
products with 8-bit numbers fit into 16 bits. Tried at the same 4.5 bits: a span of 32 (half of the gain), groups of 64
with a scale and a minimum (none), groups of 16 with 8-bit scales (somewhat better, but products a fifth slower).
"""


class Grouped(NamedTuple):
    """A q8 or q4 matrix widened to float32: its products still round their other side as those of q8 and q4 do.

    values (..., rows, columns) float32.
    """

    values: np.ndarray


Weight = np.ndarray | F16 | BF16 | Q8 | Q4 | Grouped
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


def widen(w: Weight) -> np.ndarray:
    """A matrix in any number format -> the numbers it stands for in float32 (float32 itself is not copied)."""
    if isinstance(w, F16):
        return w.bits.view(np.float16).astype(np.float32)
    if isinstance(w, BF16):
        return (w.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if isinstance(w, Grouped):
        return w.values
    if isinstance(w, Q8 | Q4):
        groups = _levels(w)  # (..., B, G, ROWS, GROUP)
        groups *= w.scales.view(np.float16).astype(np.float32)[..., None]
        rows = np.swapaxes(groups, -3, -2)  # (..., B, ROWS, G, GROUP)
        whole = rows.reshape(*rows.shape[:-4], rows.shape[-4] * ROWS, rows.shape[-2] * GROUP)
        return np.ascontiguousarray(whole[..., : w.rows, : w.columns])
    return w


def widen_rows(w: Weight, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix (N, K) in any number format: (T,) integers -> (T, K) float32, new."""
    if isinstance(w, np.ndarray):
        return w[rows]
    if isinstance(w, Q8 | Q4):
        blocks = w._replace(codes=w.codes[rows // ROWS], scales=w.scales[rows // ROWS], rows=ROWS * len(rows))
        return widen(blocks)[np.arange(len(rows)) * ROWS + rows % ROWS]
    return widen(type(w)(*(part[rows] for part in w)))


def _levels(w: Q8 | Q4) -> np.ndarray:
    """Codes -> the integers they stand for, in the order of rows and columns: (..., B, G, ROWS, GROUP) float32."""
    groups = w.codes.shape[:-1]
    if isinstance(w, Q8):
        vectors = w.codes.astype(np.float32).reshape(*groups, GROUP // 4, ROWS, 4)
    else:
        packed = w.codes.reshape(*groups, GROUP // 8, 1, ROWS, 4)
        halves = np.concatenate([packed & 15, packed >> 4], axis=-3)  # (..., 4, 2, ROWS, 4)
        vectors = np.array(Q4_LEVELS, np.float32)[halves].reshape(*groups, GROUP // 4, ROWS, 4)
    return np.swapaxes(vectors, -3, -2).reshape(*groups, ROWS, GROUP)  # (..., 8, ROWS, 4) -> (..., ROWS, 8, 4)


# ---------------------------------------------------------------- activations


SMALLEST_MAGNITUDE = 1e-30
"""A group of activations below it counts as zero: the quotient 127 / magnitude must not overflow."""


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round the input of a product with a q8 or q4 matrix to 8 bits.

        scale[t, g] = max_k |x[t, g, k]| / 127        code[t, g, k] = rint(x[t, g, k] * (127 / max_k |x[t, g, k]|))

    x (T, K) float32. Every operation is float32, half rounds to even; a group that is not finite gets a scale that is
    not finite. Returns codes (T, G, GROUP) int8, zero beyond column K, and scales (T, G) float32.
    """
    T, K = x.shape
    groups = np.zeros((T, -(-K // GROUP) * GROUP), np.float32)
    groups[:, :K] = x
    groups = groups.reshape(T, -1, GROUP)  # (T, K) -> (T, G, GROUP)
    magnitude = np.abs(groups).max(axis=-1)
    zero = magnitude < np.float32(SMALLEST_MAGNITUDE)
    scale = np.where(zero, np.float32(0), magnitude / np.float32(127))
    with np.errstate(invalid="ignore"):  # infinity times 0, and NaN as an integer: their scale is not finite either
        factor = np.where(zero, np.float32(0), np.float32(127) / np.where(zero, np.float32(1), magnitude))
        return np.rint(groups * factor[..., None]).astype(np.int8), scale


def round_rows(x: np.ndarray) -> np.ndarray:
    """What quantize_rows keeps of x: (T, K) float32 -> (T, K) float32, new."""
    codes, scales = quantize_rows(x)
    return (codes * scales[..., None]).reshape(len(x), codes.shape[1] * GROUP)[:, : x.shape[1]]


# ---------------------------------------------------------------- float32 -> q8, q4


CHUNK_NUMBERS = 1 << 17
LARGEST_WEIGHT = 1e6  # its scale still is a finite float16
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


def _nearest_q8(w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """The integer from -127 to 127 nearest to w * inverse: (n, GROUP), (n,) -> (n, GROUP) float32."""
    level = np.rint(w * inverse[:, None])
    return np.clip(level, -127, 127, out=level)


def _pack_q4(levels: np.ndarray) -> np.ndarray:
    """Levels (b, ROWS, G, GROUP) -> codes of the blocks (b, G, 256) uint8."""
    b, _, G, _ = levels.shape
    code = _Q4_CODE[levels.astype(np.int8) - Q4_LEVELS[0]].reshape(b, ROWS, G, GROUP // 8, 2, 4)
    packed: np.ndarray = code[..., 0, :] | code[..., 1, :] << 4  # (b, ROWS, G, 4, 4)
    return packed.transpose(0, 2, 3, 1, 4).reshape(b, G, -1)


def _pack_q8(levels: np.ndarray) -> np.ndarray:
    """Levels (b, ROWS, G, GROUP) -> codes of the blocks (b, G, 512) int8."""
    b, _, G, _ = levels.shape
    return levels.astype(np.int8).reshape(b, ROWS, G, GROUP // 4, 4).transpose(0, 2, 3, 1, 4).reshape(b, G, -1)


class _Grid(NamedTuple):
    """How a format is quantized. targets: levels near the outermost ones, on which a group's largest number is laid."""

    form: type[Q8] | type[Q4]
    nearest: Callable[[np.ndarray, np.ndarray], np.ndarray]
    pack: Callable[[np.ndarray], np.ndarray]
    targets: tuple[float, ...]


_GRIDS = {
    "q8": _Grid(Q8, _nearest_q8, _pack_q8, (127.0,)),
    "q4": _Grid(Q4, _nearest_q4, _pack_q4, (-37, -35.2, -33.4, -31.6, -29.8, -28, 23, 24.6, 26.2, 27.8, 29.4, 31)),
}


def quantize(w: np.ndarray, number_format: str) -> Q8 | Q4:
    """float32 (..., N, K) -> "q8" or "q4", with scales that make the squared error small.

    Blocks of rows are independent: a matrix may be quantized in pieces, cut at multiples of ROWS rows, and the parts
    joined along the axis of blocks. Raises UsageError for a number that is not finite, or too large for a scale.
    """
    grid = _GRIDS[number_format]
    N, K = w.shape[-2:]
    B, G = -(-N // ROWS), -(-K // GROUP)
    stacked = w.reshape(-1, N, K)
    step = max(1, CHUNK_NUMBERS // (ROWS * G * GROUP))
    pieces = list(itertools.product(range(len(stacked)), range(0, B, step)))
    with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda p: _quantize_blocks(stacked[p[0]], p[1], p[1] + step, grid), pieces))
    codes, scales = (np.concatenate(part).reshape(*w.shape[:-2], B, G, -1) for part in zip(*done, strict=True))
    return grid.form(np.ascontiguousarray(codes), np.ascontiguousarray(scales), N, K)


def _quantize_blocks(w: np.ndarray, begin: int, stop: int, grid: _Grid) -> tuple[np.ndarray, np.ndarray]:
    """Blocks begin .. stop-1 of a matrix (N, K): codes (b, G, bytes), scales (b, G, ROWS)."""
    part = w[begin * ROWS : stop * ROWS]
    b, G = -(-len(part) // ROWS), -(-part.shape[1] // GROUP)
    whole = np.zeros((b * ROWS, G * GROUP), np.float32)
    whole[: len(part), : part.shape[1]] = part
    _check_range(whole, begin * ROWS)
    groups = whole.reshape(-1, GROUP)
    scale = f16_bits(_best_scales(groups, grid))  # rounded before the codes are chosen
    levels = grid.nearest(groups, _inverse(scale.view(np.float16).astype(np.float32)))
    return grid.pack(levels.reshape(b, ROWS, G, GROUP)), scale.reshape(b, ROWS, G).transpose(0, 2, 1)


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
