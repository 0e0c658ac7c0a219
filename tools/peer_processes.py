"""Programs beside which npllama is measured, each in a process of its own, and how they are kept to some features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

TOOL = Path(__file__).with_name("bench_peers.py")
KEPT_TO = "NPLLAMA_PEERS_FEATURES"
BEYOND_AVX2 = ("avx512", "avx10", "amx", "avxvnni", "avxifma", "avxneconvert", "vaes", "vpclmulqdq", "gfni")
"""How LLVM's names of features begin that a CPU with AVX2, FMA and F16C alone does not have."""


class Program(Protocol):
    """What the tool asks of a program."""

    def measure(self, n_prompt: int, n_gen: int, depth: int) -> float:
        """Seconds for reading n_prompt tokens and then generating n_gen, at a depth."""

    def close(self) -> None:
        """End it."""


def environment(program: str, features: str, llama_cpp: Path | None) -> dict[str, str]:
    """The environment of a program that is kept to features: "avx2", or nothing for all."""
    found = dict(os.environ)
    if llama_cpp is not None and program == "llama.cpp":
        found["PYTHONPATH"] = os.pathsep.join([str(llama_cpp), *found.get("PYTHONPATH", "").split(os.pathsep)])
    if not features:
        return found
    found[KEPT_TO] = features
    if program == "npllama":
        import llvmlite.binding as llvm

        host = llvm.get_host_cpu_features()
        has = {name: there and not name.startswith(BEYOND_AVX2) for name, there in host.items()}
        found["NUMBA_CPU_NAME"] = llvm.get_host_cpu_name()
        found["NUMBA_CPU_FEATURES"] = ",".join(f"{'+' if there else '-'}{name}" for name, there in has.items())
    found["ATEN_CPU_CAPABILITY"], found["ONEDNN_MAX_CPU_ISA"] = "avx2", "AVX2"
    return found


def refuse_more_features(said: str) -> None:
    """End llama.cpp's process where it says that it uses more than it is to be kept to."""
    more = [part.strip() for part in said.split("|") if part.strip().endswith("= 1")]
    more = [part for part in more if part.startswith(("AVX512", "AVX_VNNI", "AMX"))]
    if os.environ.get(KEPT_TO) and more:
        sys.exit(f"this llama.cpp was built with {', '.join(more)}; give one by --llama-cpp that was not.")


class Child:
    """One program in a process of its own."""

    def __init__(
        self,
        program: str,
        model: Path,
        threads: int,
        context: int,
        kv_dtype: str,
        features: str = "",
        llama_cpp: Path | None = None,
    ) -> None:
        command = [sys.executable, str(TOOL), "--serve", program, str(model), str(threads), str(context), kv_dtype]
        self._program = program
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(program, features, llama_cpp),
        )
        answer = self._answer()
        if answer != "ready":
            ended = f"it said {answer!r}" if answer else f"it ended with {self._process.wait()}"
            sys.exit(f"{program} could not open {model}: {ended}")

    def measure(self, n_prompt: int, n_gen: int, depth: int) -> float:
        """Seconds for reading n_prompt tokens and then generating n_gen, at a depth."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n_prompt} {n_gen} {depth}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if not answer:  # llama.cpp's code for AMX as gcc 12 builds it, for one: a signal
            sys.exit(f"{self._program} could not run {n_prompt}+{n_gen} tokens: it ended with {self._process.wait()}")
        return float(answer)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=60)


class IkLlamaBench:
    """ik_llama.cpp's llama-bench, started for each measurement; weights are repacked when it loads them."""

    def __init__(self, program: Path, model: Path, threads: int, kv_dtype: str | None) -> None:
        self._command = [str(program), "-m", str(model), "-t", str(threads), "-rtr", "1", "-r", "3", "-o", "json"]
        if kv_dtype:
            self._command += ["-ctk", kv_dtype, "-ctv", kv_dtype]

    def measure(self, n_prompt: int, n_gen: int, depth: int) -> float:
        command = [*self._command, "-p", str(n_prompt), "-n", str(n_gen)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            (found,) = json.loads(done.stdout)
            rate = float(found["avg_ts"])
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{' '.join(command)} gave no rate; it ended with {done.returncode}: {done.stderr[-300:]}")
        return (n_prompt + n_gen) / rate

    def close(self) -> None:
        """Each measurement has ended by itself."""
