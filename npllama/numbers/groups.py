"""What quantized formats share: blocks of rows, groups of columns; and the 8-bit scales of q8, q6 and q4.

GROUP neighbours of a row share a scale, and BLOCK_ROWS rows stand interleaved in a block, so that a vector holds the
same columns of many rows and no sum runs across it. Blocks (B) and groups (Q) are whole: what is beyond the last row or
column is zero. The codes of a block's group are vectors of 64 bytes or parts of them, as each format says.

    w[n, k] = level(code) * scale[n, q] * factor[n]        k in group q
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from npllama.numbers.bf16 import from_bf16
from npllama.numbers.blocks import BLOCK_ROWS, GROUP, SCALES
from npllama.numbers.formats import ArraySpec, NumberFormat, UnstorableError, Weight, as_float32
from npllama.numbers.rounding import MAX_WEIGHT, Nearest, quantize, round_to_8_bit_scales


class Grouped(NamedTuple):
    """A quantized matrix unpacked for products in NumPy.

        w[n, q, k] = (levels[q, k, n] * scales[q, n] + minimums[q, n]) * factors[n]

    levels (..., Q, GROUP, rows) integers as float32, scales and minimums (..., Q, rows) float32, factors (..., rows)
    float32. Most formats have no minimums.
    """

    levels: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    minimums: np.ndarray | None = None


class Scaling(NamedTuple):
    """What levels are multiplied with: scales and minimums (..., B, Q, BLOCK_ROWS), factors (..., B, BLOCK_ROWS)."""

    scales: np.ndarray
    factors: np.ndarray
    minimums: np.ndarray | None = None


class GroupedFormat(NumberFormat):
    """A format of blocks and groups. Its weight is a NamedTuple like q8.Q8: codes, scales, factors, rows, columns.

    code_bits: bits of a code. code_dtype: of the codes in the file. A subclass says what its codes stand for
    (`levels`), which level is nearest (`rule`, or `nearest`) and how levels are packed (`pack`). targets: levels near
    the outermost ones, on which a group's largest number is laid when scales are searched. One with other scales says
    how they are stored (`scale_arrays`), what they are (`scaling`) and how numbers are rounded to them
    (`round_groups`).
    """

    quantized = True
    block_rows = BLOCK_ROWS
    largest = "1,000,000"

    max_weight: ClassVar[float] = MAX_WEIGHT
    code_bits: ClassVar[int]
    code_dtype: ClassVar[str] = "|u1"
    targets: ClassVar[tuple[float, ...]]

    def levels(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> vectors of the integers they stand for: (..., B, Q, bytes) -> (..., B, Q, GROUP/4, 64) float32."""
        raise NotImplementedError

    @property
    def rule(self) -> Nearest | None:
        """How `nearest` finds a level, where it is as simple as that; then the search for scales can be compiled."""
        return None

    def nearest(self, w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        """The level nearest to w * inverse: (n, GROUP), (n,) -> (n, GROUP) float32. By the rule, if there is one."""
        if self.rule is None:
            raise NotImplementedError
        return self.rule.levels(w, inverse)

    def pack(self, levels: np.ndarray) -> np.ndarray:
        """Vectors of levels (b, Q, GROUP/4, 64) float32 -> codes of the blocks (b, Q, bytes)."""
        raise NotImplementedError

    def round_groups(self, groups: np.ndarray) -> tuple[np.ndarray, ...]:
        """Numbers (b, BLOCK_ROWS, Q, GROUP) -> their levels (the same shape), and the arrays of `scale_arrays`."""
        return round_to_8_bit_scales(groups, self)

    def scale_arrays(self, blocks: tuple[int, ...], groups: int) -> dict[str, ArraySpec]:
        """How scales are stored, for so many blocks of rows and groups of columns."""
        return {
            "scales": ArraySpec("|u1", (*blocks, groups, BLOCK_ROWS)),
            "factors": ArraySpec("<u2", (*blocks, BLOCK_ROWS)),
        }

    def scaling(self, w: Any) -> Scaling:
        """The scales of a weight as numbers."""
        return Scaling(SCALES[w.scales], from_bf16(w.factors))

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        blocks, groups = (*shape[:-2], -(-shape[-2] // BLOCK_ROWS)), -(-shape[-1] // GROUP)
        codes = ArraySpec(self.code_dtype, (*blocks, groups, BLOCK_ROWS * GROUP * self.code_bits // 8))
        return {"codes": codes, **self.scale_arrays(blocks, groups)}

    def assemble(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> Weight:
        made: Weight = self.weight(*(arrays[name] for name in self.arrays(shape)), shape[-2], shape[-1])
        return made

    def encode(self, block: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
        """As NumberFormat.encode says; `block` begins at a whole block of rows."""
        wide = as_float32(block, dtype)
        storable = np.abs(wide) <= self.max_weight  # not true for NaN
        if not storable.all():
            raise UnstorableError(int(np.flatnonzero(~storable)[0]), self.title, self.largest)
        return dict(zip(self.arrays(wide.shape), quantize(wide, self), strict=True))

    def quantize(self, w: np.ndarray) -> Any:
        """float32 (..., N, K) -> this format, with scales that make the squared error small. Raises UnstorableError.

        Blocks of rows are independent: a matrix may be quantized in pieces, cut at multiples of BLOCK_ROWS.
        """
        return self.assemble(self.encode(w, "f32"), w.shape)

    def widen(self, w: Any) -> np.ndarray:
        groups = self._in_rows(w)  # (..., B, Q, BLOCK_ROWS, GROUP)
        scales, factors, minimums = self.scaling(w)
        groups *= scales[..., None]  # exact: a level has 8 bits, an 8-bit scale 6, a float16 11
        if minimums is not None:
            groups += minimums[..., None]
        groups *= factors[..., None, :, None]
        rows = np.swapaxes(groups, -3, -2)  # (..., B, BLOCK_ROWS, Q, GROUP)
        whole = rows.reshape(*rows.shape[:-4], rows.shape[-4] * BLOCK_ROWS, rows.shape[-2] * GROUP)
        return np.ascontiguousarray(whole[..., : w.rows, : w.columns])

    def widen_rows(self, w: Any, rows: np.ndarray) -> np.ndarray:
        parts = (part[rows // BLOCK_ROWS] for part in w[:-2])
        blocks = type(w)(*parts, BLOCK_ROWS * len(rows), w.columns)
        return self.widen(blocks)[np.arange(len(rows)) * BLOCK_ROWS + rows % BLOCK_ROWS]

    def for_products(self, w: Any) -> Grouped:
        in_blocks = np.moveaxis(self._in_rows(w), -4, -2)  # (..., B, Q, BLOCK_ROWS, GROUP) -> (..., Q, ROWS, B, GROUP)
        levels = np.moveaxis(in_blocks, (-1, -2), (-3, -2))  # -> (..., Q, GROUP, B, BLOCK_ROWS)
        scales, factors, minimums = self.scaling(w)

        def by_group(part: np.ndarray) -> np.ndarray:
            return _rows(np.swapaxes(part, -3, -2), w.rows)  # (..., B, Q, BLOCK_ROWS) -> (..., Q, rows)

        return Grouped(
            _rows(levels, w.rows),
            by_group(scales),
            _rows(factors, w.rows),
            None if minimums is None else by_group(minimums),
        )

    def _in_rows(self, w: Any) -> np.ndarray:
        """Levels in the order of rows and columns: (..., B, Q, BLOCK_ROWS, GROUP) float32, new."""
        vectors = self.levels(w.codes).reshape(*w.codes.shape[:-1], GROUP // 4, BLOCK_ROWS, 4)
        groups = np.swapaxes(vectors, -3, -2)  # (..., GROUP/4, BLOCK_ROWS, 4) -> (..., BLOCK_ROWS, GROUP/4, 4)
        return groups.reshape(*w.codes.shape[:-1], BLOCK_ROWS, GROUP)


def _rows(part: np.ndarray, n: int) -> np.ndarray:
    """The first n rows, block after block: (..., B, BLOCK_ROWS) -> (..., n)."""
    return np.ascontiguousarray(part.reshape(*part.shape[:-2], -1)[..., :n])


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Two codes to a byte -> a byte each, lower ones of a vector before its upper ones: (..., 256) -> (..., 8, 64)."""
    vectors = packed.reshape(*packed.shape[:-1], -1, 1, 4 * BLOCK_ROWS)
    both = np.concatenate([vectors & 15, vectors >> 4], axis=-2)  # (..., 4, 2, 64)
    return both.reshape(*packed.shape[:-1], -1, 4 * BLOCK_ROWS)


def pack_nibbles(vectors: np.ndarray) -> np.ndarray:
    """Vectors of codes below 16 (b, Q, 8, 64) -> two codes to a byte (b, Q, 256)."""
    packed: np.ndarray = vectors[:, :, ::2] | vectors[:, :, 1::2] << 4
    return packed.reshape(*vectors.shape[:2], -1)
