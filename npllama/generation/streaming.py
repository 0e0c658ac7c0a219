"""Text while it is generated: each id's share of the text as soon as it is certain, and stop strings.

Whatever the ids and however a text is cut into pieces, the pieces add up: `StreamDecoder`'s to the decoding of all ids,
`StopStrings`' to the text before the first stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from npllama.errors import UsageError, quote
from npllama.text.sentencepiece import BREAK, Tokenizer, bytes_of, replace_bad_bytes

_Utf8 = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Decode ids one at a time; what all pushes and finish return is `tokenizer.decode` of all ids, for any ids.

    Only the beginning of a character is held back (at most three bytes), so a push takes the same time however
    long the text is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._at_start = True
        self._held = False
        self._utf8 = _Utf8("surrogateescape")

    def push(self, token: int) -> str:
        """The text that is certain now and was not before, perhaps empty. Raises UsageError for an id out of range."""
        piece = self._tokenizer.piece(token)
        if self._at_start:
            piece, self._at_start = self._tokenizer.first_piece(token)
        if "\udc80" <= piece <= "\udcff":  # one byte of a character beyond ASCII
            self._held = True
            return replace_bad_bytes(self._utf8.decode(bytes_of(piece)))
        if piece == BREAK:
            piece = ""
        return self._flush() + piece if self._held else piece

    def finish(self) -> str:
        """What was held back; the next push starts another text."""
        text = self._flush()
        self._at_start = True
        return text

    def _flush(self) -> str:
        """The bytes of a character that was not completed: U+FFFD each."""
        self._held = False
        return replace_bad_bytes(self._utf8.decode(b"", final=True))


def stop_texts(stops: str | Iterable[str] | None) -> tuple[str, ...]:
    """One stop string, several, or None for none, as a tuple. Raises UsageError for what is empty or no string."""
    if stops is None:
        return ()
    found = (stops,) if isinstance(stops, str) or not isinstance(stops, Iterable) else tuple(stops)
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
