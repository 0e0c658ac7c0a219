"""One continuation of one prompt: from logits to ids, text and stop strings."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from npllama.execution.drawing.top_k import not_finite
from npllama.generation.jobs import Continued, Job
from npllama.generation.requests import Progress, Request
from npllama.generation.results import Piece, Result, Usage
from npllama.generation.sampling.ahead import Ahead
from npllama.generation.sampling.basic import Draw, Numbers
from npllama.generation.sampling.logprobs import Observer, TokenLogprobs
from npllama.generation.sampling.sampler import Model, Sampler, SamplerState
from npllama.generation.speculation import Lookup
from npllama.generation.streaming import StopStrings
from npllama.text.decoding import StreamDecoder

if TYPE_CHECKING:
    from npllama.generation.structured.constraint import Constraint

JOINED = 1024
"""Pieces of text that are joined once they have come."""

MAX_UNREAD = 32
"""Pieces that a stream computes before somebody reads them."""


class PromptProgress:
    """Tells the caller how much of the prompts of one call was read, as it asked; the answer may cancel the call."""

    def __init__(self, tell: Progress, groups: Iterable[Iterable[Completion]]) -> None:
        """groups: the completions of each prompt."""
        self._tell, self._groups = tell, [list(group) for group in groups]
        self._total = sum(len(group[0].ids) for group in self._groups)
        self._read, self._started = [0] * len(self._groups), time.perf_counter()
        for g, group in enumerate(self._groups):
            for job in group:
                job.on_read = functools.partial(self.add, g)

    def add(self, g: int, n_read: int) -> None:
        """So many tokens of a prompt are read. What is read again is not told twice."""
        if n_read <= self._read[g]:
            return
        self._read[g] = n_read
        if self._tell(sum(self._read), self._total, time.perf_counter() - self._started) is False:
            for group in self._groups:
                for job in group:
                    job.cancelled = True


def follow_prompts(tell: Progress | None, groups: Iterable[Iterable[Completion]]) -> None:
    """Tell a caller that asked how much of its prompts was read. groups: the completions of each prompt."""
    if tell is not None:
        PromptProgress(tell, groups)


class Completion(Job):
    """A generation under way. `pieces` holds what has come and was not read yet.

    max_tokens: what the request asks for, at most what the context has room for. index: which of several completions
    of the same prompt. streamed: its pieces are read as they come, and it pauses while its reader is behind; else ids
    become text when somebody asks for the result. constraint: what the text has to be.
    """

    def __init__(
        self,
        model: Model,
        ids: list[int],
        request: Request,
        max_tokens: int,
        window: int,
        n_sink: int = 0,
        index: int = 0,
        streamed: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__(list(ids), window, n_sink)
        self._request, self._index, self.streamed = request, index, streamed
        self._max_tokens, self._n_prompt = max_tokens, len(ids)
        self.received = self._n_prompt - 1
        self._constraint, self._observer = constraint, None
        if request.logprobs is not None:
            self._observer = Observer(model.tokenizer, request.logprobs, request.post_sampling_probs)
        self._sampler = Sampler(
            *(model, request.sampling, request.padding_ids, len(ids), request.logits_processor),
            *(constraint, self._observer),
        )
        self._mus: dict[int, float] | None = None  # of a session, whose text it goes on with
        self._numbers = Numbers(request.seed, index)
        self._late = not (streamed or request.stop or constraint or self._observer)  # is text made at the end?
        self._lookup = Lookup() if model.speculation else None
        self._decoder = StreamDecoder(model.tokenizer)
        self._stops = StopStrings(request.stop if constraint is None else ())
        self.pieces: deque[Piece] = deque()
        self._text: list[str] = []
        self._texts: list[str] = []  # what was in it before, joined: small strings take much more memory
        self._ids: dict[int, int] = {}  # each id as one object, however often it comes
        self._n_decoded = 0  # of the ids that have come, those whose text has
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason = "length"
        self._started = self._read_at = self._last_at = 0.0
        self.on_read: Callable[[int], None] | None = None  # told how much of the prompt was read
        if request.max_time_s is not None:
            self.deadline = time.monotonic() + request.max_time_s

    def end_at(self, ids: Iterable[int]) -> None:
        """End at these ids too."""
        self._sampler.ends.update(ids)
        if self._constraint is not None:
            self._constraint.end_at(ids)

    def continues(self, text: Continued) -> None:
        """Go on in a session's blocks, and with its mirostat, whose mu it gets behind each new id."""
        self.rest = text.rest
        if self._request.sampling.mirostat:
            self._mus = text.mus
            if text.mus:
                self._sampler.state = SamplerState(text.mus[max(text.mus)])

    def begin(self) -> None:
        """The clock starts; the prompt's own text comes first where it is asked for."""
        self._started = time.perf_counter()
        before = "".join([self._decoder.push(i) for i in self.ids])  # the text depends on what it continues
        if self._constraint is not None:  # but one of a given form begins with whatever that says, a space too
            before += self._decoder.finish(inside=True)
        if self._request.echo and before:
            self._emit(Piece(before, None))

    @property
    def paused(self) -> bool:
        return self.streamed and len(self.pieces) >= MAX_UNREAD

    def _emit(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self._text.append(piece.text)
        if len(self._text) == JOINED:
            self._texts.append("".join(self._text))
            self._text.clear()
        if piece.logprobs is not None:
            self._logprobs.append(piece.logprobs)

    def progressed(self, n_fed: int) -> None:
        if self.on_read is not None and self.n_written == 0:
            self.on_read(min(n_fed, self._n_prompt))

    def end(self, reason: str) -> None:
        """End with what has come; out of time, with the text that was held back too."""
        if reason == "time":
            self._close(reason)
        else:
            self._finish_reason, self.done = reason, True

    @property
    def n_written(self) -> int:
        """How many ids have come to the prompt's."""
        return len(self.ids) - self._n_prompt

    def draws(self) -> list[Draw]:
        """The draw of the next id, and of those behind each guess, as if the guesses before were right."""
        n, left = len(self.ids), self._max_tokens - self.n_written
        if not self._sampler.is_basic or left == 0:
            return []
        if not self.draft:
            draw = self._sampler.draw(self.ids, self._numbers.at(n))
            return [draw] if draw is not None else []
        ids = [*self.ids[-self._sampler.n_seen :], *self.draft]
        start = len(ids) - len(self.draft)
        draws = []
        for i in range(min(left, 1 + len(self.draft))):
            draw = self._sampler.draw(ids[: start + i], self._numbers.at(n + i), n - start)
            if draw is None:
                return []
            draws.append(draw)
        return draws

    def ahead(self, most: int) -> Ahead | None:
        if self.streamed and self.attended:  # its reader drives, and may leave: nothing has come that nobody has read
            return None
        n = min(most, self._max_tokens - self.n_written, self._sampler.n_alike(self.ids))
        if self.streamed:
            n = min(n, MAX_UNREAD - len(self.pieces))
        if n < 2 or self.n_written == 0 or self.followers:  # the first id is to come as soon as it can
            return None
        if self._lookup is not None and self._lookup.repeats:  # guesses gain more
            return None
        draw = self._sampler.draw(self.ids, 0.0)
        return None if draw is None else Ahead(draw, self._numbers.ahead(len(self.ids), n), self._sampler.ends)

    def receive(self, positions: Ids[int], logits: np.ndarray) -> None:
        """Sample the next id, and those behind it for as long as the guess before each was right.

        Without an id to sample the prompt was to be read only.
        """
        if not self._read_at:
            self._read_at = self._last_at = time.perf_counter()
        if self.n_written >= self._max_tokens:
            self._finish("length")
            return
        for row, guess in zip_longest(logits, self.draft):
            n = len(self.ids)
            self._choose(row)
            if self.done or len(self.ids) > n + 1 or self.ids[n] != guess:
                return

    def _choose(self, logits: np.ndarray) -> None:
        """Add the next id, whose logits are given, and those that have to follow in any case."""
        token = self._sampler.next_id(logits, self.ids, self._request.seed, self._index)
        about = None if self._observer is None else self._observer.of(token, logits, self._sampler.chances)
        constraint = self._constraint
        if constraint is None:
            self._add(token, about)
            return
        while True:
            ended = constraint.take(token, self._max_tokens - self.n_written)
            if ended in ("full", "stop"):
                self._close("length" if ended == "full" else ended)
            else:
                self._add(token, about, is_over=ended == "over")
            if self.done or self._observer is not None or not constraint.forced:
                return
            token = constraint.forced[0]

    def _close(self, reason: str) -> None:
        """Finish; a text of a given form with what completes it."""
        closing = [] if self._constraint is None else self._constraint.closing
        for token in closing:
            self._put(token, None if self._observer is None else self._observer.unasked(token))
        self._finish("closed" if closing else reason)

    def take(self, ids: Iterable[int | None]) -> None:
        """Add the next id, and those behind it for as long as the guess before each was right; finish at the end."""
        if not self._read_at:
            self._read_at = self._last_at = time.perf_counter()
        if not self.draft:
            for token in ids:
                self._add(token)
            return
        for token, guess in zip_longest(ids, self.draft):
            self._add(token)
            if self.done or token != guess:
                return

    def _add(self, token: int | None, about: TokenLogprobs | None = None, is_over: bool = False) -> None:
        """Add an id; is_over: none may follow."""
        if token is None:
            raise not_finite()
        if token in self._sampler.ends:
            self._finish("stop")
        elif self._put(token, about):
            self._finish_reason, self.done = "stop", True
        elif is_over or self.n_written >= self._max_tokens:
            self._finish("stop" if is_over else "length")

    def _put(self, token: int, about: TokenLogprobs | None) -> bool:
        """Put an id behind the text; whether a stop string ends it."""
        token = self._ids.setdefault(token, token)
        self.ids.append(token)
        self.received = len(self.ids) - 1
        if self._mus is not None:
            self._mus[len(self.ids)] = self._sampler.state.mu
        self._last_at = time.perf_counter()
        return not self._late and self._decode(about)

    def _decode(self, about: TokenLogprobs | None = None) -> bool:
        """Make pieces of the tokens that are none yet; whether a stop string ends the text."""
        stopped = False
        for token in self.ids[self._n_prompt + self._n_decoded :]:
            text, stopped = self._stops.push(self._decoder.push(token))
            self._emit(Piece(text, token, about))
        self._n_decoded = self.n_written
        return stopped

    def chances(self) -> list[float]:
        if self._lookup is None or self.followers:
            return []
        self._lookup.see(self.ids)
        return self._lookup.chances(self._max_tokens - self.n_written - 1)

    def guesses(self, n: int) -> list[int]:
        return self._lookup.guesses(self.ids, n) if self._lookup is not None else []

    def _finish(self, reason: str) -> None:
        """The text that was held back comes, now that no id follows; it too ends at a stop string."""
        self._decode()
        text, stopped = self._stops.push(self._decoder.finish())
        if not stopped:
            text += self._stops.finish()
        self._finish_reason = "stop" if self._stops.stopped else reason
        self._last_at = time.perf_counter()
        if text:
            self._emit(Piece(text, None))
        self.done = True

    @property
    def result(self) -> Result:
        """What has come so far; complete once it is done."""
        self._decode()
        read_at = self._read_at or self._started
        slid = max(0, len(self.ids) - self.window - self.n_sink) if self._request.context_policy == "slide" else 0
        return Result(
            text="".join([*self._texts, *self._text]),
            tokens=self.ids[self._n_prompt :],
            finish_reason=self._finish_reason,
            usage=Usage(self._n_prompt, self.n_written, self.cached or 0),
            seed=self._request.seed,
            prompt_s=read_at - self._started,
            generate_s=max(0.0, self._last_at - read_at),
            slid_tokens=slid,
            logprobs=None if self._observer is None else list(self._logprobs),
            overruled=() if self._constraint is None else tuple(sorted(self._constraint.overruled)),
        )
