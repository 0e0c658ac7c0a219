"""Generations under way, as their owners hold them: driven by the reader, or by the scheduler's own thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from npllama.generation.completion import Completion
from npllama.generation.results import ChatResult, Piece, Result
from npllama.generation.runtime import Runtime, raise_first_error
from npllama.generation.scheduler import Scheduler
from npllama.system.interrupts import Hold

if TYPE_CHECKING:
    import asyncio

    from npllama.text.chat.encoding import ChatPrompt

log = logging.getLogger("npllama")


class Stream(Iterator[Piece]):
    """A generation under way: an iterator of Piece. `result` is what has come so far, complete after the last piece.

    Whoever asks for the next piece computes it.
    """

    def __init__(self, runtime: Runtime, job: Completion) -> None:
        self._runtime, self._job = runtime, job
        self._scheduler: Scheduler | None = None
        self._hold: Hold | None = None
        self._given = False

    def __next__(self) -> Piece:
        job = self._job
        if not job.pieces and not job.done:
            self._drive()
        if job.pieces:
            return job.pieces.popleft()
        self._release()
        raise_first_error([job])
        raise StopIteration

    def end_at(self, ids: Iterable[int]) -> None:
        """End at these ids too."""
        self._job.end_at(ids)

    def _drive(self) -> None:
        """Wait for the next piece; what interrupts the wait ends the generation."""
        job = self._job
        try:
            if self._scheduler is None:
                self._scheduler = self._runtime.scheduler
                self._hold = Hold()
                self._scheduler.add(job)
            self._scheduler.drive(job, lambda: bool(job.pieces) or job.done)
        except BaseException:
            self.close()
            raise

    def give_away(self, paused: bool) -> Completion:
        """The generation for another owner, before it has begun. paused: while many of its pieces are unread."""
        job, self._job.streamed = self._job, paused
        self._given = True
        return job

    def run(self) -> Result:
        """Compute it to the end; nobody reads its pieces. Only before the first piece was asked for."""
        self._job.streamed = False
        for _ in self:
            pass
        return self.result

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()

    def close(self) -> None:
        """End the generation early and give its part of the cache back."""
        self._release()
        if self._scheduler is None:
            self._job.done = self._job.done or not self._given
        elif not self._job.done:
            self._scheduler.cancel(self._job)

    def __del__(self) -> None:
        self.close()

    @property
    def result(self) -> Result:
        return self._job.result


class ChatStream:
    """An answer under way: an iterator of Piece. `result` is what has come so far, complete after the last piece."""

    def __init__(self, stream: Stream, prompt: ChatPrompt) -> None:
        self._stream, self._prompt = stream, prompt
        stream.end_at(prompt.stop_ids)

    def __iter__(self) -> Iterator[Piece]:
        return self._stream

    def __next__(self) -> Piece:
        return next(self._stream)

    def run(self) -> ChatResult:
        """Answer to the end."""
        self._stream.run()
        return self.result

    def close(self) -> None:
        """End the answer early."""
        self._stream.close()

    @property
    def result(self) -> ChatResult:
        result = self._stream.result
        return ChatResult({"role": "assistant", "content": result.text}, result, self._prompt.escaped)


class Handle:
    """A generation that the scheduler's own thread computes, whether or not anybody waits for it. For any thread.

    Iterate over it for the pieces, each of which comes once, in one thread at a time; or ask for the result.
    """

    def __init__(self, runtime: Runtime, job: Completion) -> None:
        self._job, self._scheduler = job, runtime.scheduler
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Handle], object]] = []
        job.on_news = self._take_news

    def begin(self) -> Handle:
        """Queue it. Raises UsageError when too many wait."""
        try:
            self._scheduler.add(self._job, attended=False)
        except BaseException:  # Ctrl-C: it may be queued already, and nobody has this handle
            self._scheduler.cancel(self._job)
            raise
        return self

    def _take_news(self) -> None:
        if not self._job.done or self._ended.is_set():
            return
        with self._lock:
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Handle], object]) -> None:
        try:
            callback(self)
        except Exception:
            log.exception("a function that add_done_callback was given has failed")

    def __iter__(self) -> Iterator[Piece]:
        job = self._job
        while True:
            job.event.clear()
            while job.pieces:
                yield job.pieces.popleft()
            if self._ended.is_set():
                if not job.pieces:
                    raise_first_error([job])
                    return
                continue
            self._scheduler.check_caller()
            job.event.wait()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end. Raises the error with which it ended, TimeoutError after so many seconds without one."""
        if not self._ended.is_set():
            self._scheduler.check_caller()
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the text was not complete after {timeout} s; wait longer, or cancel it.")
        raise_first_error([self._job])
        return self._job.result

    def cancel(self) -> None:
        """End it early: its result is what has come so far, its finish_reason "cancelled". Later it does nothing."""
        if not self._ended.is_set():
            self._scheduler.cancel(self._job)

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._ended.is_set()

    @property
    def so_far(self) -> Result:
        """What has come so far."""
        return self._job.result

    def add_done_callback(self, function: Callable[[Handle], object]) -> None:
        """Call function(handle) at the end, in the thread that computes: it must not wait. At once if it has ended."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(function)
                return
        self._call(function)


class AsyncStream(AsyncIterator[Piece]):
    """A generation for asyncio: `async for piece in stream`. The scheduler's own thread computes it.

    It begins with the first wait for a piece, and pauses while many are unread. Cancelling the task that waits for a
    piece cancels it.
    """

    def __init__(self, runtime: Runtime, job: Completion) -> None:
        self._runtime, self._job = runtime, job
        self._scheduler: Scheduler | None = None
        self._news: asyncio.Event | None = None

    async def __anext__(self) -> Piece:
        job = self._job
        try:
            news = self._begin()
            while not job.pieces and not job.done:
                await news.wait()
                news.clear()  # before the next look
        except BaseException:
            self.close()
            raise
        if job.pieces:
            was_paused = job.paused
            piece = job.pieces.popleft()
            if was_paused and not job.paused and self._scheduler is not None:
                self._scheduler.wake()
            return piece
        raise_first_error([job])
        raise StopAsyncIteration

    def _begin(self) -> asyncio.Event:
        """What is set when there is news, in the loop that runs."""
        import asyncio  # here, because few programs use it, and its own imports take long

        if self._news is None:
            loop, news = asyncio.get_running_loop(), asyncio.Event()
            job = self._job

            def tell() -> None:
                try:
                    loop.call_soon_threadsafe(news.set)
                except RuntimeError:  # the loop is closed: nobody will ever read this
                    job.cancelled = True

            job.on_news, self._news = tell, news
            if not job.done:
                self._scheduler = self._runtime.scheduler
                self._scheduler.add(job, attended=False)
        return self._news

    def close(self) -> None:
        """End the generation early and give its part of the cache back."""
        if self._scheduler is None:
            self._job.done = True
        elif not self._job.done:
            self._scheduler.cancel(self._job)

    async def aclose(self) -> None:
        """The same, as contextlib.aclosing asks for it."""
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def result(self) -> Result:
        return self._job.result
