"""Make a smaller model directory of a model directory, by rounding its weights to another number format."""

from __future__ import annotations

import argparse

from npllama.commands.export import say_made
from npllama.commands.terminal import Choices, Notes, ProgressLine, quantized_formats

NAME = "quantize"
SUMMARY = "make a smaller model of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama quantize`."""
    parser.add_argument("model", metavar="MODEL", help="the model directory to read (f32, f16 or bf16)")
    parser.add_argument("out", metavar="OUT", help="the model directory to make")
    parser.add_argument(
        "--dtype",
        metavar="FORMAT",
        choices=Choices(quantized_formats),
        default="q4",
        help="number format: %(choices)s (default q4)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Quantize, with a progress line; the result is said on stderr."""
    from npllama.store.export import quantize_model

    with ProgressLine("quantizing") as progress:
        manifest = quantize_model(args.model, args.out, args.dtype, args.force, progress)
    notes.show()
    say_made(args.out, manifest)
    return 0
