"""Added tokens: strings that are one id wherever they stand in a text, cut out before anything else happens.

A special one is control, and text never gives it; it is looked for all the same, because the characters that it covers
are then not searched for others: with "<|x|>" special and "x" not, "<|x|>" holds no x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from npllama.text.bpe.splitting import character_class, member

_SPACES = re.compile(f"[{character_class(chr(92) + 's')}]*")


MAX_LENGTH = 256
"""Most characters of an added token: what bounds the work at each place of a text."""


@dataclass(frozen=True)
class AddedToken:
    """A token of the list added_tokens of a tokenizer.json.

    special: control, no text. normalized: looked for after the normalizer has run, not before. single_word: not beside
    a character of a word. lstrip, rstrip: takes the white space before or after it along.
    """

    id: int
    content: str
    special: bool = False
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class LeftmostLongest:
    """Cut texts at added tokens: the leftmost first, of those that begin there the longest."""

    def __init__(self, tokens: Sequence[tuple[str, AddedToken]]) -> None:
        """tokens: what is looked for, and the token that it stands for."""
        self._tokens: dict[str, AddedToken] = {}
        for spelled, token in tokens:
            self._tokens.setdefault(spelled, token)
        self._lengths: dict[str, dict[int, None]] = {}  # of the tokens that begin with a character, the longest first
        for spelled in sorted(self._tokens, key=len, reverse=True):
            self._lengths.setdefault(spelled[0], {})[len(spelled)] = None
        first = "".join(map(re.escape, self._lengths))
        # Without a token that is text, nothing is cut.
        idle = all(token.special for token in self._tokens.values())
        self._first = None if idle else re.compile(f"[{first}]")

    def cut(self, text: str) -> Iterator[str | int]:
        """The text in order: stretches as strings, none empty, and ids of added tokens."""
        begin = 0
        for start, end, token in self._matches(text, self._first) if self._first else ():
            if token.special or (token.single_word and not _is_word_alone(text, start, end)):
                continue
            if token.lstrip:
                start = _spaces_before(text, start, begin)
            if token.rstrip:
                end = _spaces_after(text, end)
            if begin < start:
                yield text[begin:start]
            yield token.id
            begin = end
        if begin < len(text):
            yield text[begin:]

    def _matches(self, text: str, first: re.Pattern[str]) -> Iterator[tuple[int, int, AddedToken]]:
        """Every match, special ones too; none overlaps another."""
        position = 0
        while found := first.search(text, position):
            start = found.start()
            position = start + 1
            for length in self._lengths[found[0]]:
                token = self._tokens.get(text[start : start + length])
                if token is not None:
                    position = start + length
                    yield start, position, token
                    break


class LongestFirst:
    """Cut texts at added tokens: each in turn wherever it stands in what is left, the longest token first."""

    def __init__(self, tokens: Sequence[tuple[str, AddedToken]]) -> None:
        texts = [(spelled, token.id) for spelled, token in tokens if not token.special]
        self._tokens = sorted(texts, key=lambda item: len(item[0].encode("utf-8")), reverse=True)

    def cut(self, text: str) -> Iterator[str | int]:
        """The text in order: stretches as strings, none empty, and ids of added tokens."""
        parts: list[str | int] = [text] if text else []
        for spelled, token in self._tokens:
            if spelled in text:
                parts = [piece for part in parts for piece in _cut_at(part, spelled, token)]
        return iter(parts)


def _cut_at(part: str | int, spelled: str, token: int) -> list[str | int]:
    if isinstance(part, int) or spelled not in part:
        return [part]
    first, *others = part.split(spelled)
    pieces: list[str | int] = [first]
    for other in others:
        pieces += [token, other]
    return [piece for piece in pieces if piece != ""]


def _is_word_alone(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start] if start else "", text[end : end + 1]
    return not any(beside and member(r"\w", beside) for beside in (before, after))


def _spaces_before(text: str, start: int, least: int) -> int:
    """Where the white space begins that ends at start."""
    while start > least and member(r"\s", text[start - 1]):
        start -= 1
    return start


def _spaces_after(text: str, end: int) -> int:
    """Where the white space ends that begins at end."""
    found = _SPACES.match(text, end)
    return found.end() if found else end
