"""Many texts at once: each step is one call of the model for the next ids of all texts under way.

A step holds the next id of every text that is being written, and parts of the prompts that are being read, as many as
do not stall the writers. A text that ends makes room for the next. When the pool of blocks is full, the youngest is set
aside, and read again later: what it had computed is often still there. So nothing fails that fits alone.

Whoever wants a result drives: a lone caller runs the steps in its own thread. Callers in several threads drive in turn,
and the others wait for news of their job. Jobs whose owners do not drive have a thread of the scheduler, which lives
as long as there are any.

Any thread adds jobs, and asks for their end by a flag. Only the thread that holds `_driving` changes them: it looks at
the flags before each step. Whoever sets one tries for that lock afterwards, and whoever releases it looks for flags
afterwards, so none is missed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids

import numpy as np

from npllama.cache import BLOCK_SLOTS, n_blocks
from npllama.errors import ContextError, NpllamaError, UsageError
from npllama.execution.abandon import AbandonedError, Call
from npllama.execution.engine import Engine
from npllama.generation.chunks import Pace
from npllama.generation.jobs import Job, Resting
from npllama.generation.pool import Pool, PoolFullError, Sequence
from npllama.generation.sampling.basic import Draw, draw_rows
from npllama.generation.speculation import how_many
from npllama.system.interrupts import Uninterrupted

MAX_WRITTEN = 16
"""A text with no more pending ids than this is being written, and not read."""

MAX_WAITING = 4096
"""Jobs that wait to begin."""

IDLE_S = 5.0
"""Seconds after which a thread without work ends."""

CLOSED = "this model is closed; load it again."

Part = tuple[Job, Sequence, int]
"""A job of a step, its sequence, and how many ids of it are fed."""

Drawn = dict[Job, list[int | None]]
"""The ids that were drawn for jobs; None where logits were not finite."""


class Scheduler:
    """Runs jobs over one pool, up to `parallel` of them at once, reading at most `chunk` ids of prompts in a step."""

    def __init__(self, engine: Engine, pool: Pool, parallel: int, chunk: int) -> None:
        self.pool = pool
        self.closed = False
        self._process = os.getpid()
        self._engine = engine
        self._parallel, self._chunk = parallel, chunk
        self._pace = Pace()
        self._driving = threading.Lock()  # guards the pool, what jobs have computed, and what stands from here on:
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []  # the oldest first
        self._next_deadline = math.inf
        self._driver: int | None = None  # the thread that steps
        self._guard = threading.RLock()  # of what follows; reentrant, because a stream may be collected at any time
        self._arrived: deque[Job] = deque()
        self._listeners: set[threading.Event] = set()
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        self._visitors = 0  # threads that wait to come between two steps
        self._swept = True  # False: something was cancelled since the last look
        self._hidden = False  # what the last step gave, where jobs want either
        self._computing: tuple[Call, list[Job]] | None = None

    # ------------------------------------------------------------ jobs in and out

    def fits(self, window: int, n_sink: int, n_ids: int) -> bool:
        """Whether a text of n ids can be fed when it is alone."""
        return self.blocks_of(window, n_sink, n_ids, self._chunk) <= self.pool.capacity

    @staticmethod
    def blocks_of(window: int, n_sink: int, n_ids: int, chunk: int) -> int:
        """Blocks that a text of n ids has at most at a time: all, or its sinks and its window and a part behind it."""
        return min(n_blocks(n_ids), n_blocks(n_sink) + n_blocks(window + chunk) + 1)

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

    def _drop_ended(self, more: Iterable[Job] = ()) -> None:
        """Let go of jobs that have ended; the followers of one that ended early take its place.

        Only then are owners told: who has a result finds the pool without its blocks.
        """
        for job in [job for job in (*self._active, *more) if job.done]:
            self._release(job)
            (self._active if job in self._active else self._waiting).remove(job)
            heirs = [follower for follower in job.followers if not follower.done]
            for follower in job.followers:
                follower.tell()
            job.followers = []
            self._waiting.extendleft(reversed(heirs))
            job.tell()

    def _release(self, job: Job) -> None:
        """Take a job's blocks: for the session that it has continued, else for everybody."""
        sequence, job.sequence = job.sequence, None
        if sequence is None:
            return
        if job.done and job.rest is not None and not self.closed:
            self.keep(job.rest, sequence, job.ids)
        else:
            sequence.close()

    # ------------------------------------------------------------ texts that rest

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

    def keep(self, rest: Resting, sequence: Sequence, ids: list[int]) -> None:
        """Let a text rest that was fed these ids. Between steps."""
        if rest.done or rest.cancelled:
            sequence.close()
            return
        if rest.sequence is None:
            self._active.append(rest)
        rest.keep(sequence, ids)

    def claim(self, rest: Resting, ids: list[int]) -> tuple[Sequence, list[int]] | None:
        """A sequence for a text that is to be filled from elsewhere, and what is missing of it; None where all is used.

        Between steps, at the cost of texts that are not fed now.
        """
        while True:
            sequence = Sequence(self.pool, rest.window, rest.n_sink)
            try:
                return sequence, sequence.claim(ids)
            except PoolFullError:
                sequence.close()
            if not any(job.paused for job in self._active):
                return None
            self._set_aside(self._victim())

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
        """One call of the model. Whoever calls this holds the lock `_driving`."""
        self._sweep()
        self._admit()
        parts = self._choose()
        if not parts:
            self._drop_ended()
            return
        started = time.perf_counter()
        try:
            self._compute(parts)
        except AbandonedError:
            return  # nothing counts as written; the next step begins with a look at what was cancelled
        n_read = sum(n for _, _, n in parts if n > MAX_WRITTEN)
        self._pace.record(sum(n for _, _, n in parts) - n_read, n_read, time.perf_counter() - started)

    def _compute(self, parts: list[Part]) -> None:
        """Feed the parts and hand out their logits. What fails together is tried one by one: only what fails ends."""
        try:
            logits = self._forward(parts)
        except (NpllamaError, MemoryError) as error:
            if len(parts) == 1:
                parts[0][0].fail(error)
                self._drop_ended()
                return
            for part in parts:
                self._compute([part])
            return
        self._deliver(parts, logits)

    def _admit(self) -> None:
        """Let jobs that wait begin, as long as there are blocks for their beginnings."""
        while any(not job.paused for job in self._waiting):
            busy = [job for job in self._active if not job.paused]
            if len(busy) >= self._parallel:
                return
            job = next(job for job in self._waiting if not job.paused)
            if job.rest is not None and job.rest.sequence is not None:
                self._active.remove(job.rest)
                job.rest.hand_over(job)
            if job.sequence is not None:
                self._waiting.remove(job)
                self._active.append(job)
                continue
            sequence = Sequence(self.pool, job.window, job.n_sink)
            found = sequence.adopt(job.ids[: job.received + 1])
            if sequence.needed(min(len(job.ids) - found, self._chunk) + 1) > self.pool.available and self._active:
                sequence.close()
                if len(busy) == len(self._active):
                    return
                self._set_aside(self._victim())
                continue
            job.sequence = sequence
            job.cached = found if job.cached is None else job.cached
            self._waiting.remove(job)
            self._active.append(job)

    def _victim(self) -> Job:
        """Whose blocks are taken next: of who rests longest, else of the youngest not fed now, else of the youngest."""
        if resting := [job for job in self._active if isinstance(job, Resting)]:
            return resting[0]
        return next((job for job in reversed(self._active) if job.paused), self._active[-1])

    def _choose(self) -> list[Part]:
        """The jobs of this step and how many ids of each, with blocks reserved for them."""
        able = self._of_one_kind([job for job in self._active if not job.paused])
        pending = [job.pending for job in able]
        written = [n for n in pending if n <= MAX_WRITTEN]
        left = self._chunk
        if written:
            left = self._pace.part(sum(written), self._chunk)
            self._guess(able, pending)
        parts: list[Part] = []
        for job, n in zip(able, pending, strict=True):
            if n > MAX_WRITTEN:
                n = min(n, left)
                left -= n
            n += len(job.draft)
            if n and self._reserve(job, n) and job.sequence is not None:
                parts.append((job, job.sequence, n))
        return [(job, s, n) for job, s, n in parts if s is job.sequence]  # later ones may have displaced earlier ones

    def _guess(self, jobs: list[Job], pending: list[int]) -> None:
        """Let jobs guess as many of their next ids as it pays to check: not beside a prompt, nor for others' blocks."""
        alone = max(pending) <= MAX_WRITTEN
        chances = [job.chances() if alone and n == 1 else [] for job, n in zip(jobs, pending, strict=True)]
        n_each = how_many(chances, sum(pending), self._pace) if any(chances) else [0] * len(jobs)
        for job, n in zip(jobs, n_each, strict=True):
            job.draft = []
            if n and job.sequence is not None and job.sequence.needed(1 + n) <= self.pool.available:
                job.draft = job.guesses(n)

    def _of_one_kind(self, jobs: list[Job]) -> list[Job]:
        """Those that want logits, or those that want hidden states: in turn where there are both."""
        if len({job.hidden for job in jobs}) > 1:
            self._hidden = not self._hidden
            return [job for job in jobs if job.hidden == self._hidden]
        return jobs

    def _reserve(self, job: Job, n: int) -> bool:
        """Blocks for the next n ids of a job: at the cost of the youngest, which may be this one."""
        while job.sequence is not None:
            try:
                job.sequence.reserve(n)
            except PoolFullError:
                if len(self._active) > 1:
                    self._set_aside(self._victim())
                    continue
                self._release(job)
                job.fail(self._too_long(job))
            else:
                return True
        return False

    def _too_long(self, job: Job) -> ContextError:
        return ContextError(
            f"a text of {len(job.ids)} tokens does not fit into the {self.pool.capacity} blocks of {BLOCK_SLOTS} "
            f"positions that there are; load the model with more kv_memory."
        )

    def _set_aside(self, job: Job) -> None:
        """Take a job's blocks; it is read again when blocks are free, or when somebody continues it."""
        self._release(job)
        self._active.remove(job)
        if not isinstance(job, Resting):
            job.draft = []
            self._waiting.appendleft(job)

    def _forward(self, parts: list[Part]) -> np.ndarray:
        """Logits of the rows that the jobs want, job by job."""
        tokens: list[int] = []
        pos: list[int] = []
        seq: list[int] = []
        out: list[int] = []
        for job, sequence, n in parts:
            start = sequence.length
            out += [len(tokens) + p - start for p in job.wanted(start, start + n)]
            tokens += job.ids[start : start + n]
            tokens += job.draft[: max(0, start + n - len(job.ids))]
            pos += range(start, start + n)
            seq += [sequence.row] * n
        call = Call()
        self._computing = call, [job for job, _, _ in parts]
        try:
            return self._engine.forward(self.pool.cache, tokens, pos, seq, out, parts[0][0].hidden, call)
        finally:
            self._computing = None

    def _deliver(self, parts: list[Part], logits: np.ndarray) -> None:
        """Hand out the logits, or the ids drawn from them; guesses that were fed and are wrong are taken back."""
        ends = [sequence.length for _, sequence, _ in parts]
        wanted = [job.wanted(end - n, end) for (job, _, n), end in zip(parts, ends, strict=True)]
        drawn = self._drawn(parts, wanted, logits)
        row = 0
        for (job, sequence, _), positions, end in zip(parts, wanted, ends, strict=True):
            self._hand(job, sequence, positions, logits[row : row + len(positions)], drawn)
            row += len(positions)
            if job.draft:
                sequence.rewind(end - len(job.draft) + _n_right(job, end))
                job.draft = []
            sequence.written(job.ids)
            if job.cancelled:
                self._swept = False
            if not job.done:
                job.tell()
        self._drop_ended()

    def _drawn(self, parts: list[Part], wanted: list[Ids[int]], logits: np.ndarray) -> Drawn:
        """The ids of all jobs that draw them, drawn together."""
        rows: list[int] = []
        draws: list[Draw] = []
        takers: list[tuple[Job, int]] = []
        row = 0
        for (job, _, _), positions in zip(parts, wanted, strict=True):
            for one in (job, *job.followers) if positions else ():
                if some := one.draws():
                    takers.append((one, len(draws)))
                    draws += some
                    rows += range(row, row + len(some))
            row += len(positions)
        if not draws:
            return {}
        every = len(rows) == row and not any(job.followers for job, _, _ in parts)
        ids = draw_rows(logits if every else logits[rows], draws, self._engine.top_k)
        return {one: ids[first : first + 1 + len(one.draft)] for one, first in takers}

    def _hand(self, job: Job, sequence: Sequence, positions: Ids[int], logits: np.ndarray, drawn: Drawn) -> None:
        """Give a job, and those that follow it from here on, the logits of these positions, or the ids drawn there.

        Followers go on from the prompt in blocks that all share until they write.
        """
        self._receive(job, lambda: job.progressed(sequence.length))
        if not positions:
            return
        followers, job.followers = job.followers, []
        for one in (*followers, job):
            if one is not job:
                if one.done:
                    one.tell()
                    continue
                one.sequence, one.cached = sequence.fork(), sequence.length
                self._active.append(one)
            ids = drawn.get(one)
            give = (
                functools.partial(one.receive, positions, logits) if ids is None else functools.partial(one.take, ids)
            )
            self._receive(one, give)
            if one is not job:
                one.tell()

    @staticmethod
    def _receive(job: Job, receive: Callable[[], None]) -> None:
        """Let a job take something, unless it has ended. Whatever goes wrong there is told to its owner alone."""
        if job.done or job.cancelled:
            return
        try:
            receive()
        except Exception as error:  # noqa: BLE001 (a function that the owner gave may raise anything)
            job.fail(error)

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


def _n_right(job: Job, length: int) -> int:
    """How many of a job's guesses, fed as the last of so many positions, its ids are now."""
    start = length - len(job.draft)
    n = 0
    for guess, token in zip(job.draft, job.ids[start:], strict=False):
        if guess != token:
            break
        n += 1
    return n
