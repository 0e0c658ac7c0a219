"""The steps of the transformer in NumPy: each function is the definition that a kernel must compute.

Axes: T tokens in this call, D model width, H query heads, G key/value heads, E head size, F feed-forward width,
V vocabulary, L layers, N sequences, S cache slots. Activations are float32 between any two steps.

Within rms_norm, attend and swiglu they are float64. The float32 that a step hands on is then the one nearest to its
equation, but for the rarest ties: the same in NumPy and in a kernel that adds in another order.
"""

from __future__ import annotations

import itertools
from typing import TypeVar

import numpy as np

from npllama.cache import KVCache, n_kv_heads, read, seen, store
from npllama.numbers import Weight, format_of, widen_rows
from npllama.numbers.activations import quantize_rows
from npllama.numbers.groups import Grouped

# Scores of one attention step, at most: they stay in L2, and what later rows alone see is left out.
MAX_SCORES = 1 << 18
# Sums of groups that one step of a product holds: they stay in L2.
MAX_COUNTS = 1 << 17

W = TypeVar("W", bound=Weight)


def layer(w: W, l: int) -> W:
    """Layer l of stacked weights: (L, rows, columns) -> (rows, columns), a view, in the same number format."""
    if isinstance(w, np.ndarray):
        return w[l]
    return type(w)(*(part[l] if isinstance(part, np.ndarray) else part for part in w))


def embed(table: Weight, tokens: np.ndarray) -> np.ndarray:
    """Look up each token's row of the embedding table.

        x[t] = table[tokens[t]]

    table (V, D) in any format, tokens (T,) int64 in [0, V). Returns (T, D) float32, new.
    """
    return widen_rows(table, tokens)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """Scale each row to unit root-mean-square, then by a learned gain.

        y[t, d] = gain[d] * x[t, d] / sqrt(mean_d(x[t, d]^2) + eps)

    x (T, D) float32, gain (D,) float32, eps > 0 inside the root (LLaMA 2: 1e-5). Returns (T, D) float32, new.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467, section 4. Differs: eps, placed as in Meta's model.py.
    """
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)  # (T, D) -> (T, 1)
    scale = 1 / np.sqrt(mean_square + eps)
    return gain * (x * scale.astype(np.float32))


def linear(x: np.ndarray, w: Weight) -> np.ndarray:
    """Multiply every row by a weight matrix.

        y[t, n] = sum_k x[t, k] * w[n, k]

    x (T, K) float32, w (N, K) in any format. Returns (T, N) float32, new. With a quantized format the x of the
    equation is x rounded to 8 bits, and the products are of integers: see `_grouped_linear`.
    """
    w = w if isinstance(w, Grouped) else format_of(w).for_products(w)
    if isinstance(w, Grouped):
        return _grouped_linear(x, w)
    return x @ w.T


def _grouped_linear(x: np.ndarray, w: Grouped) -> np.ndarray:
    """Multiply rows, rounded by activations.quantize_rows, by a quantized matrix of Q groups of columns.

        y[t, n] = factor[n] * sum_q (sum_k level[n, q, k] * code[t, q, k]) * (scale[n, q] * x_scale[t, q])

    A format with minimums adds minimum[n, q] * (sum_k code[t, q, k] * x_scale[t, q]) to each term. The sums over k are
    of integers below 2^24: exact in float32, in whatever order they are added. The one over q runs in ascending order,
    each operation rounded to float32: so a kernel that does the same gives the same bits.
    """
    codes, x_scales = (np.moveaxis(a, 1, 0) for a in quantize_rows(x))  # (T, Q, GROUP) -> (Q, T, GROUP), (Q, T)
    (Q, T), N = x_scales.shape, len(w.factors)
    y = np.zeros((T, N), np.float32)
    step = max(1, MAX_COUNTS // max(1, T * N))
    for q in range(0, Q, step):
        some = slice(q, q + step)
        counts = codes[some].astype(np.float32) @ w.levels[some]  # (q, T, GROUP) @ (q, GROUP, N) -> (q, T, N)
        with np.errstate(invalid="ignore"):  # infinity times 0, in a row that is not finite anyway
            counts *= w.scales[some, None, :] * x_scales[some, :, None]
            if w.minimums is not None:
                x_sums = codes[some].sum(axis=-1, dtype=np.float32) * x_scales[some]  # (q, T)
                counts += w.minimums[some, None, :] * x_sums[..., None]
        for product in counts:
            y += product
    y *= w.factors
    return y


def linears(x: np.ndarray, ws: tuple[Weight, ...]) -> tuple[np.ndarray, ...]:
    """Multiply every row by several weight matrices: `linear` for each.

    x (T, K) float32, every w (N_i, K). Returns a (T, N_i) for each. Together they need x once.
    """
    return tuple(linear(x, w) for w in ws)


def rotation(pos: np.ndarray, frequencies: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every angle by which positions rotate the pairs of a head.

        angle[t, i] = pos[t] * frequencies[i]        i = 0 .. E/2 - 1
        cos, sin = scale * cos(angle), scale * sin(angle)

    pos (T,) integers, frequencies (E/2,) float64 in radians and scale from rope.frequencies. Angles are computed in
    float64: in float32 they lose a digit for each factor of ten in pos.
    Returns cos, sin (T, E/2) float32. Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; scale: Peng et al. 2023,
    arXiv:2309.00071, section 3.4.
    """
    angle = np.asarray(pos, np.float64)[:, None] * frequencies  # (T,) -> (T, E/2)
    return (scale * np.cos(angle)).astype(np.float32), (scale * np.sin(angle)).astype(np.float32)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate each adjacent pair of a head by its position's angle (rotary position embedding).

        y[t, h, 2i]   = x[t, h, 2i] * cos[t, i] - x[t, h, 2i+1] * sin[t, i]
        y[t, h, 2i+1] = x[t, h, 2i] * sin[t, i] + x[t, h, 2i+1] * cos[t, i]

    x (T, H, E) float32, cos and sin (T, E/2) float32 from `rotation`. Returns (T, H, E) float32, new.
    Source: Su et al. 2021, arXiv:2104.09864, equation 34; pairs are adjacent, as in Meta's checkpoints.
    """
    even, odd = x[:, :, 0::2], x[:, :, 1::2]  # (T, H, E) -> 2 x (T, H, E/2)
    c, s = cos[:, None, :], sin[:, None, :]
    y = np.empty_like(x)
    y[:, :, 0::2] = even * c - odd * s
    y[:, :, 1::2] = even * s + odd * c
    return y


def rope_to_sinks(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, cache: KVCache) -> np.ndarray:
    """Rotate queries as `rope` does, to the positions from which they see the sinks; x itself where there are none.

    x (T, H, E) float32, cos and sin (T, E/2) of the positions min(p, n_sink + window - 1). Returns (T, H, E) float32.
    Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2: distances are counted within the cache.
    """
    if cache.n_sink.max() == 0:
        return x
    return rope(x, cos, sin)


def attend(
    q: np.ndarray,
    q_sink: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: KVCache,
    l: int,
    pos: np.ndarray,
    seq: np.ndarray,
) -> np.ndarray:
    """Store the new keys and values in layer l of the cache, then let every query read what it may see.

        score[t, h, s] = q[t, h] . K[g, s] / sqrt(E)            for visible s, g = h // (H/G)
        y[t, h]        = sum_s softmax_s(score[t, h, s]) * V[g, s]

    q, q_sink (T, H, E); k, v (T, G, E) float32, rotated; pos, seq (T,) int64; the rows of a sequence stand together,
    their positions ascending by one. q_sink is q rotated to the distance at which the sinks are seen.
    Returns (T, H*E) float32, new. All rows are written before any is read, and a row sees nothing that later ones
    have written: so a chunk of any length equals its tokens one at a time.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; Ainslie et al. 2023, arXiv:2305.13245 (groups);
    Xiao et al. 2023, arXiv:2309.17453 (sinks).
    """
    T, H, E = q.shape
    y = np.empty((T, H * E), np.float32)
    bounds = [0, *(1 + np.flatnonzero(np.diff(seq))), T]
    for start, stop in itertools.pairwise(bounds):  # the rows of one sequence
        n = seq[start]
        store(cache, l, n, int(pos[start]), k[start:stop], v[start:stop])
        most_seen = min(pos[stop - 1] + 1, cache.n_sink[n] + cache.window[n] + stop - start)
        step = max(1, MAX_SCORES // int(H * most_seen))
        for t in range(start, stop, step):
            rows = slice(t, min(t + step, stop))
            y[rows] = _attend_rows(q[rows], q_sink[rows], cache, l, n, pos[rows])
    return y


def _attend_rows(q: np.ndarray, q_sink: np.ndarray, cache: KVCache, l: int, n: int, pos: np.ndarray) -> np.ndarray:
    """Attention of rows of one sequence, whose keys are all in the cache. q (T, H, E) -> (T, H*E)."""
    T, H, E = q.shape
    G, window, n_sink = n_kv_heads(cache), cache.window[n], cache.n_sink[n]
    slot_pos, spans = seen(cache, n, int(pos[0]), int(pos[-1]))  # (S,)

    near = _by_group(q, G)
    far = _by_group(q_sink, G) if n_sink else near
    score = np.empty((G, T * (H // G), len(slot_pos)))
    for some, slots in spans:
        K = read(cache.k, l, slots).astype(np.float64)  # (G, s, E), never a gather
        query = far if slot_pos[some.start] < n_sink else near
        np.matmul(query, K.transpose(0, 2, 1), out=score[:, :, some])  # (G, T*H/G, E) @ (G, E, s) -> (G, T*H/G, s)
    score /= np.sqrt(E)  # in place here and below: a new array of this size costs more than the step

    recent = (slot_pos > pos[:, None] - window) | (slot_pos < n_sink)
    visible = (slot_pos <= pos[:, None]) & recent  # (T, S)
    if not visible.all():
        hidden = np.where(visible, 0.0, -np.inf)
        score.reshape(G, T, H // G, -1)[:] += hidden[None, :, None, :]

    score -= score.max(axis=-1, keepdims=True)
    weight = np.exp(score, out=score)
    y = np.zeros((G, T * (H // G), E))
    for some, slots in spans:
        y += weight[:, :, some] @ read(cache.v, l, slots).astype(np.float64)  # (G, T*H/G, s) @ (G, s, E)
    y /= weight.sum(axis=-1, keepdims=True)  # the softmax's sum, divided by after the product: E numbers and not S
    return y.reshape(G, T, H // G, E).transpose(1, 0, 2, 3).reshape(T, H * E).astype(np.float32)


def _by_group(q: np.ndarray, G: int) -> np.ndarray:
    """Bring together the query heads that share a key/value head: (T, H, E) -> (G, T*H/G, E) float64."""
    T, H, E = q.shape
    return q.astype(np.float64).reshape(T, G, H // G, E).transpose(1, 0, 2, 3).reshape(G, T * (H // G), E)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Gate one projection by the SiLU of the other.

        y[t, f] = gate[t, f] * sigmoid(gate[t, f]) * up[t, f]

    gate, up (T, F) float32. Returns (T, F) float32, new.
    Source: Shazeer 2020, arXiv:2002.05202, equation 6; SiLU is Swish with beta = 1.
    """
    y = np.negative(gate, dtype=np.float64)
    with np.errstate(over="ignore"):  # exp(-gate) = inf is the right limit: sigmoid = 0
        np.exp(y, out=y)
        y += 1
        np.divide(gate, y, out=y)  # gate / (1 + exp(-gate)), in place: new arrays cost more than the arithmetic
        y *= up
        return y.astype(np.float32)
