"""Keys and values in the KV cache's number format: a head's row written, a block of rows read as float32.

Rows are read as tiles want them: in whole vectors, with zeros after a row's E numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from npllama.cache import Int8KV
from npllama.execution.kernels.flags import INNER
from npllama.execution.kernels.int8_dot import round_group
from npllama.execution.kernels.int8_input import group_scale
from npllama.execution.kernels.numba_internals import namedtuple_class
from npllama.execution.kernels.simd import (
    f16_to_f32,
    f32_to_f16,
    load,
    load_f16,
    load_int8,
    load_scalar,
    mul,
    pointer,
    round_to_width,
    splat,
    store,
    store_scalar,
)
from npllama.execution.kernels.strided_rows import StridedRows
from npllama.execution.kernels.target import WIDTH
from npllama.numbers.blocks import GROUP
from npllama.numbers.f16 import F16


def pointers(stored):
    """The same keys or values with a pointer in place of each array. The caller keeps the arrays alive."""


def pool_slots(stored):
    """Slots of each layer and head."""


def block_rows(stored, row, n_slots, E, buffer):
    """Rows `row` .. row+n_slots-1 of all heads' slots as StridedRows: where they lie, or in the buffer."""


def store_head(stored, row, E, x, at):
    """Keep the E numbers x[at ...] in row `row` of all heads' slots."""


@njit(**INNER)
def block_rows_f32(stored, row, n_slots, E, buffer):
    if E % WIDTH == 0:
        return StridedRows(pointer(stored, row * E), E)
    stride = round_to_width(E)
    for s in range(n_slots):
        for e in range(stride):
            store_scalar(buffer, s * stride + e, load_scalar(stored, (row + s) * E + e) if e < E else np.float32(0))
    return StridedRows(pointer(buffer, 0), stride)


@njit(**INNER)
def block_rows_f16(stored, row, n_slots, E, buffer):
    stride, whole = round_to_width(E), E // WIDTH * WIDTH
    for s in range(n_slots):
        at, to = (row + s) * E, s * stride
        for e in range(0, whole, WIDTH):
            store(buffer, to + e, load_f16(stored.bits, at + e))
        for e in range(whole, stride):
            store_scalar(buffer, to + e, f16_to_f32(load_scalar(stored.bits, at + e)) if e < E else np.float32(0))
    return StridedRows(pointer(buffer, 0), stride)


@njit(**INNER)
def block_rows_q8(stored, row, n_slots, E, buffer):
    stride, n_groups, whole = round_to_width(E), (E + GROUP - 1) // GROUP, E // WIDTH * WIDTH
    for s in range(n_slots):
        at, to, group = (row + s) * E, s * stride, (row + s) * n_groups
        for e in range(0, whole, WIDTH):
            scale = splat(load_scalar(stored.scales, group + e // GROUP))
            store(buffer, to + e, mul(load_int8(stored.codes, at + e), scale))
        for e in range(whole, E):
            code = np.float32(load_scalar(stored.codes, at + e))
            store_scalar(buffer, to + e, code * load_scalar(stored.scales, group + e // GROUP))
        for e in range(E, stride):
            store_scalar(buffer, to + e, np.float32(0))
    return StridedRows(pointer(buffer, 0), stride)


@njit(**INNER)
def store_head_f32(stored, row, E, x, at):
    whole = E // WIDTH * WIDTH
    for e in range(0, whole, WIDTH):
        store(stored, row * E + e, load(x, at + e))
    for e in range(whole, E):
        store_scalar(stored, row * E + e, load_scalar(x, at + e))


@njit(**INNER)
def store_head_f16(stored, row, E, x, at):
    for e in range(E):
        store_scalar(stored.bits, row * E + e, f32_to_f16(load_scalar(x, at + e)))


@njit(**INNER)
def store_head_q8(stored, row, E, x, at):
    n_groups, whole = (E + GROUP - 1) // GROUP, E // GROUP
    for i in range(whole):
        scale, factor = group_scale(x, at + i * GROUP)
        round_group(x, at + i * GROUP, factor, stored.codes, row * E + i * GROUP)
        store_scalar(stored.scales, row * n_groups + i, scale)
    if whole < n_groups:
        store_tail_q8(stored, row, E, x, at)


@njit(**INNER)
def store_tail_q8(stored, row, E, x, at):
    """The last group, which E does not fill."""
    first, n_groups = E // GROUP * GROUP, (E + GROUP - 1) // GROUP
    numbers, codes = np.zeros(GROUP, np.float32), np.empty(GROUP, np.int8)
    for e in range(first, E):
        numbers[e - first] = load_scalar(x, at + e)
    scale, factor = group_scale(numbers, 0)
    round_group(numbers, 0, factor, codes, 0)
    store_scalar(stored.scales, row * n_groups + n_groups - 1, scale)
    for e in range(first, E):
        store_scalar(stored.codes, row * E + e, codes[e - first])


@overload(pointers)
def _pointers(stored):
    if namedtuple_class(stored) is F16:
        return lambda stored: F16(pointer(stored.bits, 0))
    if namedtuple_class(stored) is Int8KV:
        return lambda stored: Int8KV(pointer(stored.codes, 0), pointer(stored.scales, 0))
    return lambda stored: pointer(stored, 0)


@overload(pool_slots)
def _pool_slots(stored):
    if namedtuple_class(stored) is F16:
        return lambda stored: stored.bits.shape[2]
    if namedtuple_class(stored) is Int8KV:
        return lambda stored: stored.codes.shape[2]
    return lambda stored: stored.shape[2]


@overload(block_rows)
def _block_rows(stored, row, n_slots, E, buffer):
    if namedtuple_class(stored) is F16:
        return lambda stored, row, n_slots, E, buffer: block_rows_f16(stored, row, n_slots, E, buffer)
    if namedtuple_class(stored) is Int8KV:
        return lambda stored, row, n_slots, E, buffer: block_rows_q8(stored, row, n_slots, E, buffer)
    return lambda stored, row, n_slots, E, buffer: block_rows_f32(stored, row, n_slots, E, buffer)


@overload(store_head)
def _store_head(stored, row, E, x, at):
    if namedtuple_class(stored) is F16:
        return lambda stored, row, E, x, at: store_head_f16(stored, row, E, x, at)
    if namedtuple_class(stored) is Int8KV:
        return lambda stored, row, E, x, at: store_head_q8(stored, row, E, x, at)
    return lambda stored, row, E, x, at: store_head_f32(stored, row, E, x, at)
