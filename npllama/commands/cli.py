"""The command line: which commands there are, and how a command ends.

Only this module and the modules of commands/ print. A command gets its arguments and returns an exit code:
0; 1 for an expected failure (one line on stderr); 2 for wrong usage; 130 after Ctrl-C; 0 when the reader of the
output has gone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from npllama.commands import (
    bench,
    detokenize,
    export,
    generate,
    info,
    models,
    perplexity,
    quantize,
    tokenize,
    verify,
    warmup,
)
from npllama.commands.dialog import chat
from npllama.commands.scoring import embed, score
from npllama.commands.terminal import MARK, Notes, say
from npllama.errors import NpllamaError, UsageError
from npllama.version import __version__

COMMANDS = (
    *(generate, chat, export, info, models, quantize),
    *(tokenize, detokenize, score, embed, bench, perplexity, verify, warmup),
)
"""Each has NAME, SUMMARY, add_arguments(parser) and run(args, notes) -> exit code."""

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (argv None: the process's own arguments); returns its exit code."""
    _prepare_streams()
    with Notes() as notes:
        try:
            code = _run(argv, notes)
            sys.stdout.flush()
        except SystemExit as exit:  # argparse: 0 after --help and --version
            code = exit.code if isinstance(exit.code, int) else FAILED
        except BrokenPipeError:
            code = 0
        except KeyboardInterrupt:
            code = INTERRUPTED
        except UsageError as error:
            code = _fail(WRONG_USAGE, str(error))
        except NpllamaError as error:
            code = _fail(FAILED, str(error))
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            code = _fail(FAILED, f"{where}{error.strerror or error}; check the path, its permissions and free space.")
        except MemoryError:
            code = _fail(FAILED, "the memory does not suffice; use a smaller model or context, or free some.")
        except ModuleNotFoundError as error:
            code = _fail(FAILED, f"the package {error.name} is needed and not installed; run: pip install {error.name}")
    return code if _settle_streams() else code or FAILED


class Parser(argparse.ArgumentParser):
    """A parser, its commands' included, whose errors are one line like all others, without the list of all options.

    texts: options of a command whose value is taken as it is; argparse would take "---" for an option, and lose a "--".
    None for the parser of all commands, which leaves their arguments to them.
    """

    texts: Mapping[str, str] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, once the values of text options are marked as such."""
        if self.texts is None:
            return super().parse_known_args(args, namespace)
        marked = _marked(args, self.texts, self._option_string_actions)
        if lost := [arg for arg in marked if re.fullmatch("-[a-z]=?--|--[a-z-]+=--", arg)]:
            self.error(f"{lost[0]}: -- is no value")
        return super().parse_known_args(marked, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help tells what can be given.")


def _marked(args: Sequence[str], texts: Mapping[str, str], options: Collection[str]) -> list[str]:
    """Arguments with "--stop", "---" and "--stop=---" as "--stop=", MARK, "---" in one, for each option of texts.

    Behind "--" nothing is an option.
    """
    found, rest = [], list(args)
    while rest and rest[0] != "--":
        arg = rest.pop(0)
        if arg in options and arg not in texts:  # -jf is not -j with the value f
            found.append(arg)
            continue
        option, joined, value = arg.partition("=") if arg.startswith("--") else (arg[:2], arg[2:], arg[2:])
        if option in texts and (joined or rest):
            value = value if arg.startswith("--") else value.removeprefix("=")
            arg = f"{texts[option]}={MARK}{value if joined else rest.pop(0)}"
        found.append(arg)
    return found + rest


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="npllama",
        description="LLaMA 2 in NumPy, or compiled by Numba with a kernel in place of each step. Without -m, commands "
        "use the demo model that ships inside.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"npllama {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        one = commands.add_parser(command.NAME, help=command.SUMMARY, description=command.__doc__, allow_abbrev=False)
        command.add_arguments(one)
        one.texts = getattr(command, "TEXTS", {})
        one.set_defaults(run=command.run, parser=one)
    return parser


def _run(argv: Sequence[str] | None, notes: Notes) -> int:
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    if "run" not in args:
        if extra:
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    if extra:
        hint = " (text of several words needs quotation marks)"
        if extra[0].startswith("-"):
            option = re.match("--?[a-z]{2}", extra[0]) or not args.parser.texts
            hint = "" if option else " (text that begins with a dash is given as -p TEXT)"
        args.parser.error(f"unrecognized arguments: {' '.join(extra)}{hint}")
    code: int = args.run(args, notes)
    notes.show()
    return code


def _fail(code: int, message: str) -> int:
    """Say on one line why a command ends."""
    with suppress(OSError):  # nobody reads it: the exit code tells
        say("npllama: " + " ".join(message.split()))
    return code


def _prepare_streams() -> None:
    """Text is UTF-8 whatever the locale says, and a stream that the caller closed swallows what is written to it.

    Bytes of a path that are no UTF-8 are shown as \\udcXX, which is how JSON spells them too.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _settle_streams() -> bool:
    """Write out what is buffered, or drop it where that fails: Python would try again at exit, and complain.

    False where output is lost for another reason than a reader that has gone.
    """
    complete = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            complete = complete and isinstance(error, BrokenPipeError)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return complete
