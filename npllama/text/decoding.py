"""Text of ids, one id at a time: each id's share as soon as it is certain."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from npllama.text.protocol import Tokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")
_BAD_BYTE = re.compile("[\udc80-\udcff]")


class StreamDecoder:
    """Decode ids one at a time; what all pushes and finish return is the text of all ids, for any ids.

    Only the beginning of a character is held back (at most three bytes), so a push takes the same time however
    long the text is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._breaks = tokenizer.breaks
        self._at_start = True
        self._utf8 = _Utf8(_errors(tokenizer))

    def push(self, token: int) -> str:
        """The text that is certain now and was not before, perhaps empty. Raises UsageError for an id out of range."""
        piece = self._tokenizer.piece(token)
        if self._at_start:
            piece, self._at_start = self._tokenizer.first_piece(token)
        return self._text(piece, final=token in self._breaks)

    def finish(self, inside: bool = False) -> str:
        """What was held back; the next push starts another text, which may stand right behind this one: inside."""
        self._at_start = not inside
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool) -> str:
        return _replaced(self._utf8.decode(data, final))


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ids, that of a stream which is read to its end. Raises UsageError for an id out of range."""
    breaks, errors = tokenizer.breaks, _errors(tokenizer)
    texts: list[str] = []
    run: list[bytes] = []
    at_start = True
    for token in ids:
        piece = tokenizer.piece(token)
        if at_start:
            piece, at_start = tokenizer.first_piece(token)
        run.append(piece)
        if token in breaks:
            texts.append(b"".join(run).decode("utf-8", errors))
            run.clear()
    texts.append(b"".join(run).decode("utf-8", errors))
    return _replaced("".join(texts))


def _errors(tokenizer: Tokenizer) -> str:
    """What Python is to do with bytes that are no character."""
    return "replace" if tokenizer.whole_replacement else "surrogateescape"


def _replaced(text: str) -> str:
    return text if text.isascii() else _BAD_BYTE.sub("\ufffd", text)
