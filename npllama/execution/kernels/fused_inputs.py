"""Several matrices that multiply the same input, in one parallel loop: queries, keys and values; gate and up.

Kernels take always MAX_FUSED matrices, the last ones empty where there are fewer: compiled once, a kernel serves any
number. A parallel loop of Numba takes no tuples in tuples, so it gets a tuple of arrays, or of pointers, for each part
of the format.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import imputils
from numba.extending import intrinsic, register_jitable

from npllama.execution.kernels.formats import n_rows, no_rows
from npllama.execution.kernels.llvm import address, i64

MAX_FUSED = 3
"""Matrices at once: queries, keys and values."""


@intrinsic(prefer_literal=True)
def part_of_each(typingctx, weights, i):
    """The i-th part of each of several weights (a tuple of NamedTuples of one type), as a tuple."""
    i = i.literal_value
    found = types.UniTuple(weights.dtype.types[i], weights.count)

    def generate(context, builder, signature, args):
        each = [builder.extract_value(builder.extract_value(args[0], n), i) for n in range(weights.count)]
        return imputils.impl_ret_borrowed(context, builder, found, context.make_tuple(builder, found, each))

    return found(weights, types.literal(i)), generate


@intrinsic(prefer_literal=True)
def pointers_of_each(typingctx, weights, i):
    """The same as pointers, which count no references. The caller keeps the arrays alive."""
    i = i.literal_value
    array = weights.dtype.types[i]
    found = types.UniTuple(types.CPointer(array.dtype), weights.count)

    def generate(context, builder, signature, args):
        arrays = [builder.extract_value(builder.extract_value(args[0], n), i) for n in range(weights.count)]
        return context.make_tuple(builder, found, [_data(context, builder, array, a) for a in arrays])

    return found(weights, types.literal(i)), generate


@intrinsic
def rows_of_each(typingctx, weights):
    """How many rows each of several weights has, of a format that says it."""
    found, i = types.UniTuple(types.intp, weights.count), weights.dtype.fields.index("rows")

    def generate(context, builder, signature, args):
        each = [builder.extract_value(builder.extract_value(args[0], n), i) for n in range(weights.count)]
        return context.make_tuple(builder, found, each)

    return found(weights), generate


@intrinsic
def pointers_of(typingctx, arrays):
    """A tuple of arrays as pointers."""
    found = types.UniTuple(types.CPointer(arrays.dtype.dtype), arrays.count)

    def generate(context, builder, signature, args):
        each = [builder.extract_value(args[0], n) for n in range(arrays.count)]
        return context.make_tuple(builder, found, [_data(context, builder, arrays.dtype, a) for a in each])

    return found(arrays), generate


def _data(context, builder, array_type, array):
    return address(context, builder, array_type, array, ir.Constant(i64, 0))


@register_jitable
def outputs(T, weights):
    """An array for the products of T tokens with each of MAX_FUSED weights."""
    return outputs_of(T, (n_rows(weights[0]), n_rows(weights[1]), n_rows(weights[2])))


@register_jitable
def outputs_of(T, rows):
    """The same for weights that have so many rows."""
    return (
        np.empty((T, rows[0]), np.float32),
        np.empty((T, rows[1]), np.float32),
        np.empty((T, rows[2]), np.float32),
    )


def padded_to_max(linears, n_weights):
    """A function (x, ws) that gives n_weights of one format to `linears`, which takes MAX_FUSED."""
    if n_weights == 1:
        return lambda x, ws: linears(x, (ws[0], no_rows(ws[0]), no_rows(ws[0])))[:1]
    if n_weights == 2:
        return lambda x, ws: linears(x, (ws[0], ws[1], no_rows(ws[0])))[:2]
    return lambda x, ws: linears(x, ws)
