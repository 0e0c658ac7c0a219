"""What the commands share about the terminal: output, remarks, a progress line, and kinds of arguments."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from npllama.errors import UsageError

if TYPE_CHECKING:
    from npllama.inference import Llama

REDRAW_S = 0.1
MARK = "\0"
"""What the command line puts before a value that is text, so that argparse does not read it: no argument holds it."""


def put(text: str) -> None:
    """Write to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Write a line to stderr, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Wait:
    """A line that announces a wait; on a terminal the seconds are counted behind it until the wait is over."""

    def __init__(self, line: str) -> None:
        self._over = threading.Event()
        self._counting = sys.stderr.isatty()
        if not self._counting:
            say(line)
            return
        self._thread = threading.Thread(target=self._count, args=(line, time.monotonic()), daemon=True)
        self._thread.start()

    def _count(self, line: str, started: float) -> None:
        while True:
            sys.stderr.write(f"\r{line} {time.monotonic() - started:.0f} s")
            sys.stderr.flush()
            if self._over.wait(1.0):
                return

    def end(self) -> None:
        """The wait is over: the next line begins a new one."""
        self._over.set()
        if self._counting:
            self._thread.join()
            say("")


class Notes(logging.Handler):
    """What the library logs, as plain lines on stderr.

    Remarks are held until the command has got somewhere, because a failure is to be one line, the one that says what
    to do. A line that ends in "..." announces a wait and comes at once.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._held: list[str] = []
        self._holding = True
        self._wait: Wait | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, line: str) -> None:
        """Take one line."""
        self.end_wait()
        if line.endswith("..."):
            self._wait = Wait(line)
        elif self._holding:
            self._held.append(line)
        else:
            say(line)

    def end_wait(self) -> None:
        """The wait that was announced last is over."""
        if self._wait is not None:
            self._wait.end()
            self._wait = None

    def show(self) -> None:
        """Show what was held; from here on lines come at once."""
        self.end_wait()
        self._holding = False
        while self._held:
            say(self._held.pop(0))

    def __enter__(self) -> Notes:
        log = logging.getLogger("npllama")
        self._before = log.level, log.propagate
        log.addHandler(self)
        log.setLevel(logging.INFO)
        log.propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_wait()
        log = logging.getLogger("npllama")
        log.removeHandler(self)
        log.level, log.propagate = self._before


class ProgressLine:
    """Share, rate and time left on one line of a terminal, redrawn; nothing where stderr is not a terminal."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._shown = sys.stderr.isatty()
        self._started = time.monotonic()
        self._drawn = -REDRAW_S

    def __call__(self, done: int, total: int, what: str) -> None:
        """done of total bytes; what is being worked on."""
        elapsed = self.due()
        if elapsed is None:
            return
        rate = done / max(elapsed, 1e-6)
        left = (total - done) / max(rate, 1.0)
        line = (
            f"{self._doing} {100 * done // max(total, 1)} % of {total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, "
            f"{left // 60:.0f}:{left % 60:02.0f} left, {what}"
        )
        self.draw(line)

    def due(self) -> float | None:
        """Seconds since the start, where the line is to be drawn now; else None."""
        elapsed = time.monotonic() - self._started
        if not self._shown or elapsed - self._drawn < REDRAW_S:
            return None
        self._drawn = elapsed
        return elapsed

    def draw(self, line: str) -> None:
        """Draw a line in the place of the one before."""
        self._draw(line[: shutil.get_terminal_size().columns - 1])

    def hide(self) -> None:
        """Make room for other output."""
        if self._drawn >= 0:
            self._draw("")

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()

    def _draw(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def whole(least: int, largest: int = 2**64 - 1) -> Callable[[str], int]:
    """A type of argument: whole numbers from least to largest."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {largest}")
        return value

    return parse


class Choices:
    """The values that an argument may have, asked for when one is checked or help is shown: no import before."""

    def __init__(self, find: Callable[[], Iterable[str]]) -> None:
        self._find = find

    def __iter__(self) -> Iterator[str]:
        return iter(self._find())

    def __contains__(self, value: object) -> bool:
        return value in tuple(self._find())


def number_formats() -> list[str]:
    """Every number format of weights."""
    from npllama.numbers import FORMATS

    return list(FORMATS)


def quantized_formats() -> list[str]:
    """The number formats that `quantize` makes."""
    from npllama.numbers import FORMATS

    return [name for name, number_format in FORMATS.items() if number_format.quantized]


def cache_formats() -> tuple[str, ...]:
    """The number formats of keys and values."""
    from npllama.cache import KV_DTYPES

    return KV_DTYPES


def text(argument: str) -> str:
    """A type of argument: text, which may begin with a dash."""
    return argument.removeprefix(MARK)


def add_model(parser: argparse.ArgumentParser, help: str) -> None:
    """The model of a command: its first argument, or -m."""
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help=help)
    parser.add_argument("-m", "--model", metavar="MODEL", help="the same")


def add_out(parser: argparse.ArgumentParser) -> None:
    """The model directory that a command makes."""
    parser.add_argument("out", metavar="OUT", help="the model directory to make")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")


def add_dtype(
    parser: argparse.ArgumentParser, formats: Callable[[], Iterable[str]], note: str, default: str | None = None
) -> None:
    """The number format of weights."""
    choices = Choices(formats)
    what = f"number format{note}"
    parser.add_argument("--dtype", metavar="FORMAT", choices=choices, default=default, help=what)


def size(argument: str) -> int:
    """A type of argument: bytes, as 800000000, 800M, 1.5G (10^9) or 2GiB (2^30)."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([KMGT])(i?))?B?", argument, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a size, such as 800M, 1.5G or 2GiB")
    number, letter, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((letter or " ").upper()))


def add_execution(parser: argparse.ArgumentParser) -> None:
    """How a model is run: its cache, texts at once, threads, backend."""
    add_kv_dtype(parser)
    parser.add_argument(
        "--kv-memory", metavar="SIZE", type=size, help="memory for keys and values, such as 800M or 2G (default: for "
        "as many full contexts as --parallel says, at most half of what is free)"
    )  # fmt: skip
    parser.add_argument("--parallel", metavar="N", type=whole(1, 1024), help="texts at once, at most (default 8)")
    parser.add_argument("-t", "--threads", metavar="N", type=whole(1, 4096), help="threads (default: see npllama info)")
    add_backend(parser)


def execution(args: argparse.Namespace) -> dict[str, Any]:
    """What these arguments mean to npllama.load."""
    names = ("kv_dtype", "kv_memory", "parallel", "threads", "backend")
    return {name: getattr(args, name) for name in names}


def add_backend(parser: argparse.ArgumentParser) -> None:
    """NumPy or compiled."""
    names = ("auto", "numpy", "numba")
    parser.add_argument("--backend", choices=names, default="auto", help="NumPy or compiled (default: auto)")


def add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    """The number format of the cache."""
    parser.add_argument(
        "--kv-dtype",
        metavar="FORMAT",
        choices=Choices(cache_formats),
        default="f32",
        help="format of keys and values kept: %(choices)s (default f32)",
    )


def load_model(notes: Notes, model: str | None, **options: Any) -> Llama:
    """npllama.load, with a progress line while a checkpoint is exported."""
    from npllama.inference import load

    with ProgressLine("exporting") as line:

        def progress(done: int, total: int, what: str) -> None:
            notes.end_wait()
            line(done, total, what)

        return load(model, progress=progress, **options)


def model_of(args: argparse.Namespace) -> str | None:
    """The model that was asked for; None for none."""
    if args.model is not None and args.model_argument is not None:
        raise UsageError(f"two models were given, {args.model_argument} and -m {args.model}; one is needed.")
    model: str | None = args.model_argument if args.model is None else args.model
    return model
