"""The pool and the scheduler of one open model: how large, made when first needed, and anew in a forked process."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids
from typing import Any

from npllama.cache import BLOCK_SLOTS, NO_WINDOW, n_blocks
from npllama.errors import UsageError, quote, whole_number
from npllama.execution.engine import Engine
from npllama.generation.jobs import Job
from npllama.generation.pool import Pool
from npllama.generation.scheduler import CLOSED, Scheduler
from npllama.store.opening import OpenModel
from npllama.system import machine

DEFAULT_PARALLEL = 8
"""Texts that are written at once, where nothing else is asked for."""

MAX_PARALLEL = 1024


class Runtime:
    """Runs jobs for one model. context: positions of a text; chunk: ids of prompts that one call reads at most.

    kv_memory: bytes of keys and values; None: `parallel` full contexts, at most half of the free memory, at least one
    context. Raises UsageError for values out of range, and for less memory than one context takes.
    """

    def __init__(
        self,
        engine: Engine,
        opened: OpenModel,
        context: int,
        chunk: int,
        kv_memory: int | None = None,
        parallel: int | None = None,
    ) -> None:
        self._engine, self._context, self._chunk = engine, context, chunk
        self.window = opened.config.sliding_window or NO_WINDOW
        self.facts = _facts(engine, opened)
        self.identity = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).digest()
        n_parallel = whole_number(DEFAULT_PARALLEL if parallel is None else parallel, 1, MAX_PARALLEL)
        if n_parallel is None:
            raise UsageError(f"parallel={quote(parallel)}: needs how many texts to write at once, 1 to {MAX_PARALLEL}.")
        self.parallel = n_parallel
        self._kv_memory = self._checked_memory(kv_memory)
        self._closed = False
        self._begin_process()
        _runtimes.add(self)

    def _begin_process(self) -> None:
        """No scheduler yet: its thread, its locks and its jobs do not survive a fork."""
        self._scheduler: Scheduler | None = None
        self._lock = threading.Lock()

    @property
    def _block_bytes(self) -> int:
        return BLOCK_SLOTS * self._engine.cache_bytes_per_position

    @property
    def _full(self) -> int:
        """Blocks of one text of a full context."""
        return Scheduler.blocks_of(self.window, 0, self._context, self._chunk)

    def _checked_memory(self, kv_memory: int | None) -> int | None:
        if kv_memory is None:
            return None
        n_bytes = whole_number(kv_memory, 1)
        if n_bytes is None:
            raise UsageError(f"kv_memory={quote(kv_memory)}: needs a number of bytes for keys and values, 1 or more.")
        if n_bytes < self._full * self._block_bytes:
            raise UsageError(
                f"kv_memory={n_bytes} holds {n_bytes // self._block_bytes} blocks of {BLOCK_SLOTS} positions, and a "
                f"text of {self._context} needs {self._full} ({self._full * self._block_bytes} bytes); give more, or "
                f"ask for a smaller context."
            )
        return n_bytes

    def _capacity(self) -> int:
        """Blocks of the pool."""
        if self._kv_memory is not None:
            return self._kv_memory // self._block_bytes
        half = machine.free_memory() // 2 // self._block_bytes
        # Texts without end hold a part of a prompt beside their window.
        return max(self._full, min(self.parallel * (self._full + n_blocks(self._chunk) + 2), half))

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of this process. Raises UsageError once the model is closed, ModelError without memory."""
        scheduler = self._scheduler
        if scheduler is not None:
            return scheduler
        with self._lock:
            if self._closed:
                raise UsageError(CLOSED)
            if self._scheduler is None:
                pool = Pool(self._engine, self._capacity(), self.identity)
                self._scheduler = Scheduler(self._engine, pool, self.parallel, self._chunk)
            return self._scheduler

    def run(self, groups: Iterable[Ids[Job]]) -> None:
        """Run jobs to their ends; the first of each group brings the others, its followers, along.

        Raises the first error, and ends the others then.
        """
        scheduler, todo = self.scheduler, deque(groups)
        under_way: list[Ids[Job]] = []
        event = threading.Event()  # of all of them: whichever has news, the caller wakes
        for group in todo:
            for job in group:
                job.event = event

        def any_done() -> bool:
            for group in under_way:  # looked at in each step: plain loops
                for job in group:
                    if not job.done:
                        break
                else:
                    return True
            return False

        try:
            while todo or under_way:
                while todo and len(under_way) < 2 * self.parallel:
                    under_way.append(todo.popleft())
                    scheduler.add(under_way[-1][0])
                scheduler.drive(next(_undone(under_way)), any_done)
                for group in under_way:
                    raise_first_error(group)
                under_way = [group for group in under_way if not _all_done(group)]
        finally:
            if under_way:
                scheduler.cancel(*_undone(under_way))

    def close(self) -> None:
        """End what is under way, with an error, and free the pool."""
        with self._lock:
            self._closed = True
            scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close()


_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


def _begin_processes() -> None:
    for runtime in _runtimes:
        runtime._begin_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_processes)


def raise_first_error(jobs: Iterable[Job]) -> None:
    """Raise the error with which a job has ended, if one has."""
    for job in jobs:
        if job.error is not None:
            raise job.error


def _undone(groups: Iterable[Ids[Job]]) -> Iterator[Job]:
    return (job for group in groups for job in group if not job.done)


def _all_done(group: Ids[Job]) -> bool:
    return all(job.done for job in group)


def _facts(engine: Engine, opened: OpenModel) -> dict[str, Any]:
    """All that keys and values depend on beside the ids, the window and the sinks."""
    tensors = json.dumps(opened.manifest["tensors"], sort_keys=True).encode()
    frequencies, scale = engine.frequencies
    return {
        "weights": hashlib.sha256(tensors).hexdigest(),
        "config": opened.manifest["config"],
        "kv_dtype": engine.kv_dtype,
        "rope": hashlib.sha256(frequencies.tobytes() + repr(scale).encode()).hexdigest(),
    }
