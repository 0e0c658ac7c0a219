"""What loading a model changes in the process, and what closing it puts back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import environment

from npllama.execution import process

needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)
needs_openblas = pytest.mark.skipif(process._openblas() is None, reason="threads: this NumPy's BLAS cannot be told")


def run(program: str, **changes: str) -> None:
    """Run a program in a process of its own, without the threads that the environment asks for."""
    env = environment(**changes)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if name not in changes:
            env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_openblas
def test_closing_the_last_model_puts_the_threads_of_numpys_products_back() -> None:
    run(
        """
import npllama
from npllama.execution import process
get, put = process._openblas()
put(2)
first = npllama.load(backend="numpy", threads=1)
assert get() == 1
second = npllama.load(backend="numpy", threads=3)
assert get() == 3
second.close()
assert get() == 1, "the other model is open still"
second.close()
first.close()
assert get() == 2
third = npllama.load(backend="numpy", threads=1)
del third  # never closed
import gc; gc.collect()
assert get() == 2
with npllama.load(backend="numpy", threads=1):
    put(3)
assert get() == 3, "what others have set stands"
"""
    )


@needs_openblas
def test_a_users_own_number_of_threads_for_numpy_stands() -> None:
    run(
        """
import npllama
from npllama.execution import process
get, put = process._openblas()
before = get()
with npllama.load(backend="numpy") as llm:
    assert get() == before and llm.engine.threads == 1
""",
        OMP_NUM_THREADS="1",
    )


@needs_numba
def test_compiled_execution_leaves_environment_and_the_callers_threads_alone() -> None:
    run(
        """
import os
environment, cpus = dict(os.environ), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
import npllama
with npllama.load(backend="numba", threads=1) as llm:
    assert dict(os.environ) == environment
    llm.logits([1, 300, 301])
    import numba
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(1)
    llm.engine.threads = 2
    llm.logits([1, 300, 301])
    assert numba.get_num_threads() == 1
assert dict(os.environ) == environment
assert cpus is None or os.sched_getaffinity(0) == cpus
""",
        NUMBA_NUM_THREADS="2",
    )


@needs_numba
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="threads: needs Linux and two CPUs"
)
def test_closing_lets_threads_that_were_tied_to_cpus_run_on_all_again() -> None:
    run(
        """
import os, time
import npllama
from npllama.execution import affinity
cpus = os.sched_getaffinity(0)
llm = npllama.load(backend="numba", threads=len(cpus))
affinity.CROWDED_PER_S = -1.0  # every thread counts as interrupted too often
ids = list(range(300, 330))
for _ in range(3):
    llm.logits(ids)
    time.sleep(affinity.LOOK_S)
def tied():
    return [t for t in os.listdir("/proc/self/task") if os.sched_getaffinity(int(t)) != cpus]
assert tied()
llm.close()
assert not tied()
"""
    )
