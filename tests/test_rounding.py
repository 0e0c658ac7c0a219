"""The search for scales: one order of addition, and the same bytes in NumPy and compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.numbers import FORMATS, named, rounding
from npllama.numbers.blocks import GROUP
from npllama.numbers.q4 import Q4_CODEBOOK
from npllama.numbers.rounding import Nearest, Search, sum_by_halves

needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)
WITH_RULE = [f.name for f in FORMATS.values() if f.quantized and f.rule is not None]


@pytest.fixture(autouse=True)
def in_numpy() -> Iterator[None]:
    """Nothing compiled at first, and afterwards what was there before."""
    before = {name: getattr(rounding._Compiled, name) for name in ("search", "n_rounded", "refused")}
    rounding._Compiled.search, rounding._Compiled.n_rounded, rounding._Compiled.refused = None, 0, False
    yield
    for name, value in before.items():
        setattr(rounding._Compiled, name, value)


@pytest.fixture(scope="module")
def search() -> Search:
    from npllama.execution.rounding import compiled_search

    return compiled_search()


def stored(dtype: str, w: np.ndarray, search: Search | None) -> dict[str, np.ndarray]:
    rounding._Compiled.search, rounding._Compiled.refused = search, True
    return named(dtype).encode(w, "f32")


def assert_the_same(dtype: str, w: np.ndarray, search: Search) -> None:
    expected, found = stored(dtype, w, None), stored(dtype, w, search)
    for part, array in expected.items():
        assert array.dtype == found[part].dtype
        np.testing.assert_array_equal(found[part], array, f"{dtype}: {part}")


def test_the_second_half_is_added_to_the_first() -> None:
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((50, GROUP)).astype(np.float32)
    expected = groups.copy()
    for half in (16, 8, 4, 2, 1):
        for i in range(half):
            expected[:, i] = [np.float32(a) + np.float32(b) for a, b in expected[:, [i, i + half]]]
    np.testing.assert_array_equal(sum_by_halves(groups), expected[:, 0])
    assert (sum_by_halves(groups) != np.add.accumulate(groups, axis=1)[:, -1]).any()  # other orders give other numbers


def test_a_table_says_which_level_is_nearest() -> None:
    x = np.arange(-45, 40, 0.125, dtype=np.float32)[:, None].repeat(GROUP, axis=1)
    levels = named("q4").rule.levels(x, np.ones(len(x), np.float32))[:, 0]
    distance = np.abs(x[:, :1] - np.array(Q4_CODEBOOK))
    assert set(levels.tolist()) == set(Q4_CODEBOOK)
    nearest = distance.min(axis=1)
    assert (np.abs(x[:, 0] - levels) - nearest <= 0.25).all()  # borders between levels are multiples of a half
    np.testing.assert_array_equal(Nearest(-3, 3).levels(x, np.ones(len(x), np.float32)), np.rint(x).clip(-3, 3))


@needs_numba
@pytest.mark.parametrize("dtype", WITH_RULE)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (50, 300), (3, 40, 64)])
def test_compiled_bytes_are_the_same(dtype: str, shape: tuple[int, ...], search: Search) -> None:
    rng = np.random.default_rng(len(shape))
    for spread in (0.02, 1.0, 1e4):
        assert_the_same(dtype, (spread * rng.standard_normal(shape)).clip(-6e4, 6e4).astype(np.float32), search)
        assert_the_same(dtype, (spread * rng.standard_t(2, shape)).clip(-6e4, 6e4).astype(np.float32), search)


@needs_numba
@pytest.mark.parametrize("dtype", WITH_RULE)
def test_compiled_bytes_of_odd_groups_are_the_same(dtype: str, search: Search) -> None:
    tiny = float(np.finfo(np.float32).tiny)
    values = [0.0, -0.0, 1.0, -1.0, 0.5, tiny, tiny / 8, 1e-37, 1e-30, 6e4, -6e4, 3.0, 127.0]
    groups = [[a] * GROUP for a in values] + [[a, b] * (GROUP // 2) for a in values for b in values]
    groups += [[a, *[b] * (GROUP - 1)] for a in values for b in values]
    w = np.array(groups, np.float32)
    assert_the_same(dtype, w, search)
    assert_the_same(dtype, w.reshape(1, -1), search)


@needs_numba
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(WITH_RULE), st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=3 * GROUP))
def test_compiled_bytes_of_any_numbers_are_the_same(dtype: str, numbers: list[float]) -> None:
    from npllama.execution.rounding import compiled_search

    assert_the_same(dtype, np.array([numbers], np.float32), compiled_search())


@needs_numba
def test_many_weights_are_rounded_by_compiled_code(monkeypatch: pytest.MonkeyPatch, search: Search) -> None:
    from npllama.execution import rounding as compiled

    w = np.ones((16, 64), np.float32)
    monkeypatch.setattr(compiled, "is_kept", lambda: False)
    named("q4").encode(w, "f32")
    assert rounding._Compiled.search is None
    monkeypatch.setattr(rounding, "COMPILED_FROM", rounding._Compiled.n_rounded + w.size)
    named("q4").encode(w, "f32")
    assert isinstance(rounding._Compiled.search, compiled.CompiledSearch)
    rounding._Compiled.search, rounding._Compiled.n_rounded = None, 0
    monkeypatch.setattr(compiled, "is_kept", lambda: True)
    named("q4").encode(w, "f32")
    assert isinstance(rounding._Compiled.search, compiled.CompiledSearch)


def test_numpy_rounds_where_it_is_asked_for_or_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.ones((16, 64), np.float32)
    monkeypatch.setattr(rounding, "COMPILED_FROM", 0)
    monkeypatch.setenv("NPLLAMA_BACKEND", "numpy")
    named("q4").encode(w, "f32")
    assert rounding._Compiled.search is None
    monkeypatch.delenv("NPLLAMA_BACKEND")
    monkeypatch.setattr(rounding.importlib.util, "find_spec", lambda name: None)
    named("q4").encode(w, "f32")
    assert rounding._Compiled.search is None


@needs_numba
def test_code_that_cannot_be_compiled_leaves_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    from npllama.execution import rounding as compiled

    def refuses() -> Search:
        raise compiled.threads.UnavailableError("no compiler")

    w = np.ones((16, 64), np.float32)
    expected = stored("q4", w, None)
    monkeypatch.setattr(rounding, "COMPILED_FROM", 0)
    monkeypatch.setattr(compiled, "compiled_search", refuses)
    rounding._Compiled.refused = False
    found = named("q4").encode(w, "f32")
    assert rounding._Compiled.refused
    np.testing.assert_array_equal(found["codes"], expected["codes"])
