"""The compiled products of quantized formats: what ops.linear defines, to the bit, whatever is computed beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_products
from helpers import quantize
from quantized_products import multiply

numba = pytest.importorskip("numba", reason="compiled kernels: numba is not installed")

# E402: these import numba, which may not be there.
from npllama import ops  # noqa: E402
from npllama.execution.kernels import amx, int8_input, int8_linear, int8_narrow  # noqa: E402
from npllama.execution.kernels.flags import SERIAL  # noqa: E402
from npllama.execution.kernels.int8_dot import DOT  # noqa: E402
from npllama.execution.kernels.target import FEATURES, TRIPLE  # noqa: E402
from npllama.numbers import FORMATS  # noqa: E402
from npllama.numbers.activations import quantize_rows  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


SHAPES = [(1, 1), (7, 8), (16, 32), (17, 33), (512, 64), (64, 172), (172, 64), (48, 288)]
MANY = 43
"""Tokens that are multiplied in every way there is: by AMX, in a wide tile, and one by one."""

KERNELS = ("q8", "q6", "q4", "q4_1", "iq4_nl", "q5_1")
"""Formats that between them have every way to unpack codes and to scale."""

every = pytest.mark.parametrize("number_format", KERNELS)
all_formats = pytest.mark.parametrize("number_format", [own.name for own in FORMATS.values() if own.quantized])
both = pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def problem(number_format: str, rows: int, columns: int, tokens: int) -> tuple[np.ndarray, Any]:
    rng = np.random.default_rng(rows * 1000 + columns)
    w = rng.standard_normal((rows, columns), dtype=np.float32)
    return rng.standard_normal((tokens, columns), dtype=np.float32), quantize(w, number_format)


# ---------------------------------------------------------------- against the definition


@all_formats
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_are_those_that_ops_linear_defines(rows, columns, number_format):
    x, w = problem(number_format, rows, columns, MANY)
    assert np.array_equal(multiply(x, w), ops.linear(x, w))


@every
@pytest.mark.parametrize("tokens", range(MANY))
def test_any_number_of_tokens_is_multiplied(tokens, number_format):
    x, w = problem(number_format, 40, 72, tokens)
    y = multiply(x, w)
    assert y.shape == (tokens, 40)
    assert np.array_equal(y, ops.linear(x, w))


@every
def test_rows_of_very_different_size_are_each_as_exact(number_format):
    x, w = problem(number_format, 40, 72, 6)
    x[0] *= 1e-20
    x[1] *= 1e20
    x[2] = 0
    x[3, 32:64] = 0
    x[4] = 1e-39
    found = multiply(x, w)
    assert np.array_equal(found, ops.linear(x, w))
    assert not found[[2, 4]].any()


@both
def test_zero_groups_of_weights_add_nothing(number_format):
    x, w = problem(number_format, 40, 72, MANY)
    w.scales[:, 1] = 0
    assert np.array_equal(multiply(x, w), ops.linear(x, w))


def extreme_codes(number_format: str) -> tuple[np.ndarray, Any]:
    """The largest codes of either sign on both sides: where sums of 16 bits would overflow if any did."""
    x = np.where(np.random.default_rng(0).random((MANY, 64)) < 0.5, np.float32(-1), np.float32(1))
    x[:2] = [[1], [-1]]
    own, rng = FORMATS[number_format], np.random.default_rng(1)
    arrays = {part: np.zeros(spec.shape, spec.dtype) for part, spec in own.arrays((32, 64)).items()}
    codes = arrays["codes"].view(np.uint8)
    lowest = {"q8": 0x81, "q8_0": 0x80}.get(number_format, 0)  # -127, -128
    ends = [lowest, 0x7F] if number_format.startswith("q8") else [0x00, 0xFF, 0x0F, 0xF0]
    codes[:] = rng.choice(np.array(ends, np.uint8), codes.shape)
    codes[0, 0], codes[0, 1], codes[1, 0, ::2], codes[1, 0, 1::2] = ends[0], ends[1], ends[0], ends[1]
    if "factors" in arrays:
        arrays["scales"][:], arrays["factors"][:] = 0x60, 0x4580  # 2^-12 and 2^12
    else:
        arrays["scales"][:] = np.float16(1).view(np.uint16)
    return x, own.assemble(arrays, (32, 64))


@all_formats
def test_the_largest_codes_do_not_overflow(number_format):
    x, w = extreme_codes(number_format)
    assert np.array_equal(multiply(x, w), ops.linear(x, w))


@every
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_alone_and_gives_nothing_finite(value, number_format):
    x, w = problem(number_format, 40, 72, MANY)
    expected = multiply(x, w)
    x[3, 50] = value
    found = multiply(x, w)
    assert not np.isfinite(found[3]).any()
    others = np.arange(MANY) != 3
    assert np.array_equal(found[others], expected[others])


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4", "q4_1"])
def test_a_layer_of_stacked_weights_is_multiplied_where_it_lies(number_format):
    rng = np.random.default_rng(3)
    w = quantize(rng.standard_normal((3, 20, 40), dtype=np.float32), number_format)
    x = rng.standard_normal((2, 40), dtype=np.float32)
    assert np.array_equal(multiply(x, ops.layer(w, 1)), ops.linear(x, ops.layer(w, 1)))


@numba.njit(**SERIAL)
def quantize_all_tiles(x, lowest, start, into):
    wanted = int8_input.Wanted(lowest, start, into.wide.size > 0)
    int8_input.quantize_tiles(x, x.shape[1], wanted, into, 0, int8_input.n_tiles(into.n_tokens))


@pytest.mark.parametrize("columns", [32, 40, 172])
def test_input_is_quantized_to_the_very_codes_of_the_definition(columns):
    x = np.random.default_rng(4).standard_normal((13, columns), dtype=np.float32)
    x[1, :5] = [127, 0.5, 1.5, 2.5, -0.5]  # halves, where the row's scale is 1
    x[2] = 0
    G = -(-columns // 32)
    into = int8_input.QuantizedInput(
        np.empty(16 * G * 32, np.int8),
        np.empty(16 * G, np.float32),
        np.empty(16 * G, np.int32),
        np.empty(16 * G * int8_narrow.STARTS if int8_narrow.USED else 0, np.int32),
        np.empty(16 * G * 32 if int8_narrow.USED else 0, np.int16),
        len(x),
    )
    quantize_all_tiles(x, np.int32(-3), np.int32(29), into)

    def wide(a, *end):
        return a.reshape(2, G, 8, *end).swapaxes(1, 2).reshape(16, G, *end)[:13]

    codes, scales = quantize_rows(x)
    assert np.array_equal(wide(into.codes, 32), codes)
    assert np.array_equal(wide(into.scales), scales)
    assert np.array_equal(wide(into.corrections), -3 * codes.sum(axis=-1, dtype=np.int32))
    if int8_narrow.USED:
        assert np.array_equal(wide(into.wide, 32), codes)
        starts = wide(into.starts, int8_narrow.STARTS)
        halves = codes.reshape(13, G, 2, 4, 2, 2).sum(axis=(3, 5), dtype=np.int16)  # by pairs of columns
        assert np.array_equal(starts[..., 0], 29 * codes.sum(axis=-1, dtype=np.int32))
        assert np.array_equal(np.ascontiguousarray(starts[..., 1:]).view(np.int16).reshape(halves.shape), -32 * halves)


# ---------------------------------------------------------------- the same bits


@every
@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 64])
def test_chunks_of_any_length_give_the_same_bits_as_all_at_once(chunk, number_format):
    x, w = problem(number_format, 300, 172, 131)
    whole = multiply(x, w)
    parts = [multiply(x[t : t + chunk], w) for t in range(0, len(x), chunk)]
    assert np.array_equal(np.concatenate(parts), whole)


@both
def test_one_thread_and_two_give_the_same_bits(number_format):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor: there is no second thread")
    x, w = problem(number_format, 1030, 288, 70)
    assert len(x) * 1030 * 288 > int8_linear.SERIAL_BELOW
    found = []
    for n_threads in (1, 2):
        numba.set_num_threads(n_threads)
        found.append(multiply(x, w))
    assert np.array_equal(*found)


def run_elsewhere(**environment: str) -> dict:
    """What quantized_products.py prints in a process of its own."""
    program = Path(__file__).with_name("quantized_products.py")
    paths = os.pathsep.join([str(program.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def without(*unwanted: str) -> str:
    """The target's features with those that begin like these switched off."""
    return ",".join(f"-{f[1:]}" if f[1:].startswith(unwanted) else f for f in FEATURES.split(","))


# How codes are multiplied, by vectors and by AMX, in a process with these variables. Four threads need no process of
# their own: in test_same_bits.py nothing else is different.
HERE = (DOT, amx.USED)
ELSEWHERE: dict[str, tuple[tuple[str, bool], dict[str, str]]] = {
    "plain": (("plain", False), {"NPLLAMA_PLAIN_KERNELS": "1", "NUMBA_NUM_THREADS": "4"}),
    "generic": (("plain", False), {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}),
}
if TRIPLE.startswith(("x86", "i386", "i686")) and "+avx2" in FEATURES:
    ELSEWHERE["avx2"] = (
        ("avx2", False),
        {
            "NUMBA_CPU_NAME": "znver3",  # asks for memory in the other way
            "NUMBA_CPU_FEATURES": without("avx512", "avxvnni", "avx10", "amx"),
            "NPLLAMA_PLAIN_KERNELS": "0",
            "NUMBA_NUM_THREADS": "4",
        },
    )
if amx.USED:
    ELSEWHERE["no AMX"] = ((DOT, False), {"NUMBA_CPU_FEATURES": without("amx"), "NUMBA_NUM_THREADS": "4"})


@pytest.mark.slow("compile the products of all formats for other instructions, each in a process of its own")
def test_other_threads_and_other_instructions_give_the_same_bits():
    here = quantized_products.report()
    assert (here["dot"], here["amx"]) == HERE
    with ThreadPoolExecutor(2) as pool:  # compiling is most of their work
        running = {name: pool.submit(run_elsewhere, **variables) for name, (_, variables) in ELSEWHERE.items()}
    found = {name: process.result() for name, process in running.items()}
    for name, (form, _) in ELSEWHERE.items():
        assert (found[name]["dot"], found[name]["amx"]) == form, name
        assert found[name]["digests"] == here["digests"], name
