"""The short steps compiled: embedding rows, layers, RMSNorm, RoPE, SwiGLU.

Each overload gives the compiler a body for the function of ops.py that it names. Explicit loops throughout: NumPy's
idioms cost seconds of compile time each.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from npllama import ops
from npllama.kernels.flags import SERIAL
from npllama.quant import BF16, F16, Q4, Q8


def is_format(typ: types.Type, cls: type) -> bool:
    """Whether a Numba type is the number format cls (a NamedTuple)."""
    return isinstance(typ, types.BaseNamedTuple) and typ.instance_class is cls  # type: ignore[attr-defined]


@overload(ops.layer)
def _layer(w, l):
    """ops.layer: a view in the same format."""
    if isinstance(w, types.Array):
        return lambda w, l: w[l]
    if is_format(w, F16):
        return lambda w, l: F16(w.bits[l])
    if is_format(w, BF16):
        return lambda w, l: BF16(w.bits[l])
    if is_format(w, Q8):
        return lambda w, l: Q8(w.codes[l], w.scales[l], w.rows, w.columns)
    if is_format(w, Q4):
        return lambda w, l: Q4(w.codes[l], w.scales[l], w.rows, w.columns)
    return None


@njit(**SERIAL)
def rms_norm(x, gain, eps):
    """ops.rms_norm: one pass for the sum, one for the scale; rows are too short to be worth threads."""
    T, D = x.shape
    y = np.empty((T, D), np.float32)
    for t in range(T):
        total = np.float32(0)
        for d in range(D):
            total += x[t, d] * x[t, d]
        scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(D) + np.float32(eps)))
        for d in range(D):
            y[t, d] = gain[d] * (x[t, d] * scale)
    return y


@njit(**SERIAL)
def rope(x, cos, sin):
    """ops.rope."""
    T, H, E = x.shape
    y = np.empty((T, H, E), np.float32)
    for t in range(T):
        for h in range(H):
            for i in range(E // 2):
                even, odd = x[t, h, 2 * i], x[t, h, 2 * i + 1]
                y[t, h, 2 * i] = even * cos[t, i] - odd * sin[t, i]
                y[t, h, 2 * i + 1] = even * sin[t, i] + odd * cos[t, i]
    return y


@njit(**SERIAL)
def swiglu(gate, up):
    """ops.swiglu."""
    T, F = gate.shape
    y = np.empty((T, F), np.float32)
    one = np.float32(1)
    for t in range(T):
        for f in range(F):
            y[t, f] = gate[t, f] / (one + np.float32(math.exp(-gate[t, f]))) * up[t, f]
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
        if cache.n_sink == 0:
            return x
        return rope(x, cos, sin)

    return rope_to_sinks


@overload(ops.swiglu)
def _swiglu(gate, up):
    return lambda gate, up: swiglu(gate, up)
