"""Keep the threads of a compiled call on CPUs of their own while other programs compete for them.

Linux balances how many threads wait for each CPU. With two other programs on two CPUs it may put both threads of a call
on one CPU and both programs on the other, and leave it so. Every step of the model then waits for the scheduler.
Shorter time slices (sched_setattr) do not change that; threads tied to one CPU each do.

They are tied only where threads are as many as CPUs, and only while other programs interrupt them. The caller's own
thread is moved but not tied: that would outlast the call, in every process that it starts.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np

LOOK_S = 0.05  # how often a thread looks whether it was interrupted
CROWDED_PER_S = 20.0  # interruptions; an idle machine has a few, other busy programs cause hundreds
CROWDED_S = 0.5  # how long that is remembered

T = TypeVar("T")
NOWHERE: frozenset[int] = frozenset()


class _Thread(threading.local):
    """What is known of the calling Python thread; its calls have threads of their own, whichever model they run."""

    looked_s = 0.0  # when it was last looked at, on the clock of time.monotonic
    interruptions = 0  # until then
    crowded_until_s = 0.0
    apart = NOWHERE  # the CPUs over which its threads are spread


_thread = _Thread()


class ThreadAffinity:
    """Runs compiled functions. make_bind: gives affinity.pin_threads, compiled; layer: numba.threading_layer."""

    def __init__(self, make_bind: Callable[[], Callable[[np.ndarray], None]], layer: Callable[[], str]) -> None:
        self._bind = functools.cache(make_bind)
        self._layer = layer
        linux = hasattr(os, "sched_setaffinity")
        self._cpu: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None) if linux else None

    def prepare(self) -> None:
        """Compile what ties threads to CPUs, so that no call has to."""
        if self._cpu is not None:
            self._bind()

    @property
    def apart(self) -> bool:
        """Whether threads of calls from this Python thread are tied."""
        return bool(_thread.apart)

    def release(self, n_threads: int) -> None:
        """Let the threads of calls from this Python thread run on all its CPUs again."""
        if self._cpu is not None:
            self._spread(n_threads, False, self._cpu)

    def run(self, n_threads: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """function(*arguments), with its threads on CPUs of their own where others compete for them."""
        cpu = self._cpu
        if cpu is None or n_threads == 1:
            return function(*arguments)
        crowded = time.monotonic() < _thread.crowded_until_s
        if crowded or _thread.apart:
            self._spread(n_threads, crowded, cpu)
        result = function(*arguments)
        self._look()
        return result

    def _spread(self, n_threads: int, crowded: bool, cpu: Callable[[], int]) -> None:
        """Give each thread one of the CPUs or, where that is not worth it, all of them. cpu: which the caller is on."""
        cpus = frozenset(os.sched_getaffinity(0))
        own, *others = sorted(cpus)
        apart = cpus if crowded and len(cpus) == n_threads else NOWHERE
        try:
            if _thread.apart != apart:
                if self._layer() != "omp":  # others give no thread a fixed part of a loop
                    self._cpu = None
                    return
                self._bind()(_masks([cpus, *([other] for other in others)] if apart else [cpus] * n_threads))
                os.sched_setaffinity(0, cpus)  # whichever parts this thread has done
                _thread.apart = apart
            if apart and cpu() != own:
                os.sched_setaffinity(0, [own])  # moves the caller, and lets it go again
                os.sched_setaffinity(0, cpus)
        except OSError:  # forbidden here
            self._cpu = None

    def _look(self) -> None:
        """Find out whether this thread was interrupted more often than on an idle machine."""
        import resource

        now = time.monotonic()
        passed = now - _thread.looked_s
        if passed < LOOK_S:
            return
        interruptions = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        if _thread.looked_s and interruptions - _thread.interruptions > CROWDED_PER_S * passed:
            _thread.crowded_until_s = now + CROWDED_S
        _thread.looked_s, _thread.interruptions = now, interruptions


def _masks(cpu_sets: Sequence[Collection[int]]) -> np.ndarray:
    """The CPUs of each thread as kernels.affinity.pin_threads takes them: (n_threads, words) uint64."""
    masks = np.zeros((len(cpu_sets), max(map(max, cpu_sets)) // 64 + 1), np.uint64)
    for mask, cpus in zip(masks, cpu_sets, strict=True):
        for cpu in cpus:
            mask[cpu // 64] |= np.uint64(1 << cpu % 64)
    return masks
