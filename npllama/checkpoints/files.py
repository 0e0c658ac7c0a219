"""Files that others have made: regular files only, bounded reads, a bounded number open at a time.

Bytes are read into the caller's memory instead of being mapped: pages of a map would count as this process's memory,
and a file that shrinks under a map ends the process with a bus error that no Python code can catch.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npllama.errors import CheckpointError, quote
from npllama.system import signatures
from npllama.system.regular_files import open_regular, read_up_to

MAX_OPEN = 8


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the operating system refuses, as CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error.strerror or quote(str(error))}; check the path and its permissions"
        ) from error


class InputFile:
    """One file of a checkpoint, its size fixed when it was first opened; a Pool decides when it is really open."""

    def __init__(self, path: Path, pool: Pool) -> None:
        self.path = path
        self.name = path.name
        self._pool = pool
        with _reading(path):
            self._identity = _identity(pool.open(path))
        self.size = self._identity[1]

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; CheckpointError unless all of them lie inside the file."""
        self._check(offset, size)
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, target: Any) -> None:
        """Fill `target` (a C-contiguous buffer) with the bytes from `offset`; CheckpointError when it has fewer."""
        view = memoryview(target).cast("B")
        self._check(offset, len(view))
        with _reading(self.path):
            file = self._pool.open(self.path)
            if _identity(file) != self._identity:
                raise CheckpointError(f"{self.name} was changed while it was read; start again when it is complete")
            file.seek(offset)
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(
                        f"{self.name} became shorter while it was read; start again with a whole file"
                    )
                view = view[got:]

    def _check(self, offset: int, size: int) -> None:
        if not 0 <= offset <= offset + size <= self.size:
            raise CheckpointError(
                f"{self.name} points to bytes {offset:,} to {offset + size:,}, but has only {self.size:,}; "
                "it is damaged or incomplete: download it again"
            )


class Pool:
    """The open files of one checkpoint, at most 8; the one used longest ago is closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, io.FileIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, path: Path) -> io.FileIO:
        """The open file; raises OSError, and CheckpointError when it is no regular file."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        self._open[path] = _open_regular(path)
        return self._open[path]

    def close(self) -> None:
        """Close all; a later read opens again."""
        while self._open:
            self._open.popitem()[1].close()


def read_whole(path: Path, max_bytes: int) -> bytes:
    """A small file at once; CheckpointError when it is larger, missing or no regular file."""
    with _reading(path), _open_regular(path) as file:
        data = read_up_to(file, max_bytes + 1)
    if len(data) > max_bytes:
        raise CheckpointError(f"{path.name} has more than the {max_bytes:,} bytes that such a file may have")
    return data


def _open_regular(path: Path) -> io.FileIO:
    """Open a regular file; CheckpointError for anything else."""
    file = open_regular(path)
    if file is None:
        raise CheckpointError(f"{path.name} is not a regular file; give the file itself")
    return file


def _identity(file: io.FileIO) -> tuple[int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def sniff(file: InputFile) -> str:
    """Which format the first bytes show: "zip", "legacy", "safetensors", "gguf" or "llama2.c"; others are refused."""
    head = file.read(0, min(file.size, signatures.HEAD))
    if not head:
        raise CheckpointError(f"{file.name} is empty; download it again")
    if kind := signatures.checkpoint(head):
        return kind
    if what := signatures.named(head):
        raise CheckpointError(f"{file.name} is {what}")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{file.name} is a tar file (torch before 0.2); save it again with a current torch")
    fits = 2 <= int.from_bytes(head[:8], "little") <= file.size - 8
    if head[8:10] == b'{"' or (fits and head[8:9] in b"{ \t\r\n"):  # also one that was cut off, to say just that
        return "safetensors"
    if signatures.is_llama2c_run(head):
        return "llama2.c"
    raise _unknown(file.name, head)


def _unknown(name: str, head: bytes) -> CheckpointError:
    """What can be said of a file that is none of those that are read."""
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return CheckpointError(f"{name} is a plain pickle, not written by torch.save; save it with torch.save")
    if line := signatures.plain_text(head):
        return CheckpointError(f"{name} is a text that begins with {quote(line)}; download the file itself")
    return CheckpointError(
        f"{name} begins with {quote(head[:8].decode('latin-1'))}, which is no format that is read; "
        "a checkpoint of PyTorch, safetensors, GGUF or llama2.c is needed"
    )
