"""What torch.save wrote: the zip format (torch >= 1.6) and the legacy format before it.

Both hold one pickle of an object tree in which every tensor names its storage, and the storages as raw bytes. The tree
is returned with Views instead of tensors; nothing of the bytes is read yet.

Source: torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

from npllama.checkpoints.files import InputFile
from npllama.checkpoints.pytorch.archive import Archive
from npllama.checkpoints.pytorch.opcodes import Name, Opaque, PickleMachine
from npllama.checkpoints.tensors import Storage, View
from npllama.errors import CheckpointError, quote

MAX_TREE_BYTES = 512 << 10  # bytes of pickle; LLaMA 2 70B needs 75 kB
MAX_AXES = 8
VERSIONS = tuple(b"%d" % version for version in range(1, 11))
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {
    "torch.FloatStorage": ("f32", 4),
    "torch.HalfStorage": ("f16", 2),
    "torch.BFloat16Storage": ("bf16", 2),
    "torch.DoubleStorage": ("f64", 8),
    "torch.LongStorage": ("i64", 8),
    "torch.IntStorage": ("i32", 4),
    "torch.ShortStorage": ("i16", 2),
    "torch.CharStorage": ("i8", 1),
    "torch.ByteStorage": ("u8", 1),
    "torch.BoolStorage": ("bool", 1),
    "torch.ComplexFloatStorage": ("c64", 8),
    "torch.ComplexDoubleStorage": ("c128", 16),
    "torch.storage.UntypedStorage": ("bytes", 1),
}
DTYPES = (
    *("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "strided"),
)


def read_zip(file: InputFile) -> object:
    """The object tree of a zip file of torch.save; CheckpointError for whatever else is in it."""
    archive = Archive(file)
    swapped = _check_kind(file, archive)
    storages: dict[str, Storage] = {}

    def persistent(pid: object) -> Storage:
        key, storage = _storage(file, pid, storages, 5)
        if storage.start < 0:
            size = archive.size(f"data/{key}")
            if size != storage.numel * storage.itemsize:
                raise CheckpointError(
                    f"{file.name}: storage {quote(key)} has {size:,} bytes, but {storage.numel:,} elements of "
                    f"{storage.dtype} are announced; it is damaged: download it again"
                )
            storage.start, storage.swapped = archive.start(f"data/{key}"), swapped
        return storage

    code = archive.read("data.pkl", MAX_TREE_BYTES)
    return PickleMachine(code, f"{file.name}/data.pkl", _Calls(file).table(), persistent).load()


def _check_kind(file: InputFile, archive: Archive) -> bool:
    """Whether the bytes of numbers are swapped; CheckpointError when the archive is none of torch.save."""
    for sign, what in (("constants.pkl", "a TorchScript program"), ("archive_format", "an exported program")):
        if sign in archive:
            raise CheckpointError(f"{file.name} is {what}, not a checkpoint; save its state_dict with torch.save")
    if "data.pkl" not in archive:
        raise CheckpointError(
            f"{file.name} is a zip archive without data.pkl, not a file of torch.save; give a checkpoint"
        )
    version = archive.read("version", 16)
    if version.strip() not in VERSIONS:
        raise CheckpointError(
            f"{file.name}: format version {quote(version.decode('latin-1'))}, but 1 to 10 are known; save it again"
        )
    order = archive.read("byteorder", 16) if "byteorder" in archive else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(
            f"{file.name}: byte order {quote(order.decode('latin-1'))}, but little or big is needed; save it again"
        )
    return (order == b"big") != (sys.byteorder == "big")


def read_legacy(file: InputFile) -> object:
    """The object tree of a file of torch.save before 1.6: five pickles, then each storage behind its length."""
    storages: dict[str, Storage] = {}
    machine = PickleMachine(
        file.read(0, min(file.size, MAX_TREE_BYTES)),
        file.name,
        _Calls(file).table(),
        lambda pid: _storage(file, pid, storages, 6)[1],
    )
    if machine.load() != LEGACY_MAGIC or machine.load() != 1001:
        raise CheckpointError(
            f"{file.name}: not the legacy format of protocol 1001; save it again with a current torch"
        )
    system = machine.load()
    if not isinstance(system, dict) or type(system.get("little_endian")) is not bool:
        raise CheckpointError(f"{file.name}: its byte order is missing; it is damaged: download it again")
    tree, keys = machine.load(), machine.load()
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise CheckpointError(f"{file.name}: its storages are not those that its tensors name; download it again")
    order: Literal["little", "big"] = "little" if system["little_endian"] else "big"
    _place(file, machine.position, [(key, storages[key]) for key in keys], order)
    return tree


def _place(file: InputFile, at: int, storages: list[tuple[str, Storage]], order: Literal["little", "big"]) -> None:
    """The storages of a legacy file lie behind each other, each after its length, and fill it to its end."""
    for key, storage in storages:
        if int.from_bytes(file.read(at, 8), order) != storage.numel:
            raise CheckpointError(f"{file.name}: storage {quote(key)} has two sizes; it is damaged: download it again")
        storage.start, storage.swapped = at + 8, order != sys.byteorder
        at = storage.start + storage.numel * storage.itemsize
    if at != file.size:
        raise CheckpointError(
            f"{file.name} has {file.size:,} bytes, but its storages end at {at:,}; it is damaged: download it again"
        )


def _storage(file: InputFile, pid: object, storages: dict[str, Storage], fields: int) -> tuple[str, Storage]:
    """The storage that a persistent id names: ("storage", type, key, device, number of elements[, None])."""
    if type(pid) is tuple and pid[:1] == ("module",):
        raise CheckpointError(f"{file.name} holds a pickled module with its code; save only the state_dict")
    if type(pid) is not tuple or len(pid) != fields or type(pid[0]) is not str or pid[0] != "storage":
        raise _damaged(file, "a persistent id is no storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not isinstance(kind, Name) or kind.text not in STORAGES or type(key) is not str or type(numel) is not int:
        raise _damaged(file, "a storage is not described as torch does it")
    if not 0 <= numel < 1 << 62 or pid[5:] not in ((), (None,)):
        raise _damaged(file, f"storage {quote(key)} has an impossible size or is part of another")
    dtype, itemsize = STORAGES[kind.text]
    storage = storages.setdefault(key, Storage(file, dtype, itemsize, -1, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise _damaged(file, f"storage {quote(key)} is described in two ways")
    return key, storage


class _Calls:
    """Every name that a checkpoint of plain tensors may mention, and what calling it means here."""

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def table(self) -> dict[str, Callable[..., object] | None]:
        """Dotted name -> what it does; None for a name that may only be mentioned."""
        return {
            "collections.OrderedDict": self._ordered,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor": self._old_tensor,
            "torch._utils._rebuild_tensor_v3": self._other_tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._of_type,
            "torch.Tensor": None,
            "torch.nn.parameter.Parameter": None,
            "torch.Size": self._size,
            "torch.device": lambda *_: Opaque("a device"),
            "torch.serialization._get_layout": lambda *_: Opaque("a layout"),
            **dict.fromkeys(STORAGES),
            **{f"torch.{dtype}": None for dtype in DTYPES},
        }

    def _tensor(self, *arguments: object) -> View:
        """(storage, offset, shape, strides, requires_grad, hooks[, metadata])"""
        if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
            raise self._other("a tensor is not described as torch does it")
        if len(arguments) == 7 and arguments[6]:
            raise CheckpointError(
                f"{self._file.name}: a tensor is stored negated or conjugated; save it with .resolve_neg()"
            )
        return _view(self._file, *arguments[:4])

    def _old_tensor(self, *arguments: object) -> View:
        """(storage, offset, shape, strides)"""
        if len(arguments) != 4 or not isinstance(arguments[0], Storage):
            raise self._other("a tensor is not described as torch does it")
        return _view(self._file, *arguments)

    def _other_tensor(self, *arguments: object) -> Opaque:
        """(..., dtype[, metadata]): a type that has no storage class, and is none of a weight's."""
        kind = arguments[6] if len(arguments) > 6 else None
        return Opaque(f"a tensor of type {kind.text}" if isinstance(kind, Name) else "a tensor of another type")

    def _parameter(self, *arguments: object) -> object:
        """(tensor, requires_grad, hooks[, attributes])"""
        if len(arguments) not in (3, 4) or not isinstance(arguments[0], (View, Opaque)):
            raise self._other("a parameter is no tensor")
        return arguments[0]

    def _of_type(self, *arguments: object) -> View:
        """(how to make it, its class, arguments, attributes): a tensor with attributes."""
        if len(arguments) != 4 or not isinstance(arguments[0], Name) or type(arguments[2]) is not tuple:
            raise self._other("a tensor is not described as torch does it")
        if arguments[0].text != "torch._utils._rebuild_tensor_v2":
            raise self._other("a tensor is of a class of its own")
        return self._tensor(*arguments[2])

    def _ordered(self, *arguments: object) -> dict[object, object]:
        if arguments:
            raise self._other("an OrderedDict has arguments")
        return {}

    def _size(self, *arguments: object) -> object:
        if len(arguments) != 1 or type(arguments[0]) is not tuple:
            raise self._other("a shape is no tuple")
        return arguments[0]

    def _other(self, what: str) -> CheckpointError:
        return _damaged(self._file, what)


def _view(file: InputFile, *arguments: object) -> View:
    """A tensor inside its storage: every element that shape and strides can reach is there."""
    storage, offset, shape, strides = arguments
    if not isinstance(storage, Storage) or not isinstance(offset, int):
        raise _damaged(file, "a tensor has no storage, or begins at no element of it")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_AXES:
        raise _damaged(file, "a tensor is not described as torch does it")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *strides)):
        raise _damaged(file, "a tensor has an impossible shape")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise _damaged(file, f"a tensor reaches element {last:,} of a storage of {storage.numel:,}")
    return View(storage, offset, shape, strides)


def _damaged(file: InputFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.name}: {what}; it is damaged: download it again")
