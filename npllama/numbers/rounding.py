"""float32 to a format of blocks and groups: the search for scales that make the squared error small.

What stands here defines the bytes. Many weights are rounded by the same operations compiled (execution/rounding.py),
where numba is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from npllama.numbers.bf16 import bf16_bits, from_bf16
from npllama.numbers.blocks import BLOCK_ROWS, GROUP, SCALES

CHUNK_NUMBERS = 1 << 17
MAX_WEIGHT = 1e6
"""A model with larger weights is broken; and the sums below stay far from the largest float32."""

MAX_WORKERS = 8

COMPILED = "npllama.execution.rounding"

FOUR = {1: np.uint32, 4: np.complex128}
"""Bytes of a number -> a type of four times as many."""


COMPILED_FROM = 1 << 24
"""Weights that are rounded in NumPy before it is worth compiling; none where compiled code is kept."""


class Nearest(NamedTuple):
    """A rule for the level nearest to a number x, simple enough to be compiled.

    Without a table all integers from low to high are levels; else table[floor(2 x - 2 low)] is the level, and the
    table's first entry, low, and its last are those of what lies beyond.
    """

    low: int
    high: int
    table: tuple[float, ...] = ()

    def levels(self, w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        """The levels nearest to w * inverse: (n, GROUP), (n,) -> (n, GROUP) float32."""
        if not self.table:
            return integers_nearest(w, inverse, self.low, self.high)
        cell = w * (np.float32(2) * inverse)[:, None]
        cell -= np.float32(2 * self.low)
        np.clip(cell, 0, len(self.table) - 1, out=cell)
        return np.array(self.table, np.float32).take(cell.astype(np.uint8))


def integers_nearest(w: np.ndarray, inverse: np.ndarray, low: int, high: int) -> np.ndarray:
    """The nearest of all integers from low to high, half to even: (n, GROUP), (n,) -> (n, GROUP) float32."""
    level = np.rint(w * inverse[:, None])
    return np.clip(level, low, high, out=level)


class Codebook(Protocol):
    """What the search for scales needs of a format: its levels, and the rule that `nearest` follows, if one does."""

    @property
    def targets(self) -> tuple[float, ...]: ...
    @property
    def rule(self) -> Nearest | None: ...
    def nearest(self, w: np.ndarray, inverse: np.ndarray) -> np.ndarray: ...


class Search(Protocol):
    """The functions of the same names below, compiled, for a format with a rule."""

    def best_scales(self, w: np.ndarray, grid: Codebook, rule: Nearest) -> np.ndarray: ...
    def with_stored_scales(
        self, w: np.ndarray, wanted: np.ndarray, factors: np.ndarray, rule: Nearest
    ) -> tuple[np.ndarray, np.ndarray]: ...


class Grid(Codebook, Protocol):
    """What rounding needs of a format (groups.GroupedFormat): levels and scales, and how levels are packed."""

    def round_groups(self, groups: np.ndarray) -> tuple[np.ndarray, ...]: ...
    def pack(self, levels: np.ndarray) -> np.ndarray: ...


def quantize(w: np.ndarray, grid: Grid) -> tuple[np.ndarray, ...]:
    """float32 (..., N, K), finite, at most MAX_WEIGHT -> the arrays of a format (GroupedFormat.arrays), codes first."""
    from concurrent.futures import ThreadPoolExecutor  # here, because few starts quantize

    if grid.rule is not None:
        _compile_for(w.size)
    N, K = w.shape[-2:]
    B, Q = -(-N // BLOCK_ROWS), -(-K // GROUP)
    stacked = w.reshape(-1, N, K)
    step = max(1, CHUNK_NUMBERS // (BLOCK_ROWS * Q * GROUP))
    pieces = list(itertools.product(range(len(stacked)), range(0, B, step)))
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda p: _quantize_blocks(stacked[p[0]], p[1], p[1] + step, grid), pieces))
    parts = (np.concatenate(part) for part in zip(*done, strict=True))
    return tuple(np.ascontiguousarray(part.reshape(*w.shape[:-2], B, *part.shape[1:])) for part in parts)


def _quantize_blocks(w: np.ndarray, begin: int, stop: int, grid: Grid) -> tuple[np.ndarray, ...]:
    """Blocks begin .. stop-1 of a matrix (N, K): codes (b, Q, bytes), then scales."""
    part = w[begin * BLOCK_ROWS : stop * BLOCK_ROWS]
    b, Q = -(-len(part) // BLOCK_ROWS), -(-part.shape[1] // GROUP)
    whole = np.zeros((b * BLOCK_ROWS, Q * GROUP), np.float32)
    whole[: len(part), : part.shape[1]] = part
    levels, *scales = grid.round_groups(whole.reshape(b, BLOCK_ROWS, Q, GROUP))
    return (grid.pack(in_vectors(levels)), *scales)


class _Compiled:
    """The compiled search once it is there, and how many weights were rounded without it."""

    search: ClassVar[Search | None] = None
    n_rounded: ClassVar[int] = 0
    refused: ClassVar[bool] = False


def _compile_for(n_weights: int) -> None:
    """Have the search compiled, or loaded, if that is worth it for so many weights more."""
    _Compiled.n_rounded += n_weights
    if _Compiled.search is not None or _Compiled.refused or os.environ.get("NPLLAMA_BACKEND") == "numpy":
        return
    if importlib.util.find_spec("numba") is None:
        return
    compiled = importlib.import_module(COMPILED)  # by name: this room is below, and does without it
    if _Compiled.n_rounded < COMPILED_FROM and not compiled.is_kept():
        return
    try:
        _Compiled.search = compiled.compiled_search()
    except compiled.threads.UnavailableError:  # as everywhere: NumPy computes then
        _Compiled.refused = True


def in_vectors(levels: np.ndarray) -> np.ndarray:
    """Levels in the order of rows and columns -> vectors of four columns of each row.

    (b, BLOCK_ROWS, Q, GROUP) -> (b, Q, GROUP/4, 64)
    """
    b, _, Q, _ = levels.shape
    fours: np.ndarray = np.ascontiguousarray(levels).view(FOUR[levels.itemsize]).reshape(b, BLOCK_ROWS, Q, GROUP // 4)
    vectors = np.ascontiguousarray(fours.transpose(0, 2, 3, 1))  # four columns of a row are moved as one number
    return vectors.view(levels.dtype).reshape(b, Q, GROUP // 4, 4 * BLOCK_ROWS)


def round_to_8_bit_scales(groups: np.ndarray, grid: Codebook) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers (b, BLOCK_ROWS, Q, GROUP) -> levels, scales (b, Q, BLOCK_ROWS), factors (b, BLOCK_ROWS) bfloat16."""
    b, _, Q, _ = groups.shape
    flat = groups.reshape(-1, GROUP)
    wanted = best_scales(flat, grid)
    factors = bf16_bits(np.abs(wanted).reshape(-1, Q).max(axis=1) / SCALES[127])
    scales, levels = with_stored_scales(flat, wanted, from_bf16(factors).repeat(Q), grid)
    in_blocks = scales.reshape(b, BLOCK_ROWS, Q).transpose(0, 2, 1)
    return levels.reshape(groups.shape), in_blocks, factors.reshape(b, BLOCK_ROWS)


def with_stored_scales(
    w: np.ndarray, wanted: np.ndarray, factors: np.ndarray, grid: Codebook
) -> tuple[np.ndarray, np.ndarray]:
    """The 8-bit scale above or below the wanted one, whichever leaves the smaller error, and its levels.

    w (n, GROUP), wanted and factors (n,) -> codes of scales (n,) uint8, levels (n, GROUP), whole numbers.
    """
    if _Compiled.search is not None and grid.rule is not None:
        return _Compiled.search.with_stored_scales(w, wanted, factors, grid.rule)
    above = np.searchsorted(SCALES[:127], np.abs(wanted) * reciprocal(factors)).clip(1, 127).astype(np.uint8)
    sign = np.where(wanted < 0, np.uint8(128), np.uint8(0))
    codes, levels, errors = [], [], []
    for code in (above, above - 1):
        scale = SCALES[code | sign] * factors
        level = grid.nearest(w, reciprocal(scale))
        codes.append(code | sign)
        levels.append(level)
        errors.append(sum_by_halves(np.square(level * scale[:, None] - w)))
    below = errors[1] < errors[0]
    return np.where(below, codes[1], codes[0]), np.where(below[:, None], levels[1], levels[0])


def best_scales(w: np.ndarray, grid: Codebook) -> np.ndarray:
    """The scale of each group: (n, GROUP) -> (n,) float32.

    For given levels q the best scale is w.q / q.q, and leaves the squared error w.w - (w.q)^2 / q.q. So candidates
    are compared by (w.q)^2 / q.q: each target for the largest number, then the best one's levels chosen anew.
    """
    if _Compiled.search is not None and grid.rule is not None:
        return _Compiled.search.best_scales(w, grid, grid.rule)
    largest = w[np.arange(len(w)), np.abs(w).argmax(axis=1)]
    best, most = np.zeros(len(w), np.float32), np.zeros(len(w), np.float32)
    for target in (*grid.targets, None):
        q = grid.nearest(w, reciprocal(best if target is None else largest / np.float32(target)))
        along, length = sum_by_halves(w * q), sum_by_halves(q * q)
        scale = along * reciprocal(length)
        better = along * scale > most
        best[better], most[better] = scale[better], (along * scale)[better]
    return best


def sum_by_halves(numbers: np.ndarray) -> np.ndarray:
    """The sums of groups (n, GROUP) float32 -> (n,): the second half is added to the first, and so on."""
    while numbers.shape[1] > 1:
        half = numbers.shape[1] // 2
        numbers = numbers[:, :half] + numbers[:, half:]
    total: np.ndarray = numbers[:, 0]
    return total


def reciprocal(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 where that is not a finite float32."""
    tiny = np.abs(x) < 1e-37
    return np.where(tiny, np.float32(0), np.float32(1) / np.where(tiny, np.float32(1), x))
