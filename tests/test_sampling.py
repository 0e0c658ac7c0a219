"""The next id: against the formula by definition over the whole vocabulary, and draws against their probabilities."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from npllama.errors import ModelError, UsageError
from npllama.generation.sampling import basic as sampling
from npllama.generation.sampling.basic import Allowed, Draw, Numbers, candidates, draw_rows, sample, uniform
from npllama.options import SamplingOptions

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
ROUNDING = 1e-6  # of a probability: all V exponentials are float32 when top-k is off
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 1e-300, 0.01, 0.8, 1.0, 5.0, 1e300]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, 40, 1000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.05, 0.5, 1.0]),
    repeat_penalty=st.sampled_from([1.0, 1.1, 0.5, 100.0]),
)


def some_logits(n: int, seed: int, spread: float, rounded: bool) -> np.ndarray:
    """(n,) float32; rounded ones hold many ties."""
    logits = np.random.default_rng(seed).standard_normal(n) * spread
    return (logits.round() if rounded else logits).astype(np.float32)


def probabilities(logits: np.ndarray, recent: list[int], options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """The candidates for the next id, and their probabilities."""
    ids, weights = candidates(logits, recent, options)
    assert weights.max() == 1
    return ids, weights / weights.sum()


def by_definition(logits: np.ndarray, recent: list[int], options: SamplingOptions) -> dict[int, float]:
    """The documented formula, id by id in float64; rejects examples that rounding decides at the edge of a cut."""
    at = {v: float(logit) for v, logit in enumerate(logits)}
    for v in set(recent[-64:]):
        at[v] = float(np.float32(at[v] / options.repeat_penalty if at[v] > 0 else at[v] * options.repeat_penalty))
    order = sorted(at, key=lambda v: (-at[v], v))
    best = at[order[0]]
    if options.temperature == 0:
        return {order[0]: 1.0}
    if options.top_k > 0:
        order = order[: options.top_k]
    weight = {v: math.exp(at[v] - best) for v in order}
    total = math.fsum(weight.values())
    left, reached = order, 0.0
    if options.top_p < 1:
        for n, v in enumerate(order, 1):
            reached += weight[v] / total
            assume(abs(reached - options.top_p) > ROUNDING)
            if reached > options.top_p:
                left = order[:n]
                break
    assume(all(weight[v] == options.min_p or abs(weight[v] - options.min_p) > 1e-12 for v in left) or not options.min_p)
    left = [v for v in left if weight[v] >= options.min_p]
    heated = {v: math.exp((at[v] - best) / options.temperature) for v in left}
    total = math.fsum(heated.values())
    return {v: heat / total for v, heat in heated.items()}


@given(
    n=st.sampled_from([1, 2, 5, 63, 64, 65, 512, 1000, 4099]),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    rounded=st.booleans(),
    options=OPTIONS,
)
@example(n=4099, seed=0, spread=3.0, rounded=False, options=SamplingOptions())
@example(n=4099, seed=0, spread=3.0, rounded=True, options=SamplingOptions())
@example(n=4099, seed=0, spread=0.3, rounded=False, options=SamplingOptions(top_k=0, min_p=0.0))
@example(n=4099, seed=0, spread=3.0, rounded=False, options=SamplingOptions(top_k=0))
@example(n=512, seed=0, spread=3.0, rounded=True, options=SamplingOptions(temperature=1e-300, **OFF))
@example(n=512, seed=0, spread=3.0, rounded=True, options=SamplingOptions(temperature=1e300, **OFF))
def test_probabilities_are_those_of_the_formula(
    n: int, seed: int, spread: float, rounded: bool, options: SamplingOptions
) -> None:
    logits = some_logits(n, seed, spread, rounded)
    recent = [int(i) for i in np.random.default_rng(seed).integers(0, n, 80)]
    expected = by_definition(logits, recent, options)
    ids, p = probabilities(logits, recent, options)
    assert (ids.dtype, p.dtype) == (np.int64, np.float64)
    assert sorted(ids) == sorted(expected)
    np.testing.assert_allclose(p, [expected[v] for v in ids.tolist()], rtol=2e-5, atol=ROUNDING)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_the_candidates_come_with_the_most_probable_first() -> None:
    logits = some_logits(512, 1, 3.0, rounded=True)
    ids, p = probabilities(logits, [], SamplingOptions())
    assert ids.tolist() == sorted(ids.tolist(), key=lambda v: (-logits[v], v))
    assert (np.diff(p) <= 0).all()


@pytest.mark.parametrize("k", [1, 7, 40, 99])
@pytest.mark.parametrize("n", [100, 6401])
def test_of_equal_logits_at_the_border_of_top_k_the_lower_ids_stay(n: int, k: int) -> None:
    logits = np.full(n, -1.5, dtype=np.float32)
    logits[90] = 2
    ids, _ = probabilities(logits, [], SamplingOptions(**{**OFF, "top_k": k}))
    assert ids.tolist() == [90, *[v for v in range(n) if v != 90][: k - 1]]


@pytest.mark.parametrize("top_k", [0, -1, -7, 300, 301])
def test_top_k_of_zero_or_less_or_of_all_ids_is_off(top_k: int) -> None:
    ids, _ = probabilities(some_logits(300, 1, 1.0, False), [], SamplingOptions(**{**OFF, "top_k": top_k}))
    assert len(ids) == 300


def test_top_p_counts_before_the_temperature() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    ids, _ = probabilities(logits, [], SamplingOptions(temperature=100, top_k=0, top_p=0.75, min_p=0))
    assert ids.tolist() == [0, 1]


def test_top_p_counts_what_top_k_leaves() -> None:
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2])).astype(np.float32)
    ids, _ = probabilities(logits, [], SamplingOptions(top_k=2, top_p=0.6, min_p=0))  # 0.4 of 0.6 is 0.67
    assert ids.tolist() == [0]


def test_top_p_and_min_p_always_leave_the_best() -> None:
    for options in (SamplingOptions(top_p=0.0), SamplingOptions(min_p=1.0)):
        logits = some_logits(100, 2, 0.01, False)
        assert probabilities(logits, [], options)[0].tolist() == [logits.argmax()]


def test_min_p_is_relative_to_the_most_probable() -> None:
    logits = np.log(np.array([0.1, 0.051, 0.049] + [0.01] * 80)).astype(np.float32)
    ids, _ = probabilities(logits, [], SamplingOptions(top_k=0, top_p=1, min_p=0.5))
    assert ids.tolist() == [0, 1]


# --- greedy, penalty


def test_greedy_takes_the_lowest_id_of_the_largest_logits() -> None:
    logits = np.array([0, 3, -1, 3, 3], dtype=np.float32)
    assert sample(logits, [], SamplingOptions(temperature=0), seed=1, completion=0, position=0) == 1


def test_greedy_looks_at_the_penalised_logits() -> None:
    logits = np.array([0, 3, -1, 2.9], dtype=np.float32)
    assert sample(logits, [1], SamplingOptions(temperature=0, repeat_penalty=1.1), 1, 0, 0) == 3


def test_the_penalty_divides_above_zero_and_multiplies_below_once_per_id() -> None:
    logits = np.array([2, -2, 0, 1], dtype=np.float32)
    _, p = probabilities(logits, [0, 1, 2, 0, 1], SamplingOptions(temperature=1, repeat_penalty=2, **OFF))
    expected = np.exp([1.0, -4, 0, 1])
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-6)


def test_the_penalty_forgets_what_is_more_than_64_ids_ago() -> None:
    logits = np.array([1, 0.9, 0, 0], dtype=np.float32)
    greedy = SamplingOptions(temperature=0, repeat_penalty=2)
    assert sample(logits, [0] + [3] * 64, greedy, 1, 0, 0) == 0
    assert sample(logits, [0] + [3] * 63, greedy, 1, 0, 0) == 1


def test_an_enormous_penalty_stays_finite() -> None:
    logits = np.array([-3e38, -1, 5], dtype=np.float32)
    _, p = probabilities(logits, [0, 1, 2], SamplingOptions(repeat_penalty=1e300, **OFF))
    assert p.tolist() == [0, 0, 1]


def test_the_logits_are_left_as_they_are() -> None:
    logits = some_logits(200, 3, 2.0, False)
    logits.flags.writeable = False
    probabilities(logits, [1, 2], SamplingOptions(repeat_penalty=1.5))


# --- draws


def test_draws_follow_their_probabilities() -> None:
    logits = some_logits(40, 4, 1.5, False)
    options, n = SamplingOptions(temperature=1.3), 20_000
    ids, p = probabilities(logits, [], options)
    drawn = np.bincount([sample(logits, [], options, 7, 0, position) for position in range(n)], minlength=40)
    chi_square = float(((drawn[ids] - n * p) ** 2 / (n * p)).sum())
    assert drawn[ids].sum() == n
    assert chi_square < len(ids) + 5 * math.sqrt(2 * len(ids))  # mean and five standard deviations


@pytest.mark.parametrize("axis", ["seed", "completion", "position"])
def test_the_numbers_drawn_are_uniform_along_each_axis(axis: str) -> None:
    at = {"seed": 11, "completion": 3, "position": 5}
    u = np.sort([uniform(**{**at, axis: i}) for i in range(4000)])
    assert u[0] >= 0
    assert u[-1] < 1
    assert np.abs(u - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov, 1 %


def test_seed_completion_and_position_each_change_the_number() -> None:
    assert len({uniform(1, 2, 3), uniform(2, 1, 3), uniform(1, 3, 2), uniform(3, 2, 1), uniform(2**64 - 1, 2, 3)}) == 5


def test_the_number_is_that_of_philox_by_its_paper() -> None:
    """Ten rounds of Salmon et al. 2011 on the counter (position + 1, 0, 0, 0), where NumPy begins."""
    a, b, c, d, keys = 10, 0, 0, 0, (5, 7)
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ keys[0], right % 2**64, (left >> 64) ^ d ^ keys[1], left % 2**64
        keys = ((keys[0] + 0x9E3779B97F4A7C15) % 2**64, (keys[1] + 0xBB67AE8584CAA73B) % 2**64)
    assert uniform(seed=5, completion=7, position=9) == (a >> 11) / 2**53


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    logits, options = some_logits(300, 5, 1.0, False), SamplingOptions()
    alone = sample(logits, [], options, 1, 2, 30)
    assert [sample(logits, [], options, 1, 2, i) for i in range(40)][30] == alone


def test_the_global_generator_of_numpy_is_not_touched() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (the global one is meant)
    sample(some_logits(300, 5, 1.0, False), [], SamplingOptions(), 1, 2, 3)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002 (the global one is meant)


def test_the_highest_number_draws_the_last_candidate_that_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *_: 1 - 2.0**-53)
    for n in range(1, 200):  # many sums, rounded either way
        logits = np.append(some_logits(n, n, 2.0, False), np.float32(-1e30))
        assert sample(logits, [], SamplingOptions(temperature=1, **OFF), 0, 0, 0) == n - 1


def test_the_lowest_number_draws_the_first_candidate_that_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *_: 0.0)
    logits = np.array([-1e30, 0, 1], dtype=np.float32)
    assert sample(logits, [], SamplingOptions(temperature=1, **OFF), 0, 0, 0) == 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=rf"seed='{seed}': needs a whole number from 0 to 2\^64 - 1"):
        sample(np.zeros(3, dtype=np.float32), [], SamplingOptions(), seed, 0, 0)


# --- rows


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0),
        SamplingOptions(repeat_penalty=1.3),
        SamplingOptions(top_p=1.0, min_p=0.0),
        SamplingOptions(top_p=0.0),
        SamplingOptions(temperature=1e-300),
        SamplingOptions(temperature=50.0, min_p=0.0),
        SamplingOptions(**OFF),
    ],
)
@pytest.mark.parametrize("n_ids", [600, 500])
def test_ids_drawn_for_rows_together_are_those_of_each_row(options: SamplingOptions, n_ids: int) -> None:
    logits = np.array([some_logits(600, seed, 2.0, seed % 2 == 0) for seed in range(60)])
    allowed, recent = Allowed(n_ids, [599]), [*range(0, 500, 7)]
    numbers = [Numbers(seed, 3) for seed in range(60)]
    draws = [Draw(allowed, recent, options, numbers[i].at(70 + i)) for i in range(60)]
    ids = [allowed.id(sample(allowed.logits(row), recent, options, i, 3, 70 + i)) for i, row in enumerate(logits)]
    assert draw_rows(logits, draws) == ids
    mixed = [draw if i % 3 else draw._replace(options=SamplingOptions(top_k=5)) for i, draw in enumerate(draws)]
    assert [token for i, token in enumerate(draw_rows(logits, mixed)) if i % 3] == [
        t for i, t in enumerate(ids) if i % 3
    ]


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=0, repeat_penalty=2.0)])
def test_logits_that_are_not_finite_spoil_their_own_row_only(options: SamplingOptions) -> None:
    logits = np.array([some_logits(600, seed, 2.0, False) for seed in range(4)])
    draws = [Draw(Allowed(600), [1, 2], options, 0.5) for _ in range(4)]
    whole = draw_rows(logits, draws)
    logits[2, 1] = np.inf
    assert draw_rows(logits, draws) == [*whole[:2], None, whole[3]]


def test_numbers_computed_ahead_are_those_of_their_positions() -> None:
    numbers = Numbers(5, 2**64 - 1)
    for position in (3, 4, 200, 66, 67, 0, 1 << 40):
        assert numbers.at(position) == uniform(5, 2**64 - 1, position)


# --- what is refused


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0),
        SamplingOptions(top_k=0),
        SamplingOptions(repeat_penalty=1.3),
        SamplingOptions(temperature=0, repeat_penalty=1.3),
        SamplingOptions(**OFF),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(value: float, options: SamplingOptions) -> None:
    logits = some_logits(1000, 6, 1.0, False)
    logits[700] = value
    with pytest.raises(ModelError, match=r"logits are not all finite .* are needed .* check the model's files"):
        sample(logits, [700], options, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "values", "needed"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True, "1", None, 1j, 10**400], "a finite number of at least 0"),
        ("top_k", [1.0, math.nan, True, "40", None], "a whole number"),
        ("top_p", [-0.1, 1.1, math.nan, True, "1", None], "a number from 0 to 1"),
        ("min_p", [-0.1, 1.1, math.nan, False, "1", None], "a number from 0 to 1"),
        ("repeat_penalty", [0, -1.0, math.nan, math.inf, True, "1", None, 10**400], "a finite number above 0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, values: list[object], needed: str) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{name}='.*': needs {needed}"):
            SamplingOptions(**{name: value})


def test_options_may_be_numbers_of_numpy() -> None:
    options = SamplingOptions(np.float32(0.5), np.int64(3), np.float64(0.5), np.float32(0), np.float16(1))
    assert len(probabilities(some_logits(100, 7, 1.0, False), [], options)[0]) <= 3


def test_options_may_be_fractions() -> None:
    assert SamplingOptions(Fraction(1, 2), 3, Fraction(1, 2)) == SamplingOptions(0.5, 3, 0.5)
    probabilities(some_logits(100, 7, 1.0, False), [], SamplingOptions(Fraction(1, 2)))


# ---------------------------------------------------------------- ids that may be drawn


def test_allowed_ids_are_the_first_and_the_named_ones_in_their_order() -> None:
    logits = some_logits(100, 8, 1.0, False)
    few = Allowed(90, beyond=[95, 2, 93])
    ids = [*range(90), 93, 95]
    assert np.array_equal(few.logits(logits), logits[ids])
    assert [few.id(place) for place in range(92)] == ids
    assert few.indices([3, 95, 91, 89, 93, 99]) == [3, 91, 89, 90]
    assert np.shares_memory(Allowed(90).logits(logits), logits)
    assert np.array_equal(Allowed(100).logits(logits), logits)


@pytest.mark.parametrize("beyond", [[], [299]])
@pytest.mark.parametrize(
    "options", [SamplingOptions(temperature=0), SamplingOptions(), SamplingOptions(temperature=3.0, **OFF)]
)
def test_a_draw_among_allowed_ids_is_the_draw_from_their_logits(beyond: list[int], options: SamplingOptions) -> None:
    logits = some_logits(300, 9, 1.0, False)
    logits[260:299] = 50.0  # what would always be drawn
    few = Allowed(260, beyond)
    ids = [*range(260), *beyond]
    for position in range(50):
        recent = few.indices([*range(position), 280, 299])
        found = few.id(sample(few.logits(logits), recent, options, 7, 0, position))
        assert found in ids
        assert found == ids[sample(logits[ids], recent, options, 7, 0, position)]
