"""LLaMA 2: which steps happen in which order.

Touvron et al. 2023, arXiv:2307.09288 (LLaMA 2) and arXiv:2302.13971 (LLaMA). What each step means stands in ops.py.
This file runs as it stands in NumPy, and is compiled as it stands by Numba, which puts a kernel in place of each op.

Axes: T tokens in this call, D model width, H query heads, G key/value heads, E head size, F feed-forward width,
V vocabulary, L layers, R rows whose logits are wanted.

The whole model in one picture. x is the residual stream: every block reads it and adds to it, nothing overwrites it.

    tokens ─ embed ─ x ─┬─ norm ─ attention ────┬─ + ─┬─ norm ─ feed_forward ─┬─ + ─ ... ─ norm ─ linear ─ logits
                        └───────────────────────┘     └───────────────────────┘
                         once for each of L layers
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.cache import KVCache
from npllama.ops import attend, embed, layer, linear, linears, rms_norm, rope, rope_to_sinks, swiglu
from npllama.weights import Weights


class Batch(NamedTuple):
    """The tokens of one call, flat: a prompt, one new token, several sequences side by side are all this.

    tokens, pos, seq (T,) int64: token t of sequence seq[t] stands at position pos[t]. Rows of a sequence stand
    together in ascending order. out (R,) int64: the rows whose logits are wanted.
    """

    tokens: np.ndarray
    pos: np.ndarray
    seq: np.ndarray
    out: np.ndarray


class Rotation(NamedTuple):
    """What ops.rotation gives for the batch's positions, and for those from which the sinks are seen. (T, E/2)"""

    cos: np.ndarray
    sin: np.ndarray
    sink_cos: np.ndarray
    sink_sin: np.ndarray


class Numbers(NamedTuple):
    """The numbers of the config that the steps need."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float


def attention(
    x: np.ndarray,
    l: int,
    batch: Batch,
    rotation: Rotation,
    weights: Weights,
    cache: KVCache,
    config: Numbers,
) -> np.ndarray:
    """Let each token gather what earlier tokens know: (T, D) -> (T, D).

    Every token asks with a query q, offers itself under a key k, and hands over a value v when it is chosen. LLaMA 2
    lets H/G query heads share each key/value head (grouped-query attention), which makes the cache H/G times smaller.
    Queries and keys are turned by their positions, so that their product depends on the distance between them only.
    The cache keeps k and v of all earlier tokens, so that each is computed once: it is what makes decoding cheap.
    """
    T = x.shape[0]
    q, k, v = linears(x, (layer(weights.wq, l), layer(weights.wk, l), layer(weights.wv, l)))
    q = q.reshape(T, config.n_heads, config.head_dim)  # (T, H*E) -> (T, H, E)
    k = k.reshape(T, config.n_kv_heads, config.head_dim)  # (T, G*E) -> (T, G, E)
    v = v.reshape(T, config.n_kv_heads, config.head_dim)  # (T, G*E) -> (T, G, E)

    q_sink = rope_to_sinks(q, rotation.sink_cos, rotation.sink_sin, cache)
    q = rope(q, rotation.cos, rotation.sin)
    k = rope(k, rotation.cos, rotation.sin)

    y = attend(q, q_sink, k, v, cache, l, batch.pos, batch.seq)  # (T, H, E) -> (T, H*E)
    return linear(y, layer(weights.wo, l))


def feed_forward(x: np.ndarray, l: int, weights: Weights) -> np.ndarray:
    """Let each token think for itself: (T, D) -> (T, D).

    w1 and w3 look for F patterns in the token; where the gate w1 fires, the pattern's content w3 passes, and w2
    writes what it stands for back into the residual stream.
    """
    gate, up = linears(x, (layer(weights.w1, l), layer(weights.w3, l)))  # (T, D) -> 2 x (T, F)
    return linear(swiglu(gate, up), layer(weights.w2, l))


def forward(batch: Batch, rotation: Rotation, weights: Weights, cache: KVCache, config: Numbers) -> np.ndarray:
    """Tokens -> logits of the next token, for the rows in batch.out: (T,) -> (R, V). Writes the cache.

    A norm stands before each block and before the output, never on the residual stream itself.
    """
    x = embed(weights.tok_embeddings, batch.tokens)  # (T,) -> (T, D)
    for l in range(config.n_layers):
        x = x + attention(
            rms_norm(x, layer(weights.attention_norm, l), config.norm_eps), l, batch, rotation, weights, cache, config
        )
        x = x + feed_forward(rms_norm(x, layer(weights.ffn_norm, l), config.norm_eps), l, weights)
    return linear(rms_norm(x[batch.out], weights.norm, config.norm_eps), weights.output)  # (R, D) -> (R, V)
