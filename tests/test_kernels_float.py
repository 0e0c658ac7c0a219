"""The compiled products of f32, f16, bf16: one order of addition, whatever is computed beside it or how it is cut."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="compiled kernels: numba is not installed")

# E402: these import numba, which may not be there.
from compiled_ops import OPS  # noqa: E402
from helpers import as_mapped  # noqa: E402

from npllama.execution.kernels.float_linear import MAX_KEPT_TOKENS, MAX_STRIP_COLUMNS, MIN_COPIED_TOKENS  # noqa: E402
from npllama.execution.kernels.target import WIDTH  # noqa: E402
from npllama.numbers.bf16 import BF16, bf16_bits  # noqa: E402
from npllama.numbers.f16 import F16, f16_bits  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


FORMATS: dict[str, Callable[[np.ndarray], np.ndarray | F16 | BF16]] = {
    "f32": as_mapped,
    "f16": lambda w: as_mapped(F16(f16_bits(w))),
    "bf16": lambda w: as_mapped(BF16(bf16_bits(w))),
}
MANY = MAX_KEPT_TOKENS + MIN_COPIED_TOKENS + 3
"""Tokens that are multiplied in every way there is: by a copy of w and in place, in two turns where columns are cut."""

# Rows that fill no tile, fewer rows than a tile has; columns that fill no vector, fewer columns than one has lanes.
SHAPES = [(1, 1), (2, WIDTH - 1), (3, WIDTH), (40, WIDTH + 1), (45, 172), (131, MAX_STRIP_COLUMNS + 5), (50, 2077)]

every = pytest.mark.parametrize("number_format", FORMATS)


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def problem(number_format, rows, columns, tokens):
    rng = np.random.default_rng(rows * 1000 + columns)
    w = rng.standard_normal((rows, columns), dtype=np.float32)
    return rng.standard_normal((tokens, columns), dtype=np.float32), FORMATS[number_format](w)


def in_lanes(x, w):
    """The order that float_tile.py documents, for products and sums of them that float64 holds exactly."""
    lanes, rest = np.zeros(WIDTH), len(x) % WIDTH
    for k in range(0, len(x) - rest, WIDTH):
        lanes = np.float32(lanes + x[k : k + WIDTH] * w[k : k + WIDTH])
    if rest:
        lanes[WIDTH - rest :] = np.float32(lanes[WIDTH - rest :] + x[-rest:] * w[-rest:])
    while len(lanes) > 1:
        low, high = np.float32(np.split(lanes, 2))
        lanes = low + high
    return lanes[0]


@every
@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH, 77, MAX_STRIP_COLUMNS + 5])
def test_the_order_is_the_documented_one(columns, number_format):
    rng = np.random.default_rng(columns)  # seven bits: products are exact, and sums of them are rounded in float32 only
    x = rng.integers(-127, 128, (MIN_COPIED_TOKENS + 1, columns)) * np.exp2(rng.integers(-9, 9, columns))
    w = rng.integers(-127, 128, (7, columns)) * np.exp2(rng.integers(-6, 6, columns))
    found = OPS["linear"](np.float32(x), FORMATS[number_format](np.float32(w)))
    assert np.array_equal(found, [[in_lanes(a, b) for b in w] for a in x])


@every
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_token_has_the_same_bits_alone_and_in_company_of_any_size(rows, columns, number_format):
    x, w = problem(number_format, rows, columns, MANY)
    alone = np.concatenate([OPS["linear"](x[t : t + 1], w) for t in range(MANY)])
    for tokens in (2, 3, 4, 5, 8, MIN_COPIED_TOKENS - 1, MIN_COPIED_TOKENS, MIN_COPIED_TOKENS + 1, MANY):
        assert np.array_equal(OPS["linear"](x[:tokens], w), alone[:tokens]), tokens


@every
def test_a_prompt_that_is_cut_anywhere_has_the_same_bits(number_format):
    x, w = problem(number_format, 67, 1205, MANY)
    whole, rng = OPS["linear"](x, w), np.random.default_rng(1)
    for _ in range(20):
        cuts = [0, *sorted(rng.choice(np.arange(1, MANY), 5, replace=False)), MANY]
        parts = [OPS["linear"](x[a:b], w) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole)


@every
def test_other_rows_in_any_order_change_no_bit(number_format):
    x, w = problem(number_format, 67, 172, MANY)
    whole, rng = OPS["linear"](x, w), np.random.default_rng(2)
    for n in (3, 37, 100):
        mixed = rng.permutation(MANY)[:n]
        assert np.array_equal(OPS["linear"](x[mixed], w), whole[mixed])


@every
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_matrices_side_by_side_have_the_bits_of_each_alone(tokens, number_format):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((tokens, 172), dtype=np.float32)
    ws = tuple(FORMATS[number_format](rng.standard_normal((n, 172), dtype=np.float32)) for n in (300, 2, 61))
    for y, w in zip(OPS["linears"](x, ws), ws, strict=True):
        assert np.array_equal(y, OPS["linear"](x, w))


@every
def test_one_thread_and_two_give_the_same_bits(number_format):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor: there is no second thread")
    x, w = problem(number_format, 301, 288, 70)
    found = []
    for n_threads in (1, 2):
        numba.set_num_threads(n_threads)
        found.append(OPS["linear"](x, w))
    assert np.array_equal(*found)


@every
def test_no_tokens_and_no_rows_are_nothing(number_format):
    x, w = problem(number_format, 40, 72, 3)
    assert OPS["linear"](x[:0], w).shape == (0, 40)
    assert OPS["linear"](x, FORMATS[number_format](np.empty((0, 72), np.float32))).shape == (3, 0)


@every
@pytest.mark.parametrize("tokens", [6, 40])
def test_a_row_that_is_not_finite_stays_alone(tokens, number_format):
    x, w = problem(number_format, 40, 77, tokens)
    expected = OPS["linear"](x, w)
    x[3, 50] = np.nan
    found, others = OPS["linear"](x, w), np.arange(tokens) != 3
    assert np.isnan(found[3]).all()
    assert np.array_equal(found[others], expected[others])
