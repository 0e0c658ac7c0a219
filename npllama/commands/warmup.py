"""Compile what a model needs and keep it, so that the next start finds it: for the build of an image."""

from __future__ import annotations

import argparse

from npllama.commands.terminal import Notes, add_kv_dtype, add_model, load_model, model_of, put
from npllama.errors import ModelError

NAME = "warmup"
SUMMARY = "compile for a model ahead of time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama warmup`."""
    add_model(parser, "a model directory or a checkpoint (default: the demo model)")
    add_kv_dtype(parser)


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Compile, and make sure that the result was kept."""
    from npllama.execution.compiled_code import compiled_exists
    from npllama.inference import DEMO
    from npllama.store.direct import open_source
    from npllama.system import machine

    model = model_of(args)
    folder, why = machine.compiled_code_directory()
    if folder is None:
        raise ModelError(f"compiled code could not be kept: {why}; set NPLLAMA_CACHE_DIR to a directory of your own.")
    with load_model(notes, model, backend="numba", kv_dtype=args.kv_dtype) as llama:
        notes.show()
        seconds = llama.engine.compile_s
    with open_source(DEMO if model is None else model) as opened:
        if not compiled_exists(opened.weights, args.kv_dtype):
            raise ModelError(
                "compiled code could not be kept, see above; set NPLLAMA_CACHE_DIR to a directory of your own."
            )
    put(f"compiled code is ready ({seconds:.1f} s)\n")
    return 0
