"""What a number format is, and the registry through which everything else finds one.

A weight is a NamedTuple of arrays, so its type selects format and kernel; plain float32 is a plain array. A matrix is
(rows, columns) = (outputs, inputs); any leading axes are layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from npllama.errors import UsageError, quote

Weight = np.ndarray | tuple[Any, ...]
"""A matrix in any number format: a float32 array, or the NamedTuple of a format."""


class ArraySpec(NamedTuple):
    """What one .npy file must hold: dtype as NumPy writes it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class LevelSet(NamedTuple):
    """What a quantized matrix may hold: which levels, and whether groups have minimums."""

    values: frozenset[int]
    minimums: bool = False


class Levels(NamedTuple):
    """Rows as their quantized groups: w[n, q, k] = levels[n, q, k] * scales[n, q] + minimums[n, q].

    levels (rows, Q, columns of a group) int8; scales and minimums (rows, Q) float32, minimums None for zeros.
    """

    levels: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None = None

    def widen(self) -> np.ndarray:
        """The numbers, float32, new: each operation rounded, in the order of the equation."""
        found = self.levels.astype(np.float32)
        found *= self.scales[..., None]
        if self.minimums is not None:
            found += self.minimums[..., None]
        return found


class UnstorableError(UsageError):
    """A number that a format cannot hold. at: its index among the numbers that were to be stored, in C order."""

    def __init__(self, at: int, format_name: str, largest: str) -> None:
        super().__init__(
            f"number {at} cannot be stored in {format_name}, which holds finite numbers up to {largest}; "
            f"choose a format with a wider range."
        )
        self.at = at


class NumberFormat:
    """One way to store a matrix. A subclass is a format; `register` makes it known.

    name: in manifests and on the command line. weight: its NamedTuple (np.ndarray for float32). title and largest, for
    messages: its full name, the largest number it holds. kernel: the module that registers its compiled products when
    it is imported. quantized: its products round their input to 8 bits (see groups.py). block_rows: rows stored
    together. output: the format of the output matrix in a model of this format; "" for this format itself.
    """

    name: ClassVar[str]
    weight: ClassVar[type]
    title: ClassVar[str]
    largest: ClassVar[str]
    kernel: ClassVar[str]
    quantized: ClassVar[bool] = False
    block_rows: ClassVar[int] = 1
    output: ClassVar[str] = ""

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """The arrays that store a weight of this shape, by the names of the NamedTuple's fields."""
        raise NotImplementedError

    def assemble(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> Weight:
        """Arrays as they lie in files -> the weight as kernels take it; no copy."""
        raise NotImplementedError

    def encode(self, block: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
        """Rows of a matrix (rows, columns) or a vector (n,) -> the arrays that store them.

        dtype "f32", "f16", "bf16" (bits) or "f64": what `block` holds. Rounds to nearest, half to even.
        Raises UnstorableError.
        """
        raise NotImplementedError

    def holds(self, stored: LevelSet) -> bool:
        """Whether it holds the levels of a matrix that is quantized already, so that `lay_out` can be asked."""
        return False

    def lay_out(self, rows: Levels) -> dict[str, np.ndarray]:
        """As `encode`, for rows in levels that it holds: they stay, and scales become float16. UnstorableError."""
        raise NotImplementedError

    def widen(self, w: Any) -> np.ndarray:
        """The numbers that a weight stands for, float32 (float32 itself is not copied)."""
        raise NotImplementedError

    def widen_rows(self, w: Any, rows: np.ndarray) -> np.ndarray:
        """Some rows of a matrix (N, K): (T,) integers -> (T, K) float32, new."""
        return self.widen(type(w)(*(part[rows] for part in w)))

    def for_products(self, w: Any) -> Any:
        """A weight as NumPy multiplies by it: float32, or groups.Grouped for a quantized format."""
        return self.widen(w)

    def bits_per_weight(self, shape: tuple[int, ...] = (4096, 4096)) -> float:
        """Bits that a weight takes on average in a matrix of this shape."""
        return sum(8 * spec.size_bytes for spec in self.arrays(shape).values()) / math.prod(shape)


FORMATS: dict[str, NumberFormat] = {}
"""Every format that is known, by name, in the order of registration."""

_BY_WEIGHT: dict[type, NumberFormat] = {}


def register(number_format: NumberFormat) -> NumberFormat:
    """Make a format known to everything that stores, opens or computes. Raises UsageError for a name that is taken."""
    if number_format.name in FORMATS or number_format.weight in _BY_WEIGHT:
        raise UsageError(f"a number format {quote(number_format.name)} is registered already; choose another name.")
    FORMATS[number_format.name] = number_format
    _BY_WEIGHT[number_format.weight] = number_format
    return number_format


def named(name: object, quantized_only: bool = False) -> NumberFormat:
    """The format of a name. Raises UsageError with the names there are."""
    known = [f.name for f in FORMATS.values() if f.quantized or not quantized_only]
    if not isinstance(name, str) or name not in known:
        what = "is not a quantized format" if quantized_only else "is not known"
        raise UsageError(f"dtype {quote(name)} {what}; choose one of {', '.join(known)}.")
    return FORMATS[name]


def format_of(w: Weight) -> NumberFormat:
    """The format of a weight, by its type. Raises TypeError for what is none, groups.Grouped among it."""
    found = _BY_WEIGHT.get(np.ndarray if isinstance(w, np.ndarray) else type(w))
    if found is None:
        raise TypeError(f"a {type(w).__name__} is no weight of a registered number format")
    return found


def widen(w: Weight) -> np.ndarray:
    """A weight in any format -> the numbers it stands for, float32."""
    return format_of(w).widen(w)


def widen_rows(w: Weight, rows: np.ndarray) -> np.ndarray:
    """Some rows of a matrix (N, K) in any format: (T,) integers -> (T, K) float32, new."""
    return format_of(w).widen_rows(w, rows)


def as_float32(block: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of "f32", "f16", "bf16" (bits) or "f64" -> float32; what is too large becomes infinity."""
    if dtype == "bf16":
        return (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        return block.astype(np.float32, copy=False)


def check_exponents(number_format: NumberFormat, bits: np.ndarray, exponent: int) -> None:
    """Raise UnstorableError at the first number whose exponent bits are all set: infinity or NaN."""
    mask = bits.dtype.type(exponent)
    if bits.size and (bits & mask).max() == mask:
        at = int(np.flatnonzero((bits & mask) == mask)[0])
        raise UnstorableError(at, number_format.title, number_format.largest)
