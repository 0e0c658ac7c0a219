"""Several matrices at once, as a parallel loop of Numba takes them: a tuple of arrays for each part of their format.

Always MAX_FUSED of them, the last ones empty where there are fewer: one kernel, compiled once, serves any number.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import imputils
from numba.extending import intrinsic, overload, register_jitable

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


def no_rows(w):
    """A matrix of the same format and width without rows."""


@overload(no_rows)
def _no_rows(w):
    if isinstance(w, types.Array):
        return lambda w: w[:0]
    form = w.instance_class
    if len(w.types) == 1:
        return lambda w: form(w[0][:0])
    return lambda w: form(w[0][:0], w[1][:0], w[2][:0], 0, w[4])


def n_rows(w):
    """Rows of a matrix: an array (rows, columns), or a grouped format."""


@overload(n_rows)
def _n_rows(w):
    return (lambda w: w.shape[0]) if isinstance(w, types.Array) else (lambda w: w.rows)


@register_jitable
def outputs(T, weights):
    """An array for the products of T tokens with each of MAX_FUSED weights."""
    return (
        np.empty((T, n_rows(weights[0])), np.float32),
        np.empty((T, n_rows(weights[1])), np.float32),
        np.empty((T, n_rows(weights[2])), np.float32),
    )


def padded_to_max(linears, weights):
    """A function (x, weights) that gives MAX_FUSED weights to `linears`, a kernel, and returns the products asked for.

    weights: the type of a tuple of 1 to MAX_FUSED weights of one format.
    """
    if len(weights) == 1:
        return lambda x, ws: linears(x, (ws[0], no_rows(ws[0]), no_rows(ws[0])))[:1]
    if len(weights) == 2:
        return lambda x, ws: linears(x, (ws[0], ws[1], no_rows(ws[0])))[:2]
    return lambda x, ws: linears(x, ws)
