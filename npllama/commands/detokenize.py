"""Show the text of ids, which are arguments or come from stdin."""

from __future__ import annotations

import argparse
import re
import sys

from npllama.commands.terminal import Notes, put
from npllama.commands.texts import decoded, read_stdin
from npllama.commands.tokenize import piece_text
from npllama.errors import UsageError, quote

NAME = "detokenize"
SUMMARY = "show the text of ids"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama detokenize`."""
    add = parser.add_argument
    add("ids", metavar="ID", nargs="*", help="ids, separated by spaces or commas; without any they come from stdin")
    add("-m", "--model", metavar="MODEL", help="a model directory or a checkpoint (default: the demo model)")
    add("--special", action="store_true", help="show control tokens by their names")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Decode, and print the text and a line end."""
    from npllama.inference import DEMO
    from npllama.store.direct import open_text_side

    ids = _ids(args)
    tokenizer = open_text_side(DEMO if args.model is None else args.model).tokenizer
    text = tokenizer.decode(ids)
    if args.special:
        text, begin = "", 0
        for at, token in enumerate([*ids, None]):
            if token is None or token in tokenizer.control_ids:
                text += tokenizer.decode(ids[begin:at])
                text += "" if token is None else piece_text(tokenizer, token)
                begin = at + 1
    notes.show()
    put(text + "\n")
    return 0


def _ids(args: argparse.Namespace) -> list[int]:
    """The ids that are given. Raises UsageError for what is no list of numbers."""
    given = " ".join(args.ids)
    if not args.ids:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no ids were given; name them, or pipe them in: npllama tokenize --ids TEXT | ...")
        given = decoded(read_stdin(), "stdin", False)
    words = re.findall(r"[^\s,\[\]]+", given)
    for word in words:
        if not re.fullmatch("[0-9]{1,9}", word):
            raise UsageError(
                f"{quote(word)} is no id; whole numbers from 0 on are needed, as 'npllama tokenize' shows."
            )
    return [int(word) for word in words]
