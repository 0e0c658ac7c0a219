"""The KV cache: one ring buffer of keys and values for each sequence, addressed by position.

Axes: L layers, N sequences, G key/value heads, S slots, E head size.

Why a cache: a token's keys and values never change once computed, so each is computed once and kept. Why a ring: memory
is bounded, and position p replaces position p - ring. The order of slots does not matter to attention, because every
key is stored rotated by its own position. One rule decides what a query at position p sees:

    visible(p, s)  =  0 <= pos[s] <= p   and   (pos[s] > p - window  or  pos[s] < n_sink)

That is the causal mask, the empty slot (pos = -1), the lapped ring, the sliding window and the attention sinks
(Xiao et al. 2023, arXiv:2309.17453) at once. Nothing in the package asks for sinks or several sequences yet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.errors import UsageError, quote
from npllama.numbers.activations import quantize_rows
from npllama.numbers.blocks import GROUP
from npllama.numbers.f16 import F16, f16_bits, from_f16

EMPTY = -1


class Int8KV(NamedTuple):
    """Keys or values in 8 bits, each head's row rounded in groups as activations.quantize_rows does it.

    codes (L, N, G, S, E) int8, scales (L, N, G, S, groups) float32.
    """

    codes: np.ndarray
    scales: np.ndarray


Stored = np.ndarray | F16 | Int8KV
"""Keys or values of all layers and sequences in a number format: float32, float16 or 8 bits."""

KV_DTYPES = ("f32", "f16", "q8")


class KVCache(NamedTuple):
    """Keys and values of all layers and sequences, and which position each slot holds.

    k, v (L, N, G, S, E) in any of the formats; pos (L, N, S) int64, EMPTY where nothing is stored. It is kept for each
    layer, because a chunk that laps the ring is written piece by piece within a layer. Slots 0 .. n_sink-1 are pinned
    to the first positions, the other S - n_sink >= window slots are the ring. A query sees every key and value as
    stored, its own too, so a result does not depend on how the tokens were cut into calls.
    """

    k: Stored
    v: Stored
    pos: np.ndarray
    window: int
    n_sink: int


def checked_kv_dtype(kv_dtype: object) -> str:
    """The number format of a cache, or UsageError."""
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype={quote(kv_dtype)} is not known; it needs one of {', '.join(KV_DTYPES)}.")
    return str(kv_dtype)


def row_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of one key or value of one head."""
    return {"f32": 4 * head_dim, "f16": 2 * head_dim, "q8": head_dim + 4 * n_groups(head_dim)}[kv_dtype]


def size_bytes(n_layers: int, n_seqs: int, n_kv_heads: int, n_slots: int, head_dim: int, kv_dtype: str = "f32") -> int:
    """Bytes that `allocate` needs once every slot is used."""
    return n_layers * n_seqs * n_slots * (2 * n_kv_heads * row_bytes(head_dim, kv_dtype) + 8)


def allocate(
    n_layers: int,
    n_seqs: int,
    n_kv_heads: int,
    n_slots: int,
    head_dim: int,
    window: int = 0,
    n_sink: int = 0,
    kv_dtype: str = "f32",
) -> KVCache:
    """An empty cache; pages are taken from the system as slots are first written.

    window 0 means all slots that are not sinks; kv_dtype "f32", "f16" or "q8". Raises UsageError for another, and when
    the slots do not hold sinks and window.
    """
    window = window or n_slots - n_sink
    if n_sink < 0 or window < 1 or n_sink + window > n_slots:
        raise UsageError(
            f"a cache of {n_slots} slots cannot hold {n_sink} sinks and a window of {window} positions; "
            f"it needs n_sink >= 0, window >= 1 and at least their sum of slots."
        )
    shape = (n_layers, n_seqs, n_kv_heads, n_slots, head_dim)
    k, v = (_zeros(shape, checked_kv_dtype(kv_dtype)) for _ in range(2))
    return KVCache(k, v, np.full((n_layers, n_seqs, n_slots), EMPTY, np.int64), window, n_sink)


def slots_and_window(context: int, sliding_window: int | None, chunk: int) -> tuple[int, int]:
    """Slots and window (0: none) for texts of `context` tokens, read in chunks, by a model that sees so far back.

    A chunk that is written whole before it is read must replace nothing that its first row sees.
    """
    if sliding_window is None or sliding_window >= context:
        return context, 0
    return min(context, sliding_window + chunk - 1), sliding_window


def _zeros(shape: tuple[int, ...], kv_dtype: str) -> Stored:
    if kv_dtype == "f16":
        return F16(np.zeros(shape, np.uint16))
    if kv_dtype == "q8":
        return Int8KV(np.zeros(shape, np.int8), np.zeros((*shape[:-1], n_groups(shape[-1])), np.float32))
    return np.zeros(shape, np.float32)


def n_groups(head_dim: int) -> int:
    """Groups of numbers that share a scale in a head's row of 8-bit keys or values."""
    return -(-head_dim // GROUP)


def write(stored: Stored, l: int, n: int, at: slice | list[int], rows: np.ndarray) -> None:
    """Keep the keys or values (T, G, E) float32 of sequence n in the slots `at` of layer l."""
    heads = rows.transpose(1, 0, 2)  # (T, G, E) -> (G, T, E)
    if isinstance(stored, F16):
        stored.bits[l, n][:, at] = f16_bits(heads)
    elif isinstance(stored, Int8KV):
        G, T, E = heads.shape
        codes, scales = quantize_rows(heads.reshape(G * T, E))
        stored.codes[l, n][:, at] = codes.reshape(G, T, -1)[:, :, :E]
        stored.scales[l, n][:, at] = scales.reshape(G, T, -1)
    else:
        stored[l, n][:, at] = heads


def read(stored: Stored, l: int, n: int, used: int) -> np.ndarray:
    """The first `used` slots of sequence n in layer l: (G, used, E) float32, a view where that is how they lie."""
    if isinstance(stored, F16):
        return from_f16(stored.bits[l, n, :, :used])
    if isinstance(stored, Int8KV):
        codes, scales = stored.codes[l, n, :, :used], stored.scales[l, n, :, :used]
        return codes * np.repeat(scales, GROUP, axis=-1)[:, :, : codes.shape[-1]]
    return stored[l, n, :, :used]


def clear(cache: KVCache, n: int) -> None:
    """Forget sequence n."""
    cache.pos[:, n] = EMPTY


def slot(cache: KVCache, p: int) -> int:
    """The slot of position p: its own for a sink, the ring's for all others."""
    if p < cache.n_sink:
        return p
    return cache.n_sink + (p - cache.n_sink) % (cache.pos.shape[2] - cache.n_sink)


def store(cache: KVCache, l: int, n: int, pos: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """Keep the keys and values (T, G, E) of ascending positions in layer l of sequence n."""
    first, last = slot(cache, int(pos[0])), slot(cache, int(pos[-1]))
    if last - first == len(pos) - 1:
        at: slice | list[int] = slice(first, last + 1)
    else:
        at = [slot(cache, p) for p in pos.tolist()]
    write(cache.k, l, n, at, k)
    write(cache.v, l, n, at, v)
    cache.pos[l, n, at] = pos


def run_stop(cache: KVCache, pos: np.ndarray, seq: np.ndarray, start: int, most: int) -> int:
    """End of the longest run of rows from `start` that may be written to the cache before its rows look at it.

    A run is of one sequence, has at most `most` rows, and overwrites nothing that its first row still sees. Writing p
    replaces p - ring, which the row at position `first` needs unless p - ring <= first - window.
    """
    n_slots = cache.pos.shape[2]
    last = max(n_slots - 1, pos[start] + (n_slots - cache.n_sink) - cache.window)
    stop = start + 1
    end = min(len(pos), start + most)
    while stop < end and seq[stop] == seq[start] and pos[stop] <= last:
        stop += 1
    return stop
