"""Where the threads of compiled calls run while other programs compete for the CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import environment

from npllama.execution import affinity

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

PROGRAM = """
import os, sys, time
import npllama
from npllama.execution import affinity

def affinities():
    return sorted((len(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")))

cpus = os.sched_getaffinity(0)
llm = npllama.load(backend="numba", threads=len(cpus))
ids = [1, 300, 301]
usual = llm.logits(ids)
before = affinities()
assert set(before) == {len(cpus)}
affinity.CROWDED_PER_S = -1.0  # every thread counts as interrupted too often
time.sleep(affinity.LOOK_S)
llm.logits(ids)
crowded = llm.logits(ids)
assert affinities() == sorted([1] * (len(cpus) - 1) + before[len(cpus) - 1:]), affinities()
assert os.sched_getaffinity(0) == cpus
assert (crowded == usual).all()
affinity.CROWDED_PER_S = 1e9
time.sleep(affinity.CROWDED_S)
assert (llm.logits(ids) == usual).all()
assert affinities() == before and os.sched_getaffinity(0) == cpus
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="threads: needs Linux and two CPUs"
)
def test_other_threads_are_tied_while_it_is_crowded_and_the_callers_never_is() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def unknown_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "_thread", affinity._Thread())


def test_masks_name_each_threads_cpus() -> None:
    assert affinity._masks([[0, 1, 70], [1], [70]]).tolist() == [[3, 64], [2, 0], [0, 64]]


def test_a_system_that_forbids_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forbidden(*arguments: object) -> None:
        asked.append(arguments)
        raise PermissionError

    def function(x: float) -> np.ndarray:
        time.sleep(affinity.LOOK_S)
        return np.full(1, x)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", forbidden, raising=False)
    monkeypatch.setattr(affinity, "CROWDED_PER_S", -1.0)
    here = affinity.ThreadAffinity(lambda: lambda masks: None, lambda: "omp")
    for i in range(4):
        assert here.run(2, function, (float(i),)) == i
    assert len(asked) == 1


def test_threads_that_share_a_loop_otherwise_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "CROWDED_PER_S", -1.0)
    here = affinity.ThreadAffinity(lambda: pytest.fail("nothing is to be tied"), lambda: "workqueue")
    for _ in range(3):
        here.run(2, lambda: time.sleep(affinity.LOOK_S), ())
