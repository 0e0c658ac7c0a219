"""Files of compiled code: what they are called, whether there is one, and which of them go.

A name is made of the number formats, a stamp and the CPU's part (kernels.compile.target): everything that the machine
code depends on. So a stale file is never read, and installations, versions and checkouts keep theirs beside each other.
Nothing here imports numba.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

from npllama.execution.compiled_sources import compiled_sources
from npllama.execution.kernels.flags import PLAIN
from npllama.numbers import FORMATS, format_of
from npllama.system import machine
from npllama.version import __version__
from npllama.weights import Weights

PACKAGE = Path(__file__).parent.parent
FORWARD, STEPS = "forward-", "steps-"
PARTS_OF_NAMES = (FORWARD, STEPS, "op-", "bind-threads", "top-k", "stamp-", "prefetch-", "round-", "new-")
MAX_DAYS, MAX_BYTES = 60, 512 << 20
"""A file goes when nobody has used it for so long, or, the longest unused first, when all are larger than that."""
UNFINISHED_S = 3600  # a file that is still being written after that never will be
STAMP_DIGITS = 16


def formats(weights: Weights) -> str:
    """The number formats of a model's matrices, as part of a file name: the compiled code depends on them."""
    return "+".join(dict.fromkeys(format_of(w).name for w in weights))


def forward_name(weights: Weights, kv_dtype: str = "f32") -> str:
    """Name of the file of model.forward, without the CPU's part: formats, and a stamp of what the code depends on."""
    layout = hashlib.sha256(repr([format_of(w).name for w in weights]).encode()).hexdigest()[:8]
    return named(f"{FORWARD}{formats(weights)}.{layout}.kv_{kv_dtype}")


def named(what: str) -> str:
    """Name of a file of compiled code, without the CPU's part."""
    return f"{what}{'.plain' if PLAIN else ''}-{stamp()}"


def compiled_exists(weights: Weights, kv_dtype: str = "f32") -> bool:
    """Whether compiled code for this model is kept, for this or another CPU. Writes nothing, does not import numba."""
    folder, _ = machine.compiled_code_directory(make=False)
    if folder is None or not any(folder.glob("forward-*")):
        return False
    return is_kept(forward_name(weights, kv_dtype))


def is_kept(name: str) -> bool:
    """Whether there is a file of this name, for this or another CPU."""
    folder, _ = machine.compiled_code_directory(make=False)
    return folder is not None and any(folder.glob(f"{name}-*"))


def stamp() -> str:
    """Hash of what machine code depends on but the CPU: versions, switches, and the sources that it is made from.

    Of sources without docstrings, comments and the messages of errors, so that other words there compile nothing again.
    """
    return _stamp(_added())


@functools.cache  # once: what a process has imported does not change when its files do
def _stamp(added: tuple[Path, ...]) -> str:
    known = _stamp_file(added)
    if known is not None and (text := _read(known)):
        return text
    digest = hashlib.sha256(_versions())
    for text in compiled_sources([*_kernels(), *added]):
        digest.update(text.encode())
    return digest.hexdigest()[:STAMP_DIGITS]


def _kernels() -> list[Path]:
    return sorted((PACKAGE / "execution" / "kernels").glob("*.py"))


def _modules_of_formats() -> list[str]:
    return list(dict.fromkeys(name for f in FORMATS.values() for name in (type(f).__module__, f.kernel)))


def in_stamp(module: str) -> bool:
    """Whether the stamp follows what a module defines: one of the package, or of a number format that is registered."""
    return module.startswith("npllama.") or module in _modules_of_formats()


def _added() -> tuple[Path, ...]:
    """Sources of registered number formats that are not the package's: of the format and of its kernel."""
    specs = [importlib.util.find_spec(name) for name in _modules_of_formats() if not name.startswith("npllama.")]
    return tuple(Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None)


def _versions() -> bytes:
    import importlib.metadata  # with all of email: too much for each start, and only asked for compiled execution

    versions = [sys.version, str(PLAIN)]
    for package in ("numba", "llvmlite", "numpy"):
        try:
            versions.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.append("none")
    if not _kernels():  # a build without sources (frozen, or .pyc alone) changes with the version only
        versions.append(__version__)
    return repr(versions).encode()


def _stamp_file(added: tuple[Path, ...]) -> Path | None:
    """The file that remembers the stamp of the package's files as they are, so that a start need not parse them."""
    folder, _ = machine.compiled_code_directory(make=False)
    if folder is None:
        return None
    digest = hashlib.sha256(_versions())
    for file in [*sorted(PACKAGE.rglob("*.py")), *added]:
        digest.update(hashlib.sha256(file.name.encode() + file.read_bytes()).digest())
    return folder / f"stamp-{digest.hexdigest()[:STAMP_DIGITS]}"


def _read(file: Path) -> str:
    """The stamp in a file; nothing where there is none, or something else."""
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return text if len(text) == STAMP_DIGITS and set(text) <= set("0123456789abcdef") else ""


def note_use(file: Path) -> None:
    """Note that a file of compiled code was used now, and remember the stamp. A read-only directory stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(file)
        known = _stamp_file(_added())
        if known is not None and not known.exists():
            write_whole(known, stamp().encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that others see all of it or nothing. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix="new-")
    try:
        with os.fdopen(handle, "wb") as new:
            new.write(content)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def tidy(folder: Path, kept: Path) -> None:
    """Remove what has not been used for long, and the longest unused of what is too much together; never `kept`."""
    found, now, total = [], time.time(), 0
    for file in folder.iterdir():
        if file.name.startswith(PARTS_OF_NAMES):
            with contextlib.suppress(OSError):
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
    for used, size, file in sorted(found, reverse=True):
        unfinished = file.name.startswith("new-")
        total += size
        most_s = UNFINISHED_S if unfinished else MAX_DAYS * 86400
        if file != kept and (now - used > most_s or (total > MAX_BYTES and not unfinished)):
            with contextlib.suppress(OSError):
                file.unlink()
