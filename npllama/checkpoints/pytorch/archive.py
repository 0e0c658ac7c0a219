"""Which entries a zip archive of torch.save has, and where their bytes lie.

Every entry is stored as it is, never compressed, so a tensor is a range of the file. Sizes stand in the central
directory alone (torch leaves them 0 in the local headers); where the data begins, in the local header alone (torch pads
it). Everything must lie in order and apart, so no other reader can see other bytes in the same file.

Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central), 4.3.14-16 (end), 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from npllama.checkpoints.files import InputFile
from npllama.errors import CheckpointError, quote

MAX_DIRECTORY_BYTES = 4 << 20  # bytes; LLaMA 2 70B needs 80 kB

_END = struct.Struct("<IHHHHIIH")
_LOCATOR = struct.Struct("<IIQI")
_END64 = struct.Struct("<IQHHIIQQQQ")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_IN_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One file of the archive: `size` bytes, behind the local header at `header`, ending before `limit`."""

    name: bytes
    method: int
    size: int
    header: int
    limit: int = 0


class Archive:
    """The entries of one zip file, by name without their common root."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        offset, size = self._directory()
        entries = self._central(file.read(offset, size))
        entries.sort(key=lambda entry: entry.header)
        borders = [entry.header for entry in entries] + [offset]
        if borders[0] or any(low >= high for low, high in pairwise(borders)):
            raise self._damaged("its entries overlap")
        limited = [
            Entry(e.name, e.method, e.size, e.header, limit) for e, limit in zip(entries, borders[1:], strict=True)
        ]
        self._entries = self._rooted(limited)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def size(self, name: str) -> int:
        """Bytes of an entry; CheckpointError when there is none."""
        if name not in self._entries:
            raise CheckpointError(f"{self._file.name} has no entry {quote(name)}; it is incomplete: download it again")
        return self._entries[name].size

    def start(self, name: str) -> int:
        """Where the bytes of an entry begin in the file; CheckpointError unless all of them are the entry's own."""
        size, entry = self.size(name), self._entries[name]
        if entry.method:
            raise CheckpointError(
                f"{self._file.name}: entry {quote(name)} is compressed, but torch.save never does that; save it again"
            )
        header = _LOCAL.unpack(self._file.read(entry.header, _LOCAL.size))
        start = entry.header + _LOCAL.size + header[9] + header[10]
        same = self._file.read(entry.header + _LOCAL.size, min(header[9], len(entry.name) + 1)) == entry.name
        if header[0] != 0x04034B50 or not same or header[3] or start + size > entry.limit:
            raise self._damaged(f"the header of entry {quote(name)} contradicts the directory")
        return start

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a small entry; CheckpointError when it has more than `most`."""
        size = self.size(name)
        if size > most:
            raise self._damaged(f"entry {quote(name)} has {size:,} bytes, but at most {most:,} are read")
        return self._file.read(self.start(name), size)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file.name}: {what}; the archive is damaged or incomplete: download it again")

    def _directory(self) -> tuple[int, int]:
        """Offset and size of the central directory, which must end where the end records begin."""
        end = self._file.size - _END.size
        if end < 0:
            raise self._damaged("it ends in the middle")
        magic, disk, first, _, count, size, offset, comment = _END.unpack(self._file.read(end, _END.size))
        if magic != 0x06054B50 or comment or disk or first:
            raise self._damaged("the directory at its end is missing")
        locator = end - _LOCATOR.size
        if locator >= 0 and self._file.read(locator, 4) == b"PK\x06\x07":
            end = locator - _END64.size
            count, size, offset = self._zip64_end(end, locator, [count, size, offset])
        if offset + size != end or size > MAX_DIRECTORY_BYTES or not 0 < count <= size // _CENTRAL.size:
            raise self._damaged("the directory at its end has an impossible place or size")
        self._count = count
        return offset, size

    def _zip64_end(self, end: int, locator: int, narrow: list[int]) -> tuple[int, ...]:
        """The same three numbers in 64 bits; torch writes them always, and the narrow ones too where they fit."""
        _, _, place, _ = _LOCATOR.unpack(self._file.read(locator, _LOCATOR.size))
        fields = _END64.unpack(self._file.read(end, _END64.size))
        wide = fields[7:]
        fits = zip(narrow, wide, (0xFFFF, _IN_ZIP64, _IN_ZIP64), strict=True)
        if place != end or fields[0] != 0x06064B50 or any(n not in (w, full) for n, w, full in fits):
            raise self._damaged("the zip64 directory at its end contradicts the other one")
        return wide

    def _central(self, data: bytes) -> list[Entry]:
        entries = []
        at = 0
        for _ in range(self._count):
            if at + _CENTRAL.size > len(data):
                raise self._damaged("its directory ends in the middle")
            fields = _CENTRAL.unpack_from(data, at)
            flags, method, packed, size, header = fields[3], fields[4], fields[8], fields[9], fields[16]
            name_end = at + _CENTRAL.size + fields[10]
            extra_end = name_end + fields[11]
            if fields[0] != 0x02014B50 or flags & 1 or fields[13] or extra_end + fields[12] > len(data):
                raise self._damaged("an entry of its directory is impossible")
            sizes = self._zip64([size, packed, header], data[name_end:extra_end])
            if not method and sizes[0] != sizes[1]:
                raise self._damaged("an entry has two sizes")
            entries.append(Entry(data[at + _CENTRAL.size : name_end], method, sizes[0], sizes[2]))
            at = extra_end + fields[12]
        if at != len(data):
            raise self._damaged("its directory has bytes left over")
        return entries

    def _zip64(self, values: list[int], extra: bytes) -> list[int]:
        """Sizes and offsets that do not fit 32 bits stand in extra field 1, in this order."""
        wanted = [i for i, value in enumerate(values) if value == _IN_ZIP64]
        at = 0
        while wanted and at + 4 <= len(extra):
            kind, size = struct.unpack_from("<HH", extra, at)
            if kind == 1 and size >= 8 * len(wanted) and at + 4 + size <= len(extra):
                for i, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4), strict=True):
                    values[i] = value
                return values
            at += 4 + size
        if wanted:
            raise self._damaged("a large entry has no 64-bit size")
        return values

    def _rooted(self, entries: list[Entry]) -> dict[str, Entry]:
        root = entries[0].name.partition(b"/")[0] + b"/"
        rooted: dict[str, Entry] = {}
        for entry in entries:
            if not entry.name.startswith(root):
                found = quote(entry.name.decode("latin-1"))
                raise CheckpointError(
                    f"{self._file.name} is a zip archive of another kind (entry {found} lies outside the first "
                    f"folder); a file of torch.save is needed"
                )
            name = entry.name[len(root) :].decode("utf-8", "backslashreplace")
            if name in rooted:
                raise self._damaged(f"entry {quote(name)} stands twice in its directory")
            rooted[name] = entry
        return rooted
