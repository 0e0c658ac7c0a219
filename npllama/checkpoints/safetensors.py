"""Which tensors a safetensors file has.

    u64 N | N bytes of JSON: name -> {dtype, shape, data_offsets: [begin, end)} | data

The data must be covered exactly: no holes, no overlap, nothing left over.
Where two names share one array, `save_model` writes one, and "__metadata__" says which one the other is: both are read.
Source: huggingface/safetensors, README, tensor.rs and torch.py. Differs: a name that stands twice is refused.
"""

from __future__ import annotations

import sys

from npllama.checkpoints.files import InputFile
from npllama.checkpoints.headers import Header
from npllama.checkpoints.tensors import Storage, View
from npllama.errors import CheckpointError, UsageError, quote

MAX_HEADER_BYTES = 100_000_000  # bytes, as in tensor.rs; LLaMA 2 70B needs 90 kB
MAX_AXES = 8

DTYPES = {
    "F32": ("f32", 4),
    "F16": ("f16", 2),
    "BF16": ("bf16", 2),
    "F64": ("f64", 8),
    "I64": ("i64", 8),
    "U64": ("u64", 8),
    "I32": ("i32", 4),
    "U32": ("u32", 4),
    "I16": ("i16", 2),
    "U16": ("u16", 2),
    "I8": ("i8", 1),
    "U8": ("u8", 1),
    "BOOL": ("bool", 1),
    "C64": ("c64", 8),
    "F8_E4M3": ("f8_e4m3", 1),
    "F8_E5M2": ("f8_e5m2", 1),
    "F8_E8M0": ("f8_e8m0", 1),
    "F8_E4M3FNUZ": ("f8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("f8_e5m2fnuz", 1),
}


def read_safetensors(file: InputFile) -> dict[str, View]:
    """The tensors of a safetensors file by name; CheckpointError unless they cover its data exactly."""
    size = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, file.size - 8):
        raise _damaged(file, f"a header of {size:,} bytes is announced")
    data = bytearray(size)
    file.read_into(8, data)
    try:
        header = Header(data)
    except UsageError as error:
        raise CheckpointError(f"{file.name}: header: {error}") from error
    views = {name: _view(file, name, entry, 8 + size) for name, entry in header.tensors.items()}
    end = 8 + size
    for view in sorted(views.values(), key=lambda view: (view.storage.start, view.storage.numel)):
        if view.storage.start != end:
            raise _damaged(file, "its tensors overlap or leave holes")
        end += view.storage.numel * view.storage.itemsize
    if end != file.size:
        raise _damaged(file, f"its tensors end at byte {end:,}, but it has {file.size:,}")
    shared = {name: views[kept] for name, kept in header.notes.items() if kept in views and name not in views}
    return {**views, **shared}


def _view(file: InputFile, name: str, entry: object, data: int) -> View:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"tensor {quote(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file.name}: tensor {quote(name)} is of type {quote(dtype) if isinstance(dtype, str) else 'unknown'}, "
            "but F32, F16, BF16 or F64 is needed; use a checkpoint that is not quantized"
        )
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or len(shape) > MAX_AXES:
        raise _damaged(file, f"shape or data_offsets of tensor {quote(name)} are no whole numbers")
    kind, itemsize = DTYPES[dtype]
    strides = [1]
    for n in reversed(shape):
        strides.insert(0, strides[0] * n)
    if offsets[1] - offsets[0] != strides[0] * itemsize:
        raise _damaged(file, f"tensor {quote(name)} has {offsets[1] - offsets[0]:,} bytes, not what its shape needs")
    storage = Storage(file, kind, itemsize, data + offsets[0], strides[0], sys.byteorder == "big")
    return View(storage, 0, tuple(shape), tuple(strides[1:]))


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _damaged(file: InputFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.name}: {what}; it is damaged or incomplete: download it again")
