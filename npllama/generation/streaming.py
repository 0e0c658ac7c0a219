"""Stop strings: a text that comes in pieces, cut before the first of them.

However the text is cut into pieces, those that are given back add up to the text before the first stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from npllama.errors import UsageError, quote


def stop_texts(stops: str | Iterable[str] | None) -> tuple[str, ...]:
    """One stop string, several, or None for none, as a tuple. Raises UsageError for what is empty or no string."""
    if stops is None:
        return ()
    alone = isinstance(stops, (str, Mapping)) or not isinstance(stops, Iterable)
    found: tuple[Any, ...] = (stops,) if alone else tuple(stops)
    for stop in found:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"stop={quote(stop)}: needs text of at least one character; leave it out to stop nowhere.")
    return found


class StopStrings:
    """Cut a text that comes in pieces before its first stop string, the one that begins earliest, however it is cut.

    Text that may yet turn out to be a stop string is held back. Raises UsageError for a stop string that is empty or no
    string.
    """

    def __init__(self, stops: str | Iterable[str] | None = None) -> None:
        self._stops = stop_texts(stops)
        self._text = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(the text that is certain to come before any stop string, whether the text ends here)."""
        if not self._stops:
            return text, False
        self._text += text
        match = self._first_match()
        certain = self._first_beginning(match)
        self.stopped = certain == match < len(self._text)
        emitted, self._text = self._text[:certain], self._text[certain:]
        return emitted, self.stopped

    def finish(self) -> str:
        """What was held back, when nothing follows; `stopped` then says whether a stop string came after all."""
        match = self._first_match()
        self.stopped = match < len(self._text)
        emitted, self._text = self._text[:match], ""
        return emitted

    def _first_match(self) -> int:
        """Where the first complete stop string begins; the end of the text if there is none."""
        found = (self._text.find(stop) for stop in self._stops)
        return min((start for start in found if start >= 0), default=len(self._text))

    def _first_beginning(self, match: int) -> int:
        """Where, before match, the text's end first is the beginning of a stop string; else match."""
        n = len(self._text)
        first = match
        for stop in self._stops:
            start = self._text.find(stop[0], max(0, n - len(stop) + 1), first)
            while start >= 0 and not stop.startswith(self._text[start:]):
                start = self._text.find(stop[0], start + 1, first)
            first = start if start >= 0 else first
        return first
