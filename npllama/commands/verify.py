"""Check on this machine, with your weights, that every compiled kernel computes what its step in NumPy means."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from npllama.commands.terminal import Notes, add_kv_dtype, add_model, load_model, model_of, put, whole

NAME = "verify"
SUMMARY = "check every compiled kernel against NumPy, on your weights"
FAILED = 1
SWITCH = "NPLLAMA_PLAIN_KERNELS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama verify`."""
    add_model(parser, "a model directory or a checkpoint (default: the demo model)")
    add_kv_dtype(parser)
    parser.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", "--threads", metavar="N", type=whole(1, 4096), help="threads (default: see npllama info)")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """The kernels of this CPU in this process, their plain twins in another: the switch is read once per process."""
    if SWITCH in os.environ:
        return _verify(args, notes)
    command = [sys.executable, "-m", "npllama", "verify", "--in-turn", "--kv-dtype", args.kv_dtype]
    command += ["-m", model] if (model := model_of(args)) is not None else []
    command += ["-t", str(args.threads)] if args.threads is not None else []
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, SWITCH: "1"}, text=True, **pipes) as twins:
        try:
            code = _verify(args, notes)
            sys.stdout.flush()
            _, said = twins.communicate()  # stdin is closed: it is their turn
        except BaseException:
            twins.kill()
            raise
    sys.stderr.writelines(line for line in said.splitlines(True) if not line.endswith("...\n"))  # they waited long ago
    return code or twins.returncode


def _verify(args: argparse.Namespace, notes: Notes) -> int:
    from npllama.measure.verify import verify, whole_model_error

    with load_model(notes, model_of(args), backend="numba", threads=args.threads, kv_dtype=args.kv_dtype) as llama:
        notes.show()
        if args.in_turn:  # compiled beside the other process, which is still computing: two at once would be slower
            sys.stdin.read()
        rows = [*verify(llama.engine), whole_model_error(llama.engine)]
        kind = "plain twins" if os.environ.get(SWITCH, "0") not in ("", "0") else "kernels of this CPU"
        put(f"{kind}: largest error of each step, relative to its largest value\n")
        put(f"{'step':<14} {'weight':<15} {'calls':>6} {'largest error':>14} {'allowed':>9} {'layer':>6}\n")
        for row in rows:
            where = str(row.layer) if row.layer >= 0 else ""
            verdict = "" if row.passed else "  WRONG"
            put(
                f"{row.step:<14} {row.weight:<15} {row.calls:>6} {row.error:>14.1e} {row.tolerance:>9.0e} "
                f"{where:>6}{verdict}\n"
            )
    return 0 if all(row.passed for row in rows) else FAILED
