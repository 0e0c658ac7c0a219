"""Many texts at once: each step is one call of the model for the next ids of all texts under way.

A step holds the next id of every text that is being written, and parts of the prompts that are being read, as many as
do not stall the writers. A text that ends makes room for the next. When the pool of blocks is full, the youngest is set
aside, and read again later: what it had computed is often still there. So nothing fails that fits alone.

Whoever wants a result drives: a lone caller runs the steps in its own thread. Callers in several threads drive in turn,
and the others wait for news of their job. `start_thread` drives for callers that do not wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids

import numpy as np

from npllama.cache import BLOCK_SLOTS, n_blocks
from npllama.errors import ContextError, NpllamaError, UsageError
from npllama.execution.engine import Engine
from npllama.generation.jobs import Job, Resting
from npllama.generation.pool import Pool, PoolFullError, Sequence

MAX_WRITTEN = 16
"""A text with no more pending ids than this is being written, and not read."""

MAX_STALL = 2.2
"""How much longer than without a prompt a step may take, with a part of one."""

MIN_PART = 8
"""Ids of a prompt that a step reads at least."""

MAX_WAITING = 4096
"""Jobs that wait to begin."""

IDLE_S = 5.0
"""Seconds after which a thread without work ends."""


Part = tuple[Job, Sequence, int]
"""A job of a step, its sequence, and how many ids of it are fed."""


class Pace:
    """How long steps take on this machine, so that a part of a prompt does not stall those who write."""

    def __init__(self) -> None:
        self._step_s = self._id_s = 0.0

    def record(self, n_written: int, n_read: int, seconds: float) -> None:
        """A step has taken so long."""
        if n_read == 0:
            self._step_s = seconds if not self._step_s else 0.7 * self._step_s + 0.3 * seconds
            return
        each = max(1e-9, seconds - (self._step_s if n_written else 0.0)) / n_read
        self._id_s = each if not self._id_s else 0.7 * self._id_s + 0.3 * each

    def part(self, most: int) -> int:
        """How many ids of prompts a step may read beside those that are written; none before a step was measured."""
        if not self._step_s:
            return 0
        if not self._id_s:
            return MIN_PART
        return max(MIN_PART, min(most, int((MAX_STALL - 1) * self._step_s / self._id_s)))


class Scheduler:
    """Runs jobs over one pool, up to `parallel` of them at once, reading at most `chunk` ids of prompts in a step."""

    def __init__(self, engine: Engine, pool: Pool, parallel: int, chunk: int) -> None:
        self.pool = pool
        self._engine = engine
        self._parallel, self._chunk = parallel, chunk
        self._pace = Pace()
        self._driving = threading.Lock()
        self._arrived: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []  # the oldest first
        self._listeners: set[threading.Event] = set()
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()  # of _listeners and _thread
        self._swept = True
        self._hidden = False  # what the last step gave, where jobs want either
        self.closed = False

    # ------------------------------------------------------------ jobs in and out

    def fits(self, window: int, n_sink: int, n_ids: int) -> bool:
        """Whether a text of n ids can be fed when it is alone."""
        return self.blocks_of(window, n_sink, n_ids, self._chunk) <= self.pool.capacity

    @staticmethod
    def blocks_of(window: int, n_sink: int, n_ids: int, chunk: int) -> int:
        """Blocks that a text of n ids has at most at a time: all, or its sinks and its window and a part behind it."""
        return min(n_blocks(n_ids), n_blocks(n_sink) + n_blocks(window + chunk) + 1)

    def add(self, job: Job) -> None:
        """Queue a job. Raises UsageError when too many wait."""
        if self.closed:
            raise UsageError("this model is closed; load it again.")
        if len(self._arrived) + len(self._waiting) >= MAX_WAITING:
            raise UsageError(f"{MAX_WAITING} requests are waiting already; wait for some of them before the next.")
        self._arrived.append(job)
        self._work.set()

    def cancel(self, job: Job) -> None:
        """End a job early; its blocks are given back now, or by the thread that drives."""
        if job.done and job.sequence is None:
            return
        job.cancelled = job.done = True
        self._swept = False
        self._sweep_if_free()
        job.event.set()

    def _sweep_if_free(self) -> None:
        while not self._swept and self._driving.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._driving.release()

    def _sweep(self) -> None:
        """Take in what has arrived; let go of jobs that have ended."""
        self._swept = True
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        for job in [job for job in (*self._active, *self._waiting) if job.done]:
            (self._active if job in self._active else self._waiting).remove(job)
            self._release(job)
            self._waiting.extend(job.followers)  # of a job that ended before its prompt was read
            job.followers = []

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
        with self._driving:
            self._sweep()
            try:
                yield
            finally:
                self._sweep()
        self._hand_over(None)

    def keep(self, rest: Resting, sequence: Sequence, ids: list[int]) -> None:
        """Let a text rest that was fed these ids. Between steps."""
        if rest.done:
            sequence.close()
            return
        if rest.sequence is None:
            self._active.append(rest)
        else:
            rest.sequence.close()
        rest.sequence, rest.ids = sequence, ids

    def claim(self, rest: Resting, ids: list[int]) -> tuple[Sequence, list[int]] | None:
        """A sequence for a text that is to be filled from elsewhere, and what is missing of it; None without room.

        Between steps. Texts that are not fed now make room.
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

    def _inherit(self, job: Job) -> bool:
        """Let a job go on in the blocks of the text that it continues, as far as that is the same; False: it has none.

        Not where the window has left what is needed behind: then the text is read again.
        """
        rest = job.rest
        if rest is None or rest.sequence is None:
            return False
        n = min(rest.common(job.ids), job.received)
        sequence, rest.sequence = rest.sequence, None
        self._active.remove(rest)
        if not sequence.holds(n):
            sequence.close()
            return False
        sequence.rewind(n)
        job.sequence, job.cached = sequence, n if job.cached is None else job.cached
        return True

    # ------------------------------------------------------------ driving

    def drive(self, job: Job, ready: Callable[[], bool], deadline: float | None = None) -> bool:
        """Step, or let another thread step, until a job is ready. False when the deadline passed before."""
        with self._guard:
            self._listeners.add(job.event)
        try:
            while True:
                job.event.clear()
                if ready():
                    return True
                if self._driving.acquire(blocking=False):
                    try:
                        while not ready() and not _is_over(deadline):
                            self.step()
                    finally:
                        self._driving.release()
                        self._hand_over(job.event)
                    if not ready():
                        return False
                elif not job.event.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    return ready()
        finally:
            with self._guard:
                self._listeners.discard(job.event)

    def _hand_over(self, own: threading.Event | None) -> None:
        """Nobody drives any more: wake those who wait, of whom one will."""
        self._sweep_if_free()
        with self._guard:
            for event in self._listeners:
                if event is not own:
                    event.set()

    def start_thread(self) -> None:
        """Drive in a thread of its own for as long as there is work."""
        with self._guard:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="npllama-scheduler", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._work.clear()
            while self.has_work and self._driving.acquire(timeout=IDLE_S):
                try:
                    self.step()
                finally:
                    self._driving.release()
            if not self._work.wait(IDLE_S):
                with self._guard:
                    if not self._work.is_set() or self.closed:
                        self._thread = None
                        return

    @property
    def has_work(self) -> bool:
        """Whether any job can be fed."""
        jobs = (*self._arrived, *self._waiting, *self._active)
        return any(not job.done and not job.paused for job in jobs)

    # ------------------------------------------------------------ one step

    def step(self) -> None:
        """One call of the model. Whoever calls this holds the lock `_driving`."""
        self._sweep()
        self._admit()
        parts = self._choose()
        if not parts:
            return
        started = time.perf_counter()
        try:
            logits = self._forward(parts)
        except (NpllamaError, MemoryError) as error:
            for job, _, _ in parts:
                self._end(job, error)
            self._sweep()
            return
        self._deliver(parts, logits)
        n_read = sum(n for _, _, n in parts if n > MAX_WRITTEN)
        self._pace.record(sum(n for _, _, n in parts) - n_read, n_read, time.perf_counter() - started)

    def _end(self, job: Job, error: BaseException) -> None:
        job.fail(error)
        job.event.set()

    def _admit(self) -> None:
        """Let jobs that wait begin, as long as there are blocks for their beginnings."""
        while any(not job.paused for job in self._waiting):
            busy = [job for job in self._active if not job.paused]
            if len(busy) >= self._parallel:
                return
            job = next(job for job in self._waiting if not job.paused)
            if self._inherit(job):
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
        writing = [job for job in able if job.pending <= MAX_WRITTEN]
        left = self._pace.part(self._chunk) if writing else self._chunk
        parts: list[Part] = []
        for job in able:
            n = job.pending + len(job.draft)
            if job.pending > MAX_WRITTEN:
                n = min(job.pending, left)
                left -= n
            if n and self._reserve(job, n) and job.sequence is not None:
                parts.append((job, job.sequence, n))
        return [(job, s, n) for job, s, n in parts if s is job.sequence]  # later ones may have displaced earlier ones

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
                self._set_aside(self._victim())
            else:
                return True
        return False

    def _set_aside(self, job: Job) -> None:
        """Take a job's blocks; it is read again when blocks are free, or when somebody continues it."""
        if len(self._active) == 1 and not job.paused:
            needed = ContextError(
                f"a text of {len(job.ids)} tokens does not fit into the {self.pool.capacity} blocks of "
                f"{BLOCK_SLOTS} positions that there are; load the model with more kv_memory."
            )
            self._end(job, needed)
        self._release(job)
        self._active.remove(job)
        if not job.done and not isinstance(job, Resting):
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
        return self._engine.forward(self.pool.cache, tokens, pos, seq, out, parts[0][0].hidden)

    def _deliver(self, parts: list[Part], logits: np.ndarray) -> None:
        """Hand out the logits; guesses that were fed and are wrong are taken back."""
        row = 0
        for job, sequence, n in parts:
            positions = job.wanted(sequence.length - n, sequence.length)
            try:
                if len(positions):
                    self._fork(job, sequence, positions, logits[row : row + len(positions)])
                    job.receive(positions, logits[row : row + len(positions)])
                job.progressed()
            except NpllamaError as error:
                self._end(job, error)
            row += len(positions)
            if sequence.length > len(job.ids):
                sequence.rewind(len(job.ids))
            sequence.written(job.ids)
            job.event.set()
        self._sweep()

    def _fork(self, job: Job, sequence: Sequence, positions: Ids[int], logits: np.ndarray) -> None:
        """Let the followers of a job go on from its prompt, in blocks that all share until they write."""
        for follower in job.followers:
            follower.sequence, follower.cached = sequence.fork(), sequence.length
            self._active.append(follower)
            try:
                follower.receive(positions, logits)
            except NpllamaError as error:
                self._end(follower, error)
            follower.event.set()
        job.followers = []

    # ------------------------------------------------------------ the end

    def close(self, jobs: Iterable[Job] = ()) -> None:
        """End all jobs with an error, when nobody steps any more."""
        self.closed = True
        with self._driving:
            for job in (*self._arrived, *self._waiting, *self._active, *jobs):
                if not job.done:
                    self._end(job, UsageError("this model is closed; load it again."))
            self._sweep()
        self._work.set()


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
