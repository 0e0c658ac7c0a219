"""A number format that the package does not have: its kernels are registered by one call, and multiply and embed."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import quantize

numba = pytest.importorskip("numba", reason="compiled kernels: numba is not installed")

# E402: these import numba, which may not be there.
from compiled_ops import OPS  # noqa: E402

from npllama import ops  # noqa: E402
from npllama.execution.kernels import amx  # noqa: E402
from npllama.execution.kernels.flags import INLINE, INNER  # noqa: E402
from npllama.execution.kernels.formats import KERNELS  # noqa: E402
from npllama.execution.kernels.int8_dot import dot8, load_codes, make_lookup, store_levels  # noqa: E402
from npllama.execution.kernels.int8_linear import register_grouped  # noqa: E402
from npllama.numbers import format_of  # noqa: E402
from npllama.numbers.groups import Grouped  # noqa: E402
from npllama.numbers.q4 import Q4_CODEBOOK  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


LEVELS = tuple(range(-30, 34, 4))
LOWEST_UNPACKED = LEVELS[0] if amx.USED else 0
TABLE = np.array(LEVELS, np.float32)


class Even(NamedTuple):
    """As Q4, with evenly spaced levels."""

    codes: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    rows: int
    columns: int


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Any:
    low, high = make_lookup(LEVELS)

    @numba.njit(**INLINE)
    def dot_group(dots, codes, begin, x, at, tile_stride):
        for v in range(4):
            pairs = load_codes(codes, begin + v * 64)
            dots = dot8(dots, low(pairs), high(pairs), x, at + v * 8, tile_stride)
        return dots

    @numba.njit(**INLINE)
    def unpack_group(codes, begin, levels, at):
        for v in range(4):
            pairs = load_codes(codes, begin + v * 64)
            store_levels(levels, at + v * 128, low(pairs), LOWEST_UNPACKED)
            store_levels(levels, at + v * 128 + 64, high(pairs), LOWEST_UNPACKED)

    @numba.njit(**INNER)
    def level(codes, b, g, r, k):
        pair = codes[b, g, k // 8 * 64 + r * 4 + k % 4]
        shift = 4 if k % 8 >= 4 else 0
        return TABLE[(pair >> shift) & 15]

    register_grouped(Even, 4, LEVELS[0], dot_group, unpack_group, level)
    yield
    del KERNELS[Even]


def weights() -> tuple[Even, Grouped]:
    """A matrix in the new format, and unpacked for NumPy."""
    w = quantize(np.random.default_rng(0).standard_normal((70, 90), dtype=np.float32), "q4")
    unpacked = format_of(w).for_products(w)
    levels = TABLE[np.searchsorted(Q4_CODEBOOK, unpacked.levels)]
    return Even(*w), unpacked._replace(levels=levels)


@pytest.mark.parametrize("tokens", [1, 9, 43])
def test_a_registered_format_is_multiplied_as_its_levels_say(tokens: int) -> None:
    w, unpacked = weights()
    x = np.random.default_rng(tokens).standard_normal((tokens, 90), dtype=np.float32)
    assert np.array_equal(OPS["linear"](x, w), ops.linear(x, unpacked))


def test_a_registered_format_is_embedded_row_by_row() -> None:
    w, unpacked = weights()
    groups = unpacked.levels * unpacked.scales[:, None, :] * unpacked.factors  # (G, GROUP, N)
    expected = groups.reshape(-1, 70).T[:, :90]
    ids = np.array([0, 69, 17, 17])
    assert np.array_equal(OPS["embed"](w, ids), expected[ids])
