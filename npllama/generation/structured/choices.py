"""The matcher of some given texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from npllama.generation.structured.vocabulary import Vocabulary


class ChoiceMatcher:
    """One of some texts, which are given as bytes. `left`: how those that are still possible go on."""

    def __init__(self, vocabulary: Vocabulary, left: Iterable[bytes]) -> None:
        self._vocabulary, self.left = vocabulary, list(dict.fromkeys(left))

    def copy(self) -> ChoiceMatcher:
        return ChoiceMatcher(self._vocabulary, self.left)

    @property
    def is_complete(self) -> bool:
        return b"" in self.left

    @property
    def is_over(self) -> bool:
        return self.left == [b""]

    def mask(self) -> np.ndarray:
        longest, ids = self._vocabulary.longest, self._vocabulary.ids
        pieces = {text[:n] for text in self.left for n in range(1, min(len(text), longest) + 1)}
        found = [i for piece in pieces for i in ids.get(piece, ())]
        mask = np.zeros(self._vocabulary.vocab_size, bool)
        mask[found + self._vocabulary.ends if self.is_complete else found] = True
        return mask

    def take(self, token: int) -> None:
        self.left = self._behind(token)

    def _behind(self, token: int) -> list[bytes]:
        piece = self._vocabulary.pieces[token]
        return [text[len(piece) :] for text in self.left if text.startswith(piece)]

    def forced(self) -> Sequence[int]:
        return (self._vocabulary.usual(self.left[0]) or ()) if len(self.left) == 1 else ()

    def closing(self, token: int | None, old: Sequence[int], most: int) -> list[int] | None:
        left = self.left if token is None else self._behind(token)
        found: list[int] | None = None
        for text in sorted(left, key=len):
            if found is not None and len(text) >= len(found) * self._vocabulary.longest:
                break
            ids = self._vocabulary.fewest(text)
            if ids is not None and len(ids) <= most and (found is None or len(ids) < len(found)):
                found = list(ids)
        return found

    def completes(self, ids: Sequence[int]) -> bool:
        return b"".join([self._vocabulary.pieces[i] for i in ids]) in self.left
