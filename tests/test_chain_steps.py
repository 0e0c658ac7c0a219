"""Every step of sampling against its formula by definition, alone and in the chain."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from probabilities import Left, best_first, softmax

from npllama.generation.sampling import chain
from npllama.generation.sampling.basic import candidates
from npllama.generation.sampling.chain import Candidates, Situation, repetitions, through_steps
from npllama.options import OFF, SAMPLERS, SamplingOptions

EDGE = 1e-9  # examples that rounding decides at the edge of a cut are left out
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=30).map(np.array)


def situation(history: list[int] | None = None, chance: float = 0.5, **options: Any) -> Situation:
    """What steps look at; the ids 3 and 7 hold a sequence breaker."""

    def unbroken(ids: list[int], most: int) -> int:
        broken = [n for n, v in enumerate(reversed(ids)) if v in (3, 7)]
        return min([most, *broken])

    at = dataclasses.replace(OFF, **options)
    return Situation(at, history or [], lambda: chance, lambda v: v in (3, 7), unbroken)


def candidates_of(logits: np.ndarray) -> Candidates:
    return Candidates(np.arange(len(logits)), np.asarray(logits, np.float64))


def applied(step: Callable[[Candidates, Situation], Candidates], logits: np.ndarray, at: Situation) -> Left:
    found = step(candidates_of(logits), at)
    return dict(zip(found.ids.tolist(), found.logits.tolist(), strict=True))


def all_of(logits: np.ndarray) -> Left:
    return dict(enumerate(map(float, logits)))


def same(found: Left, expected: Left) -> None:
    assert sorted(found) == sorted(expected)
    assert [found[v] for v in sorted(found)] == pytest.approx(
        [expected[v] for v in sorted(found)], rel=1e-12, abs=1e-12
    )


# ---------------------------------------------------------------- steps by definition


@given(logits=LOGITS, n=st.sampled_from([0.1, 0.5, 1.0, 2.5, 0.0, -1.0]))
def test_top_n_sigma(logits: np.ndarray, n: float) -> None:
    left = all_of(logits)
    mean = math.fsum(left.values()) / len(left)
    border = max(left.values()) - n * math.sqrt(math.fsum((l - mean) ** 2 for l in left.values()) / len(left))
    assume(all(abs(l - border) > EDGE for l in left.values()) or n <= 0)
    expected = {v: l for v, l in left.items() if l >= border} if n > 0 else left
    same(applied(chain.top_n_sigma, logits, situation(top_n_sigma=n)), expected)


@given(logits=LOGITS, p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.999, 1.0]))
def test_typical_p(logits: np.ndarray, p: float) -> None:
    left = all_of(logits)
    q = softmax(left)
    entropy = -math.fsum(x * math.log(x) for x in q.values())
    distance = {v: abs(-math.log(q[v]) - entropy) for v in left}
    by_distance = sorted(set(distance.values()))
    assume(all(b - a > EDGE for a, b in pairwise(by_distance)))
    order = sorted(best_first(left), key=distance.__getitem__)
    n, reached = 0, 0.0
    while n < len(order) and (p == 1 or reached <= p):
        reached += q[order[n]]
        n += 1
        assume(abs(reached - p) > EDGE)
    same(applied(chain.typ_p, logits, situation(typical_p=p)), {v: left[v] for v in order[:n]})


@given(
    logits=LOGITS,
    threshold=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.6]),
    probability=st.sampled_from([0.0, 0.3, 1.0]),
    chance=st.sampled_from([0.0, 0.29, 0.31, 0.99]),
)
def test_xtc(logits: np.ndarray, threshold: float, probability: float, chance: float) -> None:
    left = all_of(logits)
    q, order = softmax(left), best_first(left)
    assume(all(abs(x - threshold) > EDGE for x in q.values()))
    best = [v for v in order if q[v] >= threshold]
    if chance < probability and threshold <= 0.5 and len(best) > 1:
        left = {v: l for v, l in left.items() if v not in best[:-1]}
    at = situation(chance=chance, xtc_probability=probability, xtc_threshold=threshold)
    same(applied(chain.xtc, logits, at), left)


@given(
    logits=LOGITS,
    history=st.lists(st.integers(0, 5), max_size=12),
    repeat=st.sampled_from([1.0, 1.3, 0.5]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    presence=st.sampled_from([0.0, 0.75]),
    last=st.sampled_from([-1, 0, 1, 4, 64]),
)
def test_penalties(
    logits: np.ndarray, history: list[int], repeat: float, frequency: float, presence: float, last: int
) -> None:
    expected = all_of(logits)
    recent = history if last == -1 else history[len(history) - min(last, len(history)) :]
    for v, count in Counter(recent).items():
        if v in expected:
            l = expected[v]
            expected[v] = (l / repeat if l > 0 else l * repeat) - frequency * count - presence
    options = {"repeat_penalty": repeat, "frequency_penalty": frequency, "presence_penalty": presence}
    same(applied(chain.penalties, logits, situation(history, **options, repeat_last_n=last)), expected)


def repeated(history: list[int], v: int, limit: int) -> int:
    """How many of the last ids, at most `limit`, stand once more before a v: by trying."""
    for n in range(min(limit, len(history) - 1), 0, -1):
        for end in range(n - 1, len(history) - 1):
            if history[end + 1] == v and history[end - n + 1 : end + 1] == history[len(history) - n :]:
                return n
    return 0


@given(
    history=st.lists(st.integers(0, 4), max_size=24) | st.lists(st.integers(0, 1), max_size=24),
    allowed=st.integers(1, 4),
    base=st.sampled_from([1.0, 1.75, 3.0]),
    last=st.sampled_from([-1, 0, 3, 10]),
)
def test_dry(history: list[int], allowed: int, base: float, last: int) -> None:
    logits = np.linspace(-1, 1, 6)
    expected = all_of(logits)
    recent = history if last == -1 else history[len(history) - min(last, len(history)) :]
    breaker = max((i for i, v in enumerate(recent) if v == 3), default=-1)
    for v in expected:
        n = repeated(recent, v, len(recent) - 1 - breaker)
        if n >= allowed and v != 3:
            expected[v] -= 0.8 * base ** (n - allowed)
    options = {"dry_multiplier": 0.8, "dry_base": base, "dry_allowed_length": allowed, "dry_penalty_last_n": last}
    same(applied(chain.dry, logits, situation(history, **options)), expected)


def test_a_long_repetition_overflows_nothing_and_takes_no_time() -> None:
    history = [1, 2] * 20_000
    found = applied(chain.dry, np.zeros(4), situation(history, dry_multiplier=1.0, dry_penalty_last_n=-1))
    assert found[1] < -1e38
    assert found[1] > -math.inf
    assert found[0] == found[3] == 0
    assert repetitions(np.array(history), 100)[1].max() == 100


@pytest.mark.parametrize(("name", "off"), [("top_k", 0), ("top_k", 30), ("top_p", 1.0), ("min_p", 0.0), ("typ_p", 1.0)])
def test_a_step_that_is_off_changes_nothing(name: str, off: float) -> None:
    found = candidates_of(np.arange(30.0))
    option = {"typ_p": "typical_p"}.get(name, name)
    assert chain.STEPS[name](found, situation(**{option: off})) is found


# ---------------------------------------------------------------- the whole chain


@given(
    n=st.sampled_from([1, 5, 64, 300]),
    seed=st.integers(0, 500),
    rounded=st.booleans(),
    temperature=st.sampled_from([0.0, 1e-300, 0.7, 1.0, 1e300]),
    top_k_=st.sampled_from([0, 1, 7, 40]),
    top_p=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_the_chain_is_what_the_basic_options_do_faster(
    n: int, seed: int, rounded: bool, temperature: float, top_k_: int, top_p: float, min_p: float, penalty: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(n) * 3
    logits = (logits.round() if rounded else logits).astype(np.float32)
    history = rng.integers(0, n, 80).tolist()
    options = SamplingOptions(temperature, top_k_, top_p, min_p, penalty)
    ids, weights = candidates(logits, history, options)
    found = through_steps(candidates_of(logits), situation(history, **dataclasses.asdict(options)))
    found, expected = (
        dict(zip(i.tolist(), w / w.sum(), strict=True)) for i, w in ((found.ids, found.weights), (ids, weights))
    )
    for v in found.keys() | expected.keys():  # at the edge of top-p one more may be left
        assert found.get(v, 0.0) == pytest.approx(expected.get(v, 0.0), abs=2e-6) or top_p not in (0.0, 1.0)
    if top_p in (0.0, 1.0):
        assert found.keys() == expected.keys()


def test_the_order_of_the_steps_is_that_of_the_option() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    cut = {"temperature": 100.0, "top_p": 0.69}
    assert sorted(applied(through_steps, logits, situation(**cut))) == [0, 1]
    warm_first = applied(through_steps, logits, situation(**cut, samplers=("temperature", "top_p")))
    assert sorted(warm_first) == [0, 1, 2]
    none = applied(through_steps, logits, situation(**cut, samplers=()))
    same(none, all_of(logits))


def test_what_is_not_among_the_samplers_does_nothing() -> None:
    for name in SAMPLERS:
        on = {"temperature": 0.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1, "top_n_sigma": 0.1}
        on |= {"xtc_probability": 1.0, "xtc_threshold": 0.05, "dry_multiplier": 9.0, "presence_penalty": 9.0}
        logits, history = np.log([0.1, 0.3, 0.3, 0.2, 0.1]), [0, 1, 0, 1, 0]
        alone = applied(through_steps, logits, situation(history, **on, samplers=(name,)))
        expected = applied(chain.STEPS[name], logits, situation(history, **on))
        same(alone, expected)
        assert alone != all_of(logits)
