"""The steps of the model by definition: loops over single numbers in float64. Slow, and meant to be read."""

from __future__ import annotations

import math

import numpy as np


def linear(x, w):
    T, N = len(x), len(w)
    y = np.zeros((T, N))
    for t in range(T):
        for n in range(N):
            y[t, n] = sum(float(a) * float(b) for a, b in zip(x[t], w[n], strict=True))
    return y


def rms_norm(x, gain, eps):
    y = np.zeros(x.shape)
    for t, row in enumerate(x):
        mean_square = sum(float(v) ** 2 for v in row) / len(row)
        for d, v in enumerate(row):
            y[t, d] = float(gain[d]) * float(v) / math.sqrt(mean_square + eps)
    return y


def rope(x, pos, theta):
    T, H, E = x.shape
    y = np.zeros(x.shape)
    for t in range(T):
        for h in range(H):
            for i in range(E // 2):
                turned = complex(x[t, h, 2 * i], x[t, h, 2 * i + 1]) * np.exp(1j * pos[t] * theta ** (-2 * i / E))
                y[t, h, 2 * i], y[t, h, 2 * i + 1] = turned.real, turned.imag
    return y


def swiglu(gate, up):
    y = np.zeros(gate.shape)
    for index, g in np.ndenumerate(gate):
        sigmoid = 1 / (1 + math.exp(-float(g))) if g > -700 else 0.0
        y[index] = float(g) * sigmoid * float(up[index])
    return y


def attention(q, k, v, pos, window, n_sink, theta, keys=None):
    """One sequence, whole, with a plain mask. q (T, H, E), k, v (T, G, E) not rotated, rows at positions pos.

    keys (T, G, E): what to use in place of the rotated k.

    A row sees the last `window` positions up to its own, and the first n_sink. Sinks are seen from position
    min(p, n_sink + window - 1), everything else from the row's own.
    """
    T, H, E = q.shape
    G = k.shape[1]
    keys = rope(k, pos, theta) if keys is None else keys
    near = rope(q, pos, theta)
    far = rope(q, [min(p, n_sink + window - 1) for p in pos], theta)
    y = np.zeros((T, H * E))
    for t in range(T):
        seen = [s for s in range(T) if pos[s] <= pos[t] and (pos[s] > pos[t] - window or pos[s] < n_sink)]
        for h in range(H):
            g = h // (H // G)
            scores = [(far if pos[s] < n_sink else near)[t, h] @ keys[s, g] / math.sqrt(E) for s in seen]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            total = sum(weights)
            for s, weight in zip(seen, weights, strict=True):
                y[t, h * E : (h + 1) * E] += weight / total * v[s, g]
    return y
