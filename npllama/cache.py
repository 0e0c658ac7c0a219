"""The KV cache: one ring buffer of keys and values for each sequence, addressed by position.

Axes: L layers, N sequences, G key/value heads, S slots, E head size.

Why a cache: a token's keys and values never change once computed, so each is computed once and kept. Why a ring: memory
is bounded, and position p simply replaces position p - ring; the order of slots does not matter to attention, because
every key is stored rotated by its own position. One rule decides what a query at position p sees:

    visible(p, s)  =  0 <= pos[s] <= p   and   (pos[s] > p - window  or  pos[s] < n_sink)

That is the causal mask, the empty slot (pos = -1), the lapped ring, the sliding window and the attention sinks
(Xiao et al. 2023, arXiv:2309.17453) at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.errors import UsageError

EMPTY = -1


class KVCache(NamedTuple):
    """Keys and values of all layers and sequences, and which position each slot holds.

    k, v (L, N, G, S, E) float32; pos (L, N, S) int64, EMPTY where nothing is stored: of each layer, because
    a chunk that laps the ring is written piece by piece within the layer. Slots 0 .. n_sink-1 are pinned to the
    first positions, the other S - n_sink >= window slots are the ring.
    """

    k: np.ndarray
    v: np.ndarray
    pos: np.ndarray
    window: int
    n_sink: int


def size_bytes(n_layers: int, n_seqs: int, n_kv_heads: int, n_slots: int, head_dim: int) -> int:
    """Bytes that `allocate` needs once every slot is used."""
    return n_layers * n_seqs * n_slots * (2 * n_kv_heads * head_dim * 4 + 8)


def allocate(
    n_layers: int, n_seqs: int, n_kv_heads: int, n_slots: int, head_dim: int, window: int = 0, n_sink: int = 0
) -> KVCache:
    """An empty cache; pages are taken from the system as slots are first written.

    window 0 means all slots that are not sinks. Raises UsageError when the slots do not hold sinks and window.
    """
    window = window or n_slots - n_sink
    if n_sink < 0 or window < 1 or n_sink + window > n_slots:
        raise UsageError(
            f"a cache of {n_slots} slots cannot hold {n_sink} sinks and a window of {window} positions; "
            f"it needs n_sink >= 0, window >= 1 and at least their sum of slots."
        )
    shape = (n_layers, n_seqs, n_kv_heads, n_slots, head_dim)
    pos = np.full((n_layers, n_seqs, n_slots), EMPTY, np.int64)
    return KVCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32), pos, window, n_sink)


def clear(cache: KVCache, n: int) -> None:
    """Forget sequence n."""
    cache.pos[:, n] = EMPTY


def slot(cache: KVCache, p: int) -> int:
    """The slot of position p: its own for a sink, the ring's for all others."""
    if p < cache.n_sink:
        return p
    return cache.n_sink + (p - cache.n_sink) % (cache.pos.shape[2] - cache.n_sink)


def run_stop(cache: KVCache, pos: np.ndarray, seq: np.ndarray, start: int, most: int) -> int:
    """End of the longest run of rows from `start` that may be written to the cache before its rows look at it.

    A run is of one sequence, has at most `most` rows, and overwrites nothing that its first row still sees:
    writing p replaces p - ring, which the row at first needs unless p - ring <= first - window.
    """
    n_slots = cache.pos.shape[2]
    last = max(n_slots - 1, pos[start] + (n_slots - cache.n_sink) - cache.window)
    stop = start + 1
    end = min(len(pos), start + most)
    while stop < end and seq[stop] == seq[start] and pos[stop] <= last:
        stop += 1
    return stop
