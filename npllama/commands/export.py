"""Turn a checkpoint (Meta release, Hugging Face folder, GGUF, llama2.c) into a model directory."""

from __future__ import annotations

import argparse
from typing import Any

from npllama.commands.info import matrix_formats
from npllama.commands.terminal import Notes, ProgressLine, add_dtype, add_out, number_formats, say

NAME = "export"
SUMMARY = "turn a checkpoint into a model directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or file of the checkpoint")
    add_out(parser)
    add_dtype(parser, number_formats, ": %(choices)s (default: the checkpoint's own)")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, or a folder (default: inside the checkpoint, in its folder or parent)",
    )


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Export, with a progress line; warnings, the tokenizer and the result are said on stderr."""
    from npllama.store.export import export

    with ProgressLine("exporting") as progress:
        manifest = export(args.checkpoint, args.out, args.dtype, args.tokenizer, args.force, progress, notes.add)
    notes.show()
    say_made(args.out, manifest)
    return 0


def say_made(out: str, manifest: dict[str, Any]) -> None:
    """Say what a new model directory holds."""
    from npllama.store.opening import size_bytes

    say(f"{out}: {size_bytes(manifest) / 1e6:,.1f} MB, matrices in {' and '.join(matrix_formats(manifest))}")
