"""The header of a safetensors file: one JSON object, read member by member.

A header may have 100 MB, most of it notes of a trainer in "__metadata__". Read at once, it could ask for gigabytes: so
nothing is made of it but the entries of tensors, each of them small, and those notes that may name a tensor.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

from npllama.errors import UsageError, quote
from npllama.system import strict_json

MAX_ENTRY_BYTES = 1 << 10  # bytes; eight dimensions of 18 digits are below 300
MAX_NAME_BYTES = 1 << 10  # bytes, quotes and escapes included
MAX_TENSORS = 1 << 16  # LLaMA 2 70B has 723
MAX_NOTES = 1 << 16
MAX_UNUSUAL = 1 << 10  # entries that take long to read: not flat objects
CHUNK = 1 << 20

_BLANKS = re.compile(rb"[ \t\r\n]*")
_OPEN = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_NULL = re.compile(rb"null")
# A bounded number of escapes at a time: what a match may have to take back is kept in memory.
_TEXT = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,4096}', re.DOTALL)


class Header:
    """Reads the header in `data`: `tensors`, name -> entry as parsed; `notes`, the metadata. Raises UsageError."""

    def __init__(self, data: bytearray) -> None:
        self._data = data
        self._at = 0
        self.tensors: dict[str, object] = {}
        self.notes: dict[str, str] = {}
        self._noted = False
        self._unusual = 0
        _check_utf8(data)
        self._members(self._entry)
        self._skip(_BLANKS)
        if self._at != len(data):
            raise self._not_json("something follows its end")

    def _members(self, read: Callable[[str], None]) -> None:
        """One object, whose values `read(key)` reads."""
        if not self._skip(_OPEN):
            raise self._not_json("an object {...} is needed")
        if self._next() == b"}":
            self._at += 1
            return
        while True:
            key = self._short_text()
            if not self._skip(_COLON):
                raise self._not_json("a colon is missing")
            read(key)
            self._skip(_BLANKS)
            following = self._next()
            self._at += 1
            if following == b"}":
                return
            if following != b",":
                raise self._not_json("a comma is missing")
            self._skip(_BLANKS)

    def _entry(self, key: str) -> None:
        if key in self.tensors or (key == "__metadata__" and self._noted):
            raise UsageError(f"key {quote(key)} stands twice in one object; keep the one that is meant")
        if key == "__metadata__":
            self._noted = True
            self._metadata()
            return
        if len(self.tensors) >= MAX_TENSORS:
            raise UsageError(f"more than {MAX_TENSORS:,} tensors; no model has so many")
        self.tensors[key] = self._value()

    def _metadata(self) -> None:
        if not self._skip(_NULL):
            if self._next() != b"{":
                raise UsageError("__metadata__ is no object of texts; the file is damaged")
            self._members(self._note)

    def _note(self, key: str) -> None:
        if self._next() != b'"':
            raise UsageError("__metadata__ is no object of texts; the file is damaged")
        if len(self.notes) >= MAX_NOTES:
            raise UsageError(f"more than {MAX_NOTES:,} texts in __metadata__; no trainer notes so many")
        start, end = self._text()
        if end - start <= MAX_NAME_BYTES:
            self.notes[key] = self._decoded(start, end)

    def _value(self) -> object:
        """One small value: most end with the next brace, and all within MAX_ENTRY_BYTES bytes."""
        start, end = self._at, self._data.find(b"}", self._at, self._at + MAX_ENTRY_BYTES) + 1
        if end and self._data.find(b"{", start + 1, end) < 0:
            try:
                value = strict_json.parse(bytes(self._data[start:end]))
                self._at = end
                return value
            except UsageError:
                pass  # a brace inside a text, or something else than an object: read it as what it is
        self._unusual += 1
        if self._unusual > MAX_UNUSUAL:
            raise UsageError(f"more than {MAX_UNUSUAL:,} entries are no objects of dtype, shape and data_offsets")
        value, size = strict_json.parse_first(bytes(self._data[start : start + MAX_ENTRY_BYTES]))
        self._at += size
        return value

    def _short_text(self) -> str:
        start, end = self._text()
        if end - start > MAX_NAME_BYTES:
            raise UsageError(f"a name of {end - start:,} bytes, but at most {MAX_NAME_BYTES:,} are read")
        return self._decoded(start, end)

    def _text(self) -> tuple[int, int]:
        """Pass over one text in quotes; where it begins and ends, quotes included."""
        start = self._at
        if self._next() != b'"':
            raise self._not_json("a text in quotes is needed")
        self._at += 1
        while self._skip(_TEXT) and self._next() == b"\\" and self._at + 1 < len(self._data):
            pass  # more escapes than one match takes
        if self._next() != b'"':
            raise self._not_json("a text has no end")
        self._at += 1
        return start, self._at

    def _decoded(self, start: int, end: int) -> str:
        return str(strict_json.parse(bytes(self._data[start:end])))  # a text: _text has found its quotes

    def _next(self) -> bytes:
        return bytes(self._data[self._at : self._at + 1])

    def _skip(self, pattern: re.Pattern[bytes]) -> bool:
        """Go to the end of what the pattern matches here; False where it does not match."""
        found = pattern.match(self._data, self._at)
        if found:
            self._at = found.end()
        return found is not None

    def _not_json(self, what: str) -> UsageError:
        return UsageError(f"not JSON ({what} at byte {self._at:,}); the file is damaged or incomplete")


def _check_utf8(data: bytearray) -> None:
    """In pieces, because the text of all of it could have four times the size."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    try:
        for at in range(0, len(data), CHUNK):
            decoder.decode(data[at : at + CHUNK], final=at + CHUNK >= len(data))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"near byte {at + error.start:,} is not UTF-8, but JSON must be; the file is damaged"
        ) from error
