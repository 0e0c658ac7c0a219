"""The tool that measures peers: what it refuses, how programs are kept to features, what it reads of ik_llama.cpp."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

import peer_processes  # noqa: E402

needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--features", "avx2"], "give such a build by --llama-cpp"),
        (["--ik-llama-bench", "nowhere"], "no such program"),
        (["--ik-llama-bench", __file__, "--depths", "5"], "leave --depths out"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench_peers.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_numba
def test_npllama_is_kept_to_avx2() -> None:
    program = (
        "from npllama.execution.kernels import target, int8_dot;"
        "print(target.WIDTH, int8_dot.DOT, target.has('avx2'), target.has('avx512f'), target.has('avxvnni'))"
    )
    kept = peer_processes.environment("npllama", "avx2", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    width, dot, avx2, *more = done.stdout.split()
    assert (width, more) == ("8", ["False", "False"])
    assert dot == ("avx2" if avx2 == "True" else "plain")
    assert "NUMBA_CPU_FEATURES" not in set(peer_processes.environment("npllama", "", None)) - set(os.environ)


def test_llama_cpp_comes_from_the_folder_that_is_given(tmp_path: Path) -> None:
    found = peer_processes.environment("llama.cpp", "avx2", tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert str(tmp_path) not in peer_processes.environment("npllama", "", tmp_path).get("PYTHONPATH", "")


def test_a_llama_cpp_that_uses_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    more = "CPU : SSE3 = 1 | AVX = 1 | AVX_VNNI = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 0 | OPENMP = 1 | "
    peer_processes.refuse_more_features(more)
    monkeypatch.setenv(peer_processes.KEPT_TO, "avx2")
    peer_processes.refuse_more_features("CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 | ")
    with pytest.raises(SystemExit, match="was built with AVX_VNNI = 1, AVX512 = 1"):
        peer_processes.refuse_more_features(more)


def test_rates_of_ik_llama_cpp_are_read(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(f"#!{sys.executable}\nimport sys, json\nprint(json.dumps([dict(args=sys.argv, avg_ts=64.0)]))\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    bench = peer_processes.IkLlamaBench(program, tmp_path / "model.gguf", 2, "f16")
    assert bench.measure(128, 0, 0) == 2.0
    assert bench.measure(0, 32, 0) == 0.5
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    with pytest.raises(SystemExit, match=r"gave no rate; it ended with 1: no such model"):
        bench.measure(1, 0, 0)
