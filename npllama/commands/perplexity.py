"""Measure how well a model predicts a text, and how far it is from a reference model (KL divergence, agreement).

The text is cut into windows of N - 1 ids that do not overlap, the last one taking what is left; BOS is put before each.
So every id of the text is predicted exactly once, from BOS and the ids before it in its window. Where the model puts no
BOS in front of a text, a window begins with the last id of the one before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

from npllama.commands.terminal import Notes, add_execution, add_model, execution, load_model, model_of, put, whole
from npllama.errors import NpllamaError

NAME = "perplexity"
SUMMARY = "measure the quality of a model on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama perplexity`."""
    add_model(parser, "a model directory or a checkpoint (default: the demo model)")
    add = parser.add_argument
    add("-f", "--file", metavar="FILE", required=True, help="the text, in UTF-8; line ends count as they are")
    add("--reference", metavar="MODEL", help="the same model in another number format, to compare with")
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=whole(2, 2**31),
        default=256,
        help="ids in a window, BOS included (default 256)",
    )
    add_execution(parser)
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Open one or two models, measure, print the figures with the protocol."""
    from npllama.measure.quality import begins_with_bos, quality

    text = _read(args.file)
    options = {**execution(args), "context": args.ctx_size}
    with ExitStack() as stack:
        llama = stack.enter_context(load_model(notes, model_of(args), **options))
        options["kv_dtype"] = "f32"
        given = args.reference is not None
        reference = stack.enter_context(load_model(notes, args.reference, **options)) if given else None
        notes.show()
        found = quality(llama, text, args.ctx_size, reference)
        begin = "BOS first, every id of the text" if begins_with_bos(llama) else "every id of the text but the first"
    if args.json:
        put(json.dumps(dataclasses.asdict(found), allow_nan=False) + "\n")
        return 0
    one = "" if found.n_tokens == 1 else "s"
    put(f"{found.n_tokens} prediction{one} in windows of {found.n_ctx} ids, {begin} once\n")
    error = "" if found.perplexity_error is None else f" +/- {found.perplexity_error:.4f}"
    put(f"perplexity       {found.perplexity:.4f}{error}\n")
    if found.reference_perplexity is not None:
        change = 100 * (found.perplexity / found.reference_perplexity - 1)
        put(f"reference        {found.reference_perplexity:.4f} ({change:+.3f} %)\n")
        put(f"KL divergence    {found.kl_divergence:.6f}\n")
        put(f"top-1 agreement  {100 * (found.top_1_agreement or 0.0):.2f} %\n")
    return 0


def _read(name: str) -> str:
    """A text file as it is, line ends too; a byte order mark is no part of the text."""
    try:
        return Path(name).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        if not isinstance(error, UnicodeDecodeError):  # a ValueError: no path holds a NUL
            raise NpllamaError(
                f"{name}: cannot be read ({getattr(error, 'strerror', error)}); -f needs a text file in UTF-8."
            ) from error
        raise NpllamaError(
            f"{name}: is not text in UTF-8 ({error.reason} at byte {error.start}); convert it, for example with iconv."
        ) from error
