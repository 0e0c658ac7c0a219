"""The formats of GGUF files in which 32 weights share a float16 scale: Q4_0, Q4_1, IQ4_NL, Q5_0, Q5_1, Q8_0.

A matrix keeps the levels and scales that it has in the file, so it stands for the numbers that ggml decodes, to the
bit. Only where they lie differs: in blocks and groups (groups.py), without factors for rows.

    w[n, k] = level(code) * scale[n, q]                      k in group q
    w[n, k] = level(code) * scale[n, q] + minimum[n, q]      q4_1 and q5_1

Source: ggml, ggml-common.h (block_q4_0 ...) and ggml-quants.c (dequantize_row_q4_0 ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from npllama.numbers.blocks import BLOCK_ROWS, GROUP
from npllama.numbers.formats import ArraySpec, Levels, LevelSet, UnstorableError
from npllama.numbers.groups import GroupedFormat, Scaling, pack_nibbles, unpack_nibbles
from npllama.numbers.rounding import Nearest, best_scales, in_vectors, reciprocal

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 unevenly spaced levels of IQ4_NL and IQ4_XS."""

NIBBLE_BYTES = BLOCK_ROWS * GROUP // 2
"""Bytes of a block's group that hold the lower four bits of its codes, in a format of five."""

_EACH_BIT = np.arange(8, dtype=np.uint8)[:, None]


class GgmlWeight(NamedTuple):
    """A matrix of `rows` rows and `columns` columns; the class of each format is a subclass.

    codes (..., B, Q, bytes) uint8: of 4 bits as in q4.Q4, of 8 bits as in q8.Q8. Of 5 bits: vectors 0 to 3 are the
    lower four as in q4.Q4, and bit v of byte 4 r + j of vector 4 is the fifth one of row r, column 4 v + j.
    scales (..., B, Q, 1 or 2, 16) uint16: float16 bits of the scales of 16 rows, then of their minimums.
    """

    codes: np.ndarray
    scales: np.ndarray
    rows: int
    columns: int


class Q4_0(GgmlWeight):  # noqa: N801 (the names of ggml, here and below)
    """Levels from -8 to 7."""

    __slots__ = ()


class Q4_1(GgmlWeight):  # noqa: N801
    """Levels from 0 to 15, and minimums."""

    __slots__ = ()


class IQ4_NL(GgmlWeight):  # noqa: N801
    """Levels of IQ4_LEVELS."""

    __slots__ = ()


class Q5_0(GgmlWeight):  # noqa: N801
    """Levels from -16 to 15."""

    __slots__ = ()


class Q5_1(GgmlWeight):  # noqa: N801
    """Levels from 0 to 31, and minimums."""

    __slots__ = ()


class Q8_0(GgmlWeight):  # noqa: N801
    """Levels from -128 to 127."""

    __slots__ = ()


class GgmlFormat(GroupedFormat):
    """One of the formats. values: the level of each code. minimums: whether groups have one."""

    largest = "65,504"
    max_weight = 65504.0
    kernel = "npllama.execution.kernels.ggml"

    values: ClassVar[Sequence[int]]
    minimums: ClassVar[bool] = False
    targets: ClassVar[tuple[float, ...]] = ()

    @cached_property
    def _value(self) -> np.ndarray:
        """The level of each code, float32."""
        return np.array(self.values, np.float32)

    def codes(self, levels: np.ndarray) -> np.ndarray:
        """The code of each level, int8 -> uint8: levels are consecutive, with 8 bits also from 127 to -128."""
        return levels.view(np.uint8) - np.uint8(self.values[0] % 256)

    # Scales ----------------------------------------------------------------------------------------------------------

    def scale_arrays(self, blocks: tuple[int, ...], groups: int) -> dict[str, ArraySpec]:
        return {"scales": ArraySpec("<u2", (*blocks, groups, 2 if self.minimums else 1, BLOCK_ROWS))}

    def scaling(self, w: Any) -> Scaling:
        numbers = w.scales.view(np.float16).astype(np.float32)  # (..., B, Q, 1 or 2, BLOCK_ROWS)
        ones = np.ones((*numbers.shape[:-3], BLOCK_ROWS), np.float32)
        return Scaling(numbers[..., 0, :], ones, numbers[..., 1, :] if self.minimums else None)

    # Codes -----------------------------------------------------------------------------------------------------------

    def levels(self, codes: np.ndarray) -> np.ndarray:
        return self._value[_unpack(codes, self.code_bits)]

    def pack(self, levels: np.ndarray) -> np.ndarray:
        return _pack(self.codes(levels.astype(np.int8, copy=False)), self.code_bits)

    # Numbers that are rounded ----------------------------------------------------------------------------------------

    @property
    def rule(self) -> Nearest | None:
        return Nearest(min(self.values), max(self.values))

    def round_groups(self, groups: np.ndarray) -> tuple[np.ndarray, ...]:
        """As GroupedFormat.round_groups says; minimums are those of the numbers, and nothing is searched for then."""
        flat = groups.reshape(-1, GROUP)
        low = flat.min(axis=1).astype(np.float16) if self.minimums else None
        if low is None:
            scales = best_scales(flat, self).astype(np.float16)
        else:
            scales = ((flat.max(axis=1) - low) / np.float32(max(self.values))).astype(np.float16)
            flat = flat - low[:, None].astype(np.float32)
        levels = self.nearest(flat, reciprocal(scales.astype(np.float32)))
        numbers = (part.reshape(groups.shape[:-1]) for part in (scales, low) if part is not None)
        return levels.reshape(groups.shape), _in_blocks(*numbers)

    # Numbers that are quantized already ------------------------------------------------------------------------------

    def holds(self, stored: LevelSet) -> bool:
        if stored.minimums:
            return self.minimums and stored.values <= set(self.values)
        return stored.values <= {value - self._shift for value in self.values}

    @property
    def _shift(self) -> int:
        """What is added to levels on both sides of zero, so that they count from a minimum."""
        return (max(self.values) + 1) // 2 if self.minimums else 0

    def lay_out(self, rows: Levels) -> dict[str, np.ndarray]:
        levels, scales, minimums = rows
        if self.minimums and minimums is None:
            levels, minimums = levels + np.int8(self._shift), scales * np.float32(-self._shift)
        b = -(-len(levels) // BLOCK_ROWS)
        with np.errstate(over="ignore"):
            stored = [part.astype(np.float16) for part in (scales, minimums) if part is not None]
        for part in stored:
            if not np.isfinite(part).all():
                raise UnstorableError(int(np.flatnonzero(~np.isfinite(part))[0]) * GROUP, self.title, self.largest)
        whole, *numbers = (_whole_blocks(part, b) for part in (levels, *stored))
        return {"codes": self.pack(in_vectors(whole)), "scales": _in_blocks(*numbers)}


def _whole_blocks(part: np.ndarray, b: int) -> np.ndarray:
    """An array of rows, filled up with zeros to b blocks: (rows, ...) -> (b, BLOCK_ROWS, ...)."""
    if missing := b * BLOCK_ROWS - len(part):
        part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])
    return part.reshape(b, BLOCK_ROWS, *part.shape[1:])


def _in_blocks(*parts: np.ndarray) -> np.ndarray:
    """Scales, and minimums, (b, BLOCK_ROWS, Q) float16 -> bits as they are stored, (b, Q, 1 or 2, BLOCK_ROWS)."""
    return np.stack([part.swapaxes(1, 2) for part in parts], axis=2).view(np.uint16)


def _unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a block's groups, a byte each: (..., bytes) -> (..., GROUP/4, 64)."""
    if bits == 8:
        return codes.reshape(*codes.shape[:-1], GROUP // 4, 4 * BLOCK_ROWS)
    if bits == 4:
        return unpack_nibbles(codes)
    high = codes[..., None, NIBBLE_BYTES:] >> _EACH_BIT & 1  # (..., 8, 64)
    return unpack_nibbles(codes[..., :NIBBLE_BYTES]) | high << 4


def _pack(vectors: np.ndarray, bits: int) -> np.ndarray:
    """The same the other way."""
    if bits == 8:
        return vectors.reshape(*vectors.shape[:-2], -1)
    if bits == 4:
        return pack_nibbles(vectors)
    tops = np.bitwise_or.reduce(vectors >> 4 << _EACH_BIT, axis=-2)
    return np.concatenate([pack_nibbles(vectors & 15), tops], axis=-1)


class _Q4_0(GgmlFormat):  # noqa: N801
    name = title = "q4_0"
    weight = Q4_0
    code_bits, values = 4, range(-8, 8)
    targets = (-8.4, -8, -7.6, 7)


class _Q4_1(GgmlFormat):  # noqa: N801
    name = title = "q4_1"
    weight = Q4_1
    code_bits, values, minimums = 4, range(16), True


class _IQ4_NL(GgmlFormat):  # noqa: N801
    name = title = "iq4_nl"
    weight = IQ4_NL
    code_bits, values = 4, IQ4_LEVELS
    targets = (-134, -127, -120, 106, 113, 120)

    def codes(self, levels: np.ndarray) -> np.ndarray:
        of_bytes = np.zeros(256, np.uint8)
        of_bytes[np.array(self.values, np.int8).view(np.uint8)] = np.arange(16)
        return of_bytes.take(levels.view(np.uint8))

    @property
    def rule(self) -> None:
        """Its levels follow none."""

    def nearest(self, w: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        borders = (self._value[1:] + self._value[:-1]) / 2
        return self._value[np.searchsorted(borders, w * inverse[:, None])]


class _Q5_0(GgmlFormat):  # noqa: N801
    name = title = "q5_0"
    weight = Q5_0
    code_bits, values = 5, range(-16, 16)
    targets = (-16.4, -15.6, 15)


class _Q5_1(GgmlFormat):  # noqa: N801
    name = title = "q5_1"
    weight = Q5_1
    code_bits, values, minimums = 5, range(32), True


class _Q8_0(GgmlFormat):  # noqa: N801
    name = title = "q8_0"
    weight = Q8_0
    code_bits, values = 8, (*range(128), *range(-128, 0))
    targets = (127.0,)


FORMATS = (_Q8_0(), _Q5_1(), _Q5_0(), _Q4_1(), _Q4_0(), _IQ4_NL())
