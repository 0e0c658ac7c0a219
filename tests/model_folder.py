"""What the tests of the folder of exported models share; its fixtures `models` and `checkpoint` are in conftest.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from npllama.store import locks
from npllama.store.direct import open_source

needs_locks = pytest.mark.skipif(locks.fcntl is None, reason="no locks on this system")


def name_of(path: Path, dtype: str | None = None) -> str:
    """Where a checkpoint is kept after it was opened."""
    with open_source(path, dtype) as opened:
        return opened.path.name


def later(path: Path) -> None:
    """Change a file's time as a write does, however coarse the file system's clock."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))
