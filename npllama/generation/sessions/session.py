"""A text that goes on over several calls.

A session is its ids. The keys and values of these rest in the pool of blocks while nobody continues the text: others
who need the blocks take them, and then the ids are read again. So a session costs nothing that somebody else needs, and
what it says does not depend on what else runs.

A draw depends on (seed, position) and a penalty on the ids before it; mirostat's mu is kept behind each id, and saved
as it is at the end. So a session with its seed goes on as one call would have done, wherever the text was cut, rewound
or saved.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from npllama.config import ModelConfig
from npllama.errors import ContextError, ModelError, UsageError, quote, whole_number
from npllama.generation.jobs import Continued, LogitsJob, Resting
from npllama.generation.pool import Sequence, seen_blocks
from npllama.generation.requests import check_kind, checked_ids
from npllama.generation.results import Piece, Result
from npllama.generation.runtime import Runtime
from npllama.generation.scheduler import Scheduler
from npllama.generation.sessions.files import Header, Saved, array_specs, read_session, write_session
from npllama.system.closing import Closing
from npllama.text.protocol import Tokenizer, check_around

MAX_FORKS = 1024
MAX_TRIES = 8
OWN = {"n": "fork the session", "bos": "say so in append", "eos": "say so in append"} | dict.fromkeys(
    ("context_policy", "n_keep"), "say so when the session is made"
)
"""Options of generate that a session does not take, and what to do instead."""


class Stream(Protocol):
    """What Llama.stream gives."""

    @property
    def result(self) -> Result: ...
    def __next__(self) -> Piece: ...
    def close(self) -> None: ...


class Host(Protocol):
    """What a session needs of an open model: a Llama."""

    config: ModelConfig
    context: int
    runtime: Runtime
    tokenizer: Tokenizer

    @property
    def generate(self) -> Callable[..., Any]: ...
    @property
    def stream(self) -> Callable[..., Any]: ...
    @property
    def session(self) -> Callable[..., Session]: ...


@dataclass(frozen=True)
class Rules:
    """What holds for all calls of a session; window and n_sink follow from the policy, n_keep and the context."""

    seed: int
    context_policy: str
    n_keep: int
    window: int
    n_sink: int


class Session(Closing):
    """A text that is written in several calls, and not read again between them. Made by Llama.session.

    One call at a time: a second one meanwhile is refused. Also a context manager, which closes it.
    """

    def __init__(self, llm: Host, rules: Rules, ids: Iterable[int] = (), saved: Saved | None = None) -> None:
        self._llm = llm
        self.rules = rules
        self._ids = list(ids)
        self._saved = saved  # where its keys and values are, until they are needed first
        self._forked = 0
        self._mus: dict[int, float] = {}  # mirostat's mu behind so many ids, where mirostat has drawn the last
        self._logits: np.ndarray | None = None
        self._scheduler: Scheduler | None = None
        self._rest = Resting(rules.window, rules.n_sink)
        self._busy = threading.Lock()
        self._stream: weakref.ref[SessionStream] | None = None
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        """The ids of the text."""
        return list(self._ids)

    @property
    def seed(self) -> int:
        """The seed of its draws."""
        return self.rules.seed

    # ------------------------------------------------------------ one user at a time

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "this session is in use by another call or by a stream that was not read to its end; wait for it, or "
                "close the stream."
            )
        if self._closed:
            self._busy.release()
            raise UsageError("this session is closed; make a new one with session(), or load it again.")
        self._forget(len(self._ids))  # a stream that was closed had computed more than was read

    def _forget(self, n: int) -> None:
        """Keep no mu behind more than n ids."""
        self._mus = {at: mu for at, mu in self._mus.items() if at <= n}

    def _end(self) -> None:
        self._busy.release()

    @contextmanager
    def _using(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._end()

    def _home(self) -> Scheduler:
        """The scheduler in whose pool the session's blocks rest: another one in a forked process."""
        scheduler = self._llm.runtime.scheduler
        if scheduler is not self._scheduler:
            self._scheduler, self._rest = scheduler, Resting(self.rules.window, self.rules.n_sink)
        return scheduler

    # ------------------------------------------------------------ the text

    def append(self, text: str | Ids[int], *, bos: bool | None = None, eos: bool | None = None) -> None:
        """Add text, or ids as they are, at the end; nothing is computed yet.

        The first text gets BOS as the model says, or as bos= does; later text goes on where the last one ended. Raises
        ContextError where the context is full, UsageError for what is neither text nor ids.
        """
        check_around(bos, eos)
        with self._using():
            if isinstance(text, str):
                ids = self._encoded(text, bos, eos)
            else:
                check_kind(text)
                ids = checked_ids(text, self._llm.config.vocab_size, bos, eos) if len(text) else []
            n, context = len(self._ids) + len(ids), self._llm.context
            if self.rules.context_policy == "stop" and n > context:
                raise ContextError(
                    f"the session has {len(self._ids)} tokens and {len(ids)} more do not fit, the context holds "
                    f"{context}; rewind it, load the model with a larger context, or use context_policy='slide'."
                )
            self._add(ids)

    def _encoded(self, text: str, bos: bool | None, eos: bool | None) -> list[int]:
        """The ids of a text behind what there is: with BOS only at the very beginning, without a space in front."""
        tokenizer = self._llm.tokenizer
        if not self._ids:
            return tokenizer.encode(text, bos, eos)
        start = tokenizer.control_ids.issuperset(self._ids)
        inside = not bos and self._ids[-1] not in tokenizer.control_ids
        return tokenizer.encode(text, bool(bos), eos, start, inside)

    def _add(self, ids: Iterable[int]) -> None:
        self._ids.extend(ids)
        self._logits = None

    def mark(self) -> int:
        """Where the text ends now, for `rewind`: how many ids it has."""
        return len(self._ids)

    def rewind(self, n: int) -> None:
        """Go back to the first n ids, or to a mark. What a window has left behind since is computed again."""
        with self._using():
            number = whole_number(n, 0, len(self._ids))
            if number is None:
                raise UsageError(f"rewind to {n!r}: the session has {len(self._ids)} ids; it needs 0 to that many.")
            if number < len(self._ids):
                del self._ids[number:]
                self._forget(number)
                self._logits = None

    def fork(self, k: int = 1) -> list[Session]:
        """k sessions that begin with this text, and share its blocks until they write.

        Each has a seed of its own, which follows from this one's. This session stays as it is.
        """
        number = whole_number(k, 1, MAX_FORKS)
        if number is None:
            raise UsageError(f"fork({k!r}): needs how many sessions, 1 to {MAX_FORKS}.")
        with self._using():
            seeds = [self._seed_of(self._forked + i) for i in range(number)]
            forks = [Session(self._llm, replace(self.rules, seed=seed), self._ids, self._saved) for seed in seeds]
            self._forked += number
            scheduler = self._home()
            with scheduler.between_steps():
                for fork in forks:
                    fork._home()
                    fork._mus = dict(self._mus)
                    if self._rest.sequence is not None:
                        scheduler.keep(fork._rest, self._rest.sequence.fork(), self._rest.ids)
            return forks

    def _seed_of(self, i: int) -> int:
        """The seed of fork i."""
        return int.from_bytes(hashlib.sha256(b"%d fork %d" % (self.seed, i)).digest()[:8], "little")

    # ------------------------------------------------------------ what follows

    def generate(self, max_tokens: int | None = 256, **options: Any) -> Result:
        """Continue the text, and add to it what was generated, the ids of a stop string too.

        options: those of Llama.generate, but for n, bos, eos, context_policy and n_keep; seed None is the session's.
        Mirostat goes on where it ended. When it fails the text stays as it was.
        """
        with self._using():
            result: Result = self._llm.generate(self._prompt(), max_tokens, **self._options(options))
            self._add(result.tokens)
            return result

    def stream(self, max_tokens: int | None = 256, **options: Any) -> SessionStream:
        """Like `generate`, piece by piece: an iterator of Piece with a `.result`. The text has what was read of it."""
        self._begin()
        try:
            stream = SessionStream(self, self._llm.stream(self._prompt(), max_tokens, **self._options(options)))
        except BaseException:
            self._end()
            raise
        self._stream = weakref.ref(stream)
        return stream

    @property
    def logits(self) -> np.ndarray:
        """The logits of the next token: (V,) float32."""
        with self._using():
            return self._read().copy()

    def _prompt(self) -> Continued:
        if not self._ids:
            raise UsageError('this session has no token yet; append text or ids first, "" for BOS alone.')
        self._home()
        self._restore()
        return Continued(self._ids, self._rest, self._mus)

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        if wrong := [name for name in given if name in OWN]:
            raise UsageError(f"{wrong[0]}= is no option of a session's call: {OWN[wrong[0]]}.")
        seed = self.seed if given.get("seed") in (None, -1) else given["seed"]
        return {**given, "seed": seed, "context_policy": self.rules.context_policy, "n_keep": self.rules.n_keep}

    def _read(self) -> np.ndarray:
        """Have all ids read; the logits of the last one."""
        if self._logits is None:
            prompt = self._prompt()
            job = LogitsJob(list(prompt), self.rules.window, self.rules.n_sink, last=True, rest=prompt.rest)
            self._llm.runtime.run([[job]])
            self._logits = job.rows[0][0]
        return self._logits

    # ------------------------------------------------------------ saved, and loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a directory: whole or not at all, and in place of an older one. See files.py.

        Ids that were not read yet are read first. Raises ModelError where the path holds what is no session.
        """
        _check_path(path)
        with self._using():
            runtime, config, n = self._llm.runtime, self._llm.config, len(self._ids)
            header = Header(runtime.facts, n_forks=self._forked, **vars(self.rules), mirostat=self._last_mu())
            kept = header.kept(n)
            specs = array_specs(config, runtime.facts["kv_dtype"], sum(rows for _, rows in kept))
            if not kept:
                write_session(path, header, self._ids, specs, ())
                return
            with self._held(n - 1) as sequence:
                blocks = ([a[:, :, :rows].transpose(2, 0, 1, 3) for a in sequence.rows(c)] for c, rows in kept)
                write_session(path, header, self._ids, specs, blocks)

    def _last_mu(self) -> tuple[int, float] | None:
        """The last mu that mirostat has left, and behind how many ids; None where it was not used."""
        last = max(self._mus.items(), default=None)
        return last if last is not None and math.isfinite(last[1]) else None

    @contextmanager
    def _held(self, n: int) -> Iterator[Sequence]:
        """A sequence that holds the first n positions, whatever others do with the session's own."""
        self._prompt()
        for _ in range(MAX_TRIES):
            scheduler, held = self._home(), None
            with scheduler.between_steps():
                sequence = self._rest.sequence
                if sequence is not None and self._rest.common(self._ids) >= n and sequence.holds(n):
                    held = sequence.fork()
            if held is not None:
                break
            self._logits = None
            self._read()
        else:
            raise UsageError(
                f"others took the session's blocks {MAX_TRIES} times before they were saved; save it when less runs, "
                f"or load the model with more kv_memory."
            )
        try:
            yield held
        finally:
            with scheduler.between_steps():
                held.close()

    def _restore(self) -> None:
        """Copy what was saved to the pool, block by block, each held against its checksum; only what is not there.

        Raises ModelError for a block that is not what was saved. Where there is no room the ids are read instead.
        """
        saved, ids, n = self._saved, self._ids, 0
        if saved is None:
            return
        most = min(saved.n_positions, len(ids))
        while n < most and saved.ids[n] == ids[n]:
            n += 1
        if self._rest.sequence is None and saved.has(seen_blocks(n, self.rules.window, self.rules.n_sink)):
            self._fill(saved, ids[:n])
        self._saved = None

    def _fill(self, saved: Saved, ids: list[int]) -> None:
        scheduler, rest = self._home(), self._rest
        with scheduler.between_steps():
            found = scheduler.claim(rest, ids)
        if found is None:
            return
        sequence, missing = found
        try:
            for c in missing:
                for array, rows in zip(sequence.rows(c), saved.read(c), strict=True):
                    array[:, :, : len(rows)] = rows.transpose(1, 2, 0, 3)
        except BaseException:
            with scheduler.between_steps():
                sequence.close()
            raise
        with scheduler.between_steps():
            sequence.claimed(len(ids))
            scheduler.keep(rest, sequence, ids)

    def close(self) -> None:
        """Give its blocks back, and end a stream that is under way. Closing twice is fine."""
        stream = None if self._stream is None else self._stream()
        if stream is not None:
            stream.close()
        self._closed = True
        if self._scheduler is not None:
            self._scheduler.cancel(self._rest)

    def __del__(self) -> None:
        self.close()


def load_session(path: str | os.PathLike[str], llm: Host) -> Session:
    """Go on with a saved session, where it ended and with its seed.

    Keys and values are mapped, and copied to the pool when they are needed first; each block is held against its
    checksum then. Raises ModelError for what is no session, damaged or of another model, ContextError where it does
    not fit.
    """
    _check_path(path)
    saved = read_session(path, llm.config, llm.runtime.facts)
    header, n = saved.header, len(saved.ids)
    if header.context_policy == "stop" and n > llm.context:
        raise ContextError(
            f"{saved.folder}: has {n} tokens, the context holds {llm.context}; load the model with a context of {n} "
            f"or more."
        )
    session = llm.session(header.seed, context_policy=header.context_policy, n_keep=header.n_keep)
    rules = session.rules
    if (rules.window, rules.n_sink) != (header.window, header.n_sink):
        raise ModelError(
            f"{saved.folder}: was saved with a window of {header.window} positions and {header.n_sink} that stay, "
            f"here they are {rules.window} and {rules.n_sink}; load the model with the context it was saved with."
        )
    session._ids, session._forked, session._saved = list(saved.ids), header.n_forks, saved
    session._mus = dict([] if header.mirostat is None else [header.mirostat])
    return session


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"path={quote(path)}: needs the path of a directory.")


class SessionStream:
    """A session's continuation under way: an iterator of Piece. `result` is what has come so far."""

    def __init__(self, session: Session, stream: Stream) -> None:
        self._session, self._stream = session, stream
        self._open = True

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if not self._open:
            raise StopIteration
        try:
            piece = next(self._stream)
        except BaseException:
            self.close()
            raise
        if piece.token is not None:
            self._session._add([piece.token])
        return piece

    def close(self) -> None:
        """End it early; the session can be used again."""
        if self._open:
            self._open = False
            self._stream.close()
            self._session._end()

    def __del__(self) -> None:
        self.close()

    @property
    def result(self) -> Result:
        return self._stream.result
