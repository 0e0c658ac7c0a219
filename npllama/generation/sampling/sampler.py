"""One text's sampling: which ids may come, the steps, and what is carried from one id to the next."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from npllama.config import ModelConfig
from npllama.errors import UsageError, quote
from npllama.execution.drawing.top_k import Search, check_finite
from npllama.generation.sampling.basic import (
    PENALTY_WINDOW,
    Allowed,
    Changes,
    Draw,
    candidates,
    drawn,
    sample,
    uniform,
)
from npllama.generation.sampling.chain import Candidates, Situation, next_mu, through_steps, unsurprising
from npllama.generation.sampling.logprobs import Chances, Observer
from npllama.options import SamplingOptions
from npllama.text.protocol import Tokenizer

if TYPE_CHECKING:
    from npllama.generation.structured.constraint import Constraint

LogitsProcessor = Callable[[list[int], np.ndarray], np.ndarray]
"""Called with the ids so far and the logits (V,) of the next, its own to change; gives logits, -inf for never."""


_LOWEST = np.float32(np.finfo(np.float32).min)
FORBIDDING = ("bad_words", "logit_bias", "min_tokens", "ignore_eos")
"""Options that can leave no id."""
_MAX_BIAS = 32.0
"""With a larger one logits would lose digits in float32."""
_MIN_BIAS = -1e30
"""With a smaller one they would reach those of ids that must not come."""


class Pieces:
    """What each id adds to a text, for questions about all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getitem__(self, token: int) -> bytes:
        return self._tokenizer.piece(token)

    @cached_property
    def _sorted(self) -> tuple[list[bytes], np.ndarray]:
        """The pieces in order, and the id of each."""
        pieces = [self._tokenizer.piece(i) for i in range(self._tokenizer.n_pieces)]
        order = sorted(range(len(pieces)), key=pieces.__getitem__)
        return [pieces[i] for i in order], np.array(order, dtype=np.int64)

    def beginning_with(self, data: bytes) -> np.ndarray:
        """The ids whose piece begins with some bytes."""
        pieces, ids = self._sorted
        first = bisect_left(pieces, data)
        return ids[first : bisect_right(pieces, data, lo=first, key=lambda piece: piece[: len(data)])]

    def holding(self, data: bytes) -> np.ndarray:
        """The ids whose piece has some bytes in it."""
        pieces, ids = self._sorted
        return ids[[i for i, piece in enumerate(pieces) if data in piece]]


@dataclass(frozen=True)
class Model:
    """What sampling and text need to know of the model, and whether its ids are to be guessed."""

    config: ModelConfig
    tokenizer: Tokenizer
    search: Search
    speculation: bool = True

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.tokenizer)


class BadWords:
    """Which ids would complete a text that must not be written, however it is cut into ids."""

    def __init__(self, words: Iterable[str], pieces: Pieces) -> None:
        self._pieces = pieces
        encoded = [word.encode() for word in words]
        self._cuts = [(word[:n], word[n:]) for word in encoded for n in range(1, len(word))]
        self._begun = tuple({begun for begun, _ in self._cuts})
        self.always = _joined([pieces.holding(word) for word in encoded])
        self._reach = max(map(len, encoded), default=0) - 1

    def next(self, ids: Sequence[int], start: int) -> np.ndarray:
        """The ids that must not come after those from `start` on; mostly `always`."""
        tail = b""
        for i in range(len(ids) - 1, start - 1, -1):
            if len(tail) >= self._reach:
                break
            tail = self._pieces[ids[i]] + tail
        if not tail.endswith(self._begun):
            return self.always
        rests = [rest for begun, rest in self._cuts if tail.endswith(begun)]
        return _joined([self.always, *(self._pieces.beginning_with(rest) for rest in rests)])


@dataclass(frozen=True)
class SamplerState:
    """What is carried from one id to the next beside the ids: mirostat's mu. It can be kept, and given back."""

    mu: float


class Sampler:
    """Chooses the ids of one text. Besides the ids so far and the state, nothing that came before has a say.

    padding_ids: ids beyond the tokenizer's pieces may come too. n_prompt: how many of the ids are not generated. ends:
    the ids that end the text; a caller may add some. constraint: what the text has to be. observer: is to be told what
    ids were drawn from, `chances`. is_basic: the basic options decide, and those that forbid ids or shift their logits;
    so `draw` mostly tells all.
    """

    def __init__(
        self,
        model: Model,
        options: SamplingOptions,
        padding_ids: bool,
        n_prompt: int,
        processor: LogitsProcessor | None = None,
        constraint: Constraint | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._model, self._options, self._n_prompt, self._processor = model, options, n_prompt, processor
        n_ids = model.config.vocab_size if padding_ids else model.tokenizer.n_pieces
        self._allowed = Allowed(n_ids, model.config.eos_token_ids)
        named = (*model.config.eos_token_ids, model.config.bos_token_id, model.tokenizer.bos_id)
        self.ends = {i for i in named if i is not None}
        self._constraint, self._observer = constraint, observer
        self._plain = options.is_basic and processor is None
        few = self._plain or (processor is None and _changes_few(options))
        self.is_basic = few and constraint is None and observer is None
        self.chances: Chances | None = None
        self._bad_words = BadWords(options.bad_words, model.pieces) if options.bad_words else None
        self._breakers = [text.encode() for text in options.dry_sequence_breakers]
        self.state = SamplerState(mu=2 * options.mirostat_tau)
        self._changes: dict[tuple[int, bool], Changes | None] = {}
        self._max_changes = len(self._allowed) - max(1, options.top_k)
        over = [i for i, _ in options.logit_bias if i >= model.config.vocab_size]
        if over:
            raise UsageError(f"logit_bias has the id {over[0]}; this model has 0 to {model.config.vocab_size - 1}.")

    def draw(self, ids: Sequence[int], number: float, n_left_out: int = 0) -> Draw | None:
        """What decides the id behind these, beside its logits: for a sampler that is basic. None: `next_id` has to.

        ids: the last ones of the text, without the first n_left_out; all where there are bad words.
        """
        recent = ids[-PENALTY_WINDOW:] if self._options.repeat_penalty != 1 else ()
        if self._plain:
            return Draw(self._allowed, recent, self._options, number)
        changes = self._changes_behind(ids, n_left_out)
        if changes is not None and len(changes.ids) > self._max_changes:
            return None
        return Draw(self._allowed, recent, self._options, number, changes)

    def n_alike(self, ids: Sequence[int]) -> int:
        """For how many ids behind these `draw` says the same, whatever they are, but for the number; 0: not known."""
        if not self.is_basic or self._options.repeat_penalty != 1 or self._bad_words is not None:
            return 0
        left = self._options.min_tokens - (len(ids) - self._n_prompt)
        return left if left > 0 else sys.maxsize

    @property
    def n_seen(self) -> int:
        """How many of the last ids `draw` has to see; 0 for all."""
        return 0 if self._bad_words is not None else PENALTY_WINDOW

    def _changes_behind(self, ids: Sequence[int], n_left_out: int) -> Changes | None:
        """What is added to the logits of the id behind these, where it is anything."""
        o, n = self._options, n_left_out + len(ids) - self._n_prompt
        no_end, words = o.ignore_eos or n < o.min_tokens, self._bad_words
        forbidden = None if words is None else words.next(ids, self._n_prompt)
        if words is not None and forbidden is not words.always:
            return self._make_changes(no_end, forbidden)
        key = len(self.ends), no_end
        if key not in self._changes:
            self._changes[key] = self._make_changes(no_end, forbidden)
        return self._changes[key]

    def _make_changes(self, no_end: bool, forbidden: np.ndarray | None) -> Changes | None:
        """What the options add to logits; with these ids forbidden, and with those that end a text."""
        added = dict(self._options.logit_bias)
        never = [*(self.ends if no_end else ()), *(() if forbidden is None else forbidden.tolist())]
        added.update(dict.fromkeys(never, -np.inf))
        return Changes(added) if added else None

    def next_id(self, logits: np.ndarray, ids: list[int], seed: int, completion: int) -> int:
        """The next id of a text, whose logits (V,) float32 are given.

        Raises ModelError for logits that are not finite, UsageError where no id is left or logits_processor fails.
        """
        key, allowed = (seed, completion, len(ids)), self._allowed
        if self._plain:
            if self._constraint is not None:
                return self._basic(logits, self._constraint.mask(), ids, key)
            if self._observer is not None and self._observer.sampled:
                return self._basic(logits, allowed.mask(len(logits)), ids, key)
            recent = allowed.indices(ids[-PENALTY_WINDOW:])
            return allowed.id(sample(allowed.logits(logits), recent, self._options, *key, self._model.search))
        check_finite(logits)
        values = allowed.logits(self._biased(logits, ids))
        left = np.flatnonzero(values > -np.inf)
        if not len(left):
            raise UsageError(
                "no token is left that may come next: bad_words, logit_bias, min_tokens, ignore_eos or "
                "logits_processor forbid all of them; forbid fewer."
            )
        at = Situation(
            *(self._options, allowed.indices(ids), lambda: uniform(*key, draw=1)),
            *(lambda index: self._breaks(self._piece(index)), self._unbroken),
        )
        chosen = through_steps(Candidates(left, values[left]), at)
        return allowed.id(self._draw(chosen, key))

    def _basic(self, logits: np.ndarray, mask: np.ndarray, ids: list[int], key: tuple[int, int, int]) -> int:
        """An id drawn with the basic options from those that a mask (V,) allows, at least one; it notes what from."""
        check_finite(logits)
        lowered = np.where(mask, logits, _LOWEST)
        chosen, weights = candidates(lowered, ids[-PENALTY_WINDOW:], self._options, self._model.search)
        left = mask[chosen]
        chosen, weights = chosen[left], weights[left]
        self._note(chosen, weights)
        return int(chosen[drawn(weights, uniform(*key))])

    def _note(self, ids: np.ndarray, weights: np.ndarray) -> None:
        if self._observer is not None and self._observer.sampled:
            ids, weights = ids[weights > 0], weights[weights > 0]
            self.chances = Chances(ids, weights / weights.sum())

    def _draw(self, chosen: Candidates, key: tuple[int, int, int]) -> int:
        if self._options.mirostat != 0:
            chosen = unsurprising(chosen, self.state.mu)
        index = drawn(chosen.weights, uniform(*key))
        if self._options.mirostat != 0:
            self.state = replace(self.state, mu=next_mu(self.state.mu, chosen.probabilities[index], self._options))
        if self._observer is not None:
            self._note(np.array([self._allowed.id(i) for i in chosen.ids.tolist()], np.int64), chosen.weights)
        return int(chosen.ids[index])

    def _biased(self, logits: np.ndarray, ids: list[int]) -> np.ndarray:
        """The logits (V,) float64 with what a caller adds to them; -inf for what must not come."""
        processor = self._processor
        values = logits.astype(np.float64) if processor is None else _processed(processor, ids, logits)
        for i, bias in self._options.logit_bias:
            values[i] += bias
        if self._options.ignore_eos or len(ids) - self._n_prompt < self._options.min_tokens:
            values[list(self.ends)] = -np.inf
        if self._bad_words is not None:
            values[self._bad_words.next(ids, self._n_prompt)] = -np.inf
        return values if self._constraint is None else self._constrained(values, logits, self._constraint)

    def _constrained(self, values: np.ndarray, logits: np.ndarray, constraint: Constraint) -> np.ndarray:
        """The logits with those alone that the text's form allows. Where all of them are forbidden the form wins."""
        mask = constraint.mask()
        found = np.where(mask, values, -np.inf)
        if not (found > -np.inf).any():
            found = np.where(mask, logits, -np.inf)
            options, off = self._options, SamplingOptions()
            constraint.overruled.update(name for name in FORBIDDING if getattr(options, name) != getattr(off, name))
            if self._processor is not None:
                constraint.overruled.add("logits_processor")
        return found

    def _piece(self, index: int) -> bytes:
        """The bytes of an id, given by its index among the allowed ones."""
        return self._model.pieces[self._allowed.id(index)]

    def _breaks(self, text: bytes) -> bool:
        return any(breaker in text for breaker in self._breakers)

    def _unbroken(self, indices: Sequence[int], most: int) -> int:
        """How many of the last ids, at most so many, have no sequence breaker of dry in their joined text."""
        longest = max(map(len, self._breakers), default=1)
        text = b""
        for n, index in enumerate(reversed(indices)):
            text = self._piece(index) + text[: longest - 1]
            if n == most or self._breaks(text):
                return n
        return len(indices)


def _changes_few(options: SamplingOptions) -> bool:
    """Whether nothing but the basic options decides and those of FORBIDDING, so that `draw_rows` computes the same.

    Where the repetition penalty and a bias would round in turn, and where ids are drawn from all, it would not.
    """
    o = options
    small = all(_MIN_BIAS <= bias <= _MAX_BIAS or bias == -np.inf for _, bias in o.logit_bias)
    cut = o.top_k > 0 or o.temperature == 0
    return small and cut and o.repeat_penalty == 1 and o.is_basic_but_for(FORBIDDING)


def _joined(ids: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def _processed(processor: LogitsProcessor, ids: list[int], logits: np.ndarray) -> np.ndarray:
    """What a caller's function makes of the logits, as float64. Raises UsageError for what it must not give."""
    try:
        found = np.asarray(processor(list(ids), logits.copy()))
    except Exception as error:
        raise UsageError(
            f"logits_processor raised {type(error).__name__}: {quote(str(error))}; it must give the logits."
        ) from error
    kind, shape = found.dtype.kind, found.shape
    if kind not in "fiu" or shape != logits.shape or np.isnan(found).any() or (found == np.inf).any():
        raise UsageError(
            f"logits_processor gave {found.dtype} of shape {shape}, or NaN or infinity; real numbers of shape "
            f"{logits.shape} are needed, -inf for what must not come."
        )
    return found.astype(np.float64)
