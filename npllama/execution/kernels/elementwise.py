"""The short steps compiled: RMSNorm, RoPE, SwiGLU.

Each overload gives the compiler a body for the function of ops.py that it names. Loops are written out: each NumPy
idiom would cost seconds of compile time.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numba.extending import overload

from npllama import ops
from npllama.execution.kernels.abandon import abandoned
from npllama.execution.kernels.flags import INNER, INNER_PARALLEL
from npllama.execution.kernels.simd import (
    AT_ONCE,
    add,
    fma,
    gated,
    horizontal_sum,
    load,
    load_last,
    load_many,
    load_scalar,
    load_twice,
    mul,
    negate_even,
    num_threads,
    pointer,
    splat,
    store,
    store_last,
    store_scalar,
    swap_pairs,
    thread_bounds,
    widened,
)
from npllama.execution.kernels.target import WIDTH, WIDTH64

SERIAL_BELOW = 1 << 14
"""Below so many numbers, starting threads costs more than it saves."""


@njit(**INNER)
def norm_rows(x, gain, eps, y, D, begin, stop):
    """ops.rms_norm for the rows begin .. stop-1 of D numbers: one pass for the sum, one for the scale."""
    whole, last = D // WIDTH * WIDTH, D - WIDTH
    for t in range(begin, stop):
        at = t * D
        low = high = splat(0.0)
        for d in range(0, whole, WIDTH):
            numbers = load(x, at + d)
            low = fma(widened(numbers, 0), widened(numbers, 0), low)
            high = fma(widened(numbers, 1), widened(numbers, 1), high)
        if whole < D:
            rest = load_last(x, at + last, D - whole)
            low = fma(widened(rest, 0), widened(rest, 0), low)
            high = fma(widened(rest, 1), widened(rest, 1), high)
        scale = splat(np.float32(1.0 / math.sqrt(horizontal_sum(add(low, high)) / D + eps)))
        for d in range(0, whole, WIDTH):
            store(y, at + d, mul(load(gain, d), mul(load(x, at + d), scale)))
        if whole < D:
            rest = mul(load_last(gain, last, D - whole), mul(load_last(x, at + last, D - whole), scale))
            store_last(y, at + last, rest, D - whole)


@njit(**INNER)
def rope_rows(x, cos, sin, y, H, E, begin, stop):
    """ops.rope for the rows begin .. stop-1: x * (c, c, ...) + (x with each pair swapped) * (-s, s, ...)."""
    whole = E // WIDTH * WIDTH
    for t in range(begin, stop):
        angle = t * (E // 2)
        for h in range(H):
            at = (t * H + h) * E
            for e in range(0, whole, WIDTH):
                numbers = load(x, at + e)
                swapped = mul(swap_pairs(numbers), negate_even(load_twice(sin, angle + e // 2)))
                store(y, at + e, add(mul(numbers, load_twice(cos, angle + e // 2)), swapped))
            for i in range(whole // 2, E // 2):  # pair by pair
                even, odd = load_scalar(x, at + 2 * i), load_scalar(x, at + 2 * i + 1)
                c, s = load_scalar(cos, angle + i), load_scalar(sin, angle + i)
                store_scalar(y, at + 2 * i, even * c - odd * s)
                store_scalar(y, at + 2 * i + 1, even * s + odd * c)


@njit(**INNER)
def some_rows(x, a, b, eps, y, H, E, begin, stop):
    """Rows of ops.rope with a and b its cosines and sines; for H 0 of ops.rms_norm, a the gain of E numbers."""
    if H == 0:
        norm_rows(x, a, eps, y, E, begin, stop)
    else:
        rope_rows(x, a, b, y, H, E, begin, stop)


@njit(**INNER_PARALLEL)
def rows_in_threads(x, a, b, eps, y, H, E, T, parts):
    for p in prange(parts):
        begin, stop = np.int64(p) * T // parts, (np.int64(p) + 1) * T // parts
        some_rows(x, a, b, eps, y, H, E, begin, stop)


@njit(**INNER)
def all_rows(x, a, b, eps, y, H, E, T):
    """some_rows for all T rows, on all threads where that is worth it: one loop for both, which is compiled once."""
    if y.size < SERIAL_BELOW:
        some_rows(x, a, b, eps, pointer(y, 0), H, E, np.int64(0), T)
    else:
        rows_in_threads(x, a, b, eps, pointer(y, 0), H, E, T, num_threads())


@njit(**INNER)
def rms_norm(x, gain, eps):
    """ops.rms_norm."""
    T, D = x.shape
    y = np.empty((T, D), np.float32)
    all_rows(pointer(x, 0), pointer(gain, 0), pointer(gain, 0), eps, y.reshape(-1), np.int64(0), D, T)
    return y


@njit(**INNER)
def rope(x, cos, sin):
    """ops.rope."""
    T, H, E = x.shape
    y = np.empty((T, H, E), np.float32)
    all_rows(pointer(x, 0), pointer(cos, 0), pointer(sin, 0), 0.0, y.reshape(-1), H, E, T)
    return y


@njit(**INNER)
def swiglu_part(gate, up, y, begin, stop):
    """ops.swiglu for the numbers begin .. stop-1 of all rows. y has at least WIDTH numbers before stop."""
    i, many = begin, AT_ONCE * WIDTH64
    while i + many <= stop:
        store(y, i, gated(load_many(gate, i), load_many(up, i)))
        i += many
    while i + WIDTH <= stop:
        store(y, i, gated(load(gate, i), load(up, i)))
        i += WIDTH
    if i < stop:
        last, rest = stop - WIDTH, stop - i
        store_last(y, last, gated(load_last(gate, last, rest), load_last(up, last, rest)), rest)


@njit(**INNER_PARALLEL)
def swiglu_in_threads(gate, up, y, parts):
    for p in prange(parts):
        begin, stop = thread_bounds(np.int64(p), parts, gate.shape[0] * gate.shape[1])
        swiglu_part(gate, up, y, begin, stop)


@njit(**INNER)
def swiglu(gate, up):
    """ops.swiglu."""
    T, F = gate.shape
    y = np.empty((T, F), np.float32)
    if abandoned():
        return y
    if T * F < SERIAL_BELOW:
        swiglu_part(gate, up, y, 0, T * F)
    else:
        swiglu_in_threads(gate, up, y, num_threads())
    return y


@overload(ops.rms_norm)
def _rms_norm(x, gain, eps):
    return lambda x, gain, eps: rms_norm(x, gain, eps)


@overload(ops.rope)
def _rope(x, cos, sin):
    return lambda x, cos, sin: rope(x, cos, sin)


@overload(ops.rope_to_sinks)
def _rope_to_sinks(x, cos, sin, cache):
    def rope_to_sinks(x, cos, sin, cache):
        if cache.n_sink.max() == 0:
            return x
        return rope(x, cos, sin)

    return rope_to_sinks


@overload(ops.swiglu)
def _swiglu(gate, up):
    return lambda gate, up: swiglu(gate, up)
