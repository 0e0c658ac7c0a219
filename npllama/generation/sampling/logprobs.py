"""How probable the ids of a text were, and what else might have come, as a call may ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from npllama.execution.drawing.top_k import top_k
from npllama.text.protocol import Tokenizer


class Alternative(NamedTuple):
    """An id that may come, the text and the bytes that it writes, and the natural logarithm of its probability."""

    token: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """An id of a text, and how probable it was where it stands: by the model, before any sampling.

    logprob: None for an id that was put at the end to close a text, which the model was not asked about. top: the most
    probable ids, the most probable first. The same after the whole chain of sampling, where that was asked for:
    sampled_logprob, sampled_top.
    """

    token: int
    text: str
    bytes: bytes
    logprob: float | None
    top: tuple[Alternative, ...] = ()
    sampled_logprob: float | None = None
    sampled_top: tuple[Alternative, ...] = ()


class Chances(NamedTuple):
    """What an id was drawn from: ids (C,) and their probabilities (C,), none of them 0."""

    ids: np.ndarray
    probabilities: np.ndarray


class Observer:
    """Makes the logprobs of one text. n_top: how many alternatives; sampled: also after the chain of sampling."""

    def __init__(self, tokenizer: Tokenizer, n_top: int, sampled: bool) -> None:
        self._tokenizer, self._n_top, self.sampled = tokenizer, n_top, sampled

    def of(self, token: int, logits: np.ndarray, chances: Chances | None) -> TokenLogprobs:
        """Of an id that came where the logits (V,) were these; chances: what it was drawn from."""
        logprobs = log_softmax(logits)
        best = top_k(logits, self._n_top) if self._n_top else np.empty(0, np.int64)
        found = TokenLogprobs(*self._written(token), float(logprobs[token]), self._alternatives(best, logprobs[best]))
        if chances is None or not self.sampled:
            return found
        order = np.argsort(-chances.probabilities, kind="stable")[: self._n_top]
        kept = np.log(chances.probabilities)
        chosen = float(kept[np.flatnonzero(chances.ids == token)[0]])
        top = self._alternatives(chances.ids[order], kept[order])
        return replace(found, sampled_logprob=chosen, sampled_top=top)

    def unasked(self, token: int) -> TokenLogprobs:
        """Of an id that the model was not asked about."""
        return TokenLogprobs(*self._written(token), None)

    def _written(self, token: int) -> tuple[int, str, bytes]:
        piece = self._tokenizer.piece(token)
        return token, piece.decode("utf-8", "replace"), piece

    def _alternatives(self, ids: np.ndarray, logprobs: np.ndarray) -> tuple[Alternative, ...]:
        pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
        return tuple([Alternative(*self._written(i), value) for i, value in pairs])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, in float64: differences of 1e-4 between models must not drown."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
