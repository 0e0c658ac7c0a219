"""Which bytes each id writes, and the fewest ids that write a text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache

from npllama.errors import UsageError
from npllama.text.protocol import Tokenizer

MAX_CACHED = 4096
"""Texts whose ids are remembered."""


class Vocabulary:
    """The ids of a model as bytes. ends: the ids that end a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int]) -> None:
        self.tokenizer, self.vocab_size, self.ends = tokenizer, vocab_size, sorted(ends)
        self.fewest = lru_cache(MAX_CACHED)(self._fewest)

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each id of the tokenizer writes inside a text; nothing for an id that no text gives."""
        tokenizer = self.tokenizer
        hidden = tokenizer.control_ids.union(self.ends)
        return [b"" if i in hidden else tokenizer.piece(i) for i in range(tokenizer.n_pieces)]

    @cached_property
    def ids(self) -> dict[bytes, list[int]]:
        """The ids that write some bytes; one that stands for a single byte comes before one for a character."""
        found: dict[bytes, list[int]] = {}
        for i, piece in enumerate(self.pieces):
            if piece:
                found.setdefault(piece, []).append(i)
        return found

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest piece."""
        return max(map(len, self.ids), default=0)

    def _fewest(self, data: bytes) -> tuple[int, ...] | None:
        """The fewest ids that write some bytes, those with long first pieces before others; None where none do."""
        n, ids, longest = len(data), self.ids, self.longest
        count = [0] * (n + 1)
        step = [0] * (n + 1)
        for start in range(n - 1, -1, -1):
            count[start] = n + 1
            for stop in range(min(n, start + longest), start, -1):
                if count[stop] < count[start] - 1 and data[start:stop] in ids:
                    count[start], step[start] = count[stop] + 1, stop
        if count[0] > n:
            return None
        found, start = [], 0
        while start < n:
            found.append(ids[data[start : step[start]]][-1])
            start = step[start]
        return tuple(found)

    def usual(self, data: bytes) -> tuple[int, ...] | None:
        """The ids that the tokenizer gives some bytes inside a text; the fewest where it gives other bytes."""
        try:
            ids = self.tokenizer.encode(data.decode(), False, False, False, True)
        except (UnicodeDecodeError, UsageError):
            return self.fewest(data)
        if b"".join(map(self.tokenizer.piece, ids)) != data:
            return self.fewest(data)
        return tuple(ids)
