"""What checkpoints were exported to, so that they can be run: a folder of model directories that looks after itself.

    NAME                a model directory; its name holds a hash of the source's path and files, the number format and
                        the exporter's version
    NAME.npllama.json   the record, what was exported to what; its time is that of the last use, and it is the lock:
                        held shared while the model is open, alone by who makes or removes it

A record without a directory, whose lock is free, is what a killed export left. What has no record is left alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from npllama.errors import ModelError, UsageError, quote
from npllama.store.locks import Lock, alone_in
from npllama.store.opening import MANIFEST, is_model_file
from npllama.store.staging import remove, remove_leftovers
from npllama.system import strict_json

RECORD = ".npllama.json"
NAME = re.compile(r"([A-Za-z0-9_.-]+-[0-9a-f]{12})" + re.escape(RECORD))
LIMIT = "NPLLAMA_MODELS_MAX_GB"
FOLDER = "NPLLAMA_MODELS_DIR"
SLACK_BYTES = 1 << 20
"""Manifest and headers, which are no numbers of arrays."""

log = logging.getLogger("npllama")


def models_directory() -> Path:
    """Where exports are kept: NPLLAMA_MODELS_DIR, else npllama/models in XDG_CACHE_HOME, else in ~/.cache.

    It need not be there. Raises ModelError where there is not even a home directory.
    """
    if given := os.environ.get(FOLDER):
        return Path(os.path.abspath(given))
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base) / "npllama" / "models"
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        raise ModelError(
            f"there is no home directory ({quote(home)} is none) to keep exported models in; set {FOLDER} to a "
            f"directory of your own, or export it yourself with 'npllama export CHECKPOINT OUT'."
        )
    return Path(home) / ".cache" / "npllama" / "models"


def make_models_directory(source: Path) -> Path:
    """The same, made where it is missing. Raises ModelError that says where else the source can be exported to."""
    folder = models_directory()
    try:
        if not os.environ.get(FOLDER):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # compiled code is kept there too
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission to write")
    except OSError as error:
        raise unwritable(folder, source, error) from error
    return folder


def unwritable(folder: Path, source: Path, error: OSError) -> ModelError:
    """What to do where the folder cannot be written."""
    return ModelError(
        f"{folder}: cannot be written ({error.strerror or error}), and a checkpoint is exported there before it is "
        f"run; set {FOLDER} to a directory of your own, or export it yourself: npllama export {source} OUT"
    )


def largest_bytes() -> int | None:
    """What all models together may take: NPLLAMA_MODELS_MAX_GB, in 10^9 bytes; None without a limit."""
    said = os.environ.get(LIMIT, "")
    if not said:
        return None
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"{LIMIT}={quote(said)}: needs a number of gigabytes above 0, such as 50.")
    return int(number * 1e9)


class Record(NamedTuple):
    """What an export is of. source: the checkpoint; dtype: what was asked for; format, size_bytes: of the result."""

    source: str
    dtype: str | None
    format: str
    size_bytes: int


UNKNOWN = Record("unknown", None, "unknown", 0)


class Entry(NamedTuple):
    """One model of the folder, whether it is there or not yet."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def record_path(self) -> Path:
        return self.folder / f"{self.name}{RECORD}"

    @property
    def is_whole(self) -> bool:
        """Whether the model directory is there: the manifest comes with it, and goes first."""
        return os.path.lexists(self.path / MANIFEST)

    def lock(self) -> Lock:
        """Its record, open and not yet locked; made where it is missing."""
        return Lock(self.record_path)

    def record(self) -> Record:
        """What was exported; UNKNOWN while that is being written, or where the record is none."""
        try:
            found = strict_json.parse_object(self.record_path.read_bytes())
        except (OSError, UsageError):
            return UNKNOWN
        source, dtype, made, size = (found.get(name) for name in Record._fields)
        if isinstance(source, str) and isinstance(dtype, str | None) and isinstance(made, str) and type(size) is int:
            return Record(source, dtype, made, size)
        return UNKNOWN

    def write_record(self, lock: Lock, record: Record) -> None:
        """Write the record, which is locked."""
        os.ftruncate(lock.descriptor, 0)
        os.lseek(lock.descriptor, 0, os.SEEK_SET)
        os.write(lock.descriptor, (json.dumps(record._asdict()) + "\n").encode("ascii"))

    def size_bytes(self) -> int:
        """Bytes of its files; of one under way, what it will have."""
        total = 0
        with contextlib.suppress(OSError), os.scandir(self.path) as files:
            total = sum(file.stat(follow_symlinks=False).st_size for file in files)
        return total if self.is_whole else max(total, self.record().size_bytes)

    def last_used(self) -> float:
        """When it was opened last, in seconds since 1970; 0 where nobody knows."""
        with contextlib.suppress(OSError):
            return self.record_path.stat().st_mtime
        return 0.0

    def note_use(self) -> None:
        """It is used now. A folder that cannot be written stays as it is."""
        with contextlib.suppress(OSError):
            os.utime(self.record_path)

    def remove_leftovers(self) -> None:
        """Remove what killed exports left beside it. A folder that cannot be written stays as it is."""
        with contextlib.suppress(OSError):
            remove_leftovers(self.path, is_model_file)

    def remove(self, lock: Lock) -> None:
        """Remove it; the lock is held alone, and its file goes last."""
        remove_leftovers(self.path, is_model_file)
        if os.path.lexists(self.path):
            remove(self.path, is_model_file, MANIFEST)
        if not os.path.lexists(self.path):
            with contextlib.suppress(OSError):
                self.record_path.unlink()


def entries() -> list[Entry]:
    """All models that are there or under way, the one used last first; leftovers of killed exports are removed."""
    folder = models_directory()
    try:
        found = {match[1] for name in os.listdir(folder) if (match := NAME.fullmatch(name))}
    except OSError:
        return []
    kept = [entry for entry in (Entry(folder, name) for name in sorted(found)) if not swept(entry)]
    return sorted(kept, key=Entry.last_used, reverse=True)


def swept(entry: Entry, ours: bool = False) -> bool:
    """Remove what is left at a name where nobody makes a model or has one; whether there is none.

    ours: this process made what is there, so that it goes also where there are no locks to tell.
    """
    if entry.is_whole:
        entry.remove_leftovers()
        return False
    try:
        with entry.lock() as lock:
            if not lock.alone():
                return False
            if (lock.works or ours) and lock.is_current and not entry.is_whole:
                entry.remove(lock)
    except OSError:  # a folder that is not ours
        pass
    return not entry.is_whole


def in_use(entry: Entry) -> bool | None:
    """Whether a process has the model open, or makes it; None where there are no locks to tell."""
    try:
        with entry.lock() as lock:
            free = lock.alone()
            return not free if lock.works else None
    except OSError:
        return None


def make_room(entry: Entry, lock: Lock, record: Record) -> None:
    """Before an export that holds `lock`: remove what the limit of the folder wants, and write the record.

    Those used longest ago go, never one that is open. Raises ModelError where that makes not room enough, or where
    the disk has it not; nothing is removed then.
    """
    needed, limit = record.size_bytes + SLACK_BYTES, largest_bytes()
    with alone_in(entry.folder), ExitStack() as held:
        others = [(other, other.size_bytes()) for other in reversed(entries()) if other != entry]
        excess = 0 if limit is None else sum(size for _, size in others) + needed - limit
        victims: list[tuple[Entry, Lock]] = []
        for other, size in others if limit is not None and needed <= limit else ():
            if excess > 0 and (taken := _taken(other)) is not None:
                victims.append((other, held.enter_context(taken)))
                excess -= size
        if limit is not None and excess > 0:
            raise _too_much(entry.folder, record.source, needed, excess, limit)
        _check_disk(entry.folder, record.source, needed - sum(other.size_bytes() for other, _ in victims))
        for other, other_lock in victims:
            other.remove(other_lock)
            log.warning(f"{other.path}: removed, as the one used longest ago, for the limit of {LIMIT}")
        entry.write_record(lock, record)


def _taken(entry: Entry) -> Lock | None:
    """The lock of a model that is there and that nobody has open; None where it is in use, or nobody can tell."""
    with contextlib.suppress(OSError):
        lock = entry.lock()
        if entry.is_whole and lock.alone() and lock.works and lock.is_current:
            return lock
        lock.close()
    return None


def _too_much(folder: Path, source: str, needed: int, missing: int, limit: int) -> ModelError:
    held = "" if needed > limit else f", of which models in use leave {max(0, needed - missing) / 1e9:,.3f} GB"
    return ModelError(
        f"{source}: takes {needed / 1e9:,.3f} GB once exported to {folder}, but {LIMIT} allows {limit / 1e9:,.3f} "
        f"GB{held}; raise it, take a smaller --dtype, or export it elsewhere with 'npllama export {source} OUT'."
    )


def _check_disk(folder: Path, source: str, needed: int) -> None:
    """Some file systems say nothing of free space, or 0: then writing tells."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if 0 < free < needed:
        raise ModelError(
            f"{source}: takes {needed:,} bytes once exported, and {free:,} are free in {folder}; make room ('npllama "
            f"models' shows what is there), set {FOLDER} to another disk, or take a smaller --dtype."
        )


def remove_outdated(entry: Entry) -> None:
    """Remove what the same source was exported to before it changed, unless that is open."""
    own = entry.record()
    for other in entries() if own != UNKNOWN else ():
        if other != entry and other.record()[:2] == own[:2] and (lock := _taken(other)) is not None:
            with lock:
                other.remove(lock)


class Listed(NamedTuple):
    """One line of `npllama models`. last_used: in UTC; in_use None: nobody can tell."""

    name: str
    source: str
    format: str
    size_bytes: int
    last_used: str
    in_use: bool | None


def listed() -> list[Listed]:
    """All models that are there, the one used last first."""
    rows = []
    for entry in entries():
        if entry.is_whole:
            said, used = entry.record(), time.gmtime(entry.last_used())
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", used)
            rows.append(Listed(entry.name, said.source, said.format, entry.size_bytes(), when, in_use(entry)))
    return rows


def remove_models(names: list[str] | None) -> list[str]:
    """Remove models by name, None: all; returns the names of those that have gone.

    Raises ModelError for a name that is not there, before anything is removed, and for one that is in use, after the
    others have been.
    """
    there = {entry.name: entry for entry in entries() if entry.is_whole}
    for name in names or ():
        if name not in there:
            raise ModelError(f"{quote(name)}: is no model of {models_directory()}; 'npllama models' shows the names.")
    gone: list[str] = []
    kept: list[str] = []
    for name in dict.fromkeys(there if names is None else names):
        with there[name].lock() as lock:
            if lock.alone() and lock.is_current:
                there[name].remove(lock)
        (kept if there[name].is_whole else gone).append(name)
    if kept:
        raise ModelError(f"{', '.join(kept)}: in use by another program, and so still there; end that, then try again.")
    return gone
