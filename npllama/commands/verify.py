"""Check on this machine, with your weights, that every compiled kernel computes what its step in NumPy means."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from npllama.commands.terminal import Notes, add_kv_dtype, add_model, load_model, model_of, put, whole

NAME = "verify"
SUMMARY = "check every compiled kernel against NumPy, on your weights"
FAILED = 1
SWITCH = "NPLLAMA_PLAIN_KERNELS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama verify`."""
    add_model(parser, "a model directory or a checkpoint (default: the demo model)")
    add_kv_dtype(parser)
    parser.add_argument("-t", "--threads", metavar="N", type=whole(1, 4096), help="threads (default: see npllama info)")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """The kernels of this CPU in this process, their plain twins in another: the switch is read once per process."""
    code = _verify(args, notes)
    if SWITCH in os.environ:
        return code
    command = [sys.executable, "-m", "npllama", "verify", "--kv-dtype", args.kv_dtype]
    command += ["-m", model] if (model := model_of(args)) is not None else []
    command += ["-t", str(args.threads)] if args.threads is not None else []
    twins = subprocess.run(command, env={**os.environ, SWITCH: "1"}, check=False)
    return code or twins.returncode


def _verify(args: argparse.Namespace, notes: Notes) -> int:
    from npllama.measure.verify import verify, whole_model_error

    with load_model(notes, model_of(args), backend="numba", threads=args.threads, kv_dtype=args.kv_dtype) as llama:
        notes.show()
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
