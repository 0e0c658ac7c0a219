"""float32 to a format of blocks and groups: the search for scales that make the squared error small."""

from __future__ import annotations

import itertools
import os
from typing import Protocol

import numpy as np

from npllama.numbers.bf16 import bf16_bits, from_bf16
from npllama.numbers.blocks import BLOCK_ROWS, GROUP, SCALES

CHUNK_NUMBERS = 1 << 17
MAX_WEIGHT = 1e6
"""A model with larger weights is broken; and the sums below stay far from the largest float32."""

MAX_WORKERS = 8


class Grid(Protocol):
    """What the search needs of a format (groups.GroupedFormat): its levels and how they are packed."""

    @property
    def targets(self) -> tuple[float, ...]: ...
    def nearest(self, w: np.ndarray, inverse: np.ndarray) -> np.ndarray: ...
    def pack(self, levels: np.ndarray) -> np.ndarray: ...


def quantize(w: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 (..., N, K), finite, at most MAX_WEIGHT -> codes, scales, factors (see GroupedFormat)."""
    from concurrent.futures import ThreadPoolExecutor  # here, because few starts quantize

    N, K = w.shape[-2:]
    B, Q = -(-N // BLOCK_ROWS), -(-K // GROUP)
    stacked = w.reshape(-1, N, K)
    step = max(1, CHUNK_NUMBERS // (BLOCK_ROWS * Q * GROUP))
    pieces = list(itertools.product(range(len(stacked)), range(0, B, step)))
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda p: _quantize_blocks(stacked[p[0]], p[1], p[1] + step, grid), pieces))
    codes, scales, factors = (np.concatenate(part) for part in zip(*done, strict=True))
    blocks = (*w.shape[:-2], B)
    return (
        np.ascontiguousarray(codes.reshape(*blocks, Q, -1)),
        np.ascontiguousarray(scales.reshape(*blocks, Q, BLOCK_ROWS)),
        factors.reshape(*blocks, BLOCK_ROWS),
    )


def _quantize_blocks(w: np.ndarray, begin: int, stop: int, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks begin .. stop-1 of a matrix (N, K): codes (b, Q, bytes), scales (b, Q, ROWS), factors (b, ROWS)."""
    part = w[begin * BLOCK_ROWS : stop * BLOCK_ROWS]
    b, Q = -(-len(part) // BLOCK_ROWS), -(-part.shape[1] // GROUP)
    whole = np.zeros((b * BLOCK_ROWS, Q * GROUP), np.float32)
    whole[: len(part), : part.shape[1]] = part
    groups = whole.reshape(-1, GROUP)
    wanted = _best_scales(groups, grid)
    factors = bf16_bits(np.abs(wanted).reshape(-1, Q).max(axis=1) / SCALES[127])
    scale, levels = _with_stored_scales(groups, wanted, from_bf16(factors).repeat(Q), grid)
    in_blocks = scale.reshape(b, BLOCK_ROWS, Q).transpose(0, 2, 1)
    return grid.pack(_vectors(levels, b, Q)), in_blocks, factors.reshape(b, BLOCK_ROWS)


def _vectors(levels: np.ndarray, b: int, Q: int) -> np.ndarray:
    """Levels in the order of rows and columns -> vectors of four columns of each row: (b, Q, GROUP/4, 64)."""
    in_rows = levels.reshape(b, BLOCK_ROWS, Q, GROUP // 4, 4)
    return in_rows.transpose(0, 2, 3, 1, 4).reshape(b, Q, GROUP // 4, 4 * BLOCK_ROWS)


def _with_stored_scales(
    w: np.ndarray, wanted: np.ndarray, factors: np.ndarray, grid: Grid
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


def _best_scales(w: np.ndarray, grid: Grid) -> np.ndarray:
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
