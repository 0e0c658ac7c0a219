"""The steps from logits to the weights of a draw, one function each, in an order that the options give.

Axes: C candidates that are left. What a step does depends on the logits, the ids so far, the options and, for xtc, one
random number. `basic.candidates` does the same for the basic options, faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from npllama.generation.sampling.basic import FIRST_TRY
from npllama.options import SamplingOptions

_MAX_LOGIT = float(np.finfo(np.float32).max)
_MIN_TEMPERATURE = 1e-200
_TINY = float(np.finfo(np.float64).tiny)
_MAX_PENALTY_LOG = 88.7
"""As good as any larger logarithm of what dry takes: exp of it is about the largest float32."""


class Candidates(NamedTuple):
    """The ids (C,) that are left and their logits (C,) float64; best_first: sorted, among equals the lower id first."""

    ids: np.ndarray
    logits: np.ndarray
    best_first: bool = False

    def of(self, chosen: np.ndarray, best_first: bool | None = None) -> Candidates:
        """The candidates at some indices, or where a mask is true."""
        return Candidates(self.ids[chosen], self.logits[chosen], self.best_first if best_first is None else best_first)

    @property
    def weights(self) -> np.ndarray:
        """exp(l - max l): the probabilities times a common factor."""
        weights: np.ndarray = np.exp(self.logits - self.logits.max())
        return weights

    @property
    def probabilities(self) -> np.ndarray:
        """softmax(l)."""
        weights = self.weights
        return weights / weights.sum()


class Situation(NamedTuple):
    """What a step may look at beside the logits.

    history: the ids so far, the latest last; chance: a random number of this position, for xtc; breaks: whether an id's
    text holds one of dry's sequence breakers; unbroken: how many of the last ids have no breaker in their joined text.
    """

    options: SamplingOptions
    history: Sequence[int]
    chance: Callable[[], float]
    breaks: Callable[[int], bool]
    unbroken: Callable[[Sequence[int], int], int]


# ---------------------------------------------------------------- what the ids so far take from a logit


def penalties(left: Candidates, at: Situation) -> Candidates:
    """The three penalties on ids that are among the last repeat_last_n.

        l[v] <- l[v] / repeat if l[v] > 0 else l[v] * repeat
        l[v] <- l[v] - frequency * count(v) - presence          for v with count(v) > 0

    Source: llama.cpp's penalties; arXiv:1909.05858 section 4.1 (repeat), OpenAI's interface (the other two).
    """
    o = at.options
    recent = _last(at.history, o.repeat_last_n)
    if not len(recent) or (o.repeat_penalty, o.frequency_penalty, o.presence_penalty) == (1, 0, 0):
        return left
    count = np.bincount(recent, minlength=int(left.ids.max()) + 1)[left.ids]
    occurred = np.flatnonzero(count)
    old = left.logits[occurred]
    with np.errstate(over="ignore"):
        new = np.where(old > 0, old / o.repeat_penalty, old * o.repeat_penalty)
        new -= count[occurred] * o.frequency_penalty + o.presence_penalty
    logits = left.logits.copy()
    logits[occurred] = new.clip(-_MAX_LOGIT, _MAX_LOGIT)
    return Candidates(left.ids, logits)


def dry(left: Candidates, at: Situation) -> Candidates:
    """Take from an id that would continue a repetition, the more the longer it is ("don't repeat yourself").

        n(v) = the largest n such that the last n ids stand once more among the last dry_penalty_last_n, before a v
        l[v] <- l[v] - multiplier * base^(n(v) - allowed_length)          where n(v) >= allowed_length

    No repetition goes back beyond a sequence breaker, and an id whose text holds one is not touched.
    Source: llama.cpp's dry; text-generation-webui, pull request 5677. Differs: a breaker is looked for in the joined
    text of ids.
    """
    o = at.options
    if o.dry_multiplier == 0:
        return left
    recent = np.array(_last(at.history, o.dry_penalty_last_n), dtype=np.int64)
    grows = math.log(o.dry_base) if o.dry_base > 1.000001 else 0.0
    longest = o.dry_allowed_length + (int(_MAX_PENALTY_LOG / grows) if grows else 0)
    limit = at.unbroken(recent.tolist(), min(longest, len(recent)))
    if limit < o.dry_allowed_length:
        return left
    ids, lengths = repetitions(recent, limit)
    taken = np.zeros(int(max(left.ids.max(), recent.max())) + 1)
    for v, n in zip(ids.tolist(), lengths.tolist(), strict=True):
        if n >= o.dry_allowed_length and not at.breaks(v):
            taken[v] = max(taken[v], o.dry_multiplier * o.dry_base ** (n - o.dry_allowed_length))
    return Candidates(left.ids, (left.logits - taken[left.ids]).clip(-_MAX_LOGIT, None))


def repetitions(ids: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(what came next, how many ids were the same) for each earlier place where the last ids stand, up to `limit`."""
    last = len(ids) - 1
    ends = np.flatnonzero(ids[:last] == ids[last]) if last > 0 else np.empty(0, np.int64)
    lengths = np.ones(len(ends), np.int64)
    for n in range(1, min(limit, last)):
        same = (lengths == n) & (ends >= n)
        same[same] = ids[ends[same] - n] == ids[last - n]
        if not same.any():
            break
        lengths[same] = n + 1
    return ids[ends + 1], lengths


def _last(ids: Sequence[int], n: int) -> Sequence[int]:
    """The last n, all for -1."""
    return ids if n < 0 else ids[len(ids) - min(n, len(ids)) :]


# ---------------------------------------------------------------- which ids are left


def top_n_sigma(left: Candidates, at: Situation) -> Candidates:
    """Those with l >= max(l) - n * std(l). Source: arXiv:2411.07641."""
    n = at.options.top_n_sigma
    return left if n <= 0 else left.of(left.logits >= left.logits.max() - n * left.logits.std())


def top_k(left: Candidates, at: Situation) -> Candidates:
    """The k largest; among equals the lower id."""
    k = at.options.top_k
    if not 0 < k < len(left.ids):
        return left
    return left.of(_first(-left.logits, k)[:k], True)


def _first(keys: np.ndarray, n: int) -> np.ndarray:
    """The indices of the n smallest keys, and of those equal to the last of them, in their order."""
    few = np.flatnonzero(keys <= np.partition(keys, n - 1)[n - 1]) if n < len(keys) else np.arange(len(keys))
    return few[np.argsort(keys[few], kind="stable")]


def _shortest(keys: np.ndarray, weights: np.ndarray, share: float, side: Literal["left", "right"]) -> np.ndarray:
    """The indices of the fewest of the smallest keys whose weights reach a share ("left"), or exceed it ("right")."""
    n = FIRST_TRY
    while True:
        order = _first(keys, n)
        needed = int(weights[order].cumsum().searchsorted(share, side)) + 1
        if needed <= len(order) or len(order) == len(keys):
            return order[:needed]
        n *= 8


def typ_p(left: Candidates, at: Situation) -> Candidates:
    """The shortest prefix, most typical first, whose sum of p exceeds typical_p: by |-log p - entropy|.

    Source: arXiv:2202.00666.
    """
    if at.options.typical_p >= 1:
        return left
    p = left.probabilities
    surprise = -np.log(np.maximum(p, _TINY))
    most_typical = _shortest(np.abs(surprise - (p * surprise).sum()), p, at.options.typical_p, "right")
    return left.of(np.sort(most_typical))


def top_p(left: Candidates, at: Situation) -> Candidates:
    """The shortest prefix, most probable first, whose sum of p reaches top_p. Source: arXiv:1904.09751 section 3.1."""
    if at.options.top_p >= 1:
        return left
    weights = left.weights
    return left.of(_shortest(-left.logits, weights, at.options.top_p * weights.sum(), "left"), True)


def min_p(left: Candidates, at: Situation) -> Candidates:
    """Those with p >= min_p * max(p). Source: arXiv:2407.01082."""
    return left if at.options.min_p <= 0 else left.of(left.weights >= at.options.min_p)


def xtc(left: Candidates, at: Situation) -> Candidates:
    """With a probability, leave out those with p >= threshold, but for the least probable of them.

    Source: llama.cpp's xtc; text-generation-webui, pull request 6335 ("exclude top choices").
    """
    o = at.options
    if o.xtc_probability <= 0 or o.xtc_threshold > 0.5 or len(left.ids) < 2 or at.chance() >= o.xtc_probability:
        return left
    best = np.flatnonzero(left.probabilities >= o.xtc_threshold)
    best = best[np.argsort(-left.logits[best], kind="stable")]
    return left.of(np.delete(np.arange(len(left.ids)), best[:-1]))


def temperature(left: Candidates, at: Situation) -> Candidates:
    """l / temperature; 0: the largest alone, among equals the lowest id."""
    t = at.options.temperature
    if t == 0:
        best = left.logits.argmax()
        return left.of(np.array([best]))
    with np.errstate(over="ignore"):  # what lies beyond the range below the largest goes to -inf: probability 0
        return Candidates(left.ids, (left.logits - left.logits.max()) / max(t, _MIN_TEMPERATURE), left.best_first)


STEPS: dict[str, Callable[[Candidates, Situation], Candidates]] = {
    step.__name__: step for step in (penalties, dry, top_n_sigma, top_k, typ_p, top_p, min_p, xtc, temperature)
}
WITH_MIROSTAT = ("penalties", "dry", "temperature")


def through_steps(left: Candidates, at: Situation) -> Candidates:
    """A left after all steps, in the order of options.samplers; with mirostat those that leave ids out do not count."""
    for name in at.options.samplers:
        if at.options.mirostat == 0 or name in WITH_MIROSTAT:
            left = STEPS[name](left, at)
    return left


# ---------------------------------------------------------------- mirostat


def unsurprising(left: Candidates, mu: float) -> Candidates:
    """Those with -log2 p <= mu, at least the most probable. Source: arXiv:2007.14966, algorithm 2 (version 2)."""
    expected = np.flatnonzero(-np.log2(np.maximum(left.probabilities, _TINY)) <= mu)
    return left.of(expected if len(expected) else np.array([left.logits.argmax()]))


def next_mu(mu: float, probability: float, options: SamplingOptions) -> float:
    """mu after an id was drawn with a probability: mu - eta * (-log2 p - tau)."""
    return mu - options.mirostat_eta * (-math.log2(probability) - options.mirostat_tau)
