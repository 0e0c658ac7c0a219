"""Texts that a command is given: as an argument, from a file, or from stdin."""

from __future__ import annotations

import argparse
import codecs
import re
import sys

from npllama.commands.terminal import text
from npllama.errors import NpllamaError, UsageError

PROMPTS = {"-p": "--prompt", "--prompt": "--prompt"}
"""Options whose value is text, also where it begins with a dash, and their long names."""


def add_text(parser: argparse.ArgumentParser) -> None:
    """The options that give the text instead of the first argument."""
    add = parser.add_argument
    add(
        "-p",
        "--prompt",
        metavar="PROMPT",
        type=text,
        action="append",
        default=[],
        help='the same as PROMPT; may be empty: ""',
    )
    add(
        "-f", "--file", metavar="FILE", action="append", default=[], help="read the prompt from a file in UTF-8 "
        "(without its last line end)"
    )  # fmt: skip


def prompt_of(args: argparse.Namespace) -> str:
    """The one prompt: an argument, a file, or stdin. Raises UsageError for two."""
    texts = [given for given in (args.prompt_argument, *args.prompt) if given is not None]
    if len(texts) + len(args.file) > 1:
        raise UsageError("two prompts were given; one is needed: PROMPT, or -p PROMPT, or -f FILE.")
    if args.file and args.file[0] != "-":
        return decoded(of_a_file(read_file(args.file[0])), args.file[0], args.escape)
    if texts and texts[0] != "-":
        return decoded(argument_bytes(texts[0]), "the prompt", args.escape)
    if not texts and not args.file and (sys.stdin is None or sys.stdin.isatty()):
        return ""
    return decoded(of_a_file(read_stdin()), "stdin", args.escape)


def argument_bytes(argument: str) -> bytes:
    """The bytes of an argument, which Python hands over as surrogates where the locale is not UTF-8."""
    return argument.encode("utf-8", "surrogateescape")


def read_stdin() -> bytes:
    """All of stdin."""
    if sys.stdin is None:
        raise NpllamaError("stdin: is closed, and the prompt - is read from it; open it, or give the prompt with -p.")
    data = sys.stdin.buffer.read()
    if data is None:  # a pipe in non-blocking mode, to which nothing was written yet
        raise NpllamaError(
            "stdin: does not wait for what is not there yet; open it blocking, or give the prompt with -p."
        )
    return data


def read_file(name: str) -> bytes:
    """All of a file that was named."""
    try:
        with open(name, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: no path holds a NUL
        raise NpllamaError(
            f"{name}: cannot be read ({getattr(error, 'strerror', error)}); -f needs a text file in UTF-8. Check the "
            f"path, or give the text itself with -p."
        ) from error


def of_a_file(data: bytes) -> bytes:
    """Without what is no text: the mark (BOM) that editors begin UTF-8 with, and the line end that they end it with."""
    data = data.removeprefix(codecs.BOM_UTF8)
    return data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data


def decoded(data: bytes, name: str, escape: bool) -> str:
    """Text of UTF-8 bytes, its escapes read first if asked."""
    data = unescaped(data) if escape else data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise NpllamaError(
            f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8, which text must be"
            f"{' (it looks like UTF-16)' if wide else ''}; convert it, for example with iconv."
        ) from error


ESCAPE = re.compile(rb"\\(?:([nrt'\"\\])|x([0-9A-Fa-f]{2}))")
ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def unescaped(data: bytes) -> bytes:
    """Bytes with \\n \\r \\t \\' \\" \\\\ and \\xHH as what they stand for; any other backslash stays.

    Source: string_process_escapes of llama.cpp.
    """

    def meant(found: re.Match[bytes]) -> bytes:
        letter, digits = found.groups()
        return bytes([int(digits, 16)]) if letter is None else ESCAPED.get(letter, letter)

    return ESCAPE.sub(meant, data)
