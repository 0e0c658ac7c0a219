"""The object tree of a PyTorch file: an interpreter for the few pickle opcodes that torch.save writes.

A pickle is a program for a stack machine, and the general machine may call any function of any module. This one knows
the opcodes of protocol 2 that plain tensors need, and calls nothing but the functions that its caller hands over; every
other name is refused. A value costs at least one byte of input, so work and memory are bounded by the input's size.

Source: the opcode comments of CPython's pickletools.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from npllama.errors import CheckpointError, quote

MAX_KEY = 1 << 24  # small whole numbers hash to themselves, so keys cannot be made to collide without end
MAX_NAME_BYTES = 256
MAX_INTEGER_BYTES = 16  # bytes

Call = Callable[..., object]


@dataclass(frozen=True)
class Name:
    """A name that the file mentions: a word, never resolved to anything."""

    text: str


class Opaque:
    """A value that is of no use here, and stays a word for messages."""

    def __init__(self, what: str) -> None:
        self.what = what


class PickleMachine:
    """Runs the pickles in `data` one after the other.

    `calls` maps each dotted name that may be called to what it does; names in it with None may be mentioned only.
    `persistent` makes a value from a persistent id. All raise CheckpointError.
    """

    def __init__(self, data: bytes, source: str, calls: Mapping[str, Call | None], persistent: Call) -> None:
        self._data = data
        self._source = source
        self._calls = calls
        self._persistent = persistent
        self.position = 0

    def load(self) -> object:
        """The value of the pickle that begins at `position`, which moves behind it."""
        self._stack: list[object] = []
        self._outer: list[list[object]] = []
        self._memo: dict[int, object] = {}
        data, table = self._data, _OPCODES
        while True:
            if self.position >= len(data):
                raise self._damaged("it ends in the middle")
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                break
            step = table.get(opcode)
            if step is None:
                raise self._damaged(f"opcode 0x{opcode:02x} is none of those that torch.save writes")
            step(self)
        if len(self._stack) != 1 or self._outer:
            raise self._damaged("values are left over at its end")
        return self._stack.pop()

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {what}; it is damaged, or not a checkpoint of plain tensors")

    # What the opcodes share -----------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise self._damaged(f"{size:,} bytes are announced where {len(self._data) - self.position:,} are left")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _number(self, layout: str) -> int:
        return int(struct.unpack(layout, self._take(struct.calcsize(layout)))[0])

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise self._damaged("a name has no end")
        line = self._take(end - self.position)
        self.position += 1
        return line.decode("ascii", "backslashreplace")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise self._damaged("a value is used that was never made")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[object]:
        if not self._outer:
            raise self._damaged("a group ends that never began")
        group = self._stack
        self._stack = self._outer.pop()
        return group

    def _top(self, kind: type) -> object:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise self._damaged(f"something is added to what is no {kind.__name__}")
        return self._stack[-1]

    # The opcodes ----------------------------------------------------------------------------------------------------

    def _proto(self) -> None:
        protocol = self._number("<B")
        if protocol != 2:
            raise CheckpointError(
                f"{self._source}: pickle protocol {protocol}, but 2 is needed; save it again with torch.save's default"
            )

    def _global(self) -> None:
        text = f"{self._line()}.{self._line()}"
        if text not in self._calls:
            raise CheckpointError(
                f"{self._source}: names {quote(text)}, which is no part of a checkpoint of plain tensors and is not "
                "run; save only the state_dict"
            )
        self._push(Name(text))

    def _reduce(self) -> None:
        arguments, name = self._pop(), self._pop()
        call = self._calls.get(name.text) if isinstance(name, Name) else None
        if call is None or type(arguments) is not tuple:
            raise self._damaged("something is called that is no function")
        self._push(call(*arguments))

    def _build(self) -> None:
        self._pop()  # attributes (such as _metadata of a state_dict): of no use here
        if not self._stack or not isinstance(self._stack[-1], (dict, Opaque)):
            raise self._damaged("attributes are given to what takes none")

    def _persistent_id(self) -> None:
        self._push(self._persistent(self._pop()))

    def _put(self, layout: str) -> None:
        index = self._number(layout)
        if not self._stack:
            raise self._damaged("nothing is there to remember")
        self._memo[index] = self._stack[-1]

    def _get(self, layout: str) -> None:
        index = self._number(layout)
        if index not in self._memo:
            raise self._damaged("something is recalled that was never remembered")
        self._push(self._memo[index])

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise self._damaged("a value is used that was never made")
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _tuple_to_mark(self) -> None:
        group = self._pop_to_mark()
        self._push(tuple(group))

    def _text(self) -> None:
        raw = self._take(self._number("<I"))
        try:
            self._push(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self._damaged("a text is not UTF-8") from error

    def _long(self) -> None:
        size = self._number("<B")
        if size > MAX_INTEGER_BYTES:
            raise self._damaged(f"a whole number has {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)  # type: ignore[attr-defined]

    def _appends(self) -> None:
        group = self._pop_to_mark()
        self._top(list).extend(group)  # type: ignore[attr-defined]

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self._pop_to_mark())

    def _set(self, group: list[object]) -> None:
        target = cast(dict[object, object], self._top(dict))
        if len(group) % 2:
            raise self._damaged("a key has no value")
        for key, value in zip(group[::2], group[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and 0 <= key < MAX_KEY):
                raise self._damaged(f"a key of a dict is a {type(key).__name__}")
            if key in target:
                raise CheckpointError(f"{self._source}: {quote(key)} stands twice in one dict; it is damaged")
            target[key] = value


_STOP = ord(".")
_OPCODES: dict[int, Callable[[PickleMachine], None]] = {
    0x80: PickleMachine._proto,
    ord("c"): PickleMachine._global,
    ord("R"): PickleMachine._reduce,
    ord("b"): PickleMachine._build,
    ord("Q"): PickleMachine._persistent_id,
    ord("q"): lambda m: m._put("<B"),
    ord("r"): lambda m: m._put("<I"),
    ord("h"): lambda m: m._get("<B"),
    ord("j"): lambda m: m._get("<I"),
    ord("("): PickleMachine._mark,
    ord("t"): PickleMachine._tuple_to_mark,
    ord(")"): lambda m: m._push(()),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("]"): lambda m: m._push([]),
    ord("a"): PickleMachine._append,
    ord("e"): PickleMachine._appends,
    ord("}"): lambda m: m._push({}),
    ord("s"): PickleMachine._set_item,
    ord("u"): PickleMachine._set_items,
    ord("X"): PickleMachine._text,
    ord("J"): lambda m: m._push(m._number("<i")),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    0x8A: PickleMachine._long,
    ord("G"): PickleMachine._float,
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
}
