"""ops.attend compiled."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numba.extending import overload, register_jitable

from npllama import cache as kv
from npllama import ops
from npllama.kernels.flags import SERIAL

run_stop = register_jitable(kv.run_stop)
slot = register_jitable(kv.slot)


@njit(**SERIAL)
def store(k, v, cache, l, pos, n, start, stop):
    """Write the keys and values of rows start .. stop-1 into layer l of sequence n."""
    _, G, E = k.shape
    for t in range(start, stop):
        s = slot(cache, pos[t])
        cache.pos[l, n, s] = pos[t]
        for g in range(G):
            for e in range(E):
                cache.k[l, n, g, s, e] = k[t, g, e]
                cache.v[l, n, g, s, e] = v[t, g, e]


@njit(**SERIAL)
def attend_head(q, q_sink, k, v, slot_pos, p, used, limits, score, y):
    """One query head over the slots of its key/value head: q, q_sink, y (E,), k, v (S, E), score (S,) to work in."""
    E = q.shape[0]
    window, n_sink = limits
    scale = np.float32(1) / np.float32(math.sqrt(E))
    highest = np.float32(-np.inf)
    for s in range(used):
        at = slot_pos[s]
        if at < 0 or at > p or (at <= p - window and at >= n_sink):
            score[s] = np.float32(-np.inf)
            continue
        total = np.float32(0)
        if s < n_sink:
            for e in range(E):
                total += q_sink[e] * k[s, e]
        else:
            for e in range(E):
                total += q[e] * k[s, e]
        score[s] = total * scale
        highest = max(highest, score[s])
    norm = np.float32(0)
    for e in range(E):
        y[e] = np.float32(0)
    for s in range(used):
        if score[s] == np.float32(-np.inf):
            continue
        weight = np.float32(math.exp(score[s] - highest))
        norm += weight
        for e in range(E):
            y[e] += weight * v[s, e]
    for e in range(E):
        y[e] /= norm


@njit(**SERIAL)
def attend(q, q_sink, k, v, cache, l, pos, seq):
    """ops.attend: run after run, row after row."""
    T, H, E = q.shape
    S, share = cache.pos.shape[2], H // k.shape[1]
    y = np.empty((T, H * E), np.float32)
    score = np.empty(S, np.float32)
    start = 0
    while start < T:
        stop = run_stop(cache, pos, seq, start, T)
        n = seq[start]
        store(k, v, cache, l, pos, n, start, stop)
        for t in range(start, stop):
            used = min(pos[t] + 1, S)
            for h in range(H):
                g = h // share
                attend_head(
                    q[t, h], q_sink[t, h], cache.k[l, n, g], cache.v[l, n, g], cache.pos[l, n], pos[t], used,
                    (cache.window, cache.n_sink), score, y[t, h * E : (h + 1) * E],
                )  # fmt: skip
        start = stop
    return y


@overload(ops.attend)
def _attend(q, q_sink, k, v, cache, l, pos, seq):
    return lambda q, q_sink, k, v, cache, l, pos, seq: attend(q, q_sink, k, v, cache, l, pos, seq)
