"""The KV cache: keys and values of all sequences in one pool of blocks, addressed by position.

Axes: L layers, N sequences, G key/value heads, S slots of the pool, E head size, C entries of a table.

Why a cache: a token's keys and values never change once computed, so each is computed once and kept. Why blocks: a
block holds 64 positions of one sequence, and each sequence has a table of its blocks. So texts of any length share one
memory, equal beginnings share their blocks, and a text without end gives back the blocks that no later query sees.
Position p stands in slot p % 64 of block p // 64 of its sequence, wherever the pool keeps it: what a query adds, and in
which order, depends on positions alone. One rule decides what a query at position p sees of its sequence:

    visible(p, s)  =  0 <= s <= p   and   (s > p - window  or  s < n_sink)

That is the causal mask, the sliding window and the attention sinks (Xiao et al. 2023, arXiv:2309.17453) at once.
Blocks as in Kwon et al. 2023, arXiv:2309.06180, section 4.1 (PagedAttention).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from npllama.errors import UsageError, quote
from npllama.numbers.activations import quantize_rows
from npllama.numbers.blocks import GROUP
from npllama.numbers.f16 import F16, f16_bits, from_f16

BLOCK_SLOTS = 64
"""Positions of a block."""

NO_BLOCK = -1
NO_WINDOW = 1 << 40
"""The window of a sequence that sees all its positions."""


class Int8KV(NamedTuple):
    """Keys or values in 8 bits, each head's row rounded in groups as activations.quantize_rows does it.

    codes (L, G, S, E) int8, scales (L, G, S, groups) float32.
    """

    codes: np.ndarray
    scales: np.ndarray


Stored = np.ndarray | F16 | Int8KV
"""Keys or values of all layers and blocks in a number format: float32, float16 or 8 bits."""

KV_DTYPES = ("f32", "f16", "q8")


class KVCache(NamedTuple):
    """The pool of keys and values, and for each sequence where it keeps its positions and what its queries see.

    k, v (L, G, S, E) in any of the formats: block b is the slots 64 b .. 64 b + 63 of every layer and head.
    table (N, C) int32: the block of positions 64 c .. 64 c + 63 of sequence n; NO_BLOCK where it keeps none.
    window, n_sink (N,) int64: see the rule above. length (N,) int64: positions that are written, from 0 on; the engine
    counts them when a call has ended, so what an abandoned call has written does not count.
    A query sees every key and value as stored, its own too, so a result does not depend on how the tokens were cut into
    calls.
    """

    k: Stored
    v: Stored
    table: np.ndarray
    window: np.ndarray
    n_sink: np.ndarray
    length: np.ndarray


def checked_kv_dtype(kv_dtype: object) -> str:
    """The number format of a cache, or UsageError."""
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype={quote(kv_dtype)} is not known; it needs one of {', '.join(KV_DTYPES)}.")
    return str(kv_dtype)


def row_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of one key or value of one head."""
    return {"f32": 4 * head_dim, "f16": 2 * head_dim, "q8": head_dim + 4 * n_groups(head_dim)}[kv_dtype]


def n_groups(head_dim: int) -> int:
    """Groups of numbers that share a scale in a head's row of 8-bit keys or values."""
    return -(-head_dim // GROUP)


def n_blocks(n_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-n_positions // BLOCK_SLOTS)


def size_bytes(n_layers: int, n_kv_heads: int, n_slots: int, head_dim: int, kv_dtype: str = "f32") -> int:
    """Bytes of so many slots of a pool once they are used."""
    return n_layers * n_kv_heads * n_slots * 2 * row_bytes(head_dim, kv_dtype)


def allocate_pool(
    n_layers: int, n_kv_heads: int, head_dim: int, blocks: int, n_seqs: int, n_entries: int, kv_dtype: str = "f32"
) -> KVCache:
    """A pool of so many blocks and n_seqs sequences without any; pages are taken from the system when first written.

    kv_dtype "f32", "f16" or "q8"; UsageError for another.
    """
    shape = (n_layers, n_kv_heads, blocks * BLOCK_SLOTS, head_dim)
    k, v = (_zeros(shape, checked_kv_dtype(kv_dtype)) for _ in range(2))
    table = np.full((n_seqs, n_entries), NO_BLOCK, np.int32)
    windows, sinks, lengths = np.full(n_seqs, NO_WINDOW), np.zeros(n_seqs, np.int64), np.zeros(n_seqs, np.int64)
    return KVCache(k, v, table, windows, sinks, lengths)


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
    """An empty cache in which every sequence has its own blocks, for n_slots positions from 0 on.

    window 0: none. Raises UsageError for sinks or a window out of range.
    """
    if n_sink < 0 or window < 0:
        raise UsageError(f"{n_sink} sinks and a window of {window} positions: neither can be below 0.")
    entries = n_blocks(n_slots)
    cache = allocate_pool(n_layers, n_kv_heads, head_dim, n_seqs * entries, n_seqs, entries, kv_dtype)
    cache.table[:] = np.arange(n_seqs * entries).reshape(n_seqs, entries)
    cache.window[:], cache.n_sink[:] = window or NO_WINDOW, n_sink
    return cache


def _zeros(shape: tuple[int, ...], kv_dtype: str) -> Stored:
    if kv_dtype == "f16":
        return F16(np.zeros(shape, np.uint16))
    if kv_dtype == "q8":
        return Int8KV(np.zeros(shape, np.int8), np.zeros((*shape[:-1], n_groups(shape[-1])), np.float32))
    return np.zeros(shape, np.float32)


def write(stored: Stored, l: int, slots: slice, rows: np.ndarray) -> None:
    """Keep keys or values (T, G, E) float32 in adjacent slots of layer l."""
    heads = rows.transpose(1, 0, 2)  # (T, G, E) -> (G, T, E)
    if isinstance(stored, F16):
        stored.bits[l, :, slots] = f16_bits(heads)
    elif isinstance(stored, Int8KV):
        G, T, E = heads.shape
        codes, scales = quantize_rows(heads.reshape(G * T, E))
        stored.codes[l, :, slots] = codes.reshape(G, T, -1)[:, :, :E]
        stored.scales[l, :, slots] = scales.reshape(G, T, -1)
    else:
        stored[l, :, slots] = heads


def read(stored: Stored, l: int, slots: slice) -> np.ndarray:
    """Adjacent slots of layer l: (G, slots, E) float32, a view where that is how they lie."""
    if isinstance(stored, F16):
        return from_f16(stored.bits[l, :, slots])
    if isinstance(stored, Int8KV):
        codes, scales = stored.codes[l, :, slots], stored.scales[l, :, slots]
        return codes * np.repeat(scales, GROUP, axis=-1)[:, :, : codes.shape[-1]]
    return stored[l, :, slots]


def runs(cache: KVCache, n: int, first: int, stop: int) -> Iterator[tuple[int, slice]]:
    """Where positions first .. stop-1 of sequence n lie: (position, slots) for each run of adjacent blocks."""
    p = first
    while p < stop:
        c = p // BLOCK_SLOTS
        start = int(cache.table[n, c])
        end = c + 1
        while end * BLOCK_SLOTS < stop and cache.table[n, end] == start + end - c:
            end += 1
        last = min(stop, end * BLOCK_SLOTS)
        at = start * BLOCK_SLOTS + p % BLOCK_SLOTS
        yield p, slice(at, at + last - p)
        p = last


def seen(cache: KVCache, n: int, first: int, last: int) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """What queries at positions first .. last of sequence n may see: positions (S,), and where they lie.

    For each run of adjacent blocks, which of the S positions it holds, and its slots. Sinks have runs of their own.
    """
    sinks, stop = min(int(cache.n_sink[n]), last + 1), last + 1
    oldest = max(sinks, first - int(cache.window[n]) + 1)
    found = [*runs(cache, n, 0, sinks), *runs(cache, n, oldest, stop)]
    ends = [0, *np.cumsum([slots.stop - slots.start for _, slots in found]).tolist()]
    spans = [(slice(*columns), slots) for columns, (_, slots) in zip(itertools.pairwise(ends), found, strict=True)]
    return np.concatenate([np.arange(sinks), np.arange(oldest, stop)]), spans


def store(cache: KVCache, l: int, n: int, first: int, k: np.ndarray, v: np.ndarray) -> None:
    """Keep the keys and values (T, G, E) of the positions from `first` on in layer l of sequence n."""
    for p, slots in runs(cache, n, first, first + len(k)):
        rows = slice(p - first, p - first + slots.stop - slots.start)
        write(cache.k, l, slots, k[rows])
        write(cache.v, l, slots, v[rows])


def copy_block(cache: KVCache, source: int, target: int) -> None:
    """Copy a block's keys and values of all layers to another: what a writer does with a block that others share."""
    a, b = (slice(i * BLOCK_SLOTS, (i + 1) * BLOCK_SLOTS) for i in (source, target))
    for array in arrays(cache):
        array[:, :, b] = array[:, :, a]


def arrays(cache: KVCache) -> list[np.ndarray]:
    """The pool's arrays, of keys, then of values: all (L, G, S, ...)."""
    return [a for stored in (cache.k, cache.v) for a in ((stored,) if isinstance(stored, np.ndarray) else stored)]


def n_kv_heads(cache: KVCache) -> int:
    """G of a cache."""
    return int(arrays(cache)[0].shape[1])
