"""Files that processes lock while they use what stands beside them: shared by readers, alone by who makes or removes.

A lock ends with its process, however that ends. Who has locked a file asks whether it still is the one at its path: it
may have been removed while he waited. Where there are no locks (Windows, some network shares) `works` is False.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from npllama.store.staging import NOT_SUPPORTED

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF}
"""How a file system says that it locks nothing; EBADF where it locks only what is open for writing."""
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
MOMENT_S = 0.2


class Lock:
    """An open lock file. Raises OSError where it is absent and cannot be made."""

    _close_file = staticmethod(os.close)  # also there when the interpreter has forgotten the module os

    def __init__(self, path: Path) -> None:
        self.path = path
        self.works, self.descriptor = fcntl is not None, -1
        flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno not in READ_ONLY or not os.path.exists(path):
                raise
            self.descriptor = os.open(path, os.O_RDONLY | flags)

    def shared(self, waiting: Callable[[], None] | None = None) -> bool:
        """Lock beside others that do so; False where one holds it alone. waiting: called before waiting for it."""
        return fcntl is None or self._take(fcntl.LOCK_SH, waiting)

    def alone(self, waiting: Callable[[], None] | None = None) -> bool:
        """Lock against all others; False where any holds it. waiting: called before waiting for them."""
        return fcntl is None or self._take(fcntl.LOCK_EX, waiting)

    def _take(self, kind: int, waiting: Callable[[], None] | None) -> bool:
        """Whoever only looks whether a lock is free holds it for a moment: that is no wait to speak of."""
        deadline = time.monotonic() + MOMENT_S
        try:
            while not self._try(kind):
                if waiting is None:
                    return False
                if time.monotonic() >= deadline:
                    waiting()
                    fcntl.flock(self.descriptor, kind)
                    return True
                time.sleep(MOMENT_S / 20)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.works = False
        return True

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @property
    def is_current(self) -> bool:
        """Whether the file at the path is the one that is locked."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path, follow_symlinks=False))
        return False

    def close(self) -> None:
        """Let go. Closing twice is fine."""
        if self.descriptor >= 0:
            self._close_file(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process after the other where a folder can be locked, and all at once where not."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
