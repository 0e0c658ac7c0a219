"""One compiled function in one file, as Numba asks of a cache: a checksum, then the code.

The checksum, because one flipped byte in machine code is a crash and not an exception. The directory is private (0700):
these files are code. Whatever is wrong with directory or file costs one compilation, with one warning.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npllama.execution import compiled_code
from npllama.execution.kernels.compile import target
from npllama.execution.kernels.numba_internals import (
    Cache,
    compile_each_once,
    namedtuple_classes,
    pack,
    unpack,
)
from npllama.system import machine

DIGEST_BYTES = 32


def open_caches(report: Callable[[str], None]) -> Callable[[str], DiskCache | None]:
    """A function that gives the cache for a name of compiled_code; None, once said why, where code cannot be kept."""
    folder, why = machine.compiled_code_directory()
    if folder is None:
        report(f"compiled code is not kept: {why}")
        return lambda name: None
    cpu = hashlib.sha256(target().encode()).hexdigest()[:16]
    return lambda name: DiskCache(folder / f"{name}-{cpu}", report)


def kept_ops(cache_of: Callable[[str], DiskCache | None]) -> dict[str, Callable[..., Any]]:
    """Every function of ops.py compiled on its own (per_op.OPS), for each types of arguments once, and kept."""
    from npllama.execution.kernels import per_op  # it imports the kernels of all formats

    for step, function in per_op.OPS.items():
        compile_each_once(function, functools.partial(_cache_for, cache_of, step))
    return per_op.OPS


def _cache_for(cache_of: Callable[[str], DiskCache | None], step: str, types: tuple[Any, ...]) -> DiskCache | None:
    """The cache of a step for arguments of these types; None where code depends on more than its stamp says."""
    classes = [(found.__module__, found.__qualname__) for found in namedtuple_classes(types)]
    if not all(compiled_code.in_stamp(module) for module, _ in classes):
        return None
    digest = hashlib.sha256(repr((classes, types)).encode()).hexdigest()[:16]
    return cache_of(compiled_code.named(f"op-{step}.{digest}"))


class DiskCache(Cache):
    """What Numba asks of a cache for one compiled function, kept in one file: checksum, then code."""

    def __init__(self, file: Path, warn: Callable[[str], None]) -> None:
        self._file, self.warn = file, warn
        self.loaded = False

    @property
    def cache_path(self) -> str:
        return str(self._file.parent)

    @property
    def exists(self) -> bool:
        """Whether there is a file."""
        return self._file.exists()

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
            self.warn(f"{self._file}: not usable ({error}); compiling again")
            return None
        self.loaded = result is not None
        if self.loaded:
            compiled_code.note_use(self._file)
        return result

    def save_overload(self, sig: Any, data: Any) -> None:
        """Replace the file, and tidy its directory."""
        try:
            code = pack(sig, data)
            compiled_code.write_whole(self._file, hashlib.sha256(code).digest() + code)
            compiled_code.note_use(self._file)
            compiled_code.tidy(self._file.parent, self._file)
        except Exception as error:  # noqa: BLE001 (a full or read-only disk: run uncached)
            self.warn(f"{self._file}: cannot keep compiled code ({error}); the next start compiles again")

    def enable(self) -> None:
        raise NotImplementedError("this cache is always on")

    def disable(self) -> None:
        raise NotImplementedError("this cache is always on")

    def flush(self) -> None:
        self._file.unlink(missing_ok=True)
