"""Files that others have made: opening a regular one and nothing else, reading it to the end."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path


def open_regular(path: Path) -> io.FileIO | None:
    """Open a file for reading, unbuffered; None for what is no regular file: a pipe or a device may never end.

    Raises OSError as open does, and ValueError for a path that cannot be one.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))  # a pipe without writer blocks
    descriptor = os.open(path, os.O_RDONLY | sum(flags))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return io.FileIO(descriptor, "rb")


def read_up_to(file: io.FileIO, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file, where a single read may give fewer anywhere."""
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data
