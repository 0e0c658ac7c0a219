"""One array of a model directory as a .npy file: its header, what it must be exactly, and how it comes into memory.

Where a file system maps no files (some network drives and FUSE), they are read instead.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npllama.errors import ModelError, quote
from npllama.numbers import ArraySpec
from npllama.system import machine, regular_files, signatures

MAX_NPY_HEADER_BYTES = 10_000
NPY_ALIGNMENT = 64
CHUNK_BYTES = 4 << 20
AGAIN = "export the checkpoint again."


class Whole(NamedTuple):
    """What a file is part of, and what to do where it is not what it must be."""

    name: str
    again: str


MODEL = Whole("a model directory", AGAIN)

# Errors that no other way of having the numbers avoids: too many open files, no memory.
HOPELESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def npy_header(spec: ArraySpec) -> bytes:
    """The bytes before the numbers of a .npy file, version 1.0, padded so that the numbers start at a multiple of 64.

    Source: NumPy's documentation, numpy.lib.format.
    """
    text = _npy_dict(spec)
    padding = -(10 + len(text) + 1) % NPY_ALIGNMENT
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + padding + 1) + text + b" " * padding + b"\n"


def _npy_dict(spec: ArraySpec) -> bytes:
    """The one spelling, NumPy's own, of the dictionary for an array in C order."""
    return f"{{'descr': {spec.dtype!r}, 'fortran_order': False, 'shape': {spec.shape!r}, }}".encode("ascii")


# ---------------------------------------------------------------- files


def open_regular(path: Path, whole: Whole = MODEL) -> io.FileIO:
    """Open a regular file for reading. Raises ModelError for anything else."""
    try:
        file = regular_files.open_regular(path)
    except (OSError, ValueError) as error:
        raise ModelError(unreadable(path, error, whole)) from error
    if file is None:
        raise ModelError(f"{path}: is not a regular file, which every file of {whole.name} must be; {whole.again}")
    return file


def unreadable(path: Path, error: OSError | ValueError, whole: Whole = MODEL) -> str:
    """What to say about a file that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: is missing, and {whole.name} needs it; {whole.again}"
    return (
        f"{path}: cannot be read ({reason(error)}), and {whole.name} needs every one of its files; check its "
        f"permissions."
    )


def reason(error: OSError | ValueError) -> str:
    """What the system says about a failure."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def read(file: io.FileIO, size: int, name: str) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file."""
    try:
        return regular_files.read_up_to(file, size)
    except OSError as error:
        raise ModelError(unreadable(Path(name), error)) from error


def read_small(path: Path, largest: int, whole: Whole = MODEL) -> bytes:
    """A whole file of at most `largest` bytes."""
    with open_regular(path, whole) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ModelError(f"{path}: has {size:,} bytes, at most {largest:,} are accepted; {whole.again}")
        return read(file, size, path.name)


# ---------------------------------------------------------------- arrays


def map_array(path: Path, spec: ArraySpec, refused: list[OSError | ValueError], whole: Whole = MODEL) -> np.ndarray:
    """Map one .npy file read-only; where its file system does not map files, read it, and add the error to `refused`.

    Some file systems (FUSE with direct I/O) map privately only.
    """
    with open_array(path, spec, whole) as file:
        offset = file.tell()
        size = offset + spec.size_bytes
        try:
            buffer: Any = _mapped(file, size)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in HOPELESS:
                raise ModelError(
                    f"{path}: cannot be mapped into memory ({reason(error)}); {size:,} bytes and one open file are "
                    f"needed: raise the process's limits (ulimit -v, ulimit -n)."
                ) from error
            buffer, offset = _read_aligned(path, file, spec, error, whole), 0
            refused.append(error)
    array = np.frombuffer(buffer, np.dtype(spec.dtype), math.prod(spec.shape), offset).reshape(spec.shape)
    array.flags.writeable = False
    return array


def _mapped(file: io.FileIO, size: int) -> mmap.mmap:
    """A map of a file: shared, so that processes share one copy on any file system; else private."""
    try:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in HOPELESS:
            raise
        if hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def _read_aligned(path: Path, file: io.FileIO, spec: ArraySpec, why: OSError | ValueError, whole: Whole) -> np.ndarray:
    """The numbers of an array, read into memory that begins at a multiple of 64 as those of a map do."""
    size, free = spec.size_bytes, machine.free_memory()
    if size > free:
        raise ModelError(
            f"{path}: cannot be mapped into memory ({reason(why)}), nor read: {size:,} bytes are needed, {free:,} are "
            f"free; copy it to a local disk."
        )
    buffer = np.empty(size + NPY_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % NPY_ALIGNMENT
    numbers, done = buffer[start : start + size], 0
    while done < size:
        chunk = read(file, min(CHUNK_BYTES, size - done), path.name)
        if not chunk:
            raise ModelError(f"{path}: became shorter while it was read; {whole.again}")
        numbers[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    return numbers


def open_array(path: Path, spec: ArraySpec, whole: Whole = MODEL) -> io.FileIO:
    """Open one .npy file where its numbers begin, once header and size are exactly what they must be.

    Why exactly: a file cut short would end the process when its missing part is touched, and longer or differently
    laid out contents are not what was exported.
    """
    file = open_regular(path, whole)
    try:
        offset = _check_npy_header(path, file, spec, whole)
        size, needed = os.fstat(file.fileno()).st_size, offset + spec.size_bytes
        if size != needed:
            raise ModelError(
                f"{path}: has {size:,} bytes, shape {spec.shape} of {spec.dtype} needs exactly {needed:,}; "
                f"{whole.again}"
            )
        file.seek(offset)
    except BaseException:
        file.close()
        raise
    return file


def prefetch(array: np.ndarray) -> None:
    """Ask the system to read an array's file ahead, where it is a map."""
    base: Any = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if hasattr(base, "madvise") and hasattr(mmap, "MADV_WILLNEED"):
        with suppress(OSError):  # some file systems take no advice: pages then come when they are touched
            base.madvise(mmap.MADV_WILLNEED)


def _check_npy_header(path: Path, file: io.FileIO, spec: ArraySpec, whole: Whole) -> int:
    """Where the numbers start. The header is not parsed but compared: there is one right spelling of it."""
    start = read(file, 12, path.name)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\x00", b"\x02\x00") or len(start) < 12:
        what = signatures.pointer_or_page(start + read(file, signatures.HEAD, path.name))
        found = f"is {what}" if what else f"begins with {quote(start[:8].decode('latin-1'))}"
        raise ModelError(f"{path}: {found}, a .npy file (version 1.0, 2.0) is needed; {whole.again}")
    begin = 10 if start[6] == 1 else 12
    length = int.from_bytes(start[8:begin], "little")
    if length > MAX_NPY_HEADER_BYTES or (begin + length) % NPY_ALIGNMENT:
        raise ModelError(
            f"{path}: has a header of {length:,} bytes, needed are at most {MAX_NPY_HEADER_BYTES:,} and an end at a "
            f"multiple of {NPY_ALIGNMENT}; {whole.again}"
        )
    header = start[begin:] + read(file, length - len(start[begin:]), path.name)
    needed = _npy_dict(spec)
    if len(header) != length or not header.endswith(b"\n") or header.rstrip(b"\n").rstrip(b" ") != needed:
        found = header.rstrip(b" \n").decode("latin-1")
        raise ModelError(f"{path}: its header is {quote(found)}, needed is {quote(needed.decode())}; {whole.again}")
    return begin + length
