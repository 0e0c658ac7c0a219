"""Many texts at once: each step is one call of the model for the next ids of all texts under way.

batching.py says what a step computes, and here it is decided who runs the steps. Whoever wants a result drives: a lone
caller runs them in its own thread. Callers in several threads drive in turn, and the others wait for news of their job.
Jobs whose owners do not drive have a thread of the scheduler, which lives as long as there are any.

Any thread adds jobs, and asks for their end by a flag. Only the thread that holds `_driving` changes them: it looks at
the flags before each step. Whoever sets one tries for that lock afterwards, and whoever releases it looks for flags
afterwards, so none is missed.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from npllama.errors import UsageError
from npllama.execution.abandon import AbandonedError
from npllama.execution.engine import Engine
from npllama.generation.batching import MAX_WRITTEN, Batching
from npllama.generation.jobs import Job
from npllama.generation.pool import Pool
from npllama.system.interrupts import Uninterrupted

MAX_WAITING = 4096
"""Jobs that wait to begin."""

IDLE_S = 5.0
"""Seconds after which a thread without work ends."""

CLOSED = "this model is closed; load it again."


class Scheduler(Batching):
    """Runs jobs over one pool, up to `parallel` of them at once, reading at most `chunk` ids of prompts in a step."""

    def __init__(self, engine: Engine, pool: Pool, parallel: int, chunk: int) -> None:
        super().__init__(engine, pool, parallel, chunk)
        self._process = os.getpid()
        self._driving = threading.Lock()  # guards the pool, what jobs have computed, and what stands from here on:
        self._next_deadline = math.inf
        self._driver: int | None = None  # the thread that steps
        self._guard = threading.RLock()  # of what follows; reentrant, because a stream may be collected at any time
        self._arrived: deque[Job] = deque()
        self._listeners: set[threading.Event] = set()
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        self._visitors = 0  # threads that wait to come between two steps

    # ------------------------------------------------------------ jobs in and out

    def add(self, job: Job, attended: bool = True) -> None:
        """Queue a job. attended: its owner drives; else a thread of the scheduler does.

        Raises UsageError when too many wait, or when no thread can be started.
        """
        with self._guard:
            if self.closed:
                raise UsageError(CLOSED)
            if len(self._arrived) + len(self._waiting) >= MAX_WAITING:
                raise UsageError(f"{MAX_WAITING} requests are waiting already; wait for some of them before the next.")
            if not attended:
                self._ensure_thread()
            job.attended = attended
            self._arrived.append(job)
            if not attended:
                self._work.set()

    def cancel(self, *jobs: Job) -> None:
        """End jobs early: now, or where another thread steps, after the step under way. Ended ones stay as they are."""
        if self._process != os.getpid():
            return
        for job in jobs:
            job.cancelled = True
        self._swept = False
        computing = self._computing
        if computing is not None and all(job.cancelled for job in computing[1]):
            computing[0].abandon()
        self._settle()

    def _settle(self) -> None:
        """Let go of what was cancelled, unless another thread steps: it will. Then wake those who wait for a turn."""
        with Uninterrupted():
            while not self._swept and self._driving.acquire(blocking=False):
                try:
                    self._sweep()
                finally:
                    self._driving.release()
            with self._guard:
                for event in self._listeners:
                    event.set()

    def _sweep(self) -> None:
        """Take in what has arrived; end what was cancelled or is out of time; let go of what has ended."""
        while self._arrived:
            job = self._arrived.popleft()
            self._waiting.append(job)
            if job.cancelled:
                self._swept = False
            self._next_deadline = min(self._next_deadline, job.deadline)
        now = time.monotonic()
        if self._swept and not self.closed and now < self._next_deadline:
            return
        self._swept = True  # before looking: who cancels from here on is seen the next time
        known = [*self._active, *self._waiting]
        for job in [*known, *itertools.chain.from_iterable(job.followers for job in known)]:
            if job.done:
                continue
            if self.closed:
                job.fail(UsageError(CLOSED))
            elif job.cancelled:
                job.end("cancelled")
            elif job.deadline <= now:
                job.end("time")
        self._drop_ended(self._waiting)
        self._next_deadline = min((job.deadline for job in (*self._active, *self._waiting)), default=math.inf)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Nobody steps meanwhile: for who changes sequences from outside. Waits for a step that is under way."""
        self.check_caller()
        with self._guard:
            self._visitors += 1
        try:
            with self._driving:
                self._sweep()
                yield
        finally:
            with self._guard:
                self._visitors -= 1
            self._work.set()
            self._settle()

    # ------------------------------------------------------------ driving

    def drive(self, job: Job, ready: Callable[[], bool], deadline: float | None = None) -> bool:
        """Step, or let another thread step, until a job is ready. False when the deadline passed before."""
        self.check_caller()
        event = job.event
        with self._guard:
            self._listeners.add(event)
        try:
            while True:
                event.clear()
                if ready():
                    return True
                stepped = self._step_until(lambda: ready() or _is_over(deadline))
                if not stepped and not event.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    return ready()
                if _is_over(deadline):
                    return ready()
        finally:
            with self._guard:
                self._listeners.discard(event)

    def check_caller(self) -> None:
        """Raise UsageError where nobody would ever end a wait for a job."""
        if self._process != os.getpid():
            raise UsageError("this text was begun in the process from which this one was forked; begin it anew here.")
        if self._driver == threading.get_ident():
            raise UsageError(
                "a function that is called while texts are computed cannot wait for one of the same model; "
                "let another thread do that."
            )

    def _step_until(self, over: Callable[[], bool]) -> bool:
        """Step until something is over; False where another thread steps already, or waits to come between."""
        with Uninterrupted():
            if not self._driving.acquire(blocking=False):
                return False
            self._driver = threading.get_ident()
            try:
                while not (ended := over()) and not self._visitors:
                    self.step()
            finally:
                self._driver = None
                self._driving.release()
                self._settle()
        return ended

    def wake(self) -> None:
        """There is work again for the scheduler's thread: a job that nobody drives was paused, and is not any more."""
        with self._guard:
            self._ensure_thread()
            self._work.set()

    def _ensure_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="npllama-scheduler", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise UsageError(f"no thread can be started ({error}); end some, or use generate.") from error
            self._thread = thread
            atexit.register(self.close)  # no thread is to compute while the interpreter is taken down

    def _run(self) -> None:
        """The scheduler's thread: steps while there are jobs that nobody drives; ends after a while without."""
        while True:
            self._work.clear()
            with self._driving:
                self._driver = threading.get_ident()
                try:
                    while self._has_unattended() and not self._visitors:
                        self.step()
                except BaseException as error:  # nobody is to wait for ever
                    self._fail_all(error)
                    raise
                finally:
                    self._driver = None
            self._settle()
            if not self._work.wait(0 if self.closed else IDLE_S):
                with self._guard:
                    if not self._work.is_set():
                        self._thread = None
                        atexit.unregister(self.close)
                        return

    def _fail_all(self, error: BaseException) -> None:
        for job in (*self._active, *self._waiting, *self._arrived):
            job.fail(error)
        with self._guard:
            self._thread = None
        self._swept = False
        self._sweep()

    def _has_unattended(self) -> bool:
        self._sweep()
        return any(not job.attended and not job.paused for job in itertools.chain(self._active, self._waiting))

    # ------------------------------------------------------------ one step

    def step(self) -> None:
        """One call of the model, of one step or several. Whoever calls this holds the lock `_driving`."""
        self._sweep()
        self._admit()
        parts = self._choose()
        if not parts:
            self._drop_ended()
            return
        started = time.perf_counter()
        try:
            n_steps = self._compute(parts)
        except AbandonedError:
            return  # nothing counts as written; the next step begins with a look at what was cancelled
        n_read = sum(n for _, _, n in parts if n > MAX_WRITTEN)
        seconds = (time.perf_counter() - started) / n_steps
        self._pace.record(sum(n for _, _, n in parts) - n_read, n_read, seconds)

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """End all jobs with an error: at once, or at the end of a step that computes in NumPy."""
        if self._process != os.getpid():
            return
        with self._guard:
            self.closed = True
        computing = self._computing
        if computing is not None:
            computing[0].abandon()
        self._work.set()
        if self._driver == threading.get_ident():
            return  # from a function that a step calls: the next step ends all
        with Uninterrupted(), self._driving:
            self._sweep()
        self._settle()


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
