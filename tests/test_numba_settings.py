"""Settings of Numba and OpenMP in the environment: honoured, or NumPy with one line, or one line of error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import environment

pytest.importorskip("numba")
from llvmlite import binding

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

LACKING = next((f"+{name}" for name, there in binding.get_host_cpu_features().items() if not there), "")

PROGRAM = """
import logging, sys
import npllama
logging.basicConfig(format="said: %(message)s", stream=sys.stdout)
try:
    with npllama.load(backend=sys.argv[1]) as llm:
        print(f"{llm.backend} {llm.engine.threads} {llm.logits([1, 300, 301]).shape}")
except npllama.NpllamaError as error:
    print(f"error: {error}")
"""


def load(backend: str, **settings: str) -> list[str]:
    """What a process with these settings prints, without what it says about compiling."""
    env = environment(**settings)
    env.pop("NPLLAMA_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("said: compiling kernels")]


@pytest.mark.parametrize(
    "settings",
    [
        {"NUMBA_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "1,4"},
        {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "8"},
    ],
    ids=str,
)
def test_one_thread_is_one_thread_without_a_complaint(settings: dict[str, str]) -> None:
    (line,) = load("numba", **settings)
    assert line.startswith("numba 1 (3,")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("NUMBA_NUM_THREADS", "0", "NUMBA_NUM_THREADS='0'"),
        ("NUMBA_NUM_THREADS", "-2", "NUMBA_NUM_THREADS='-2'"),
        ("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT is set"),
        ("NUMBA_THREADING_LAYER", "nonsense", "see NUMBA_THREADING_LAYER"),
        ("NUMBA_THREADING_LAYER_PRIORITY", "omp", "THREADING_LAYER_PRIORITY"),
        ("NUMBA_CPU_FEATURES", LACKING, f"asks for '{LACKING}', which this CPU has not"),
        ("NUMBA_CPU_FEATURES", "junk", "'junk', which this CPU has not or LLVM cannot read"),
        ("NUMBA_DYLD_WORKAROUND", "x", "NUMBA_DYLD_WORKAROUND='x'"),
    ],
)
def test_a_setting_that_leaves_nothing_to_compile_with_is_one_line(name: str, value: str, reason: str) -> None:
    (error,) = load("numba", **{name: value})
    assert error.startswith("error: ")
    assert reason in error
    assert error.endswith("use backend numpy.")
    said, used = load("auto", **{name: value})
    assert said.startswith("said: using NumPy: ")
    assert reason in said
    assert used.startswith("numpy")


@pytest.mark.parametrize(
    ("name", "value"), [("NUMBA_NUM_THREADS", "two"), ("NUMBA_NUM_THREADS", ""), ("NUMBA_DISABLE_JIT", "no")]
)
def test_a_setting_that_numba_does_not_understand_is_named_in_one_line(name: str, value: str) -> None:
    said, used = load("numba", **{name: value})
    assert said == f"said: {name} is not understood by numba, which uses its default"
    assert used.startswith("numba")


def test_the_simplest_threading_layer_computes_in_a_child_too() -> None:
    program = PROGRAM.replace('print(f"{llm', 'import os; os.fork() or print(f"{llm')
    env = environment(NUMBA_THREADING_LAYER="workqueue")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, "numba"],
        env=env, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "numba" in done.stdout, done.stderr


@pytest.mark.parametrize("setting", ["NUMBA_OPT", "NUMBA_BOUNDSCHECK", "NUMBA_LOOP_VECTORIZE"])
def test_settings_that_change_code_keep_code_of_their_own(setting: str) -> None:
    program = "from npllama.execution.kernels.compile import target; print(target())"

    def target(**settings: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment(**settings), capture_output=True, text=True, check=True).stdout

    assert target(**{setting: "0"}) != target(**{setting: "1"})
