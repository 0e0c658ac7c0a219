"""ops.linear, ops.linears and ops.embed compiled: the number format of the weights selects the kernel."""

from __future__ import annotations

from numba import types
from numba.core.errors import NumbaTypeError
from numba.extending import overload

from npllama import ops
from npllama.execution.kernels.formats import kernels_of
from npllama.execution.kernels.fused_inputs import MAX_FUSED, padded_to_max


@overload(ops.linear)
def _linear(x, w):
    return lambda x, w: ops.linears(x, (w,))[0]


@overload(ops.linears)
def _linears(x, ws):
    if len(ws) > MAX_FUSED:
        raise NumbaTypeError(f"linears: {len(ws)} matrices at once; the kernels take 1 to {MAX_FUSED}")
    if not isinstance(ws, types.UniTuple):  # of several formats
        if len(ws) == 2:
            return lambda x, ws: (ops.linear(x, ws[0]), ops.linear(x, ws[1]))
        return lambda x, ws: (ops.linear(x, ws[0]), ops.linear(x, ws[1]), ops.linear(x, ws[2]))
    kernels = kernels_of(ws.dtype)
    if kernels is None:
        raise NumbaTypeError(f"linear: no kernel for weights of type {ws.dtype}")
    return padded_to_max(kernels.linears, len(ws))


@overload(ops.embed)
def _embed(table, tokens):
    kernels = kernels_of(table)
    if kernels is None:
        raise NumbaTypeError(f"embed: no kernel for a table of type {table}")
    embed = kernels.embed
    return lambda table, tokens: embed(table, tokens)
