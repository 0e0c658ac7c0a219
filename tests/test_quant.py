"""Number formats: what their numbers mean, how near they come, what they refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import quantize

from npllama import ops
from npllama.numbers import UnstorableError, format_of, widen, widen_rows
from npllama.numbers.activations import quantize_rows
from npllama.numbers.bf16 import BF16, bf16_bits
from npllama.numbers.blocks import BLOCK_ROWS, GROUP, SCALES
from npllama.numbers.f16 import F16
from npllama.numbers.q4 import Q4, Q4_CODEBOOK
from npllama.numbers.q6 import Q6
from npllama.numbers.q8 import Q8

Quantized = Q8 | Q6 | Q4

SHAPES = [(1, 1), (7, 8), (16, 32), (17, 33), (64, 172), (172, 64), (48, 288)]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(w: np.ndarray, number_format: str) -> float:
    """Squared error of a format as a share of the squared weights."""
    return float(np.square(widen(quantize(w, number_format)) - w).sum() / np.square(w).sum())


def plain_q4_error(w: np.ndarray) -> float:
    """The same for sixteen even levels, -8 to 7, with the group's largest number on -8 (the common way)."""
    groups = w.reshape(-1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = (largest / -8).astype(np.float16).astype(np.float32)
    near = np.clip(np.floor(groups / scale + 8.5), 0, 15) - 8
    return float(np.square(near * scale - groups).sum() / np.square(groups).sum())


# ---------------------------------------------------------------- what the stored numbers mean


ONE = 0x60
"""The 8-bit scale that is 2^-12, whose rows have the factor 2^12."""


def whole_numbers(form: type[Q8] | type[Q6] | type[Q4], n_bytes: int, code: int) -> Quantized:
    """A matrix of 32 rows and 96 columns, whose scales and factors make 1, with the same byte everywhere."""
    dtype = np.int8 if form is Q8 else np.uint8
    scales = np.full((2, 3, 16), ONE, np.uint8)
    factors = bf16_bits(np.full((2, 16), 2.0**12, np.float32))
    return form(np.full((2, 3, n_bytes), code, dtype), scales, factors, 32, 96)


def test_a_q8_code_belongs_to_the_row_and_column_that_the_layout_names():
    w = whole_numbers(Q8, 512, 0)
    w.codes[1, 2, 64 * 5 + 4 * 9 + 3] = -77
    expected = np.zeros((32, 96), np.float32)
    expected[16 + 9, 64 + 4 * 5 + 3] = -77
    assert np.array_equal(widen(w), expected)


@pytest.mark.parametrize(("half", "shift"), [(0, 0), (4, 4)])
def test_a_q4_code_belongs_to_the_row_and_column_that_the_layout_names(half, shift):
    zero = Q4_CODEBOOK.index(0)
    w = whole_numbers(Q4, 256, zero | zero << 4)
    w.codes[1, 2, 64 * 3 + 4 * 9 + 2] ^= (zero ^ 13) << shift
    expected = np.zeros((32, 96), np.float32)
    expected[16 + 9, 64 + 8 * 3 + half + 2] = Q4_CODEBOOK[13]
    assert np.array_equal(widen(w), expected)


@pytest.mark.parametrize("column", range(32))
def test_a_q6_code_belongs_to_the_row_and_column_that_the_layout_names(column):
    w = whole_numbers(Q6, 384, 0)
    v, half, j = column // 8, column // 4 % 2, column % 4
    w.codes[1, 2, 64 * v + 4 * 9 + j] |= 0b1011 << 4 * half
    w.codes[1, 2, 256 + 64 * (column // 16) + 4 * 9 + j] |= 0b10 << column // 4 % 4 * 2
    expected = np.full((32, 96), -32, np.float32)
    expected[16 + 9, 64 + column] = 0b101011 - 32
    assert np.array_equal(widen(w), expected)


def test_a_scale_and_a_factor_belong_to_the_rows_and_the_group_that_the_layout_names():
    w = whole_numbers(Q8, 512, 1)
    w.scales[:] = 0
    w.scales[1, 2, 9] = 0x80 | ONE
    w.factors[1, 9] = bf16_bits(np.array([3 * 2.0**12], np.float32))[0]
    expected = np.zeros((32, 96), np.float32)
    expected[16 + 9, 64:96] = -3
    assert np.array_equal(widen(w), expected)


def test_scales_are_as_the_layout_names_them_and_ascend():
    for exponent, mantissa in itertools.product(range(4), range(32)):
        size = (mantissa / 32 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 32)) * 2.0**-14
        assert SCALES[exponent << 5 | mantissa] == size
        assert SCALES[0x80 | exponent << 5 | mantissa] == -size
    assert (np.diff(SCALES[:128]) > 0).all()


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_rows_and_columns_keeps_its_shape_and_comes_near(shape, number_format):
    w = normal(1, *shape)
    q = quantize(w, number_format)
    assert (q.rows, q.columns) == shape
    assert widen(q).shape == shape
    assert np.abs(widen(q) - w).max() < {"q8": 0.04, "q6": 0.1, "q4": 0.4}[number_format]


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_layers_are_quantized_on_their_own(number_format):
    w = normal(2, 3, 17, 33)
    q = quantize(w, number_format)
    for l in range(3):
        assert np.array_equal(widen(q)[l], widen(quantize(w[l], number_format)))
        assert np.array_equal(widen(ops.layer(q, l)), widen(q)[l])


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_a_matrix_quantized_in_pieces_is_the_same_as_at_once(number_format):
    w = normal(3, 100, 70)
    whole = quantize(w, number_format)
    parts = [quantize(w[rows], number_format) for rows in (slice(0, 48), slice(48, 64), slice(64, 100))]
    for name in ("codes", "scales", "factors"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_the_parts_of_a_quantized_matrix_are_contiguous(number_format):
    q = quantize(normal(4, 2, 40, 70), number_format)
    assert q.codes.flags.c_contiguous
    assert q.scales.flags.c_contiguous
    assert q.factors.flags.c_contiguous


@pytest.mark.parametrize(("number_format", "bits"), [("q8", 8.25), ("q6", 6.25), ("q4", 4.25)])
@pytest.mark.parametrize("columns", [64, 128, 2048])
def test_a_format_takes_the_bits_that_its_description_promises(columns, number_format, bits):
    q = quantize(normal(5, 64, columns), number_format)
    assert 8 * (q.codes.nbytes + q.scales.nbytes + q.factors.nbytes) / 64 == bits * columns + 16


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_some_rows_widen_to_what_they_are_in_the_whole(number_format):
    q = quantize(normal(6, 50, 40), number_format)
    rows = np.array([49, 0, 17, 17, 16])
    assert np.array_equal(widen_rows(q, rows), widen(q)[rows])


def test_some_rows_of_16_bit_formats_widen_to_what_they_are_in_the_whole():
    bits = np.arange(12, dtype=np.uint16).reshape(4, 3) * 5000
    for w in (F16(bits), BF16(bits), widen(BF16(bits))):
        assert np.array_equal(widen_rows(w, np.array([3, 0])), widen(w)[[3, 0]], equal_nan=True)


# ---------------------------------------------------------------- how near they come


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_zero_groups_stay_exactly_zero(number_format):
    w = normal(7, 20, 96)
    w[:, 32:64] = 0
    w[3] = 0
    q = quantize(w, number_format)
    assert (widen(q)[:, 32:64] == 0).all()
    assert (widen(q)[3] == 0).all()
    assert np.isfinite(widen(q)).all()


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-9, 1e5])
def test_very_small_and_large_weights_stay_finite_and_near(size, number_format):
    w = normal(8, 16, 32) * np.float32(size)
    smallest = 1e-35  # below, a group may become zero
    error = np.abs(widen(quantize(w, number_format)) - w).max()
    assert error <= max(0.4 * size, smallest)


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_a_group_much_smaller_than_others_of_its_row_keeps_its_share_of_precision(number_format):
    w = normal(9, 32, 256)
    w[:, 32:64] /= 16
    alone, within = w[:, 32:64], widen(quantize(w, number_format))[:, 32:64]
    error = np.square(within - alone).sum() / np.square(alone).sum()
    assert error < 1.2 * relative_error(np.ascontiguousarray(alone), number_format)


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_a_row_much_smaller_than_its_neighbours_is_as_precise(number_format):
    w = normal(10, 32, 64)
    w[5] *= np.float32(1e-6)
    expected = widen(quantize(w[5:6] * np.float32(2.0**20), number_format)) * np.float32(2.0**-20)
    assert np.allclose(widen(quantize(w, number_format))[5], expected, rtol=1e-2, atol=1e-9)


def test_numbers_that_are_levels_times_a_scale_stay_within_the_rounding_of_the_factor():
    codes = np.random.default_rng(9).integers(0, 16, (32, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the outermost levels occur in every group
    w = np.array(Q4_CODEBOOK, np.float32)[codes] * np.float32(0.25)
    for sign in (1, -1):
        assert np.allclose(widen(quantize(sign * w, "q4")), sign * w, rtol=2.0**-8)


def test_q4_loses_a_quarter_less_of_normal_weights_than_even_levels_without_search():
    w = normal(11, 64, 1024)
    assert relative_error(w, "q4") < 0.75 * plain_q4_error(w)


def test_q4_loses_a_third_less_of_long_tailed_weights_than_even_levels_without_search():
    w = np.random.default_rng(12).standard_t(5, (64, 1024)).astype(np.float32)
    assert relative_error(w, "q4") < 0.66 * plain_q4_error(w)


def test_q8_loses_less_than_a_three_hundredth_of_a_thousandth_of_normal_weights():
    assert relative_error(normal(13, 64, 1024), "q8") < 3.3e-5


def test_q6_loses_less_than_six_ten_thousandths_of_normal_weights():
    assert relative_error(normal(13, 64, 1024), "q6") < 6e-4


# ---------------------------------------------------------------- what they refuse


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e6])
def test_weights_that_cannot_be_quantized_are_refused_by_place(value, number_format):
    w = normal(14, 40, 50)
    w[35, 49] = value
    with pytest.raises(UnstorableError, match=rf"1799 cannot be stored in {number_format}.*up to 1,000,000") as caught:
        quantize(w, number_format)
    assert np.unravel_index(caught.value.at, w.shape) == (35, 49)


# ---------------------------------------------------------------- activations


def quantized_by_definition(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """quantize_rows in loops over single float32 numbers."""
    T, K = x.shape
    G = -(-K // GROUP)
    codes, scales = np.zeros((T, G, GROUP), np.int8), np.zeros((T, G), np.float32)
    for t in range(T):
        for g in range(G):
            group = x[t, g * GROUP : (g + 1) * GROUP]
            largest = max(abs(number) for number in group)
            if largest >= np.float32(1e-30):
                scales[t, g] = largest / np.float32(127)
                factor = np.float32(127) / largest
                codes[t, g, : len(group)] = [round(float(number * factor)) for number in group]  # half to even
    return codes, scales


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 172])
def test_quantized_input_is_what_its_definition_says(columns):
    x = normal(15, 5, columns) * np.float32(1e-3)
    x[1] = 0
    for found, expected in zip(quantize_rows(x), quantized_by_definition(x), strict=True):
        assert np.array_equal(found, expected)


def test_half_a_step_of_input_rounds_to_the_even_code():
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [127, 0.5, 1.5, 2.5, -0.5]
    codes, scales = quantize_rows(x)
    assert codes[0, 0, :5].tolist() == [127, 0, 2, 2, 0]
    assert scales.tolist() == [[1]]


def test_input_too_small_to_divide_by_counts_as_zero():
    codes, scales = quantize_rows(np.full((1, 32), 1e-39, np.float32))
    assert not codes.any()
    assert not scales.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite_gives_a_product_that_is_not_finite(value):
    x = normal(16, 2, 40)
    x[1, 3] = value
    with np.errstate(invalid="ignore"):
        y = ops.linear(x, quantize(normal(17, 8, 40), "q8"))
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_a_product_is_the_sum_of_integer_products_times_both_scales(number_format):
    x, w = normal(18, 6, 72), quantize(normal(19, 20, 72), number_format)
    codes, scales = quantized_by_definition(x)
    values = (codes * scales.astype(np.float64)[..., None]).reshape(6, -1)[:, :72]
    expected = values @ widen(w).astype(np.float64).T
    assert np.abs(ops.linear(x, w) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_a_widened_matrix_multiplies_as_the_quantized_one_does(number_format):
    x, w = normal(20, 3, 72), quantize(normal(21, 20, 72), number_format)
    assert np.array_equal(ops.linear(x, format_of(w).for_products(w)), ops.linear(x, w))


def test_the_levels_of_q4_are_sorted_hold_zero_and_span_at_most_64():
    assert list(Q4_CODEBOOK) == sorted(set(Q4_CODEBOOK))
    assert len(Q4_CODEBOOK) == 16
    assert 0 in Q4_CODEBOOK
    assert Q4_CODEBOOK[-1] - Q4_CODEBOOK[0] <= 64
    assert BLOCK_ROWS * GROUP == 512
