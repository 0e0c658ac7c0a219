"""Lines that a person types, with editing and history where there is a terminal, or that come through a pipe."""

from __future__ import annotations

import contextlib
import os
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from npllama.errors import UsageError

MAX_HISTORY = 1000
BLOCK = '"""'


def history_file() -> Path | None:
    """Where lines are remembered: NPLLAMA_HISTORY, else below XDG_STATE_HOME or ~/.local/state; None: nowhere."""
    own = os.environ.get("NPLLAMA_HISTORY")
    if own is not None:
        return Path(own) if own else None
    state = os.environ.get("XDG_STATE_HOME")
    try:
        folder = Path(state) if state else Path.home() / ".local" / "state"
    except RuntimeError:  # no home
        return None
    return folder / "npllama" / "history"


class LineEditor:
    """Reads texts of one line or several. Used in a with block, which keeps the history.

    interactive: a person types, and is shown prompts.
    """

    def __init__(self, source: TextIO | None, sink: TextIO | None) -> None:
        self._source = source
        if isinstance(source, TextIOWrapper):  # bytes that are not UTF-8 are refused line by line, by `checked`
            source.reconfigure(encoding="utf-8", errors="surrogateescape")
        self.interactive = bool(source is not None and source.isatty() and sink is not None and sink.isatty())
        self._readline = _readline() if self.interactive else None
        self._history = history_file() if self._readline else None

    def __enter__(self) -> LineEditor:
        if self._readline is not None and self._history is not None:
            self._readline.set_history_length(MAX_HISTORY)
            with contextlib.suppress(OSError):  # there is none yet, or it cannot be read
                self._readline.read_history_file(self._history)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._readline is None or self._history is None:
            return
        with contextlib.suppress(OSError):  # a disk that cannot be written forgets
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            self._readline.write_history_file(self._history)

    def read(self, prompt: str) -> str | None:
        """The next text; None at the end of input. Raises UsageError for what is not UTF-8."""
        line = self._line(prompt)
        if line is None:
            return None
        if line.strip() == BLOCK:
            return self._block()
        while line.endswith("\\"):
            more = self._line(". ")
            line = line[:-1] + "\n" + (more or "")
            if more is None:
                break
        return checked(line)

    def _block(self) -> str:
        """The lines up to the next that is three quotation marks."""
        lines: list[str] = []
        while (line := self._line(". ")) is not None and line.strip() != BLOCK:
            lines.append(line)
        return checked("\n".join(lines))

    def _line(self, prompt: str) -> str | None:
        if self._source is None:
            return None
        if self.interactive:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        line = self._source.readline()
        return line.rstrip("\n").removesuffix("\r") if line else None


def checked(text: str) -> str:
    """The text, or UsageError where bytes in it were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("this line is not UTF-8, which text must be; it was left out.") from None
    return text


def _readline() -> ModuleType | None:
    """The module for editing lines, which some builds of Python lack."""
    try:
        import readline
    except ImportError:
        return None
    return readline
