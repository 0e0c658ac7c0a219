"""Each function of ops.py compiled on its own, for `verify` and for timing op by op; disk_cache.kept_ops keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from npllama import ops
from npllama.execution.kernels import attention, elementwise, linear  # noqa: F401 (importing registers the overloads)
from npllama.execution.kernels.flags import SERIAL
from npllama.execution.kernels.formats import import_kernels

import_kernels()


@njit(**SERIAL)
def embed_alone(table, tokens):
    return ops.embed(table, tokens)


@njit(**SERIAL)
def rms_norm_alone(x, gain, eps):
    return ops.rms_norm(x, gain, eps)


@njit(**SERIAL)
def linear_alone(x, w):
    return ops.linear(x, w)


@njit(**SERIAL)
def linears_alone(x, ws):
    return ops.linears(x, ws)


@njit(**SERIAL)
def rope_alone(x, cos, sin):
    return ops.rope(x, cos, sin)


@njit(**SERIAL)
def rope_to_sinks_alone(x, cos, sin, cache):
    return ops.rope_to_sinks(x, cos, sin, cache)


@njit(**SERIAL)
def attend_alone(q, q_sink, k, v, cache, l, pos, seq):
    return ops.attend(q, q_sink, k, v, cache, l, pos, seq)


@njit(**SERIAL)
def swiglu_alone(gate, up):
    return ops.swiglu(gate, up)


OPS: dict[str, Callable[..., Any]] = {
    "embed": embed_alone,
    "rms_norm": rms_norm_alone,
    "linear": linear_alone,
    "linears": linears_alone,
    "rope": rope_alone,
    "rope_to_sinks": rope_to_sinks_alone,
    "attend": attend_alone,
    "swiglu": swiglu_alone,
}
