"""numbers/rounding.py compiled: the search for scales, the same operations in the same order, so the same bytes.

A group's numbers are one vector, whose `horizontal_sum` is rounding.sum_by_halves. low and high are those of
rounding.Nearest; where its table has its steps: (2, n) where each entry that differs from the one before stands, and by
how much. Threads of Python call this: it is serial, and holds no lock.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.flags import INNER, SERIAL
from npllama.execution.kernels.llvm import address, call, constant, f32, i8, i32
from npllama.execution.kernels.simd import VectorType, horizontal_sum, load_scalar, mul, store_scalar, sub
from npllama.numbers.blocks import GROUP, SCALES

numbers = VectorType(f32, GROUP)


@intrinsic
def load_group(typingctx, array, offset):
    """The group of float32 from array[offset] on."""

    def generate(context, builder, signature, args):
        return llvm.load(builder, address(context, builder, signature.args[0], *args), numbers.llvm, 4)

    return numbers(array, types.intp), generate


@intrinsic
def repeat(typingctx, number):
    """The same number in each lane."""

    def generate(context, builder, signature, args):
        return llvm.broadcast(builder, args[0], GROUP)

    return numbers(types.float32), generate


@intrinsic
def clip(typingctx, a, low, high):
    """Each lane, at least low and at most high."""

    def generate(context, builder, signature, args):
        a, *bounds = args
        low, high = (llvm.broadcast(builder, bound, GROUP) for bound in bounds)
        a = builder.select(builder.fcmp_ordered("<", a, low), low, a)
        return builder.select(builder.fcmp_ordered(">", a, high), high, a)

    return numbers(numbers, types.float32, types.float32), generate


@intrinsic
def round_half_even(typingctx, a):
    """The nearest integer in each lane, half to even."""

    def generate(context, builder, signature, args):
        return call(builder, f"llvm.rint.v{GROUP}f32", numbers.llvm, args[0])

    return numbers(numbers), generate


@intrinsic
def add_where(typingctx, total, a, least, step):
    """total, and step more in each lane in which a is at least `least`."""

    def generate(context, builder, signature, args):
        total, a, *bounds = args
        least, step = (llvm.broadcast(builder, bound, GROUP) for bound in bounds)
        reached = builder.fcmp_ordered(">=", a, least)
        return builder.fadd(total, builder.select(reached, step, constant(numbers.llvm, 0.0)))

    return numbers(numbers, numbers, types.float32, types.float32), generate


@intrinsic
def store_levels(typingctx, array, offset, a):
    """Write whole numbers to int8 array[offset ...]."""

    def generate(context, builder, signature, args):
        array, offset, a = args
        whole = builder.trunc(builder.fptosi(a, ir.VectorType(i32, GROUP)), ir.VectorType(i8, GROUP))
        llvm.store(builder, whole, address(context, builder, signature.args[0], array, offset), 1)
        return llvm.nothing(context)

    return types.void(array, types.intp, numbers), generate


@njit(**INNER)
def reciprocal(x):
    """rounding.reciprocal."""
    return np.float32(0) if abs(x) < np.float32(1e-37) else np.float32(1) / x


@njit(**INNER)
def nearest(w, inverse, low, high, steps):
    """The levels nearest to w * inverse: rounding.Nearest.levels."""
    n = steps.shape[1]
    if n == 0:
        return round_half_even(clip(mul(w, repeat(inverse)), low, high))
    cells, level = sub(mul(w, repeat(np.float32(2) * inverse)), repeat(np.float32(2) * low)), repeat(low)
    for i in range(n):
        level = add_where(level, cells, load_scalar(steps, i), load_scalar(steps, n + i))
    return level


@njit(**INNER)
def largest_of(w, at):
    """The number of the group from w[at] on whose magnitude is largest; of equals the first."""
    largest = load_scalar(w, at)
    for i in range(at + 1, at + GROUP):
        number = load_scalar(w, i)
        largest = number if abs(number) > abs(largest) else largest
    return largest


@njit(**SERIAL)
def best_scales(w, targets, low, high, steps, found):
    """Write rounding.best_scales of w (n, GROUP) float32 to found (n,)."""
    for n in range(w.shape[0]):
        group, largest = load_group(w, n * GROUP), largest_of(w, n * GROUP)
        best, most = np.float32(0), np.float32(0)
        for i in range(targets.shape[0] + 1):
            scale = best if i == targets.shape[0] else largest / load_scalar(targets, i)
            q = nearest(group, reciprocal(scale), low, high, steps)
            along, length = horizontal_sum(mul(group, q)), horizontal_sum(mul(q, q))
            scale = along * reciprocal(length)
            if along * scale > most:
                best, most = scale, along * scale
        store_scalar(found, n, best)


@njit(**INNER)
def first_at_least(value):
    """The first of SCALES[:127] that is not below a value; 127 where all are."""
    low, high = 0, 127
    while low < high:
        middle = (low + high) // 2
        if SCALES[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@njit(**INNER)
def with_scale(group, scale, low, high, steps):
    """The levels of a group for a scale, and their squared error."""
    q = nearest(group, reciprocal(scale), low, high, steps)
    error = sub(mul(q, repeat(scale)), group)
    return q, horizontal_sum(mul(error, error))


@njit(**SERIAL)
def stored_scales(w, wanted, factors, low, high, steps, codes, levels):
    """Write the codes of scales (n,) uint8 and the levels (n, GROUP) int8 of rounding.with_stored_scales."""
    for n in range(w.shape[0]):
        group, scale = load_group(w, n * GROUP), load_scalar(wanted, n)
        sign = 128 if scale < np.float32(0) else 0
        above = min(max(first_at_least(abs(scale) * reciprocal(load_scalar(factors, n))), 1), 127)
        above_q, above_error = with_scale(group, SCALES[above | sign] * factors[n], low, high, steps)
        below_q, below_error = with_scale(group, SCALES[(above - 1) | sign] * factors[n], low, high, steps)
        if below_error < above_error:
            codes[n] = (above - 1) | sign
            store_levels(levels, n * GROUP, below_q)
        else:
            codes[n] = above | sign
            store_levels(levels, n * GROUP, above_q)
