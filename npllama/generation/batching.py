"""What a step of the scheduler computes: which jobs, how many ids of each, in which blocks, and who gets the logits.

A step holds the next id of every text that is being written, and parts of the prompts that are being read, as many as
do not stall the writers. A text that ends makes room for the next. When the pool of blocks is full, the youngest is set
aside, and read again later: what it had computed is often still there. So nothing fails that fits alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids

import numpy as np

from npllama.cache import BLOCK_SLOTS, n_blocks
from npllama.errors import ContextError, NpllamaError
from npllama.execution.abandon import MIN_HEARD_ROWS, Call
from npllama.execution.engine import Engine
from npllama.generation.chunks import Pace
from npllama.generation.jobs import Job, Resting
from npllama.generation.pool import Pool, PoolFullError, Sequence
from npllama.generation.sampling.ahead import Ahead, plan_of
from npllama.generation.sampling.basic import Draw, draw_rows
from npllama.generation.speculation import how_many

MAX_WRITTEN = 16
"""A text with no more pending ids than this is being written, and not read."""

AHEAD_S = 0.016
"""Seconds of steps that are gone in one compiled call: as long as nobody sees that ids come in groups."""

MAX_AHEAD = 32
"""Steps of such a call at most."""


def steps_ahead(step_s: float) -> int:
    """How many steps go in one compiled call, where one takes so many seconds."""
    return min(MAX_AHEAD, int(AHEAD_S / max(1e-6, step_s)))


Part = tuple[Job, Sequence, int]
"""A job of a step, its sequence, and how many ids of it are fed."""

Drawn = dict[Job, list[int | None]]
"""The ids that were drawn for jobs; None where logits were not finite."""


class Batching:
    """Jobs over one pool, up to `parallel` of them at once, reading at most `chunk` ids of prompts in a step.

    One thread at a time: the Scheduler, which it is the lower half of, says whose turn it is.
    """

    def __init__(self, engine: Engine, pool: Pool, parallel: int, chunk: int) -> None:
        self.pool = pool
        self.closed = False
        self._engine = engine
        self._parallel, self._chunk = parallel, chunk
        self._pace = Pace()
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []  # the oldest first
        self._swept = True  # False: something was cancelled since the last look
        self._hidden = False  # what the last step gave, where jobs want either
        self._computing: tuple[Call, list[Job]] | None = None

    @staticmethod
    def blocks_of(window: int, n_sink: int, n_ids: int, chunk: int) -> int:
        """Blocks that a text of n ids has at most at a time: all, or its sinks and its window and a part behind it."""
        return min(n_blocks(n_ids), n_blocks(n_sink) + n_blocks(window + chunk) + 1)

    # ------------------------------------------------------------ texts that rest

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

    # ------------------------------------------------------------ whose turn it is, and in which blocks

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
        able = [job for job in self._active if not job.paused]
        if len(able) > 1:
            able = self._of_one_kind(able)
        pending = [job.pending for job in able]
        left = self._chunk
        if max(pending, default=0) <= MAX_WRITTEN:
            self._guess(able, pending)
        elif written := [n for n in pending if n <= MAX_WRITTEN]:
            left = self._pace.part(sum(written), self._chunk)
            for job in able:
                job.draft = []
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
        """Let jobs guess as many of their next ids as it pays to check: not at the cost of others' blocks."""
        chances = [job.chances() if n == 1 else [] for job, n in zip(jobs, pending, strict=True)]
        if not any(chances):
            for job in jobs:
                job.draft = []
            return
        for job, n in zip(jobs, how_many(chances, sum(pending), self._pace), strict=True):
            job.draft = []
            if n and job.sequence is not None and job.sequence.needed(1 + n) <= self.pool.available:
                job.draft = job.guesses(n)

    def _of_one_kind(self, jobs: list[Job]) -> list[Job]:
        """Those that want logits, or those that want hidden states: in turn where there are both."""
        if any(job.hidden != jobs[0].hidden for job in jobs):
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

    # ------------------------------------------------------------ one call of the model

    def _compute(self, parts: list[Part]) -> int:
        """Feed the parts and hand out their logits; how many steps were gone.

        What fails together is tried one by one: only what fails ends.
        """
        try:
            ids = self._go_ahead(parts)
            logits = None if ids else self._forward(parts)
        except (NpllamaError, MemoryError) as error:
            if len(parts) == 1:
                parts[0][0].fail(error)
                self._drop_ended()
                return 1
            for part in parts:
                self._compute([part])
            return 1
        if logits is None:
            self._deliver_steps(parts, ids)
            return len(ids)
        self._deliver(parts, logits)
        return 1

    def _go_ahead(self, parts: list[Part]) -> list[list[int]]:
        """Go several steps in one compiled call, where nobody could tell: the ids of each step, part by part."""
        n = steps_ahead(self._pace.seconds(len(parts)))
        texts: list[Ahead] = []
        for job, sequence, n_fed in parts:
            one = job.ahead(n) if n > 1 and n_fed == 1 and sequence.length == len(job.ids) - 1 else None
            if one is None:
                return []
            texts.append(one)
            n = min(n, len(one.numbers))
        plan = plan_of(texts, n, self._engine.most_drawn)
        if plan is None or sum(sequence.needed(n) for _, sequence, _ in parts) > self.pool.available:
            return []
        for _, sequence, _ in parts:
            sequence.reserve(n)
        tokens = [job.ids[-1] for job, _, _ in parts]
        pos, seq = ([*column] for column in zip(*((s.length, s.row) for _, s, _ in parts), strict=True))
        return self._engine.run_steps(self.pool.cache, tokens, pos, seq, plan)

    def _deliver_steps(self, parts: list[Part], ids: list[list[int]]) -> None:
        """Hand out the ids of several steps: all but a text's last were fed, as guesses that were right would be."""
        for (job, sequence, _), drawn in zip(parts, zip(*ids, strict=True), strict=True):
            job.draft = [*drawn[:-1]]
            self._receive(job, job.take, drawn)
            self._take_stock(job, sequence, sequence.length)
        self._drop_ended()

    def _take_stock(self, job: Job, sequence: Sequence, end: int) -> None:
        """After a job took its ids: guesses that were fed up to a position, and are wrong, are taken back."""
        if job.draft:
            right = end - len(job.draft) + _n_right(job, end)
            right = right if job.done else min(right, len(job.ids) - 1)  # logits of the last are wanted
            if right < end:
                sequence.rewind(right)
            job.draft = []
        sequence.written(job.ids)
        if job.cancelled:
            self._swept = False
        if not job.done:
            job.tell()

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
        if len(tokens) < MIN_HEARD_ROWS:  # over before anybody could abandon it
            return self._engine.forward(self.pool.cache, tokens, pos, seq, out, parts[0][0].hidden)
        call = Call()
        self._computing = call, [job for job, _, _ in parts]
        try:
            return self._engine.forward(self.pool.cache, tokens, pos, seq, out, parts[0][0].hidden, call)
        finally:
            self._computing = None

    def _deliver(self, parts: list[Part], logits: np.ndarray) -> None:
        """Hand out the logits, or the ids drawn from them; guesses that were fed and are wrong are taken back."""
        if len(parts) == 1 and not parts[0][0].followers and not parts[0][0].draft:
            self._deliver_alone(*parts[0], logits)
            return
        ends = [sequence.length for _, sequence, _ in parts]
        wanted = [job.wanted(end - n, end) for (job, _, n), end in zip(parts, ends, strict=True)]
        drawn = self._drawn(parts, wanted, logits)
        row = 0
        for (job, sequence, _), positions, end in zip(parts, wanted, ends, strict=True):
            self._hand(job, sequence, positions, logits[row : row + len(positions)], drawn)
            row += len(positions)
            self._take_stock(job, sequence, end)
        self._drop_ended()

    def _deliver_alone(self, job: Job, sequence: Sequence, n: int, logits: np.ndarray) -> None:
        """The same for a step of one text without guesses, the usual case, in which each microsecond counts."""
        end = sequence.length
        positions = job.wanted(end - n, end)
        self._receive(job, job.progressed, end)
        if positions:
            draws = job.draws()
            if draws:
                self._receive(job, job.take, draw_rows(logits, draws, self._engine.top_k, self._engine.draw))
            else:
                self._receive(job, job.receive, positions, logits)
        sequence.written(job.ids)
        if job.cancelled:
            self._swept = False
        if job.done:
            self._drop_ended()
        else:
            job.tell()

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
        ids = draw_rows(logits if every else logits[rows], draws, self._engine.top_k, self._engine.draw)
        return {one: ids[first : first + 1 + len(one.draft)] for one, first in takers}

    def _hand(self, job: Job, sequence: Sequence, positions: Ids[int], logits: np.ndarray, drawn: Drawn) -> None:
        """Give a job, and those that follow it from here on, the logits of these positions, or the ids drawn there.

        Followers go on from the prompt in blocks that all share until they write.
        """
        self._receive(job, job.progressed, sequence.length)
        if not positions:
            return
        if not job.followers and job in drawn:
            self._receive(job, job.take, drawn[job])
            return
        followers, job.followers = job.followers, []
        for one in (*followers, job):
            if one is not job:
                if one.done:
                    one.tell()
                    continue
                one.sequence, one.cached = sequence.fork(), sequence.length
                self._active.append(one)
            if one in drawn:
                self._receive(one, one.take, drawn[one])
            else:
                self._receive(one, one.receive, positions, logits)
            if one is not job:
                one.tell()

    @staticmethod
    def _receive(job: Job, receive: Callable[..., None], *what: object) -> None:
        """Let a job take something, unless it has ended. Whatever goes wrong there is told to its owner alone."""
        if job.done or job.cancelled:
            return
        try:
            receive(*what)
        except Exception as error:  # noqa: BLE001 (a function that the owner gave may raise anything)
            job.fail(error)

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


def _n_right(job: Job, length: int) -> int:
    """How many of a job's guesses, fed as the last of so many positions, its ids are now."""
    start = length - len(job.draft)
    n = 0
    for guess, token in zip(job.draft, job.ids[start:], strict=False):
        if guess != token:
            break
        n += 1
    return n
