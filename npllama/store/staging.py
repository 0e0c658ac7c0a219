"""Make a directory appear whole or not at all, whatever happens on the way.

The files are written into OUT.partial-<8 hex digits> beside OUT and forced to the disk; then one rename makes the
directory OUT. A process that is killed leaves OUT as it was (absent, or the old one), and perhaps a partial directory.
The next process for the same OUT removes it: a lock, which ends with its process, tells whether the owner lives.
Nothing is ever deleted but files whose names the caller knows as its own.

File systems lack parts of this. Where directories cannot be renamed (overlays, network shares), their files are moved
one by one, the seal last: OUT is a model only once it is whole. Where there are no locks, leftovers stay and are named.
What cannot be forced to the disk is left to the system.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npllama.errors import ModelError, quote

try:
    import fcntl
except ImportError:  # Windows: partial directories are then left for their owner to delete
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("npllama")

IsOurs = Callable[[str], bool]
"""Says whether a file of this name may be deleted."""

NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""How a file system says that it has no such operation."""

CANNOT_RENAME = NOT_SUPPORTED | {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EBUSY, errno.EMFILE, errno.ETXTBSY}
"""How a file system refuses to rename a directory whose files it may still move: EXDEV on overlays, EBUSY or EACCES on
shares while something in it is open, EMFILE where a rename copies and the directory is large."""

MAX_NAME_BYTES = 255  # bytes that file systems accept
MAX_TRIES = 100


def target_path(out: str | os.PathLike[str]) -> Path:
    """The directory that `out` means, links resolved. Raises ModelError for what cannot be a path."""
    try:
        return Path(os.path.realpath(out))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{quote(os.fspath(out))}: cannot be made ({reason}); choose another OUT.") from error


def check_target(out: Path, force: bool, is_ours: IsOurs) -> None:
    """Raise ModelError unless `out` can be made: its parent is a directory and it is absent, or `force` may replace it.

    Replaced is an empty directory, or one that holds nothing but regular files which `is_ours` knows; no mount point.
    """
    try:
        _check_target(out, force, is_ours)
    except OSError as error:
        raise ModelError(
            f"{out}: cannot be made ({error.strerror or error}); choose another OUT, or give permission."
        ) from error


def _check_target(out: Path, force: bool, is_ours: IsOurs) -> None:
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
    if os.path.ismount(out):
        raise ModelError(f"{out}: is a mount point, which cannot be replaced; choose a new directory inside it as OUT.")


@contextmanager
def staged(out: Path, force: bool, is_ours: IsOurs, seal: str = "") -> Iterator[Path]:
    """Give an empty directory to fill, which becomes `out` when the block ends; when it raises, nothing remains.

    seal: the file without which the others are no whole. Raises ModelError when `out` cannot be made (see
    `check_target`) or written: a full disk, for one.
    """
    check_target(out, force, is_ours)
    remove_leftovers(out, is_ours)
    partial, lock = None, None
    try:
        try:
            partial, lock = _create(out)
            yield partial
            sync_directory(partial)
            _put_in_place(partial, out, force, is_ours, seal)
            sync_directory(out.parent)
        finally:
            if lock is not None:
                os.close(lock)  # first: shares do not remove a directory that is open
            if partial is not None:
                _remove(partial, is_ours)  # after a swap this is the directory that was replaced
    except OSError as error:
        left = f"{partial} is left, delete it" if partial and os.path.lexists(partial) else "nothing was left behind"
        raise ModelError(
            f"{out}: cannot be written ({error.strerror or error}), and {left}; make room or give permission, or "
            f"choose another OUT."
        ) from error


def remove_leftovers(out: Path, is_ours: IsOurs) -> None:
    """Remove partial directories of `out` whose process is gone; those in use, or with foreign files, stay."""
    pattern = re.compile(re.escape(_partial_prefix(out)) + r"[0-9a-f]{1,16}")
    with suppress(OSError):
        for entry in sorted(os.listdir(out.parent)):
            path = out.parent / entry
            if not pattern.fullmatch(entry) or _foreign_entries(path, is_ours) != []:
                continue
            with suppress(BlockingIOError):
                lock = _lock(path)
                if lock is None:
                    log.warning(
                        f"{path}: may be what an export that was stopped has left (there are no locks on this file "
                        f"system to tell); delete it if no export is running"
                    )
                    continue
                os.close(lock)
                _remove(path, is_ours)


def remove(folder: Path, is_ours: IsOurs, seal: str) -> None:
    """Remove a directory of ours, the seal first: what is left of it by a kill is no whole. Raises ModelError."""
    try:
        (folder / seal).unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be removed ({error.strerror or error}); give permission.") from error
    _remove(folder, is_ours)


def sync_file(descriptor: int) -> None:
    """Force a file's contents to the disk, where its file system can. Raises OSError when contents are lost."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the disk, where its file system can: shares and FUSE often cannot.

    Never fails: the files themselves are on the disk, and what a directory has lost shows when the model is opened.
    """
    if os.name == "nt":
        return  # Windows cannot open a directory
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EIO:
            log.warning(f"{path}: the disk reports an error for this directory ({error.strerror}); check the model")


def _partial_prefix(out: Path) -> str:
    """What the names of partial directories begin with: that of `out`, cut where the whole would be too long."""
    name = out.name
    while len(os.fsencode(name)) > MAX_NAME_BYTES - len(".partial-") - 8:
        name = name[:-1]
    return f"{name}.partial-"


def _partial_name(out: Path) -> Path:
    return out.with_name(_partial_prefix(out) + secrets.token_hex(4))


def _create(out: Path) -> tuple[Path, int | None]:
    """A new directory beside `out`, locked while this process lives."""
    for _ in range(MAX_TRIES):
        path = _partial_name(out)
        os.mkdir(path)
        try:
            lock = _lock(path)
        except BlockingIOError:  # another process has taken it for a leftover, and removes it
            continue
        if lock is None:
            return path, None  # a system or disk without locks: there nobody removes what is not its own
        # Before it was locked, it may have been removed as a leftover: then make a new one.
        if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
            return path, lock
        os.close(lock)
    raise OSError(errno.EBUSY, "new directories are locked or removed by others")


def _lock(path: Path) -> int | None:
    """Take a directory for this process; None where there are no locks. Raises BlockingIOError when it is taken."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
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
    try:
        for name in filter(is_ours, os.listdir(folder)):
            with suppress(OSError):
                os.unlink(folder / name)
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError as error:  # NFS keeps files that another process has open
        log.warning(f"{folder}: cannot be removed now ({error.strerror or error}); delete it later")


def _put_in_place(partial: Path, out: Path, force: bool, is_ours: IsOurs, seal: str) -> None:
    """One rename. An `out` that exists is swapped with the new one, so that at no moment there is none."""
    if not force or not os.path.lexists(out):
        _move(partial, out, seal, arriving=True)
    elif not _swap(partial, out):
        # No atomic swap on this system: a kill between these lines leaves no `out`, never half a one.
        aside = _partial_name(out)
        _move(out, aside, seal, arriving=False)
        try:
            _move(partial, out, seal, arriving=True)
        except OSError as error:
            _put_back(aside, out, seal, error)
            raise
        _remove(aside, is_ours)


def _put_back(aside: Path, out: Path, seal: str, error: OSError) -> None:
    """Make the old model `out` again when the new one could not become it because of `error`."""
    try:
        _move(aside, out, seal, arriving=True)
        with suppress(FileNotFoundError):
            os.rmdir(aside)  # what is left of it where its files were moved
    except OSError as second:
        raise ModelError(
            f"{out}: cannot be written ({error.strerror or error}), nor put back ({second.strerror or second}); what "
            f"was there is now {aside}: rename it."
        ) from second


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


def _renamed(source: Path, target: Path) -> bool:
    """Rename a file or directory; False where the file system refuses that, and copying may do."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in CANNOT_RENAME:
            raise
        return False
    return True


def _move(source: Path, target: Path, seal: str, arriving: bool) -> None:
    """Rename a directory; where the file system refuses that, make `target` and move the files, or undo all of it.

    The seal goes first, and where a model arrives it comes last: what is at `out` has it only while it is whole.
    """
    if _renamed(source, target):
        return
    os.mkdir(target)
    moved: list[str] = []
    try:
        for name in sorted(os.listdir(source), key=lambda name: (name == seal) == arriving):
            _move_file(source / name, target / name)
            moved.append(name)
        if not arriving:
            os.rmdir(source)  # else it is locked, and removed by its owner
        sync_directory(target)
    except BaseException:
        for name in reversed(moved):
            _move_file(target / name, source / name)
        os.rmdir(target)
        raise


def _move_file(source: Path, target: Path) -> None:
    """Rename a file; where the file system refuses that, copy it."""
    if _renamed(source, target):
        return
    try:
        with open(source, "rb") as read, open(target, "xb") as written:
            shutil.copyfileobj(read, written, 4 << 20)
            written.flush()
            sync_file(written.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    source.unlink()
