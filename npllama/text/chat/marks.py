"""Marks of a chat format that are plain text: in a message they would pass for the words of another speaker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from npllama.errors import UsageError, quote
from npllama.text.chat.messages import Message

ESCAPE = "\u200b"
"""ZERO WIDTH SPACE, put behind the first character of a mark: people see the same text, the model another."""


class Escaped(NamedTuple):
    """What was escaped: the number of the message, the mark, and how often it stood there (times)."""

    message: int
    mark: str
    times: int


def without_marks(
    messages: Sequence[Message], marks: Iterable[str], escape: bool
) -> tuple[list[Message], tuple[Escaped, ...]]:
    """The messages with no mark in them, and what was escaped for that. Raises UsageError where escape is False."""
    marks = sorted(marks, key=lambda mark: (-len(mark), mark))
    cleared, escaped = [], []
    for i, (role, text) in enumerate(messages):
        for mark in marks:
            count = text.count(mark)
            if count and not escape:
                raise UsageError(
                    f"messages[{i}] holds {quote(mark)}, by which this chat format tells who speaks; leave it out, or "
                    f"have it escaped (escape=True, --escape-marks: U+200B behind its first character)."
                )
            if count:
                text = text.replace(mark, mark[0] + ESCAPE + mark[1:])
                escaped.append(Escaped(i, mark, count))
        cleared.append(Message(role, text))
    return cleared, tuple(escaped)
