"""Forks: before anything was computed, after it, and while another thread computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

from npllama.inference import DEMO

BACKENDS = ["numpy"] if os.environ.get("NPLLAMA_BACKEND") == "numpy" else ["numpy", "numba"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks: needs a system that has them")
needs_numba = pytest.mark.skipif("numba" not in BACKENDS, reason="compiled execution: not in the run of NumPy's")


@pytest.fixture
def folder() -> Path:
    """The demo model: a smaller one would never need a second thread."""
    return DEMO


START = """
import multiprocessing, os, sys, threading, time
import npllama
from npllama.execution import threads

llm = npllama.load(sys.argv[1], backend=sys.argv[2])
ids = [1, 7, 30, 5, 9, 12, 40, 3]

def compute(_=0):
    return llm.logits(ids).tobytes().hex()

def in_child(work):
    # What a forked child says: the value of work, or an error of the package.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = work()
        except npllama.NpllamaError as error:
            said = f"error: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return said
"""


def run(program: str, folder: Path, backend: str, timeout_s: float = 240.0) -> None:
    """Run a program in a process of its own; it must end, and say nothing on stderr but what npllama reports."""
    command = [sys.executable, "-W", "ignore", "-c", START + program, str(folder), backend]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    assert "Terminating" not in done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_children_of_a_process_that_has_only_loaded_compute_as_it_does(backend: str, folder: Path) -> None:
    run(
        """
first = in_child(compute)
with multiprocessing.get_context("fork").Pool(2) as pool:  # as gunicorn --preload does, too
    workers = pool.map(compute, range(4))
assert len({first, *workers, compute()}) == 1
""",
        folder,
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_child_of_a_child_that_has_only_loaded_computes_too(backend: str, folder: Path) -> None:
    run("assert in_child(lambda: in_child(compute)) == compute()", folder, backend)


@needs_numba
def test_loading_for_compiled_execution_starts_no_thread(folder: Path) -> None:
    run(
        """
assert threading.active_count() == 1
n_before = len(os.listdir("/proc/self/task"))
compute()
assert len(os.listdir("/proc/self/task")) > n_before or llm.engine.threads == 1
""",
        folder,
        "numba",
    )


@needs_numba
def test_a_child_of_a_process_that_has_computed_gets_an_error_at_once(folder: Path) -> None:
    run(
        """
usual = compute()
for work in (compute, lambda: in_child(compute), lambda: npllama.load(sys.argv[1], backend="numba").backend):
    said = in_child(work)
    assert said.startswith("error: this process was forked from one that had computed with compiled kernels"), said
os.environ.pop("NPLLAMA_BACKEND", None)
assert in_child(lambda: npllama.load(sys.argv[1]).backend) == "numpy"
assert compute() == usual
""",
        folder,
        "numba",
    )


def test_products_of_a_child_use_threads_of_its_own(folder: Path) -> None:
    """NumPy's BLAS stops its threads before a fork, and starts others where they are needed next."""
    run(
        """
import numpy as np
a = np.random.default_rng(0).standard_normal((700, 700)).astype(np.float32)
usual = compute() + (a @ a).tobytes().hex()
assert in_child(lambda: compute() + (a @ a).tobytes().hex()) == usual
assert compute() + (a @ a).tobytes().hex() == usual
""",
        folder,
        "numpy",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_while_other_threads_compute_is_an_error_or_right(backend: str, folder: Path) -> None:
    run(
        """
usual, stop = compute(), threading.Event()

def keep_computing():
    while not stop.is_set():
        assert compute() == usual

workers = [threading.Thread(target=keep_computing) for _ in range(3)]
for worker in workers:
    worker.start()
for _ in range(20):
    said = in_child(compute)
    assert said == usual or said.startswith("error: this process was forked"), said
stop.set()
for worker in workers:
    worker.join()
""",
        folder,
        backend,
    )


def test_a_fork_waits_for_a_call_and_its_child_does_not(folder: Path) -> None:
    run(
        """
turn, begun, ended = threads.Turn(), threading.Event(), threading.Event()

def long_call():
    with turn:
        begun.set()
        time.sleep(0.3)
        ended.set()

caller = threading.Thread(target=long_call)
caller.start()
begun.wait()
def in_turn():
    with turn:
        return str(ended.is_set())

assert in_child(in_turn) == "True"
caller.join()
with turn:  # also from within a call
    assert in_child(in_turn) == "True"
""",
        folder,
        "numpy",
    )


@pytest.mark.slow("fork and compute for seconds")
@pytest.mark.parametrize("backend", [*BACKENDS, *(["both"] if "numba" in BACKENDS else [])])
def test_a_few_seconds_of_hammering_end_without_a_hang(backend: str) -> None:
    """The whole minute: python tools/hammer_forks.py"""
    script = Path(__file__).resolve().parent.parent / "tools" / "hammer_forks.py"
    done = subprocess.run(
        [sys.executable, script, "3", backend], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
