"""Ctrl-C: put off while jobs are moved about, passed on at once while the model computes, heard during compiled code.

Python runs the handler of SIGINT between any two instructions of the main thread, and KeyboardInterrupt leaves what it
meets half done. So what several threads share is changed inside `Uninterrupted`: the handler then runs at the end, or
inside `Interruptible`, where nothing is half done. While the main thread is in compiled code no handler can run at all;
`Ears` hears the signal in a thread of its own.

In other threads all of this does nothing: signals are handled in the main thread only.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

Handler = Callable[[int, FrameType | None], Any]


class _Shield:
    """Stands before the handler of SIGINT as long as anybody holds it. Used by the main thread alone."""

    def __init__(self) -> None:
        self.holders = 0
        self.busy = self.came = False
        self._handler: Handler | None = None

    def hold(self) -> None:
        self.holders += 1
        if self.holders == 1:
            found = signal.getsignal(signal.SIGINT)
            if found != self._take:
                self._handler = found if callable(found) else None  # else it is ignored, or ends the process
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._take)

    def let_go(self) -> None:
        self.holders -= 1
        if self.holders == 0 and self._handler is not None and signal.getsignal(signal.SIGINT) == self._take:
            signal.signal(signal.SIGINT, self._handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.busy:
            self.came = True
        elif self._handler is not None:
            self._handler(number, frame)

    def deliver(self) -> None:
        """Run the handler that was put off."""
        if self.came and self._handler is not None:
            self.came = False
            self._handler(signal.SIGINT, None)


_shield = _Shield()


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class Uninterrupted:
    """`with Uninterrupted():` what is done inside is not torn by Ctrl-C, which takes effect at the end."""

    def __enter__(self) -> None:
        self._main = _is_main()
        if not self._main:
            return
        self._outer = _shield.busy
        try:
            _shield.busy = True
            _shield.hold()
        except BaseException:
            _shield.busy = self._outer
            raise

    def __exit__(self, *error: object) -> None:
        if not self._main:
            return
        try:
            _shield.let_go()
        finally:
            _shield.busy = self._outer
        if not self._outer:
            _shield.deliver()


class Interruptible:
    """`with Interruptible():` inside the other: Ctrl-C takes effect at once, one that came before too."""

    def __enter__(self) -> None:
        self._outer = _shield.busy and _is_main()
        if self._outer:
            _shield.busy = False
            try:
                _shield.deliver()
            except BaseException:
                _shield.busy = True
                raise

    def __exit__(self, *error: object) -> None:
        if self._outer:
            _shield.busy = True


class Hold:
    """Keeps the shield standing from one `Uninterrupted` to the next: to put it up costs system calls."""

    def __init__(self) -> None:
        self._held = _is_main()
        if self._held:
            _shield.hold()

    def release(self) -> None:
        """Let it go; in another thread than the main one it stays, and passes everything on."""
        if self._held and _is_main():
            self._held = False
            _shield.let_go()


class Ears:
    """Hears Ctrl-C while the main thread is in compiled code: `with EARS(tell):` calls tell() from another thread.

    By Python's wakeup descriptor (signal.set_wakeup_fd). Where somebody else has set one, as event loops do, it is left
    alone: then Ctrl-C takes effect at the end of the call.
    """

    def __init__(self) -> None:
        self._process = 0
        self._lock = threading.Lock()
        self._tell: Callable[[], None] | None = None
        self._own = False

    def __call__(self, tell: Callable[[], None]) -> Ears:
        self._tell = tell
        return self

    def __enter__(self) -> None:
        if not _is_main():
            return
        if self._process != os.getpid():
            self._start()
        before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._own = before == -1
        if not self._own:
            signal.set_wakeup_fd(before)

    def __exit__(self, *error: object) -> None:
        if self._own:
            signal.set_wakeup_fd(-1)
            self._own = False
        self._tell = None

    def _start(self) -> None:
        """A thread that listens, in each process."""
        import socket  # here, because it imports much

        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        atexit.register(self._mouth.close)  # which ends the thread
        threading.Thread(target=self._listen, args=(self._ear,), name="npllama-ctrl-c", daemon=True).start()
        self._process = os.getpid()

    def _listen(self, ear: socket.socket) -> None:
        while heard := ear.recv(64):
            tell = self._tell
            if signal.SIGINT in heard and tell is not None:
                tell()


EARS = Ears()
