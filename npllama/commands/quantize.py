"""Make a smaller model directory of a model directory, by rounding its weights to another number format."""

from __future__ import annotations

import argparse

from npllama.commands.export import say_made
from npllama.commands.terminal import Notes, ProgressLine, add_dtype, add_out, quantized_formats

NAME = "quantize"
SUMMARY = "make a smaller model of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama quantize`."""
    parser.add_argument("model", metavar="MODEL", help="the model directory to read (f32, f16 or bf16)")
    add_out(parser)
    add_dtype(parser, quantized_formats, ": %(choices)s (default q4)", "q4")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Quantize, with a progress line; the result is said on stderr."""
    from npllama.store.export import quantize_model

    with ProgressLine("quantizing") as progress:
        manifest = quantize_model(args.model, args.out, args.dtype, args.force, progress)
    notes.show()
    say_made(args.out, manifest)
    return 0
