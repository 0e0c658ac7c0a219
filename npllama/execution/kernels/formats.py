"""The kernels of every number format, found by the type of a weight. A format registers itself with one call.

A weight is a float32 array, or a NamedTuple: one array of bits (F16); or two or three arrays, the first ones codes and
scales, then rows and columns (Q4_0, Q4). The type alone selects the kernel, so nothing is asked while a model runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from npllama import ops
from npllama.execution.kernels.numba_internals import namedtuple_class
from npllama.numbers import FORMATS


class FormatKernels(NamedTuple):
    """What compiled execution needs of a number format: two kernels, called by compiled code only."""

    linears: Callable[..., Any]  # (x, ws) -> ys: ops.linears for exactly fused_inputs.MAX_FUSED weights
    embed: Callable[..., Any]  # (table, tokens) -> x: ops.embed


KERNELS: dict[type, FormatKernels] = {}
"""The class of a weight -> its kernels. np.ndarray stands for float32."""


def import_kernels() -> None:
    """Import the kernels of every number format that is registered: importing registers them here."""
    for number_format in FORMATS.values():
        importlib.import_module(number_format.kernel)


def register(weight: type, linears: Callable[..., Any], embed: Callable[..., Any]) -> None:
    """Say which kernels compute with weights of a class. Before the first model with such weights is compiled."""
    KERNELS[weight] = FormatKernels(linears, embed)


def kernels_of(typ: types.Type) -> FormatKernels | None:
    """The kernels for weights of a Numba type; None where there are none."""
    if isinstance(typ, types.Array):
        return KERNELS[np.ndarray] if typ.dtype == types.float32 else None
    weight = namedtuple_class(typ)
    return KERNELS.get(weight) if weight is not None else None


@overload(ops.layer)
def _layer(w, l):
    """ops.layer: a view in the same format."""
    if isinstance(w, types.Array):
        return lambda w, l: w[l]
    weight = namedtuple_class(w)
    if weight not in KERNELS:
        return None
    if len(w.types) == 1:
        return lambda w, l: weight(w[0][l])
    if len(w.types) == 4:
        return lambda w, l: weight(w[0][l], w[1][l], w.rows, w.columns)
    return lambda w, l: weight(w[0][l], w[1][l], w[2][l], w.rows, w.columns)


def no_rows(w):
    """A matrix of the same format and width without rows."""


@overload(no_rows)
def _no_rows(w):
    if isinstance(w, types.Array):
        return lambda w: w[:0]
    weight = namedtuple_class(w)
    if len(w.types) == 1:
        return lambda w: weight(w[0][:0])
    if len(w.types) == 4:
        return lambda w: weight(w[0], w[1], 0, w.columns)
    return lambda w: weight(w[0], w[1], w[2], 0, w.columns)


def n_rows(w):
    """Rows of a matrix: a float array, an array of bits, or a grouped format."""


@overload(n_rows)
def _n_rows(w):
    if isinstance(w, types.Array):
        return lambda w: w.shape[0]
    return (lambda w: w.rows) if "rows" in w.fields else (lambda w: w[0].shape[0])
