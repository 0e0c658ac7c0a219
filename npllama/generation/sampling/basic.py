"""From logits to the next id: penalty, top-k, top-p, min-p, temperature, draw, in the order of llama.cpp.

Axes: R rows of logits, V ids of the vocabulary, C candidates that are left. A draw depends on its logits, the latest
ids, the options and (seed, completion, position) alone, not on what else runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from npllama.errors import ModelError, UsageError, quote
from npllama.execution.drawing.top_k import Drawing, Search, check_finite, top_k
from npllama.options import SamplingOptions

PENALTY_WINDOW = 64
"""How many of the latest ids the repetition penalty looks at (llama.cpp's default)."""
SEEDS = 1 << 64
FIRST_TRY = 64
"""How many of the largest logits are sorted first when top-k does not say how many can be needed."""
NUMBERS_AHEAD = 64
"""How many of a completion's draws are computed at once."""
_PHILOX = np.random.Philox(0)
"""Given key and counter for each draw, because making a new one takes longer."""
_DRAWING = threading.Lock()  # guards them; Philox's own is taken by its methods, and was not reentrant before NumPy 2
_KEY, _COUNTER = np.zeros(2, np.uint64), np.zeros(4, np.uint64)
_STATE: Any = {
    "bit_generator": "Philox",
    "state": {"key": _KEY, "counter": _COUNTER},
    "buffer": np.zeros(4, np.uint64),
    "buffer_pos": 4,  # nothing of it is left
    "has_uint32": 0,
    "uinteger": 0,
}
_MIN_TEMPERATURE = 1e-200
"""As good as any lower one: it takes every logit that is not the largest to a weight of 0, and overflows no float64."""
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_LOWEST = np.float32(-_MAX_FLOAT32)


def candidates(
    logits: np.ndarray, recent: Sequence[int], options: SamplingOptions, search: Search = top_k
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates for the next id and their weights: their probabilities p, times a common factor.

        l[v] <- l[v] / penalty if l[v] > 0 else l[v] * penalty      for v among the last 64 of recent
        top-k: the k largest l; among equals the lower id
        top-p: q = softmax(l) over what is left; the shortest prefix, most probable first, whose sum of q reaches top_p
        min-p: those with q[v] >= min_p * max(q)
        p = softmax(l / temperature) over what is left; temperature 0: 1 for the largest l, among equals the lowest id

    logits (V,) float32; recent ids, the latest last; search: what finds the largest. Returns ids (C,) int64 and
    weights (C,) float64 of which the largest is 1, C >= 1, the most probable first (by id when top-k, top-p and min-p
    are all off). Raises ModelError for logits that are not finite.
    Source: the order of llama.cpp's sampler chain; arXiv:1904.09751 section 3.1 (top-p), arXiv:2407.01082 (min-p),
    arXiv:1909.05858 section 4.1 (penalty). Differs: a logit below 0 is multiplied, so that a penalty lowers it too.
    """
    if options.repeat_penalty != 1 and len(recent):
        check_finite(logits)  # the penalty would hide an infinity
        logits = _penalised(logits, recent, options.repeat_penalty)
    if options.temperature > 0 and _truncates(options, len(logits)):  # the search checks them
        ids, relative = _truncated(logits, options, search)
        return ids, np.exp(relative / max(options.temperature, _MIN_TEMPERATURE))
    check_finite(logits)
    if options.temperature == 0:
        return np.array([logits.argmax()]), np.ones(1)
    # All V ids stay float32, where exp is much faster, unless the temperature vanishes there.
    wide = logits if options.temperature > 1e-30 else logits.astype(np.float64)
    with np.errstate(over="ignore"):  # what lies beyond the range below the largest goes to -inf: probability 0
        weights = np.exp((wide - wide.max()) / options.temperature)
    return np.arange(len(logits)), weights.astype(np.float64, copy=False)


class Allowed:
    """The ids that may be drawn: those below n_ids, and a few beyond them; the order of ids stays.

    Logits beyond the pieces of a tokenizer belong to rows that pad the vocabulary, which no training text has named.
    """

    def __init__(self, n_ids: int, beyond: Iterable[int] = ()) -> None:
        self.n_ids = n_ids
        self._beyond = np.array(sorted({i for i in beyond if i >= n_ids}), np.int64)

    def __len__(self) -> int:
        return self.n_ids + len(self._beyond)

    def logits(self, logits: np.ndarray) -> np.ndarray:
        """The logits (V,) of the allowed ids (A,): a view where they are the first A."""
        first = logits[: self.n_ids]
        return np.concatenate((first, logits[self._beyond])) if len(self._beyond) else first

    def indices(self, ids: Sequence[int]) -> Sequence[int]:
        """The indices of ids among the allowed ones; those that are not allowed are left out."""
        if max(ids, default=0) < self.n_ids:
            return ids
        beyond = {int(token): self.n_ids + i for i, token in enumerate(self._beyond)}
        return [beyond.get(i, i) for i in ids if i < self.n_ids or i in beyond]

    def mask(self, vocab_size: int) -> np.ndarray:
        """Which ids are allowed: (V,) bool."""
        mask = np.arange(vocab_size) < self.n_ids
        mask[self._beyond] = True
        return mask

    def id(self, index: int) -> int:
        """The id at an index among the allowed ones."""
        return index if index < self.n_ids else int(self._beyond[index - self.n_ids])


def sample(
    logits: np.ndarray,
    recent: Sequence[int],
    options: SamplingOptions,
    seed: int,
    completion: int,
    position: int,
    search: Search = top_k,
) -> int:
    """The next id: drawn from its `candidates` with a number that (seed, completion, position) alone decide.

    logits (V,) float32; 0 <= seed, completion, position < 2^64. Raises ModelError for logits that are not finite,
    UsageError for a seed out of range.
    """
    if not 0 <= seed < SEEDS:
        raise UsageError(f"seed={quote(seed)}: needs a whole number from 0 to 2^64 - 1.")
    return _drawn(logits, recent, options, uniform(seed, completion, position), search)


def _drawn(
    logits: np.ndarray, recent: Sequence[int], options: SamplingOptions, number: float, search: Search = top_k
) -> int:
    """The id from its `candidates` that a number from [0, 1) stands for."""
    ids, weights = candidates(logits, recent, options, search)
    return int(ids[drawn(weights, number)])


def drawn(weights: np.ndarray, number: float) -> int:
    """The index for which a number from [0, 1) stands, in proportion to the weights (C,)."""
    if len(weights) == 1:
        return 0
    below = weights.cumsum()
    # The number is at most 1 - 2^-53, so its product with the sum stays below the sum, also when rounded.
    return int(below.searchsorted(number * below[-1], side="right"))


class Changes:
    """Another logit for a few ids, each once: ids (n,) int64; added (n,) float64, -inf for an id that must not come."""

    def __init__(self, added: Mapping[int, float]) -> None:
        self.ids = np.array(sorted(added), np.int64)
        self.added = np.array([added[i] for i in sorted(added)], np.float64)


class Draw(NamedTuple):
    """What decides an id beside its logits: which ids may come, the latest ones, and a number from [0, 1).

    changes: of the logits. They leave at least top_k ids that may come, with top_k on; one with temperature 0.
    """

    allowed: Allowed
    recent: Sequence[int]
    options: SamplingOptions
    number: float
    changes: Changes | None = None


def _cannot_draw(*what: object) -> None:
    """For `draw_rows`: ids are drawn in NumPy."""


def draw_rows(
    logits: np.ndarray, draws: Sequence[Draw], search: Search = top_k, draw: Drawing = _cannot_draw
) -> list[int | None]:
    """The ids that `sample` draws from each row of logits (R, V) float32; None where logits are not finite.

    draw: does the same faster where it can, with exp of its own, whose last digit may differ. Logits with changes are
    changed meanwhile, and put back.
    """
    rows = tuple([i for i, one in enumerate(draws) if one.changes is not None])
    if not rows:
        return _drawn_rows(logits, draws, search, draw)
    logits = np.ascontiguousarray(logits)
    at, added = _places(rows, tuple([draws[i].changes for i in rows]), logits.shape[1])
    flat = logits.reshape(-1)
    before = flat[at]
    if not np.isfinite(before).all():
        each = zip(logits, draws, strict=True)
        return [None] if len(draws) == 1 else [draw_rows(row[None], [one], search, draw)[0] for row, one in each]
    try:
        flat[at] = _LOWEST if added is None else np.maximum(before + added, _LOWEST)
        found = _drawn_rows(logits, draws, search, draw)
        for i in rows:  # what must not come is drawn only where all the others are as low: overflown
            if (token := found[i]) is not None and logits[i, token] == _LOWEST:
                found[i] = None
    finally:
        flat[at] = before
    return found


@functools.lru_cache(maxsize=16)  # from step to step it is mostly the same rows that change, in the same way
def _places(
    rows: tuple[int, ...], changes: tuple[Changes, ...], vocab_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Where the logits that rows change lie, counted through all rows, and what is added there; None: -inf to all."""
    at = np.concatenate([row * vocab_size + one.ids for row, one in zip(rows, changes, strict=True)])
    added = np.concatenate([one.added for one in changes])
    return at, added if (added > -np.inf).any() else None


def _drawn_rows(logits: np.ndarray, draws: Sequence[Draw], search: Search, draw: Drawing) -> list[int | None]:
    """`draw_rows` of logits that are as they are to be."""
    found: list[int | None] = [None] * len(draws)
    for (options, n_ids), rows in _alike(draws):
        some = logits if len(rows) == len(logits) else logits[rows]
        several = len(draws[rows[0]].allowed) == n_ids and 0 < options.top_k < n_ids and options.temperature > 0
        some = some[:, :n_ids] if several else some
        ids = _together(some, [draws[i] for i in rows], options, search, draw) if several else None
        if ids is None:
            ids = [_one(row, draws[i], search) for i, row in zip(rows, some, strict=True)]
        for i, token in zip(rows, ids, strict=True):
            found[i] = token
    return found


def _alike(draws: Sequence[Draw]) -> Iterable[tuple[tuple[SamplingOptions, int], Sequence[int]]]:
    """The options and numbers of ids of draws, each with the indices of those that have them."""
    first = draws[0]
    if all(draw.options is first.options and draw.allowed.n_ids == first.allowed.n_ids for draw in draws):
        return [((first.options, first.allowed.n_ids), range(len(draws)))]
    groups: dict[tuple[SamplingOptions, int], list[int]] = {}
    for i, draw in enumerate(draws):
        groups.setdefault((draw.options, draw.allowed.n_ids), []).append(i)
    return groups.items()


def _one(logits: np.ndarray, draw: Draw, search: Search) -> int | None:
    allowed, recent = draw.allowed, draw.recent
    try:
        indices = allowed.indices(recent) if len(recent) else recent
        chosen = _drawn(allowed.logits(logits), indices, draw.options, draw.number, search)
    except ModelError:
        return None
    return allowed.id(chosen)


def _together(
    logits: np.ndarray, draws: Sequence[Draw], options: SamplingOptions, search: Search, draw: Drawing
) -> Sequence[int | None] | None:
    """Rows with the same options, one operation for all of them: what `candidates` says, with top-k on.

    None where they are to be looked at one by one.
    """
    numbers, chances = [one.number for one in draws], cut(options)
    try:
        if options.repeat_penalty != 1:
            check_finite(logits)  # the penalty would hide an infinity
            recents = [one.allowed.indices(one.recent) for one in draws]
            logits = np.array([_penalised(*one, options.repeat_penalty) for one in zip(logits, recents, strict=True)])
        drawn = draw(logits, options.top_k, chances, numbers)
        if drawn is not None or len(draws) == 1:
            return drawn
        ids = search(logits, options.top_k)
    except ModelError:
        return None
    rows = np.arange(len(ids))[:, None]
    largest = logits[rows, ids]  # (R, k)
    relative = np.subtract(largest, largest[:, :1], dtype=np.float64)
    weights = np.exp(relative)
    left = np.ones(weights.shape, bool)
    if options.top_p < 1:
        below = weights.cumsum(axis=1)
        left[:, 1:] = below[:, :-1] < options.top_p * below[:, -1:]
    if options.min_p > 0:
        left &= weights >= options.min_p
    below = np.where(left, np.exp(relative / chances[2]), 0.0).cumsum(axis=1)
    at = (below <= np.array(numbers)[:, None] * below[:, -1:]).sum(axis=1)
    found: list[int | None] = ids[rows[:, 0], at].tolist()
    return found


def cut(options: SamplingOptions) -> tuple[float, float, float]:
    """top_p, min_p and temperature, above 0."""
    return options.top_p, options.min_p, max(options.temperature, _MIN_TEMPERATURE)


class Numbers:
    """The numbers of one completion's draws, by position: those of `uniform`, computed many at a time."""

    def __init__(self, seed: int, completion: int) -> None:
        self._key = seed, completion
        self._first = 0
        self._numbers: list[float] = []

    def at(self, position: int) -> float:
        i = position - self._first
        if not 0 <= i < len(self._numbers):
            self._first, i = position, 0
            self._numbers = _uniforms(*self._key, position, NUMBERS_AHEAD).tolist()
        return self._numbers[i]

    def ahead(self, position: int, n: int) -> list[float]:
        """Those of n positions."""
        return [self.at(p) for p in range(position, position + n)]


def uniform(seed: int, completion: int, position: int, draw: int = 0) -> float:
    """A multiple of 2^-53 from [0, 1): the Philox 4x64-10 block of key (seed, completion) at counter position.

    draw: which of several numbers of a position.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; NumPy's Philox steps the
    counter before its first block.
    """
    return float(_uniforms(seed, completion, position, 1, draw)[0])


def _uniforms(seed: int, completion: int, position: int, n: int, draw: int = 0) -> np.ndarray:
    """`uniform` at n positions (n,) float64: each is the first of the four numbers of its block."""
    with _DRAWING:
        _KEY[0], _KEY[1], _COUNTER[0], _COUNTER[1] = seed, completion, position, draw
        _PHILOX.state = _STATE
        raw = _PHILOX.random_raw(4 * n)[::4]
    return (raw >> np.uint64(11)) * 2.0**-53


def _penalised(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    """The logits with the repetition penalty: once for each id of the last 64, however often it is there."""
    ids = np.array(sorted(set(recent[-PENALTY_WINDOW:])), dtype=np.int64)
    old = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):
        new = np.where(old > 0, old / penalty, old * penalty)
    logits = logits.copy()
    logits[ids] = new.clip(-_MAX_FLOAT32, _MAX_FLOAT32)
    return logits


def _truncates(options: SamplingOptions, n_ids: int) -> bool:
    """Whether top-k, top-p or min-p can leave ids out."""
    return 0 < options.top_k < n_ids or options.top_p < 1 or options.min_p > 0


def _truncated(logits: np.ndarray, options: SamplingOptions, search: Search) -> tuple[np.ndarray, np.ndarray]:
    """What top-k, top-p and min-p leave: ids (C,) and their logits less the largest (C,) float64, the largest first.

    Without top-k, as many of the largest are sorted as top-p and min-p turn out to need, eight times more at each try.
    """
    by_top_k = 0 < options.top_k < len(logits)
    n = options.top_k if by_top_k else FIRST_TRY
    total = None
    if not by_top_k:
        check_finite(logits)
        with np.errstate(over="ignore"):
            total = float(np.exp(logits - logits.max()).sum(dtype=np.float64))
    while True:
        ids = search(logits, n)
        relative = np.subtract(logits[ids], logits[ids[0]], dtype=np.float64)
        n_left = _n_left(np.exp(relative), total, options)
        if by_top_k or n_left < n or n >= len(logits):
            return ids[:n_left], relative[:n_left]
        n *= 8


def _n_left(weight: np.ndarray, total: float | None, options: SamplingOptions) -> int:
    """How many of the most probable top-p and min-p leave; weight (C,) = q / max(q), total = 1 / max(q).

    total None: weight has all of them.
    """
    n = len(weight)
    if options.top_p < 1:
        below = weight.cumsum()
        n = min(n, int(below.searchsorted(options.top_p * (below[-1] if total is None else total))) + 1)
    if options.min_p > 0:
        n = min(n, int(np.count_nonzero(weight >= options.min_p)))
    return n
