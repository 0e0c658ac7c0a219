"""Fork again and again while threads compute: every child must end, with the right logits or an error.

    python tools/hammer_forks.py [SECONDS] [BACKEND ...]

Backends "numpy", "numba" and "both" (models of both in one process); without any, each in turn. Exit code 1 for wrong
logits, 2 for a child or a thread that does not end.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np

import npllama

IDS = [1, *range(300, 324)]
MAX_S = 60.0  # for one child; under load computing takes long, a hang longer


def main() -> int:
    """Hammer each backend in a process of its own: what one has started, another would inherit."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    if os.environ.get("HAMMERED"):
        return hammer(seconds, sys.argv[2])
    codes = []
    for backend in sys.argv[2:] or ["numpy", "numba", "both"]:
        command = [sys.executable, __file__, str(seconds), backend]
        codes.append(subprocess.run(command, env={**os.environ, "HAMMERED": "1"}, check=False).returncode)
    return max(map(abs, codes))


def hammer(seconds: float, backend: str) -> int:
    """Three threads compute, one loads and closes a model over and over, this one forks."""
    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork beside threads
    faulthandler.dump_traceback_later(seconds + 3 * MAX_S, exit=True)
    backends = ["numpy", "numba"] if backend == "both" else [backend]
    models = [npllama.load(backend=name) for name in backends]
    usual = [model.logits(IDS) for model in models]
    stop, wrong = threading.Event(), []

    def compute() -> None:
        while not stop.is_set():
            for i, model in enumerate(models):
                if not are_equal(model.logits(IDS), usual[i]):
                    wrong.append("a thread")

    def load() -> None:
        while not stop.is_set():
            with npllama.load(backend=backends[0]) as model:
                model.generate("Tom", max_tokens=3)

    workers = [threading.Thread(target=work) for work in (compute, compute, compute, load)]
    for worker in workers:
        worker.start()
    counts = {"right": 0, "error": 0, "wrong": 0, "hang": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end and not counts["hang"]:
        counts[fork(models, usual)] += 1
    stop.set()
    for worker in workers:
        worker.join(MAX_S)
    print(f"{backend}: children {counts}; threads that gave other logits: {len(wrong)}")
    if counts["hang"] or any(worker.is_alive() for worker in workers):
        return 2
    return 1 if wrong or counts["wrong"] else 0


def are_equal(logits: np.ndarray, usual: np.ndarray) -> bool:
    """In NumPy the last digits depend on what is computed beside a text."""
    return bool(np.allclose(logits, usual, rtol=0, atol=1e-4))


def fork(models: list[npllama.Llama], usual: list[np.ndarray]) -> str:
    """One child that computes with every model: what became of it."""
    child = os.fork()
    if child == 0:
        code = 4
        try:
            code = 0 if all(are_equal(m.logits(IDS), u) for m, u in zip(models, usual, strict=True)) else 1
        except npllama.UsageError:
            code = 3
        finally:
            os._exit(code)
    end = time.monotonic() + MAX_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {0: "right", 3: "error"}.get(os.waitstatus_to_exitcode(status), "wrong")
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hang"


if __name__ == "__main__":
    sys.exit(main())
