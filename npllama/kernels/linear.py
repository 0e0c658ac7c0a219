"""ops.linear and ops.embed compiled, for every number format."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.errors import NumbaTypeError
from numba.extending import intrinsic, overload

from npllama import ops
from npllama.kernels.flags import PARALLEL, SERIAL
from npllama.kernels.steps import is_format
from npllama.quant import BF16, F16


@intrinsic
def half(typingctx, bits):
    """The float32 value of a float16's bits."""

    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def brain(typingctx, bits):
    """The float32 value of a bfloat16's bits."""

    def generate(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@njit(**SERIAL)
def same(value):
    """The float32 value of a float32."""
    return value


def make_linear(read):
    """ops.linear for stored numbers that `read` turns into float32: a thread owns whole columns of y."""

    @njit(**PARALLEL)
    def linear(x, w):
        T, K = x.shape
        N = w.shape[0]
        y = np.empty((T, N), np.float32)
        for n in prange(N):
            for t in range(T):
                total = np.float32(0)
                for k in range(K):
                    total += x[t, k] * read(w[n, k])
                y[t, n] = total
        return y

    return linear


def make_embed(read):
    """ops.embed for stored numbers that `read` turns into float32."""

    @njit(**SERIAL)
    def embed(table, tokens):
        T, D = tokens.shape[0], table.shape[1]
        x = np.empty((T, D), np.float32)
        for t in range(T):
            for d in range(D):
                x[t, d] = read(table[tokens[t], d])
        return x

    return embed


linear_f32, linear_f16, linear_bf16 = make_linear(same), make_linear(half), make_linear(brain)
embed_f32, embed_f16, embed_bf16 = make_embed(same), make_embed(half), make_embed(brain)


@overload(ops.linear)
def _linear(x, w):
    if isinstance(w, types.Array) and w.dtype == types.float32:
        return lambda x, w: linear_f32(x, w)
    if is_format(w, F16):
        return lambda x, w: linear_f16(x, w.bits)
    if is_format(w, BF16):
        return lambda x, w: linear_bf16(x, w.bits)
    raise NumbaTypeError(f"linear: no kernel for weights of type {w}")


@overload(ops.embed)
def _embed(table, tokens):
    if isinstance(table, types.Array) and table.dtype == types.float32:
        return lambda table, tokens: embed_f32(table, tokens)
    if is_format(table, F16):
        return lambda table, tokens: embed_f16(table.bits, tokens)
    if is_format(table, BF16):
        return lambda table, tokens: embed_bf16(table.bits, tokens)
    raise NumbaTypeError(f"embed: no kernel for a table of type {table}")
