"""What an open model changes in the whole process, and puts back when the last one is closed.

NumPy's products use the threads of its BLAS, and glibc keeps freed memory for the next call.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npllama.system import machine

_lock = threading.RLock()  # reentrant: a model that is not closed may be collected at any time
_memory_users: set[object] = set()
_blas_users: dict[object, int] = {}  # who wants how many threads
_blas_before = _blas_set = 0

SUFFIXES = ("64_", "")
PREFIXES = ("scipy_openblas", "openblas")


def hold_freed_memory() -> Callable[[], None]:
    """Let malloc keep freed memory; the function that is returned gives it back, unless another holds it still."""
    key = object()
    with _lock:
        machine.keep_freed_memory()
        _memory_users.add(key)

    def release() -> None:
        with _lock:
            _memory_users.discard(key)
            if not _memory_users:
                machine.give_back_memory()

    return release


def hold_blas_threads(n: int) -> Callable[[], None] | None:
    """Let NumPy's BLAS use n threads until the function that is returned is called; None where it cannot be told.

    What others have set meanwhile stands.
    """
    global _blas_before, _blas_set
    library = _openblas()
    if library is None:
        return None
    get, put = library
    key = object()
    with _lock:
        if not _blas_users:
            _blas_before = get()
        _blas_users[key] = n
        put(n)
        _blas_set = get()

    def release() -> None:
        global _blas_set
        with _lock:
            if _blas_users.pop(key, None) is not None and get() == _blas_set:
                put([_blas_before, *_blas_users.values()][-1])
                _blas_set = get()

    return release


@functools.cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], Any]] | None:
    """How to ask and tell the OpenBLAS inside NumPy's wheel its number of threads; None where it is another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for file in folder.glob("*openblas*") if folder.is_dir() else ():
            library = ctypes.CDLL(str(file))
            for name in (f"{prefix}_%s_num_threads{suffix}" for prefix in PREFIXES for suffix in SUFFIXES):
                if hasattr(library, name % "set") and hasattr(library, name % "get"):
                    return getattr(library, name % "get"), getattr(library, name % "set")
    return None
