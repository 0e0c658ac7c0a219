"""Make a directory appear whole or not at all, whatever happens on the way.

The files are written into OUT.partial-<8 hex digits> beside OUT and forced to the disk; then one rename makes the
directory OUT. A process that is killed leaves OUT as it was (absent, or the old one), and perhaps a partial directory,
which the next one for the same OUT removes: it knows by a lock, which ends with its process, whether the owner lives.
Nothing is ever deleted but files whose names the caller knows as its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npllama.errors import ModelError, quote

try:
    import fcntl
except ImportError:  # Windows: partial directories are then left for their owner to delete
    fcntl = None  # type: ignore[assignment]

IsOurs = Callable[[str], bool]
"""Says whether a file of this name may be deleted."""


def check_target(out: Path, force: bool, is_ours: IsOurs) -> None:
    """Raise ModelError unless `out` can be made: its parent is a directory and it is absent, or `force` may replace it.

    Replaced is an empty directory, or one that holds nothing but regular files which `is_ours` knows.
    """
    if not out.parent.is_dir():
        raise ModelError(
            f"{out}: cannot be made, as {out.parent} is no directory; make that first, or choose another OUT."
        )
    if not os.path.lexists(out):
        return
    if not force:
        raise ModelError(f"{out}: exists, and export replaces nothing by itself; choose another OUT, or use --force.")
    foreign = _foreign_entries(out, is_ours)
    if foreign is None:
        raise ModelError(f"{out}: is not a directory, and --force replaces a model directory only; choose another OUT.")
    if foreign:
        raise ModelError(
            f"{out}: holds {quote(foreign[0])}, and --force replaces a directory only if it holds nothing but a model; "
            f"choose another OUT."
        )


@contextmanager
def staged(out: Path, force: bool, is_ours: IsOurs) -> Iterator[Path]:
    """Give an empty directory to fill, which becomes `out` when the block ends; when it raises, nothing remains.

    Raises ModelError when `out` cannot be made (see `check_target`) or written: a full disk, for one.
    """
    check_target(out, force, is_ours)
    remove_leftovers(out, is_ours)
    partial, lock = None, None
    try:
        partial, lock = _create(out)
        yield partial
        sync(partial)
        _put_in_place(partial, out, force)
        with suppress(OSError):  # it is complete and in place, whether or not the disk knows already
            sync(out.parent)
    except OSError as error:
        raise ModelError(
            f"{out}: cannot be written ({error.strerror or error}), and nothing was left behind; make room or give "
            f"permission, or choose another OUT."
        ) from error
    finally:
        if partial is not None:
            _remove(partial, is_ours)  # after a swap this is the directory that was replaced
        if lock is not None:
            os.close(lock)


def remove_leftovers(out: Path, is_ours: IsOurs) -> None:
    """Remove partial directories of `out` whose process is gone; those in use, or with foreign files, stay."""
    pattern = re.compile(re.escape(out.name) + r"\.partial-[0-9a-f]{1,16}")
    with suppress(OSError):
        for entry in sorted(os.listdir(out.parent)):
            path = out.parent / entry
            if not pattern.fullmatch(entry) or _foreign_entries(path, is_ours) != []:
                continue
            lock = _lock(path)
            if lock is not None:
                _remove(path, is_ours)
                os.close(lock)


def sync(path: Path) -> None:
    """Force a directory's entries, or a file's contents, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(out: Path) -> tuple[Path, int | None]:
    """A new directory beside `out`, locked while this process lives."""
    while True:
        path = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        os.mkdir(path)
        lock = _lock(path)
        if lock is None:
            return path, None  # a system or disk without locks: there nobody removes what is not its own
        # Before it was locked, another process may have taken it for a leftover: then make a new one.
        if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
            return path, lock
        os.close(lock)


def _lock(path: Path) -> int | None:
    """Take a directory for this process; None where somebody has it, or where there are no locks."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _foreign_entries(folder: Path, is_ours: IsOurs) -> list[str] | None:
    """What a directory holds besides regular files of ours; None for what is no directory."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not (is_ours(e.name) and e.is_file(follow_symlinks=False)))


def _remove(folder: Path, is_ours: IsOurs) -> None:
    """Delete our files, then the directory if that emptied it. What cannot be deleted stays for the next time."""
    with suppress(OSError):
        for name in filter(is_ours, os.listdir(folder)):
            with suppress(OSError):
                os.unlink(folder / name)
        os.rmdir(folder)


def _put_in_place(partial: Path, out: Path, force: bool) -> None:
    """One rename. An `out` that exists is swapped with the new one, so that at no moment there is none."""
    if not force or not os.path.lexists(out):
        os.rename(partial, out)
    elif not _swap(partial, out):
        # No atomic swap on this system: a kill between these lines leaves no `out`, never half a one.
        aside = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        os.rename(out, aside)
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(aside, out)
            raise
        os.rename(aside, partial)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system has no such step."""
    exchange, here = 2, -100  # RENAME_EXCHANGE or RENAME_SWAP, and AT_FDCWD
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            failed = library.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(exchange))
        else:
            failed = library.renameat2(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(exchange))
    except (AttributeError, OSError, TypeError):
        return False
    return failed == 0
