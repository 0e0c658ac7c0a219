"""What the scheduler works on: ids that go through the model, and who takes the logits."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids

import numpy as np

from npllama.cache import NO_WINDOW
from npllama.generation.pool import Sequence
from npllama.generation.sampling.ahead import Ahead
from npllama.generation.sampling.basic import Draw


class Job:
    """Ids that go through the model one after the other; logits of some of them go to `receive`.

    A job is fed from its first id on until nothing is pending. `receive` may add ids, or set `done`. The scheduler may
    set a job aside and feed all of it again: logits that were received once are not asked for again.
    """

    hidden = False  # whether `receive` takes final hidden states (R, D) and not logits

    def __init__(self, ids: list[int], window: int = NO_WINDOW, n_sink: int = 0) -> None:
        self.ids = ids
        self.draft: list[int] = []  # guesses for the next ids, fed behind them
        self.window, self.n_sink = window, n_sink
        self.sequence: Sequence | None = None
        self.received = 0  # ids whose logits are not wanted any more
        self.cached: int | None = None
        self.deadline = math.inf  # on the clock of time.monotonic
        self.done = False
        self.cancelled = False  # any thread may set it; the scheduler then ends the job
        self.attended = True  # its owner drives the scheduler
        self.error: BaseException | None = None
        self.event = threading.Event()  # set at all news, cleared by the one who waits
        self.on_news: Callable[[], None] | None = None
        self.followers: list[Job] = []  # with the same ids so far: they get the first logits too, and go on from there
        self.rest: Resting | None = None  # where its sequence comes from, and where it goes when the job has ended

    @property
    def pending(self) -> int:
        """Ids that are still to be fed, without the draft."""
        return len(self.ids) - (self.sequence.length if self.sequence is not None else 0)

    def wanted(self, first: int, stop: int) -> Ids[int]:
        """Of the positions first .. stop-1 that are fed now, those whose logits are wanted."""
        return range(max(first, self.received), stop)

    def receive(self, positions: Ids[int], logits: np.ndarray) -> None:
        """Take the logits (R, V) of these positions."""
        raise NotImplementedError

    def progressed(self, n_fed: int) -> None:
        """So many of the ids have been fed."""

    def tell(self) -> None:
        """There is news, which whoever waits is to know."""
        if not self.event.is_set():  # whoever waits clears it before looking
            self.event.set()
        if self.on_news is not None:
            self.on_news()

    def draws(self) -> Ids[Draw]:
        """What decides the ids at all positions that are wanted now, where they are drawn: `take` gets these ids then.

        Where there are none, `receive` gets the logits.
        """
        return ()

    def take(self, ids: Iterable[int | None]) -> None:
        """Take the ids that were drawn. None: the logits were not finite. Each counts if the draft was right before."""
        raise NotImplementedError

    def ahead(self, most: int) -> Ahead | None:
        """What decides the next ids, at most so many, before the first of them is known; None where that takes more."""
        return None

    def chances(self) -> list[float]:
        """How likely it is that the next guess for an id is right, that the two next are, and so on."""
        return []

    def guesses(self, n: int) -> list[int]:
        """So many guesses, at most as many as have chances."""
        raise NotImplementedError

    @property
    def paused(self) -> bool:
        """Whether it is not to be fed now."""
        return False

    def end(self, reason: str) -> None:
        """End early: "cancelled" or "time"."""
        self.done = True

    def fail(self, error: BaseException) -> None:
        """End with an error, which its owner gets."""
        self.error, self.done = error, True


class Resting(Job):
    """A text that nobody continues now: it keeps its blocks until others need them. `ids`: what they were fed."""

    def __init__(self, window: int, n_sink: int) -> None:
        super().__init__([], window, n_sink)

    @property
    def paused(self) -> bool:
        return True

    def keep(self, sequence: Sequence, ids: list[int]) -> None:
        """Let the text rest that a sequence was fed. Between steps."""
        if self.sequence is not None:
            self.sequence.close()
        self.sequence, self.ids = sequence, ids

    def hand_over(self, job: Job) -> None:
        """Let a job go on in its blocks, as far as they hold the same text.

        Not where a window has left behind what is needed: then the text is read again.
        """
        n, sequence = min(self.common(job.ids), job.received), self.sequence
        self.sequence = None
        if sequence is None or not sequence.holds(n):
            if sequence is not None:
                sequence.close()
            return
        sequence.rewind(n)
        job.sequence, job.cached = sequence, n if job.cached is None else job.cached

    def common(self, ids: list[int]) -> int:
        """How many of the first ids its sequence was fed too."""
        n = 0 if self.sequence is None else min(self.sequence.length, len(ids))
        if self.ids[:n] == ids[:n]:
            return n
        return next(i for i in range(n) if self.ids[i] != ids[i])


class Continued(list[int]):
    """The ids of a session as a prompt, where their blocks rest, and mirostat's mu behind so many ids."""

    def __init__(self, ids: Ids[int], rest: Resting, mus: dict[int, float]) -> None:
        super().__init__(ids)
        self.rest, self.mus = rest, mus


class LogitsJob(Job):
    """The logits of every id of a text, or of the last one alone."""

    def __init__(
        self, ids: list[int], window: int = NO_WINDOW, n_sink: int = 0, last: bool = False, rest: Resting | None = None
    ) -> None:
        super().__init__(ids, window, n_sink)
        self.rows: list[np.ndarray] = []
        self.received, self.rest = len(ids) - 1 if last else 0, rest

    def receive(self, positions: Ids[int], logits: np.ndarray) -> None:
        self.rows.append(logits.copy())
        self.received += len(positions)
        self.done = self.received == len(self.ids)
