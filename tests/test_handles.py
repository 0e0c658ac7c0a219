"""Generations that a thread of the model computes, and what ends any generation early: cancel, time, progress."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import environment
from helpers import TINY, write_model_directory

import npllama
from npllama.generation import batching
from npllama.generation import scheduler as scheduling
from npllama.generation.completion import MAX_UNREAD
from npllama.inference import Llama

CONTEXT = 1024
WAIT_S = 60.0
LONG = [3 + i % 250 for i in range(700)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose texts do not end by themselves."""
    path = tmp_path_factory.mktemp("handles") / "model"
    write_model_directory(path, dataclasses.replace(TINY, max_seq_len=CONTEXT, eos_token_ids=(2,)), seed=3)
    return path


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Llama]:
    with npllama.load(folder) as llm:
        llm.chunk = llm.runtime._chunk = 128
        yield llm


@pytest.fixture
def llm(opened: Llama) -> Iterator[Llama]:
    """The model; after each test every block is in the pool again."""
    yield opened
    assert_all_given_back(opened)


def assert_all_given_back(llm: Llama) -> None:
    scheduler = llm.runtime.scheduler
    with scheduler._driving:
        scheduler._sweep()
        scheduler.pool.check()
        assert scheduler.pool.available == scheduler.pool.capacity


class Gate:
    """Lets calls of the model through one by one, each of one step."""

    def __init__(self, llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computing, self._open = threading.Semaphore(0), threading.Semaphore(0)
        self.n_rows: list[int] = []
        self.free = False
        forward = llm.engine.forward

        def gated(cache: Any, tokens: Any, *others: Any) -> Any:
            self.n_rows.append(len(tokens))
            self.computing.release()
            assert self.free or self._open.acquire(timeout=WAIT_S)
            return forward(cache, tokens, *others)

        monkeypatch.setattr(llm.engine, "forward", gated)
        monkeypatch.setattr(batching, "MAX_AHEAD", 1)

    def open(self, n: int = 1) -> None:
        self._open.release(n)

    def open_for_good(self) -> None:
        self.free = True
        self._open.release(1000)


@pytest.fixture
def gate(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(llm, monkeypatch)
    yield found
    found.open_for_good()


# ---------------------------------------------------------------- submit


def test_a_handle_gives_the_text_of_generate(llm: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "seed": 4, "stop": ["zz"], "echo": True}
    expected = llm.generate("the cat", **options)
    handle = llm.submit("the cat", **options)
    assert "".join(piece.text for piece in handle) == expected.text
    assert list(handle) == []
    result = handle.result()
    assert handle.done()
    assert (result.text, result.tokens, result.finish_reason, result.seed) == (
        *(expected.text, expected.tokens, expected.finish_reason, expected.seed),
    )


def test_handles_of_many_threads_give_what_each_prompt_gives_alone(llm: Llama) -> None:
    prompts = [LONG[i : i + 3 + 11 * i] for i in range(12)]
    expected = [llm.generate(p, max_tokens=20, seed=i).tokens for i, p in enumerate(prompts)]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = llm.submit(prompts[i], max_tokens=20, seed=i).result(WAIT_S).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert [found[i] for i in range(12)] == expected


def test_what_is_submitted_goes_on_beside_those_who_drive_themselves(llm: Llama) -> None:
    alone = [llm.generate("a dog", max_tokens=n, temperature=0).tokens for n in (100, 30)]
    handle = llm.submit("a dog", max_tokens=100, temperature=0)
    assert llm.generate("a dog", max_tokens=30, temperature=0).tokens == alone[1]
    assert handle.result(WAIT_S).tokens == alone[0]


def test_a_wait_for_a_result_can_end_before_it(llm: Llama, gate: Gate) -> None:
    handle = llm.submit("the cat", max_tokens=2)
    with pytest.raises(TimeoutError, match=r"not complete after 0\.0 s; wait longer, or cancel it"):
        handle.result(0.0)
    assert not handle.done()
    gate.open_for_good()
    assert handle.result(WAIT_S).finish_reason == "length"


def test_a_cancelled_handle_has_what_came_until_then(llm: Llama, gate: Gate) -> None:
    handle = llm.submit("the cat", max_tokens=50, temperature=0)
    gate.open(3)
    pieces = [next(iter(handle)) for _ in range(3)]
    handle.cancel()
    gate.open_for_good()
    result = handle.result(WAIT_S)
    assert result.finish_reason == "cancelled"
    assert result.tokens == [piece.token for piece in pieces]
    handle.cancel()
    assert list(handle) == []
    assert len(gate.n_rows) == 4


def test_what_waits_can_be_cancelled_while_another_computes(llm: Llama, gate: Gate) -> None:
    first = llm.submit(LONG, max_tokens=3)
    gate.computing.acquire()
    second = llm.submit("a dog", max_tokens=50, temperature=0)
    second.cancel()
    gate.open_for_good()
    assert second.result(WAIT_S).tokens == []
    assert first.result(WAIT_S).finish_reason == "length"


def test_too_many_requests_are_refused(llm: Llama, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "MAX_WAITING", 3)
    running = llm.submit("the cat", max_tokens=1)
    gate.computing.acquire()
    waiting = [llm.submit("the cat", max_tokens=1) for _ in range(3)]
    for call in (llm.submit, llm.generate):
        with pytest.raises(npllama.UsageError, match="3 requests are waiting already; wait for some"):
            call("the cat")
    gate.open_for_good()
    for handle in (running, *waiting):
        handle.result(WAIT_S)


def test_one_failure_harms_nobody_else(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [llm.generate(f"a {i}", max_tokens=9, seed=i).tokens for i in range(5)]
    forward = llm.engine.forward

    def fail_with_the_bad_one(cache: Any, tokens: Any, *others: Any) -> Any:
        if 299 in tokens:
            raise npllama.ModelError("it cannot be computed.")
        return forward(cache, tokens, *others)

    monkeypatch.setattr(llm.engine, "forward", fail_with_the_bad_one)
    handles = [llm.submit(f"a {i}", max_tokens=9, seed=i) for i in range(5)]
    bad = llm.submit([5, 299, 7], max_tokens=9)

    def complain(*told: object) -> None:
        raise KeyError("of the caller's own function")

    worse = llm.submit("a dog", progress=complain)
    assert [handle.result(WAIT_S).tokens for handle in handles] == expected
    with pytest.raises(npllama.ModelError, match="it cannot be computed"):
        bad.result(WAIT_S)
    with pytest.raises(KeyError, match="of the caller's own function"):
        worse.result(WAIT_S)
    with pytest.raises(KeyError, match="of the caller's own function"):
        list(worse)


def test_a_function_is_called_at_the_end_even_if_it_came_already(llm: Llama) -> None:
    came, ends = [], threading.Semaphore(0)

    def note(handle: npllama.Handle) -> None:
        came.append(handle)
        ends.release()

    handle = llm.submit("the cat", max_tokens=3)
    handle.add_done_callback(note)
    assert ends.acquire(timeout=WAIT_S)
    handle.add_done_callback(note)
    assert came == [handle, handle]


def test_the_options_are_those_of_stream(llm: Llama) -> None:
    for call in (llm.submit, llm.astream):
        with pytest.raises(npllama.UsageError, match="temperature"):
            call("the cat", temperature=-1)
        with pytest.raises(TypeError, match="n_threads"):
            call("the cat", n_threads=3)
        with pytest.raises(npllama.UsageError, match="one prompt"):
            call(["the cat", "a dog"])


def test_a_model_that_is_closed_ends_its_handles(folder: Path) -> None:
    llm = npllama.load(folder)
    handles = [llm.submit(LONG, max_tokens=300, temperature=0) for _ in range(3)]
    pool = llm.runtime.scheduler.pool
    llm.close()
    for handle in handles:
        with pytest.raises(npllama.UsageError, match="closed; load it again"):
            handle.result(WAIT_S)
    pool.check()
    assert pool.available == pool.capacity
    with pytest.raises(npllama.UsageError, match="closed; load it again"):
        llm.submit("the cat")


def test_the_thread_ends_without_work_and_comes_back(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "IDLE_S", 0.0)
    for _ in range(20):
        assert llm.submit("the cat", max_tokens=1).result(WAIT_S).usage.completion_tokens == 1
    thread = llm.runtime.scheduler._thread
    if thread is not None:
        thread.join(WAIT_S)
    assert llm.runtime.scheduler._thread is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks: needs a system that has them")
def test_a_forked_child_begins_anew_while_its_parents_thread_computes(folder: Path) -> None:
    program = """
import os, sys, threading, npllama
llm = npllama.load(sys.argv[1], backend="numpy")
expected = llm.generate("the cat", max_tokens=30, seed=1).tokens
handle = llm.submit("the cat", max_tokens=900, temperature=0)
iterator = iter(handle)
next(iterator)
child = os.fork()
if child == 0:
    try:
        handle.result(5)
    except npllama.UsageError as error:
        assert "forked" in str(error), error
    handle.cancel()
    same = llm.submit("the cat", max_tokens=30, seed=1).result(60).tokens == expected
    os._exit(0 if same and llm.generate("the cat", max_tokens=30, seed=1).tokens == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
handle.cancel()
assert handle.result(60).usage.completion_tokens > 0
"""
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_a_program_ends_while_its_texts_are_computed(folder: Path) -> None:
    program = (
        "import sys, npllama; next(iter(npllama.load(sys.argv[1]).submit('the cat', max_tokens=900, temperature=0)))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "") or "using NumPy" in done.stderr


# ---------------------------------------------------------------- asyncio


async def texts(stream: npllama.AsyncStream) -> str:
    return "".join([piece.text async for piece in stream])


def test_texts_of_several_tasks_come_at_the_same_time(llm: Llama) -> None:
    prompts = ["the cat", "a dog", "two birds"]
    expected = [llm.generate(p, max_tokens=90, seed=2).text for p in prompts]

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(texts(llm.astream(p, max_tokens=90, seed=2)) for p in prompts))

    assert asyncio.run(all_of_them()) == expected


def test_cancelling_the_task_cancels_the_text(llm: Llama, gate: Gate) -> None:
    stream = llm.astream("the cat", max_tokens=500, temperature=0)

    async def cancel_in_the_middle() -> None:
        task = asyncio.ensure_future(texts(stream))
        gate.open(2)
        await asyncio.to_thread(lambda: [gate.computing.acquire() for _ in range(3)])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_in_the_middle())
    gate.open_for_good()
    assert_ends(llm)
    assert stream.result.finish_reason == "cancelled"
    assert gate.n_rows == [9, 1, 1, 9], "the last is of another text"


def assert_ends(llm: Llama) -> None:
    """Wait until nothing is under way: each call takes its turn behind all others."""
    pool, deadline = llm.runtime.scheduler.pool, time.monotonic() + 20
    llm.generate("the cat", max_tokens=1)
    while pool.available < pool.capacity and time.monotonic() < deadline:
        time.sleep(0.01)
    assert_all_given_back(llm)


def test_a_text_that_nobody_reads_pauses_and_goes_on(llm: Llama) -> None:
    expected = llm.generate("the cat", max_tokens=3 * MAX_UNREAD, temperature=0).tokens
    assert len(expected) == 3 * MAX_UNREAD

    async def read_late() -> list[int | None]:
        stream = llm.astream("the cat", max_tokens=3 * MAX_UNREAD, temperature=0)
        first = await stream.__anext__()
        while not stream._job.paused:
            await asyncio.sleep(0)
        assert len(stream.result.tokens) == MAX_UNREAD + 1
        return [first.token, *[piece.token async for piece in stream]]

    assert [token for token in asyncio.run(read_late()) if token is not None] == expected


def test_a_loop_that_is_closed_ends_its_texts(llm: Llama, gate: Gate) -> None:
    stream = llm.astream("the cat", max_tokens=500, temperature=0)
    loop = asyncio.new_event_loop()
    task = loop.create_task(texts(stream))
    loop.call_later(0, loop.stop)
    loop.run_forever()
    loop.stop()
    loop.close()
    gate.open_for_good()
    assert_ends(llm)
    assert stream.result.finish_reason == "cancelled"
    task._log_destroy_pending = False  # it is left in the middle on purpose
    assert not task.done()
    task.get_coro().close()


def test_an_error_reaches_the_task(llm: Llama) -> None:
    def complain(*told: object) -> None:
        raise KeyError("of the caller's own function")

    with pytest.raises(KeyError, match="of the caller's own function"):
        asyncio.run(texts(llm.astream("the cat", progress=complain)))


# ---------------------------------------------------------------- time, progress


@pytest.mark.parametrize("max_time_s", [0, -1, "soon", float("inf"), float("nan"), True])
def test_a_time_that_is_none_is_refused(llm: Llama, max_time_s: object) -> None:
    with pytest.raises(npllama.UsageError, match=r"max_time_s=.*: needs seconds, more than 0"):
        llm.generate("the cat", max_time_s=max_time_s)
    with pytest.raises(npllama.UsageError, match="progress='7': needs a function"):
        llm.generate("the cat", progress=7)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in ("completion", "scheduler"):
            monkeypatch.setattr(f"npllama.generation.{module}.time", self)

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


def test_time_that_is_over_ends_a_text_as_it_is(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    expected = llm.generate("the cat", max_tokens=9, seed=1)
    stream = llm.stream("the cat", max_tokens=500, seed=1, max_time_s=2.5)
    came = [next(stream).token for _ in range(9)]
    clock.now += 2.6
    assert list(stream) == []
    assert came == stream.result.tokens == expected.tokens
    assert stream.result.finish_reason == "time"


def test_time_counts_while_prompts_are_read_and_while_they_wait(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    read: list[tuple[int, int]] = []

    def pass_time(done: int, total: int, seconds: float) -> None:
        assert seconds == clock.now - 1000.0
        read.append((done, total))
        clock.now += 1.0

    unseen = [9, 3, 9, *LONG[:-3]]  # what other tests have read is not read again
    results = llm.generate([unseen] * 20, max_time_s=2.5, progress=pass_time, bos=None)
    assert {r.finish_reason for r in results} == {"time"}
    assert all(r.tokens == [] for r in results)
    assert read == [(n * llm.chunk, 20 * len(LONG)) for n in (1, 2, 3)]


def test_progress_tells_all_that_is_read_once_and_answers_may_cancel(llm: Llama) -> None:
    read: list[tuple[int, int]] = []

    def note(done: int, total: int, seconds: float) -> bool:
        read.append((done, total))
        return done < 500

    prompts = [[5, 6, *LONG], [7, 8, *LONG]]
    results = llm.generate(prompts, max_tokens=2, n=3, progress=note)
    assert [r.finish_reason for group in results for r in group] == ["cancelled"] * 6
    assert [total for _, total in read] == [2 * len(prompts[0])] * len(read)
    assert sorted(read) == read
    assert 500 <= read[-1][0] < 500 + llm.chunk
    read.clear()
    done = llm.generate(prompts, max_tokens=2, n=3, progress=lambda *told: read.append(told[:2]))
    assert all(r.finish_reason == "length" for group in done for r in group)
    assert read[-1] == (2 * len(prompts[0]),) * 2


def test_a_function_that_waits_for_its_own_model_is_refused(llm: Llama) -> None:
    def generate(*told: object) -> None:
        llm.generate("a dog", max_tokens=1)

    def wait(*told: object) -> None:
        llm.submit("a dog", max_tokens=1).result(WAIT_S)

    for progress in (generate, wait):
        for call in (llm.generate, lambda *a, **k: llm.submit(*a, **k).result(WAIT_S)):
            with pytest.raises(npllama.UsageError, match="cannot wait for one of the same model"):
                call("the cat", max_tokens=1, progress=progress)
    assert_ends(llm)


def test_the_first_completion_of_a_prompt_may_end_before_the_others_begin(llm: Llama) -> None:
    """Its followers read the prompt then."""
    request_of = llm.generate(LONG, max_tokens=4, n=3, seed=5)
    groups: list[Any] = []
    completions = llm._completions

    def note(*arguments: Any) -> Any:
        groups.append(completions(*arguments))
        return groups[-1]

    def cancel_the_first(done: int, total: int, seconds: float) -> None:
        groups[0][0].cancelled = True

    llm._completions = note  # type: ignore[method-assign]  # until it is deleted below
    try:
        results = llm.generate(LONG[:1] + LONG[1:], max_tokens=4, n=3, seed=5, progress=cancel_the_first)
    finally:
        del llm._completions
    assert [r.finish_reason for r in results] == ["cancelled", "length", "length"]
    assert [r.tokens for r in results[1:]] == [r.tokens for r in request_of[1:]]
