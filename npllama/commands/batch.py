"""Continue many texts at once: JSON objects, one a line, in; one a line out (`npllama generate --jsonl`).

A line has a "prompt" (text, or a list of ids), or "ids", and any option of `Llama.stream` by its name; what else it has
comes back as it is. A line that cannot be answered gets an object with "error" and its number; the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

from npllama.commands.forms import more_of
from npllama.commands.terminal import Notes, ProgressLine, put, say
from npllama.errors import NpllamaError, UsageError
from npllama.options import MoreOptions

if TYPE_CHECKING:
    from npllama.inference import Handle, Llama

MAX_LINES = 1024
"""Lines that have been read and not yet been answered, or wait for the answer to an earlier one."""

MAX_LINE_BYTES = 1 << 26
MAX_DIGITS = 20  # of a seed
ANSWERS = ("text", "tokens", "finish_reason", "usage", "seed", "overruled", "error", "line")
"""Keys of an answer: a line cannot use them for its own."""

NOT_IN_A_LINE = {
    "n": "a line has one answer; write it once for each, with a seed of its own",
    "progress": "it is a function, and JSON has none",
    "logits_processor": "it is a function, and JSON has none",
}
"""Options of a call that a line does not take, and why."""

ALIASES = {"max_new_tokens": "max_tokens", "repetition_penalty": "repeat_penalty"}
ID = re.compile("0|[1-9][0-9]{0,8}")
FAILED, INTERRUPTED = 1, 130


@dataclass(eq=False)
class Line:
    """A line under way: its number, where it ends in the file, what it brought along, and its text or its error."""

    number: int
    end: int
    own: dict[str, object] = field(default_factory=dict)
    handle: Handle | None = None
    error: NpllamaError | None = None

    @property
    def done(self) -> bool:
        return self.handle is None or self.handle.done()

    def answer(self) -> dict[str, object]:
        """The object that is written for it."""
        try:
            if self.error is not None or self.handle is None:
                raise self.error or UsageError("the line was not read.")
            result = self.handle.result()
        except NpllamaError as error:
            self.error = error
            return {**self.own, "line": self.number, "error": str(error)}
        u = result.usage
        usage = {"prompt_tokens": u.prompt_tokens, "completion_tokens": u.completion_tokens}
        usage |= {"total_tokens": u.total_tokens, "cached_tokens": u.cached_tokens}
        answer = {"text": result.text, "tokens": result.tokens, "finish_reason": result.finish_reason}
        return {**self.own, **answer, "usage": usage, "seed": result.seed, **more_of(result)}


Event = tuple[int, int, bytes] | Line | OSError | NpllamaError | None
"""A line that was read (its number, where it ends, its bytes), one that is answered, why none can be read, the end."""


class Batch:
    """Lines of a file, answered in order, or as they finish."""

    def __init__(self, llama: Llama, file: IO[bytes], defaults: dict[str, Any], ordered: bool) -> None:
        self._llama, self._file, self._defaults, self._ordered = llama, file, defaults, ordered
        import inspect  # here, because it imports much, and every command imports this module

        parameters = {*inspect.signature(type(llama).stream).parameters, *MoreOptions.__annotations__}
        self._options = parameters - {"self", "prompt", "more", *NOT_IN_A_LINE}
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._free = threading.Semaphore(MAX_LINES)
        self._lines: deque[Line] = deque()  # that have no answer yet
        self._started = time.monotonic()
        self.n_answers = self.n_errors = self.n_tokens = self.end = 0

    def run(self, progress: BatchProgress) -> bool:
        """Answer all lines; False when Ctrl-C ended it: then what is done has been written."""
        threading.Thread(target=self._read, name="npllama-jsonl", daemon=True).start()
        reading = True
        try:
            while reading or self._lines:
                event = self._events.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    reading = False
                elif isinstance(event, tuple):
                    self._begin(*event)
                self._write(progress)
        except KeyboardInterrupt:
            for line in self._lines:
                if line.handle is not None and not line.done:
                    line.handle.cancel()
                elif line.handle is not None or line.error is not None:  # else Ctrl-C came before it was begun
                    self._put(line, progress)
            return False
        return True

    def _read(self) -> None:
        """Read lines as others are answered: in a thread, so that answers come while a pipe says nothing."""
        try:
            end = 0
            for number, line in enumerate(_lines(self._file), 1):
                end += len(line) + 1
                self._free.acquire()
                self._events.put((number, end, line))
        except (OSError, NpllamaError) as error:
            self._events.put(error)
        self._events.put(None)

    def _begin(self, number: int, end: int, data: bytes) -> None:
        """Begin to answer a line; empty ones have no answer."""
        if not data.strip():
            self._free.release()
            return
        line = Line(number, end)
        self._lines.append(line)
        try:
            prompt, options = self._parsed(line, data)
            line.handle = self._llama.submit(prompt, **options)
        except NpllamaError as error:
            line.error = error
        else:
            line.handle.add_done_callback(lambda _: self._events.put(line))

    def _parsed(self, line: Line, data: bytes) -> tuple[Any, dict[str, Any]]:
        """The prompt and the options of a line; what else it has is kept with it."""
        from npllama.system.strict_json import parse_object

        found = parse_object(data, MAX_LINE_BYTES, max_digits=MAX_DIGITS)
        own = {key: value for key, value in found.items() if key not in self._options | {"prompt", "ids"}}
        if refused := [key for key in NOT_IN_A_LINE if key in found]:
            raise UsageError(f"{refused[0]!r} is no option of a line: {NOT_IN_A_LINE[refused[0]]}.")
        if taken := [key for key in ANSWERS if key in own]:
            raise UsageError(f"{taken[0]!r} is a key of the answer; call it otherwise.")
        line.own = own
        prompts = [found[key] for key in ("prompt", "ids") if key in found]
        if len(prompts) != 1:
            raise UsageError(f'{len(prompts)} prompts; a line needs one, as "prompt" or as "ids".')
        given = {key: value for key, value in found.items() if key in self._options}
        if isinstance(biases := given.get("logit_bias"), dict):  # keys of JSON are text
            given["logit_bias"] = {int(key) if ID.fullmatch(key) else key: bias for key, bias in biases.items()}
        named = {ALIASES.get(key, key) for key in given}
        return prompts[0], {**{k: v for k, v in self._defaults.items() if k not in named}, **given}

    def _write(self, progress: BatchProgress) -> None:
        """Write the answers that there are: in order, up to the first that is missing; or all."""
        if self._ordered:
            while self._lines and self._lines[0].done:
                self._put(self._lines.popleft(), progress)
            return
        for line in [line for line in self._lines if line.done]:
            self._lines.remove(line)
            self._put(line, progress)

    def _put(self, line: Line, progress: BatchProgress) -> None:
        answer = line.answer()
        progress.hide()
        put(json.dumps(answer, ensure_ascii=False) + "\n")
        self.n_answers += 1
        self.n_errors += line.error is not None
        self.n_tokens += line.handle.so_far.usage.completion_tokens if line.handle is not None else 0
        self.end = max(self.end, line.end)
        self._free.release()
        progress.show(self.n_answers, self.n_tokens, self.end)

    @property
    def summary(self) -> str:
        """What was done, in a line."""
        seconds = max(1e-9, time.monotonic() - self._started)
        return (
            f"{counted(self.n_answers, 'line')}, {counted(self.n_errors, 'error')} · "
            f"generated {counted(self.n_tokens, 'token')}, {self.n_tokens / seconds:,.0f}/s"
        )


def counted(n: int, what: str) -> str:
    """ "1 line", "2 lines"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, without a lock that a thread would hold while it waits for more."""
    rest = b""
    while chunk := file.read(1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > MAX_LINE_BYTES:
            raise NpllamaError(f"a line has more than {MAX_LINE_BYTES >> 20} MB; --jsonl needs one JSON object a line.")
    if rest:
        yield rest


class BatchProgress(ProgressLine):
    """How far the lines are, on a terminal. size: of the file in bytes, 0 where it is not known."""

    def __init__(self, size: int) -> None:
        super().__init__("generating")
        self._size = size

    def show(self, n_lines: int, n_tokens: int, end: int) -> None:
        """So many lines are answered, which end there in the file."""
        elapsed = self.due()
        if elapsed is None:
            return
        line = f"{counted(n_lines, 'line')}, {n_tokens / max(elapsed, 1e-6):,.0f} tokens/s"
        if self._size:
            left = elapsed * (self._size - min(end, self._size)) / max(end, 1)
            line += f", {100 * min(end, self._size) // self._size} %, {left // 60:.0f}:{left % 60:02.0f} left"
        self.draw(line)


@contextlib.contextmanager
def opened(name: str) -> Iterator[tuple[IO[bytes], int]]:
    """The file of lines without a buffer, and its size; 0 for a pipe. "-" is stdin."""
    if name == "-":
        if sys.stdin is None:
            raise NpllamaError("stdin: is closed, and lines are read from it; open it, or give a file with -f.")
        buffer = sys.stdin.buffer
        yield getattr(buffer, "raw", buffer), 0
        return
    with open(name, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        yield file, status.st_size if stat.S_ISREG(status.st_mode) else 0


def source_of(args: argparse.Namespace) -> str | None:
    """The file of lines for --jsonl, "-" for stdin; None for one prompt."""
    if not args.jsonl:
        if args.unordered:
            raise UsageError("--unordered is for many texts; give --jsonl with it.")
        return None
    for option in ("json", "escape", "session"):
        if getattr(args, option):
            raise UsageError(f"--jsonl and --{option} do not go together; leave one out.")
    if args.prompt or args.prompt_argument not in (None, "-") or len(args.file) > 1:
        raise UsageError("--jsonl reads its prompts from one file, -f FILE, or from stdin; leave other prompts out.")
    if not args.file and args.prompt_argument is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("--jsonl needs lines; give them with -f FILE, or through stdin.")
    return args.file[0] if args.file else "-"


def run(llama: Llama, name: str, defaults: dict[str, Any], ordered: bool, notes: Notes) -> int:
    """Answer the lines of a file: 0, 1 where a line was wrong, 130 after Ctrl-C."""
    with opened(name) as (file, size):
        batch, progress = Batch(llama, file, defaults, ordered), BatchProgress(size)
        notes.show()
        with progress:
            complete = batch.run(progress)
    say(batch.summary if complete else f"interrupted: {batch.summary}")
    return INTERRUPTED if not complete else FAILED if batch.n_errors else 0
