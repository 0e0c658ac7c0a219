"""Show how probable continuations of a prompt are, the most probable first; the prompt is read once.

With --tokens each of their tokens too. Log probabilities are natural logarithms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

from npllama.commands.terminal import Notes, add_execution, execution, load_model, put, text, whole
from npllama.commands.texts import argument_bytes, decoded
from npllama.errors import UsageError

NAME = "score"
TEXTS = {"-p": "--prompt", "--prompt": "--prompt"}
SUMMARY = "show how probable continuations of a prompt are"
NORMALIZATIONS = ("none", "tokens", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama score`."""
    add = parser.add_argument
    add("continuations", metavar="CONTINUATION", nargs="*", help="a text that may follow the prompt")
    add("-m", "--model", metavar="MODEL", help="a model directory or a checkpoint (default: the demo model)")
    add("-p", "--prompt", metavar="PROMPT", type=text, required=True, help='what comes before; may be empty: ""')
    add(
        "--normalize",
        choices=NORMALIZATIONS,
        default="none",
        help="rank by log probability, or by that per token or byte",
    )
    add("--tokens", action="store_true", help="show each token of the continuations")
    add("-c", "--ctx-size", metavar="N", type=whole(1, 2**31), help="context in tokens")
    add_execution(parser)
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Score, and print a line for each continuation."""
    prompt = decoded(argument_bytes(args.prompt), "--prompt", False)
    options = [decoded(argument_bytes(one), "a continuation", False) for one in args.continuations]
    if not options:
        raise UsageError("no continuation was given; one or more are needed behind -p PROMPT.")
    how = {**execution(args), "context": args.ctx_size}
    with load_model(notes, args.model, **how) as llama:
        found = llama.rank(prompt, options, args.normalize)
        pieces = {i: llama.tokenizer.piece(i).decode("utf-8", "replace") for one in found for i in one.score.tokens}
    notes.show()
    if args.json:
        put(
            json.dumps(
                [
                    {**dataclasses.asdict(one.score), "text": one.option, "index": one.index, "value": one.value}
                    for one in found
                ],
                ensure_ascii=False,
            )
            + "\n"
        )
        return 0
    for one in found:
        score = one.score
        put(f"{score.logprob:12.4f}  {math.exp(score.logprob):.3e}  {json.dumps(one.option, ensure_ascii=False)}\n")
        if args.tokens:
            for token, logprob in zip(score.tokens, score.logprobs, strict=True):
                put(f"    {logprob:12.4f}  {token:>6}  {json.dumps(pieces[token], ensure_ascii=False)}\n")
    return 0
