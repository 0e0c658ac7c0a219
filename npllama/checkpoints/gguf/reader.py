"""What a GGUF file says: its metadata by key, and where its tensors lie.

    "GGUF" | u32 version | u64 tensors | u64 keys | key, value ... | tensor name, shape, type, offset ... | data

Numbers are little-endian, or big-endian throughout. Everything is checked against the size of the file before memory is
taken for it, and the data must be covered exactly: each tensor begins where the one before it ends, rounded up to the
alignment. Source: ggml, docs/gguf.md and src/gguf.cpp. Differs: the limits below, and version 1 is not read.
"""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllama.checkpoints.files import InputFile
from npllama.checkpoints.gguf.blocks import BLOCK_TYPES, BlockType
from npllama.checkpoints.tensors import Storage, View, as_one_axis
from npllama.errors import CheckpointError, quote
from npllama.numbers.formats import Levels, LevelSet

MAX_HEADER = 64 << 20  # bytes; a vocabulary of 128,256 with its merges needs 8 MB
MAX_STRING = 16 << 20  # bytes
MAX_KEY = 65535  # bytes
MAX_NAME = 64  # bytes
MAX_STRINGS = 1 << 20  # in all arrays of a file together: tokens and merges
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 14
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 16
FIRST_READ = 1 << 16  # bytes of a header that are read at first; then twice as many, and so on
PIECE_BYTES = 1 << 16  # blocks are read and decoded in pieces of this size, whose numbers stay in the L2 cache

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its struct format character, where it is a number."""
FLOAT32, STRING, ARRAY = 6, 8, 9
FLOATS = {0: ("f32", 4), 1: ("f16", 2), 30: ("bf16", 2)}
UNREAD = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""Types of ggml that are not read -> their names."""


@dataclass(frozen=True)
class BlockView(View):
    """A tensor of quantized blocks, in C order; what it gives is float32. `storage.numel` counts the numbers."""

    kind: BlockType
    order: str

    @property
    def stored_as(self) -> str:
        return self.kind.name

    @property
    def level_set(self) -> LevelSet | None:
        return self.kind.level_set

    def fill(self, out: np.ndarray, start: int) -> None:
        """Decode rows `start` to `start + len(out)` into `out`, C-contiguous; memory beside it is a few MB."""
        flat = as_one_axis(out)
        first = start * math.prod(self.shape[1:])
        step = max(1, PIECE_BYTES // self.kind.size) * self.kind.elements
        for at in range(0, flat.size, step):
            low, high = first + at, first + min(at + step, flat.size)
            block = low // self.kind.elements
            values = self.kind.decode(self._blocks(block, -(-high // self.kind.elements)), self.order).reshape(-1)
            skip = low - block * self.kind.elements
            flat[at : at + high - low] = values[skip : skip + high - low]

    def levels(self, start: int, stop: int) -> Levels:
        """Rows `start` to `stop` as levels and scales."""
        in_row, n = self.shape[-1] // self.kind.elements, stop - start
        levels, scales, minimums = self.kind.levels(self._blocks(start * in_row, stop * in_row), self.order)
        by_row = None if minimums is None else minimums.reshape(n, -1)
        return Levels(levels.reshape(n, -1, self.kind.group), scales.reshape(n, -1), by_row)

    def _blocks(self, start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, self.kind.size), np.uint8)
        self.storage.file.read_into(self.storage.start + start * self.kind.size, found)
        return found


@dataclass(frozen=True, eq=False)
class Numbers:
    """An array of numbers in metadata; equal to nothing but itself, so that it can be compared with what is needed."""

    array: np.ndarray


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file: metadata by key, and its tensors by name.

    Values are int, float, bool, str, a list of str, or Numbers. A float32 is the shortest decimal that
    gives it: 1e-05 and not 9.99999974e-06, as other checkpoints of the model have it.
    """

    file: InputFile
    metadata: dict[str, object]
    tensors: dict[str, View]


def read_gguf(file: InputFile) -> GgufFile:
    """The header of a GGUF file of version 2 or 3; CheckpointError unless header and tensors are sound."""
    header = _Header(file)
    n_tensors, n_keys = header.begin()
    metadata = {}
    for _ in range(n_keys):
        key = header.string(MAX_KEY, "a key")
        if key in metadata or not key:
            raise header.damaged(f"key {quote(key)} stands there twice, or is empty")
        metadata[key] = header.value(key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment & (alignment - 1) or not 0 < alignment <= MAX_ALIGNMENT:
        raise header.damaged(f"general.alignment is {quote(alignment)}, but a power of two up to 65,536 is needed")
    return GgufFile(file, metadata, _tensors(header, n_tensors, alignment))


class _Header:
    """Reads one value after the other from the beginning of a file, whose bytes are kept as far as it came."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.at = 0
        self.order = "<"
        self._data = bytearray()
        self._strings_left = MAX_STRINGS

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.name}: {what}; it is damaged or incomplete: download it again")

    def begin(self) -> tuple[int, int]:
        """Magic, byte order and version; returns the number of tensors and of keys."""
        self._take(4)
        (version,) = struct.unpack("<I", self._take(4))
        if version & 0xFFFF == 0:
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.file.name} is GGUF of version {version}, but 2 or 3 is needed; convert the model again with a "
                "current llama.cpp"
            )
        n_tensors, n_keys = self._number("Q"), self._number("Q")
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise self.damaged(
                f"{n_tensors:,} tensors and {n_keys:,} keys are announced, but at most {MAX_TENSORS:,} are read"
            )
        return n_tensors, n_keys

    def _take(self, size: int) -> memoryview:
        start = self.at
        self._reach(start + size)
        self.at = start + size
        return memoryview(self._data)[start : self.at]

    def _reach(self, stop: int) -> None:
        """Have the bytes before `stop` in memory."""
        have = len(self._data)
        if stop <= have:
            return
        if stop > self.file.size:
            raise self.damaged(f"its header needs {stop:,} bytes and more, but it has {self.file.size:,}")
        if stop > MAX_HEADER:
            raise CheckpointError(
                f"{self.file.name}: a header of more than {MAX_HEADER:,} bytes is not read; this is no language "
                "model, or it is damaged"
            )
        grown = bytearray(min(max(stop, 2 * have, FIRST_READ), self.file.size, MAX_HEADER))
        grown[:have] = self._data
        self.file.read_into(have, memoryview(grown)[have:])
        self._data = grown

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(self.order + code, self._take(struct.calcsize(f"={code}")))
        return value

    def string(self, longest: int, what: str) -> str:
        """A length and so many bytes of UTF-8."""
        size = self._number("Q")
        if size > longest:
            raise self.damaged(f"{what} of {size:,} bytes is announced, but at most {longest:,} are read")
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def value(self, key: str) -> object:
        """The value of a key: its type and itself."""
        kind = self._number("I")
        if kind == STRING:
            return self.string(MAX_STRING, f"the value of {quote(key)}")
        if kind == ARRAY:
            return self._array(key)
        (number,) = self._checked(key, kind, 1)
        return _shortest(number) if kind == FLOAT32 else number.item()

    def _array(self, key: str) -> object:
        kind, n = self._number("I"), self._number("Q")
        if kind == STRING:
            return self._strings(key, n)
        return Numbers(self._checked(key, kind, n))

    def _checked(self, key: str, kind: int, n: int) -> np.ndarray:
        """An array of n numbers."""
        if kind not in CODES:
            raise self.damaged(f"the value of {quote(key)} is of type {kind}, which does not exist or is not read")
        code = CODES[kind]
        dtype = np.dtype(self.order + code.replace("?", "B"))
        if n * dtype.itemsize > MAX_STRING:
            raise self.damaged(f"{n:,} values of {quote(key)} are announced, but at most 16 MiB of them are read")
        found = np.frombuffer(self._take(n * dtype.itemsize), dtype).astype(dtype.newbyteorder("="))
        if code != "?":
            return found
        if n and found.max() > 1:
            raise self.damaged(f"the value of {quote(key)} is neither true nor false")
        return found.astype(bool)

    def _strings(self, key: str, n: int) -> list[str]:
        """An array of n strings, of which there may be a million: the loop does no more than it must."""
        if n > self._strings_left:
            raise self.damaged(f"{n:,} texts of {quote(key)} are announced, but {MAX_STRINGS:,} in all are the limit")
        self._strings_left -= n
        self._reach(self.at + 8 * n)
        size_of = struct.Struct(self.order + "Q").unpack_from
        at, spans = self.at, []
        for _ in range(n):
            if at + 8 > len(self._data):
                self._reach(at + 8)
            (size,) = size_of(self._data, at)
            if size > MAX_STRING:
                raise self.damaged(f"a text of {size:,} bytes is announced in {quote(key)}")
            spans.append((at + 8, at + 8 + size))
            at += 8 + size
            if at > len(self._data):
                self._reach(at)
        data, self.at = self._data, at
        try:
            return [data[start:stop].decode() for start, stop in spans]
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text of {quote(key)} is not UTF-8") from error

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in the order of NumPy, type and offset of the next tensor."""
        name = self.string(MAX_NAME, "the name of a tensor")
        n_axes = self._number("I")
        if not 1 <= n_axes <= MAX_AXES:
            raise self.damaged(f"tensor {quote(name)} has {n_axes:,} axes, but 1 to {MAX_AXES} are needed")
        shape = struct.unpack(f"{self.order}{n_axes}Q", self._take(8 * n_axes))
        if not all(shape) or math.prod(shape) >= 1 << 62:
            raise self.damaged(f"tensor {quote(name)} has the shape {list(shape[::-1])}")
        return name, shape[::-1], self._number("I"), self._number("Q")


def _shortest(value: np.float32) -> float:
    """The float64 that is written with the fewest digits among those that round to a float32."""
    return float(str(value))


def _tensors(header: _Header, n: int, alignment: int) -> dict[str, View]:
    """The tensors that the header describes, which cover the rest of the file."""
    entries = [header.tensor() for _ in range(n)]
    data = -(-header.at // alignment) * alignment
    views: dict[str, View] = {}
    end = padded = data if entries else header.at
    for name, shape, kind, offset in entries:
        if name in views:
            raise header.damaged(f"tensor {quote(name)} stands there twice")
        if data + offset != padded:
            raise header.damaged(f"tensor {quote(name)} begins at byte {data + offset:,}, not at {padded:,}")
        views[name], size = _view(header, name, shape, kind, padded)
        end = padded + size
        padded = -(-end // alignment) * alignment
    if not end <= header.file.size <= max(padded, data):
        raise header.damaged(f"its tensors end at byte {end:,}, but it has {header.file.size:,}")
    return views


def _view(header: _Header, name: str, shape: tuple[int, ...], kind: int, start: int) -> tuple[View, int]:
    """A tensor, and its size in bytes."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    numel = math.prod(shape)
    if kind in FLOATS:
        dtype, itemsize = FLOATS[kind]
        swapped = header.order != {"little": "<", "big": ">"}[sys.byteorder]
        return View(Storage(header.file, dtype, itemsize, start, numel, swapped), 0, shape, strides), numel * itemsize
    if kind not in BLOCK_TYPES:
        raise CheckpointError(
            f"{header.file.name}: tensor {quote(name)} is of type {UNREAD.get(kind, kind)}, which is not read; use a "
            "file of another type, as Q4_K_M, Q8_0 or F16"
        )
    found = BLOCK_TYPES[kind]
    if shape[-1] % found.elements:
        raise header.damaged(
            f"tensor {quote(name)} has rows of {shape[-1]:,}, which are no whole blocks of {found.elements}"
        )
    storage = Storage(header.file, "f32", 4, start, numel)
    return BlockView(storage, 0, shape, strides, found, header.order), numel // found.elements * found.size
