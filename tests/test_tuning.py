"""Prefetching is chosen by measuring, once on a machine; and it changes no bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import write_any_model

from npllama.errors import UsageError
from npllama.execution.engine import Engine
from npllama.execution.prefetching import ahead, tuning
from npllama.execution.prefetching.ahead import BYTES, HALVES, KINDS, NONE, PACKED, Prefetch
from npllama.inference import DEMO
from npllama.store.opening import open_model
from npllama.system import machine

needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

KEY = {"cpu": "one that nobody has seen", "caches": "1 2", "threads": "2", "quota": "inf"}
SLOW = Prefetch("groups", 8192)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where KEY is kept, in an empty directory; afterwards the numbers are as they were."""
    before = ahead.AHEAD.copy()
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(machine, "compiled_code_directory", lambda make=True: (tmp_path / "cache", ""))
    monkeypatch.delenv("NPLLAMA_PREFETCH", raising=False)
    for kind in KINDS:
        ahead.use(kind, SLOW)
    kept = tuning.kept_file(KEY)
    assert kept is not None
    yield kept
    ahead.AHEAD[:] = before


def machine_that_likes(
    best: Prefetch, kind: str = PACKED, seconds: float = 1e-4
) -> tuple[Callable[[], float], list[int]]:
    """A call that takes half the time when a kind is prefetched so, and how often it was made."""
    calls = [0]

    def call_s() -> float:
        calls[0] += 1
        return seconds / 2 if ahead.used(kind) == best else seconds

    return call_s, calls


def test_the_fastest_is_used_and_kept_and_not_measured_again() -> None:
    best = Prefetch("lines", 2048)
    call_s, calls = machine_that_likes(best)
    tuning.settle(KEY, {PACKED}, call_s)
    assert ahead.used(PACKED) == best
    assert ahead.used(BYTES) == ahead.used(HALVES) == SLOW
    assert calls[0] == 2 + tuning.MAX_ROUNDS * (1 + len(tuning.CANDIDATES))
    ahead.use(PACKED, SLOW)
    tuning.settle(KEY, {PACKED}, call_s)
    assert ahead.used(PACKED) == best
    assert calls[0] == 2 + tuning.MAX_ROUNDS * (1 + len(tuning.CANDIDATES))
    assert tuning.described(KEY)[PACKED].startswith("lines:2048 (measured 20")
    assert "2.00 times" in tuning.described(KEY)[PACKED]
    assert tuning.described(KEY)[BYTES].startswith("groups:8192 (by the CPU's name")


def test_another_machine_and_another_kind_are_measured(file: Path) -> None:
    tuning.settle(KEY, {PACKED}, machine_that_likes(Prefetch("lines", 2048))[0])
    call_s, calls = machine_that_likes(NONE)
    tuning.settle({**KEY, "quota": "0.5"}, {PACKED}, call_s)
    assert calls[0] > 0
    assert ahead.used(PACKED) == NONE
    call_s, calls = machine_that_likes(Prefetch("lines", 1024), BYTES)
    tuning.settle(KEY, {PACKED, BYTES}, call_s)
    assert calls[0] > 0
    assert (ahead.used(PACKED), ahead.used(BYTES)) == (Prefetch("lines", 2048), Prefetch("lines", 1024))
    assert set(tuning.read_kept(file)) == {PACKED, BYTES}


def test_what_is_no_faster_changes_nothing(file: Path) -> None:
    tuning.settle(KEY, {PACKED}, lambda: 1e-4)
    assert ahead.used(PACKED) == SLOW
    assert tuning.read_kept(file)[PACKED].gain == 1


def test_calls_that_take_too_long_are_not_measured_with(file: Path) -> None:
    call_s, calls = machine_that_likes(NONE, seconds=1.0)
    tuning.settle(KEY, {PACKED}, call_s)
    assert calls[0] == 2
    assert not file.exists()
    assert ahead.used(PACKED) == SLOW


def test_an_interrupted_measurement_leaves_what_was(file: Path) -> None:
    def call_s() -> float:
        if ahead.used(PACKED) == Prefetch("lines", 1024):
            raise KeyboardInterrupt
        return 1e-5

    with pytest.raises(KeyboardInterrupt):
        tuning.settle(KEY, {PACKED}, call_s)
    assert ahead.used(PACKED) == SLOW
    assert list(file.parent.iterdir()) == []


NO_DISTANCE = b'{"kinds": {"packed": {"prefetch": "lines:0", "gain": 1, "date": ""}}}'
NO_GAIN = b'{"kinds": {"packed": {"prefetch": "lines:4096"}}}'


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"[]", b'{"kinds": 7}', b'{"kinds": {"packed": 1}}', NO_DISTANCE, NO_GAIN, b"[" * 100_000],
)
def test_a_damaged_file_is_measured_again(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    call_s, calls = machine_that_likes(NONE)
    tuning.settle(KEY, {PACKED}, call_s)
    assert calls[0] > 0
    assert json.loads(file.read_bytes())["kinds"]["packed"]["prefetch"] == "none"


def test_nothing_is_measured_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiled_code_directory", lambda make=True: (None, "others can write there"))
    call_s, calls = machine_that_likes(NONE)
    tuning.settle(KEY, {PACKED}, call_s)
    assert calls[0] == 0


@pytest.mark.parametrize("text", ["none", "groups:64", "lines:65536"])
def test_a_setting_forces_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPLLAMA_PREFETCH", text)
    call_s, calls = machine_that_likes(NONE)
    tuning.settle(KEY, {PACKED}, call_s)
    assert calls[0] == 0
    assert {str(ahead.used(kind)) for kind in KINDS} == {text}
    assert tuning.described(KEY)[HALVES] == f"{text} (NPLLAMA_PREFETCH)"


@pytest.mark.parametrize(
    "text", ["lines", "lines:", "lines:63", "lines:65537", "rows:64", "none:64", "groups:-64", "groups:٣٢٠"]
)
def test_a_setting_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPLLAMA_PREFETCH", text)
    with pytest.raises(UsageError, match="it needs none, groups:BYTES or lines:BYTES"):
        tuning.settle(KEY, {PACKED}, None)


@needs_numba
@pytest.mark.parametrize("dtype", ["q4", "q8", "f16"])
def test_no_bit_hangs_on_it(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_any_model(tmp_path / "model", dtype)
    monkeypatch.undo()  # compiled code is where it always is
    engine = Engine(open_model(tmp_path / "model"), "numba")
    ids, found = list(range(29)), set()
    for prefetch in tuning.CANDIDATES:
        for kind in KINDS:
            ahead.use(kind, prefetch)
        cache = engine.new_cache(1, 32)
        logits = engine.forward(cache, ids, range(29), np.zeros(29), range(29))
        found.add(logits.tobytes() + engine.forward(cache, [3], [29], [0], [0]).tobytes())
    assert len(found) == 1


@needs_numba
def test_a_model_that_no_cache_holds_is_measured_when_it_is_opened(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "kept_file", lambda key: file)
    monkeypatch.setattr(tuning, "BUDGET_S", 60.0)  # a busy machine
    monkeypatch.setattr(tuning, "MAX_ROUNDS", 3)
    Engine(open_model(DEMO), "numba")
    assert not file.exists()
    monkeypatch.setattr(machine, "cache_bytes", lambda: [1 << 10])
    Engine(open_model(DEMO), "numba")
    assert set(tuning.read_kept(file)) == {HALVES}
