"""Calls of compiled code that can be abandoned: kernels look at a flag in memory, and return at once when it is set.

What an abandoned call computes is garbage, so its positions never count as written. Kernels look at the beginning of
each product and of each tile of attention: see kernels/abandon.py. One call computes at a time, so one flag serves.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

import numpy as np

from npllama.system.interrupts import EARS

MIN_HEARD_ROWS = 9
"""Rows of a call from which on Ctrl-C is listened for; a shorter one has ended soon enough."""

FLAG = np.zeros(1, np.int32)

_lock = threading.RLock()  # reentrant: a text that nobody holds any more may be collected, hence cancelled, at any time
_under_way: Call | None = None


def _renew_lock() -> None:
    """In a forked child: the thread that may have held the lock is not there to release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class AbandonedError(Exception):
    """Another thread has abandoned this call: nothing of it counts."""


class Call:
    """A call of the model, so that another thread can abandon it."""

    def __init__(self) -> None:
        self.abandoned = self.heard = False

    def abandon(self) -> None:
        """Let the call end at once with AbandonedError, if it computes or has not begun. For any thread."""
        with _lock:
            self.abandoned = True
            if _under_way is self:
                FLAG[0] = 1

    def hear(self) -> None:
        """Ctrl-C has come: the call ends at once, so that Python can handle it."""
        with _lock:
            self.heard = True
            if _under_way is self:
                FLAG[0] = 1

    def run(self, compute: Callable[[], np.ndarray], n_rows: int) -> np.ndarray:
        """What compute() returns, unless it was abandoned.

        After Ctrl-C Python handles the signal as soon as it runs again, here. If its handler raises nothing, the call
        is made again.
        """
        while True:
            with EARS(self.hear) if n_rows >= MIN_HEARD_ROWS else contextlib.nullcontext():
                self._begin()
                try:
                    result = compute()
                finally:
                    self._end()
            if self.abandoned:
                raise AbandonedError
            if not self.heard:
                return result
            self.heard = False

    def _begin(self) -> None:
        global _under_way
        with _lock:
            _under_way = self
            FLAG[0] = self.abandoned or self.heard

    def _end(self) -> None:
        global _under_way
        with _lock:
            _under_way = None
            FLAG[0] = 0
