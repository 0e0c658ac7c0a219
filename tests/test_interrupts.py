"""Ctrl-C: what is half done is finished first, what computes is left at once, also inside compiled code."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import environment
from helpers import TINY, write_any_model, write_model_directory

import npllama
from npllama.execution import abandon
from npllama.execution.abandon import AbandonedError, Call
from npllama.execution.engine import Engine
from npllama.store.opening import open_model
from npllama.system.interrupts import EARS, Hold, Interruptible, Uninterrupted

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals: sent as on Unix")
needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_takes_effect_when_what_is_not_to_be_torn_is_over() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def nested() -> None:
        with Uninterrupted():
            with Uninterrupted():
                interrupt()
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        nested()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_takes_effect_at_once_where_the_model_computes() -> None:
    done = []

    def compute(comes_before: bool) -> None:
        with Uninterrupted():
            if comes_before:
                interrupt()
            with Interruptible():
                done.append("begun")
                interrupt()
                done.append("torn")

    for comes_before, expected in ((True, []), (False, ["begun"])):
        with pytest.raises(KeyboardInterrupt):
            compute(comes_before)
        assert done == expected
    with Uninterrupted():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_hold_passes_everything_on_and_handlers_of_others_stay() -> None:
    came = []
    before = signal.signal(signal.SIGINT, lambda *told: came.append(1))
    try:
        hold, other = Hold(), Hold()
        interrupt()
        hold.release()
        hold.release()
        with Uninterrupted():
            interrupt()
            assert came == [1]
        assert came == [1, 1]
        signal.signal(signal.SIGINT, lambda *told: came.append(2))
        other.release()
        interrupt()
        assert came == [1, 1, 2]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Uninterrupted(), Interruptible():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ears_hear_and_leave_the_descriptor_of_others_alone() -> None:
    heard, waited = threading.Event(), []
    usual = signal.signal(signal.SIGINT, lambda *told: waited.append(heard.wait(60)))  # as long as compiled code runs
    try:
        with EARS(heard.set):
            interrupt()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert waited == [True]
    assert signal.set_wakeup_fd(-1) == -1
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    try:
        with EARS(heard.set):
            assert signal.set_wakeup_fd(writing) == writing
    finally:
        assert signal.set_wakeup_fd(-1) == writing
        os.close(reading), os.close(writing)


def test_other_threads_do_without() -> None:
    said: list[object] = []

    def work() -> None:
        hold = Hold()
        with Uninterrupted(), Interruptible(), EARS(lambda: None):
            said.append(signal.getsignal(signal.SIGINT))
        hold.release()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("when", ["take", "adopt", "reserve", "written", "forward"])
def test_ctrl_c_in_the_middle_of_anything_loses_no_block_and_harms_no_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    write_model_directory(tmp_path / "model")
    with npllama.load(tmp_path / "model", "numpy") as llm:
        expected = llm.generate("the cat", max_tokens=20, temperature=0).tokens
        other = llm.stream("the cat", max_tokens=20, temperature=0)
        first = next(other).token
        owner = {
            "take": "npllama.generation.completion.Completion",
            "forward": "npllama.model",
        }.get(when, "npllama.generation.pool.Sequence")
        real = _attribute(owner, when)
        calls_left = [0]

        def torn(*arguments: Any) -> Any:
            calls_left[0] -= 1
            if calls_left[0] == 0:
                interrupt()
            return real(*arguments)

        monkeypatch.setattr(f"{owner}.{when}", torn)
        for n in (1, 4):
            calls_left[0] = n
            with pytest.raises(KeyboardInterrupt):
                llm.generate([f"a {i}" for i in range(6)], max_tokens=8, temperature=0)
        monkeypatch.setattr(f"{owner}.{when}", real)
        assert [first, *(piece.token for piece in other if piece.token is not None)] == expected
        pool = llm.runtime.scheduler.pool
        pool.check()
        assert pool.available == pool.capacity


def _attribute(owner: str, name: str) -> Any:
    """A function of a module, or of a class."""
    found: Any = sys.modules.get(owner)
    if found is None:
        module, _, cls = owner.rpartition(".")
        found = getattr(sys.modules[module], cls)
    return getattr(found, name)


# ---------------------------------------------------------------- compiled calls


@pytest.fixture(scope="module", params=["q8", "f32"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("abandon") / "model"
    write_any_model(folder, request.param)
    return Engine(open_model(folder), "numba")


def call_rows(engine: Engine, call: Call | None = None, first_id: int = 3) -> tuple[np.ndarray, int]:
    cache = engine.new_cache(1, 64)
    ids = np.arange(60) + first_id
    try:
        logits = engine.forward(cache, ids, range(60), [0] * 60, range(60), call=call)
    finally:
        written = int(cache.length[0])
        assert written in (0, 60)
    return logits, written


@needs_numba
def test_an_abandoned_call_writes_nothing_that_counts_and_changes_no_other(engine: Engine) -> None:
    expected = call_rows(engine)[0].tobytes()
    call = Call()
    call.abandon()
    with pytest.raises(AbandonedError):
        call_rows(engine, call)
    assert not abandon.FLAG[0]
    call = Call()
    assert call_rows(engine, call)[0].tobytes() == expected
    call.abandon()
    assert not abandon.FLAG[0], "it has ended"
    assert call_rows(engine)[0].tobytes() == expected


@needs_numba
def test_kernels_look_at_the_flag(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set from the beginning, it leaves what the memory held: not these logits, which nothing has computed yet."""
    compiled = engine.compiled
    assert compiled is not None
    forward, found = compiled.forward, []

    def set_it_first(*arguments: Any) -> np.ndarray:
        abandon.FLAG[0] = 1
        found.append(forward(*arguments))
        return found[-1]

    monkeypatch.setattr(compiled, "forward", set_it_first)
    call = Call()
    call.abandoned = True
    with pytest.raises(AbandonedError):
        call_rows(engine, call, first_id=150)
    monkeypatch.undo()
    expected = call_rows(engine, first_id=150)[0]
    assert found[0].shape == expected.shape
    assert found[0].tobytes() != expected.tobytes()


@needs_numba
def test_a_call_that_heard_ctrl_c_is_made_again_if_its_handler_lets_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = call_rows(engine)[0].tobytes()
    compiled = engine.compiled
    assert compiled is not None
    forward, n_calls = compiled.forward, 0

    def hear(*arguments: Any) -> np.ndarray:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            abandon._under_way.hear()
        return forward(*arguments)

    monkeypatch.setattr(compiled, "forward", hear)
    assert call_rows(engine)[0].tobytes() == expected
    assert n_calls == 2


@needs_numba
def test_ctrl_c_ends_a_compiled_prompt(tmp_path: Path) -> None:
    """Sent by another process as soon as the call has begun; what the call would take is a hundred times the limit."""
    write_model_directory(tmp_path / "model", dataclasses.replace(TINY, max_seq_len=20_000))
    program = """
import os, sys, threading, time
import numpy as np
import npllama
from npllama.execution import abandon

llm = npllama.load(sys.argv[1], "numba", threads=1)
engine, ids = llm.engine, np.arange(20_000) % 200
cache = engine.new_cache(1, len(ids))

def send():
    while abandon._under_way is None:
        time.sleep(0.001)
    os.kill(os.getpid(), 2)

engine.forward(cache, ids[:9], range(9), [0] * 9, [])
threading.Thread(target=send, daemon=True).start()
try:
    engine.forward(cache, ids, range(len(ids)), [0] * len(ids), [])
except KeyboardInterrupt:
    assert cache.length[0] == 0
    print("interrupted")
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "interrupted\n", done.stderr
