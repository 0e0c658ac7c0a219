"""Keys and values in the cache's number format: a head's row written, a block of rows read as float32.

What is read is what the format keeps, as tiles want it: each row in whole vectors, with zeros after its E numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from npllama.cache import Rounded
from npllama.kernels.codes import round_group
from npllama.kernels.flags import INNER
from npllama.kernels.quantized import group_scale
from npllama.kernels.steps import is_format
from npllama.kernels.tile import Rows
from npllama.kernels.vector import (
    WIDTH,
    element,
    half,
    half_bits,
    load,
    load_half,
    load_int8,
    mul,
    pointer,
    set_element,
    splat,
    store,
    whole_vectors,
)
from npllama.quant import F16, GROUP


def pointers(stored):
    """The same keys or values with a pointer in place of each array, which whoever calls holds meanwhile."""


def block_rows(stored, row, n_slots, E, buffer):
    """Rows `row` .. row+n_slots-1 of all heads' slots as Rows of float32: where they lie, or copied to the buffer."""


def store_head(stored, row, E, x, at):
    """Keep the E numbers x[at ...] in row `row` of all heads' slots."""


@njit(**INNER)
def block_rows_f32(stored, row, n_slots, E, buffer):
    if E % WIDTH == 0:
        return Rows(pointer(stored, row * E), E)
    stride = whole_vectors(E)
    for s in range(n_slots):
        for e in range(stride):
            set_element(buffer, s * stride + e, element(stored, (row + s) * E + e) if e < E else np.float32(0))
    return Rows(pointer(buffer, 0), stride)


@njit(**INNER)
def block_rows_f16(stored, row, n_slots, E, buffer):
    stride, whole = whole_vectors(E), E // WIDTH * WIDTH
    for s in range(n_slots):
        at, to = (row + s) * E, s * stride
        for e in range(0, whole, WIDTH):
            store(buffer, to + e, load_half(stored.bits, at + e))
        for e in range(whole, stride):
            set_element(buffer, to + e, half(element(stored.bits, at + e)) if e < E else np.float32(0))
    return Rows(pointer(buffer, 0), stride)


@njit(**INNER)
def block_rows_q8(stored, row, n_slots, E, buffer):
    stride, n_groups, whole = whole_vectors(E), (E + GROUP - 1) // GROUP, E // WIDTH * WIDTH
    for s in range(n_slots):
        at, to, group = (row + s) * E, s * stride, (row + s) * n_groups
        for e in range(0, whole, WIDTH):
            scale = splat(element(stored.scales, group + e // GROUP))
            store(buffer, to + e, mul(load_int8(stored.codes, at + e), scale))
        for e in range(whole, E):
            code = np.float32(element(stored.codes, at + e))
            set_element(buffer, to + e, code * element(stored.scales, group + e // GROUP))
        for e in range(E, stride):
            set_element(buffer, to + e, np.float32(0))
    return Rows(pointer(buffer, 0), stride)


@njit(**INNER)
def store_head_f32(stored, row, E, x, at):
    whole = E // WIDTH * WIDTH
    for e in range(0, whole, WIDTH):
        store(stored, row * E + e, load(x, at + e))
    for e in range(whole, E):
        set_element(stored, row * E + e, element(x, at + e))


@njit(**INNER)
def store_head_f16(stored, row, E, x, at):
    for e in range(E):
        set_element(stored.bits, row * E + e, half_bits(element(x, at + e)))


@njit(**INNER)
def store_head_q8(stored, row, E, x, at):
    n_groups, whole = (E + GROUP - 1) // GROUP, E // GROUP
    for i in range(whole):
        scale, factor = group_scale(x, at + i * GROUP)
        round_group(x, at + i * GROUP, factor, stored.codes, row * E + i * GROUP)
        set_element(stored.scales, row * n_groups + i, scale)
    if whole < n_groups:
        store_rest_q8(stored, row, E, x, at)


@njit(**INNER)
def store_rest_q8(stored, row, E, x, at):
    """The last group, which E does not fill."""
    first, n_groups = E // GROUP * GROUP, (E + GROUP - 1) // GROUP
    numbers, codes = np.zeros(GROUP, np.float32), np.empty(GROUP, np.int8)
    for e in range(first, E):
        numbers[e - first] = element(x, at + e)
    scale, factor = group_scale(numbers, 0)
    round_group(numbers, 0, factor, codes, 0)
    set_element(stored.scales, row * n_groups + n_groups - 1, scale)
    for e in range(first, E):
        set_element(stored.codes, row * E + e, codes[e - first])


@overload(pointers)
def _pointers(stored):
    if is_format(stored, F16):
        return lambda stored: F16(pointer(stored.bits, 0))
    if is_format(stored, Rounded):
        return lambda stored: Rounded(pointer(stored.codes, 0), pointer(stored.scales, 0))
    return lambda stored: pointer(stored, 0)


@overload(block_rows)
def _block_rows(stored, row, n_slots, E, buffer):
    if is_format(stored, F16):
        return lambda stored, row, n_slots, E, buffer: block_rows_f16(stored, row, n_slots, E, buffer)
    if is_format(stored, Rounded):
        return lambda stored, row, n_slots, E, buffer: block_rows_q8(stored, row, n_slots, E, buffer)
    return lambda stored, row, n_slots, E, buffer: block_rows_f32(stored, row, n_slots, E, buffer)


@overload(store_head)
def _store_head(stored, row, E, x, at):
    if is_format(stored, F16):
        return lambda stored, row, E, x, at: store_head_f16(stored, row, E, x, at)
    if is_format(stored, Rounded):
        return lambda stored, row, E, x, at: store_head_q8(stored, row, E, x, at)
    return lambda stored, row, E, x, at: store_head_f32(stored, row, E, x, at)
