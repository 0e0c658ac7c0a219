"""Print a vector for each text: one JSON array a line, or a .npy file with -o.

The vector is the mean of the final hidden states of all tokens (or the last one), of length 1 unless --no-normalize.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from npllama.commands.terminal import Notes, add_execution, execution, load_model, put, whole
from npllama.commands.texts import argument_bytes, decoded, of_a_file, read_file, read_stdin
from npllama.errors import NpllamaError, UsageError

NAME = "embed"
SUMMARY = "print vectors for texts"
POOLINGS = ("mean", "last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama embed`."""
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="*", help="a text")
    add("-m", "--model", metavar="MODEL", help="a model directory or a checkpoint (default: the demo model)")
    add("-f", "--file", metavar="FILE", help="a text in each line of a file; - reads stdin")
    add("--pooling", choices=POOLINGS, default="mean", help="of the hidden states of a text's tokens (default mean)")
    add("--no-normalize", action="store_true", help="leave the vectors as long as they are")
    add("-o", "--output", metavar="FILE", help="write one array (texts, numbers) in float32 to a .npy file")
    add("-c", "--ctx-size", metavar="N", type=whole(1, 2**31), help="context in tokens")
    add_execution(parser)


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Embed all texts in company."""
    texts = [decoded(argument_bytes(one), "a text", False) for one in args.texts]
    if args.file is not None:
        data = read_stdin() if args.file == "-" else read_file(args.file)
        texts += decoded(of_a_file(data), args.file, False).split("\n")
    if not texts:
        raise UsageError("no text was given; one or more are needed, as arguments or with -f FILE.")
    how = {**execution(args), "context": args.ctx_size}
    with load_model(notes, args.model, **how) as llama:
        vectors = llama.embed(texts, args.pooling, not args.no_normalize)
    notes.show()
    if args.output is not None:
        _write(Path(args.output), vectors)
        return 0
    for vector in vectors:
        put(json.dumps([float(x) for x in vector]) + "\n")
    return 0


def _write(path: Path, vectors: Any) -> None:
    import numpy as np  # here, because most commands need none

    try:
        with open(path, "wb") as file:
            np.save(file, vectors)
    except OSError as error:
        raise NpllamaError(f"{path}: cannot be written ({error.strerror}); give another path.") from error
