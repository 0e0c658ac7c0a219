"""Arrays inside files: where their elements lie, and how a block of rows comes into memory.

A View is one array of one file, as torch describes it (storage, offset, shape, strides). A Tensor is one weight of the
model: a View, or the model-parallel shards of one, or rows in another order. Reading takes as much memory as the block
asked for, plus a few MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from npllama.checkpoints.files import InputFile
from npllama.errors import CheckpointError, quote
from npllama.numbers.formats import Levels, LevelSet, NumberFormat

NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "f64": np.float64}
"""The formats that weights may have, and the arrays that carry them (bfloat16: its bits)."""

MAX_READ_BYTES = 4 << 20  # bytes; strided views are read in pieces of at most this
MIN_READ_BYTES = 4 << 10  # bytes; below this, reading what lies between the elements costs less than another read
MAX_EXPANSION = 1 << 16  # elements; a stride of 0 may repeat a number so often, and cannot ask for memory without end


@dataclass(eq=False)
class Storage:
    """A run of `numel` equal elements of one file, beginning at byte `start`."""

    file: InputFile
    dtype: str
    itemsize: int
    start: int
    numel: int
    swapped: bool = False


@dataclass(frozen=True)
class View:
    """Elements of a storage: element (i, j) is number `offset + i * strides[0] + j * strides[1]`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def stored_as(self) -> str:
        """The name of the format in the file: `dtype`, or that of quantized blocks which are read as `dtype`."""
        return self.dtype

    @property
    def level_set(self) -> LevelSet | None:
        """What a number format must hold to keep its levels; None for numbers without, and for other groups."""
        return None

    def levels(self, start: int, stop: int) -> Levels:
        """Rows `start` to `stop` as levels and scales, where there is a `level_set`."""
        raise NotImplementedError

    def check_weight(self, name: str) -> None:
        """CheckpointError unless this can be a weight: a supported format, and no more elements than are stored."""
        where = f"{self.storage.file.name}: tensor {quote(name)}"
        if self.dtype not in NUMPY:
            raise CheckpointError(f"{where} is of type {self.dtype}, but f32, f16, bf16 or f64 is needed")
        elements = int(np.prod(np.array(self.shape, dtype=object))) if self.shape else 1
        if elements > max(self.storage.numel, MAX_EXPANSION):
            raise CheckpointError(
                f"{where} has {elements:,} elements, but only {self.storage.numel:,} are stored; save it without "
                "expand()"
            )

    def fill(self, out: np.ndarray, start: int) -> None:
        """Copy rows `start` to `start + len(out)` into `out`, native byte order."""
        self._fill(out, self.offset + start * self.strides[0])
        if self.storage.swapped:
            out.byteswap(inplace=True)

    def _fill(self, out: np.ndarray, first: int) -> None:
        """Read the span of the block at once where it is small or dense; else its halves along the longest way."""
        if not out.size:
            return
        ways = [(n - 1) * stride for n, stride in zip(out.shape, self.strides, strict=True)]
        span = 1 + sum(ways)
        if span == out.size and out.flags.c_contiguous and self._c_order(out.shape):
            self.storage.file.read_into(self._byte(first), out)
        elif self._worth_reading(span, out.size):
            buffer = np.empty(span, dtype=out.dtype)
            self.storage.file.read_into(self._byte(first), buffer)
            out[...] = as_strided(
                buffer, out.shape, [stride * out.itemsize for stride in self.strides], writeable=False
            )
        else:
            axis = ways.index(max(ways))
            half = out.shape[axis] // 2
            lower, upper = np.split(out, [half], axis=axis)
            self._fill(lower, first)
            self._fill(upper, first + half * self.strides[axis])

    def _worth_reading(self, span: int, wanted: int) -> bool:
        size = span * self.storage.itemsize
        return size <= MIN_READ_BYTES or (size <= MAX_READ_BYTES and span <= 8 * wanted)

    def _c_order(self, shape: tuple[int, ...]) -> bool:
        step = 1
        for n, stride in zip(reversed(shape), reversed(self.strides), strict=True):
            if n > 1 and stride != step:
                return False
            step *= n
        return True

    def _byte(self, element: int) -> int:
        return self.storage.start + element * self.storage.itemsize


def as_one_axis(out: np.ndarray) -> np.ndarray:
    """The elements of `out` in order, a view of the same memory; ValueError where there is none."""
    if not out.flags.c_contiguous:
        raise ValueError(f"an array of strides {out.strides} was to be filled in order; needs a C-contiguous one")
    return out.reshape(-1)


@dataclass(frozen=True)
class Tensor:
    """One weight of the model, under Meta's name and in Meta's row order.

    shape (rows, columns) or (n,); dtype "f32", "f16", "bf16" or "f64". `parts` are merged along `axis`.
    neox_head_dim: head size where the file has the row order of Hugging Face (GPT-NeoX's); 0 where it has Meta's.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[View, ...]
    axis: int = 0
    neox_head_dim: int = 0

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def source(self) -> str:
        """The names of the files that have it."""
        return ", ".join(dict.fromkeys(part.storage.file.name for part in self.parts))

    @property
    def stored_as(self) -> str:
        """The name of its format in the file: "f32" ..., or that of quantized blocks as "Q4_0"."""
        return self.parts[0].stored_as

    @property
    def level_set(self) -> LevelSet | None:
        """What a number format must hold to keep its levels; None for numbers without."""
        return self.parts[0].level_set if len(self.parts) == 1 and not self.neox_head_dim else None

    def encoded(self, number_format: NumberFormat, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `start` to `stop` as a format stores them: levels as they are where it holds them. UnstorableError."""
        if self.level_set is not None and number_format.holds(self.level_set):
            return number_format.lay_out(self.parts[0].levels(start, stop))
        return number_format.encode(self.rows(start, stop), self.dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, read from the file now: C-contiguous, native, new; bfloat16 as its bits in uint16.

        Hugging Face rotates halves of a head, Meta adjacent pairs; of a head of E rows, h its number:
            meta[h*E + r] = hf[h*E + (r % 2) * E/2 + r // 2]
        Raises CheckpointError when the file cannot be read. Source: transformers, convert_llama_weights_to_hf.py.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(
                f"rows {start} to {stop} were asked of {self.shape[0]}; needs 0 <= start <= stop <= {self.shape[0]}"
            )
        if not self.neox_head_dim:
            return self._merged(start, stop)
        E = self.neox_head_dim
        low, high = start // E * E, -(-stop // E) * E
        heads = self._merged(low, high).reshape(-1, 2, E // 2, *self.shape[1:])
        pairs = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(high - low, *self.shape[1:])
        return pairs[start - low : stop - low]

    def _merged(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), dtype=NUMPY[self.dtype])
        at = 0
        for part in self.parts:
            width = part.shape[self.axis]
            if self.axis == 1:
                part.fill(out[:, at : at + width], start)
            else:
                low, high = max(start, at), min(stop, at + width)
                if low < high:
                    part.fill(out[low - start : high - start], low - at)
            at += width
        return out
