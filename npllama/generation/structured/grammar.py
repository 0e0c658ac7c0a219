"""The matcher of llguidance: regular expressions, JSON Schema, Lark grammars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from npllama.errors import UsageError
from npllama.generation.structured.closing import ClosingSearch
from npllama.generation.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GrammarMatcher:
    """A text under way by a grammar; `state` is llguidance's."""

    def __init__(self, vocabulary: Vocabulary, search: ClosingSearch, state: LLMatcher) -> None:
        self._vocabulary, self._search, self.state = vocabulary, search, state

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._vocabulary, self._search, self.state.deep_copy())

    @property
    def is_complete(self) -> bool:
        return bool(self.state.is_accepting())

    @property
    def is_over(self) -> bool:
        return bool(self.state.is_stopped())

    def mask(self) -> np.ndarray:
        bits = np.frombuffer(self.state.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocabulary.vocab_size, bitorder="little").view(bool)

    def take(self, token: int) -> None:
        if not self.state.consume_token(token):
            raise UsageError(f"the form of the text cannot be followed: {reason(self.state)}; change it.")

    def forced(self) -> Sequence[int]:
        if self.state.is_accepting():  # it may end instead
            return ()
        ids: list[int] = self.state.compute_ff_tokens()
        return ids if ids and self.state.validate_tokens(ids) == len(ids) else ()

    def completes(self, ids: Sequence[int]) -> bool:
        ended = [*ids, self._vocabulary.ends[0]]
        return bool(self.state.validate_tokens(ended) == len(ended))

    def closing(self, token: int | None, old: Sequence[int], most: int) -> list[int] | None:
        if token is None:
            found = self._searched(self.state, (), most)
            return self._search.by_ids(self.state, most) if found is None else found
        if old and old[0] == token:
            return list(old[1:])
        vocabulary = self._vocabulary
        text = b"".join([vocabulary.pieces[i] for i in old])
        behind = vocabulary.fewest(text[len(vocabulary.pieces[token]) :])  # of a text of fixed length, as dates are
        for ids in (tuple(old), behind):
            if ids is not None and len(ids) <= most and self.completes([token, *ids]):
                return list(ids)
        after = self.state.deep_copy()
        return self._searched(after, (token,), most) if after.consume_token(token) else None

    def _searched(self, state: LLMatcher, before: Sequence[int], most: int) -> list[int] | None:
        """A closing behind some ids, after which the state is given."""
        text = self._search.text(state)
        ids = None if text is None else self._vocabulary.fewest(text)
        if ids is not None and len(ids) <= most and self.completes([*before, *ids]):
            return list(ids)
        return None


def reason(state: LLMatcher) -> str:
    """What a matcher says is wrong, in one short line; nothing where nothing is."""
    said: str = state.get_error() or "; ".join(state.get_grammar_warnings())
    return " ".join(said.split())[:300]


def new_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """The vocabulary as llguidance wants it."""
    from llguidance import LLTokenizer, TokenizerWrapper  # here, because it is an extra

    return LLTokenizer(
        TokenizerWrapper(_Wrapped(vocabulary)), n_vocab=vocabulary.vocab_size, eos_token=list(vocabulary.ends)
    )


class _Wrapped:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.tokens = vocabulary.pieces
        self.eos_token_id, self.bos_token_id = vocabulary.ends[0], None
        self.special_token_ids = [i for i, piece in enumerate(vocabulary.pieces) if not piece]

    def __call__(self, data: bytes) -> list[int]:
        return list(self._vocabulary.usual(data) or ())
