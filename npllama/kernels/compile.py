"""model.forward compiled whole, and the disk cache of what was compiled.

The cache keeps one file for each combination of number formats. Its name holds a hash of everything the machine code
depends on (the package's sources, versions, switches, the CPU and what the system lets a process use of it), so a stale
file is never read; a checksum stands before the code, because one flipped byte in machine code is a crash and not an
exception. The directory is private (0700): these files are code. Whatever is wrong with directory or file costs one
compilation, with one warning.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import njit, types
from numba.core.errors import NumbaError
from numba.extending import register_jitable

from npllama import model
from npllama.errors import ModelError
from npllama.kernels import affinity, amx, attention, elementwise, linear, top_k  # noqa: F401 (importing registers the overloads)
from npllama.kernels.flags import SERIAL
from npllama.kernels.formats import import_kernels
from npllama.kernels.numba_internals import Cache, compile_once, pack, target_machine, unpack

register_jitable(model.attention)
register_jitable(model.feed_forward)

DIGEST_BYTES = 32
UNFINISHED = "new-"
ABANDONED_S = 3600.0  # a file that is still unfinished then was left by a process that was killed


class DiskCache(Cache):
    """What Numba asks of a cache for one compiled function, kept in one file: checksum, then code."""

    def __init__(self, file: Path, warn: Callable[[str], None]) -> None:
        self._file, self._warn = file, warn
        self.loaded = False

    @property
    def cache_path(self) -> str:
        return str(self._file.parent)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function from the file, or None: then Numba compiles."""
        try:
            content = self._file.read_bytes()
            digest, code = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if hashlib.sha256(code).digest() != digest:
                raise ValueError("its checksum does not match")
            result = unpack(code, sig, target_context)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 (whatever is wrong with the file: compile, and replace it)
            self._warn(f"{self._file}: not usable ({error}); compiling again")
            return None
        self.loaded = result is not None
        return result

    def save_overload(self, sig: Any, data: Any) -> None:
        """Replace the file, and remove what other sources or versions left for the same formats."""
        try:
            code = pack(sig, data)
            self._write(hashlib.sha256(code).digest() + code)
        except Exception as error:  # noqa: BLE001 (a full or read-only disk: run uncached)
            self._warn(f"{self._file}: cannot keep compiled code ({error}); the next start compiles again")
            return
        with suppress(OSError):  # of other users' making, or in use: no harm but their size
            self._remove_old()

    def _write(self, content: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self._file.parent, prefix=UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, self._file)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _remove_old(self) -> None:
        formats, stamp, _ = self._file.name.rsplit("-", 2)
        for other in self._file.parent.glob(f"{formats}-*-*"):
            if not other.name.startswith(f"{formats}-{stamp}-"):
                other.unlink(missing_ok=True)
        for other in self._file.parent.glob(f"{UNFINISHED}*"):
            if time.time() - other.stat().st_mtime > ABANDONED_S:
                other.unlink(missing_ok=True)

    def enable(self) -> None:
        raise NotImplementedError("this cache is always on")

    def disable(self) -> None:
        raise NotImplementedError("this cache is always on")

    def flush(self) -> None:
        self._file.unlink(missing_ok=True)


def target() -> str:
    """What code is compiled for: the CPU with its features, and whether the system lets this process use AMX."""
    return "|".join((*target_machine(), str(amx.USED)))


def compile_forward(arguments: tuple[Any, ...], file: Path | None, warn: Callable[[str], None]) -> tuple[Any, bool]:
    """model.forward for arguments of these types. Returns the function, and whether it came from the cache file.

    file: where compiled code is kept, without the CPU's part of the name; None: nowhere.
    """
    import_kernels()
    function = njit(**SERIAL)(model.forward)
    try:
        return function, _compile(function, tuple(numba.typeof(a) for a in arguments), file, warn)
    except NumbaError as error:
        said = re.search(r"NumbaTypeError: (.*)", str(error))  # the sentence of an overload, out of forty lines
        reason = said.group(1) if said else str(error).splitlines()[0]
        raise ModelError(
            f"this model cannot be compiled: {reason}; use --backend numpy, or export it again."
        ) from error


def compile_pin_threads(file: Path | None, warn: Callable[[str], None]) -> Any:
    """affinity.pin_threads, compiled or from the cache file (see compile_forward)."""
    _compile(affinity.pin_threads, (types.Array(types.uint64, 2, "C"),), file, warn)
    return affinity.pin_threads


def compile_top_k(file: Path | None, warn: Callable[[str], None]) -> Any:
    """top_k.top_k, compiled or from the cache file (see compile_forward)."""
    arguments = types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")
    _compile(top_k.top_k, arguments, file, warn)
    return top_k.top_k


def _compile(function: Any, arguments: tuple[Any, ...], file: Path | None, warn: Callable[[str], None]) -> bool:
    """Compile a function for arguments of these types; whether it came from the cache file."""
    cache = None
    if file is not None:
        cpu = hashlib.sha256(target().encode()).hexdigest()[:16]
        cache = DiskCache(file.with_name(f"{file.name}-{cpu}"), warn)
    return compile_once(function, arguments, cache, warn)
