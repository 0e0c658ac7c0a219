"""ops.attend compiled: softmax over blocks of the cache, without ever holding all scores (FlashAttention's loop).

A tile of query rows, tokens of one sequence times the query heads that share a key/value head, goes over the blocks of
the KV cache once. Sums are kept relative to the highest score so far, and rescaled when a higher one appears (online
softmax, Milakov & Gimelshein 2018, arXiv:1805.02867).

Blocks begin at fixed positions, and a masked one adds an exact zero: why that matters is said in kernels/__init__.py.

Axes as in ops.py. M query rows of a tile; P: E rounded up to a multiple of WIDTH, zeros beyond E.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numba.extending import overload

from npllama import ops
from npllama.cache import BLOCK_SLOTS
from npllama.execution.kernels.abandon import abandoned
from npllama.execution.kernels.flags import INLINE, INNER, INNER_PARALLEL
from npllama.execution.kernels.kv_formats import block_rows, pointers, pool_slots, store_head
from npllama.execution.kernels.simd import (
    MANY_EXPS,
    exp_scalar,
    horizontal_max,
    horizontal_sum,
    load_doubles,
    load_scalar,
    maximum,
    num_threads,
    pointer,
    round_to_width,
    splat,
    store_exps,
    store_scalar,
)
from npllama.execution.kernels.strided_rows import StridedRows, skip_columns, skip_rows, transpose_square
from npllama.execution.kernels.target import WIDTH, WIDTH64
from npllama.execution.kernels.weighted_sum import TILE_ROWS, weighted_sums

MAX_TILE_ROWS = 64
"""Query rows of a tile, at most, unless one token has more; fewer where a thread would get less than two tiles."""

SERIAL_BELOW = 1 << 12
"""Below so many products of queries and keys, starting threads costs more than it saves."""


# Tuples of pointers: an array taken out of a tuple counts a reference, and threads that count at once wait for each
# other. The functions that make these tuples are called by one that holds the arrays.


class Queries(NamedTuple):
    """The query rows of a call, and where their results go."""

    q: object  # (T, H, E) float32
    q_sink: object  # the same, rotated to the positions from which the sinks are seen
    y: object  # (T, H * E) float32
    n_heads: int
    head_dim: int
    heads_per_kv: int


class Cache(NamedTuple):
    """What is read of the cache beside keys and values: pointers to `table`, `window` and `n_sink`, and its sizes."""

    table: object
    window: object
    n_sink: object
    columns: int  # C, blocks of a sequence
    slots: int  # of each layer and head


class Tiles(NamedTuple):
    """The rows of a call, pointers, and the tiles that they are cut into: tile i is rows starts[i] .. starts[i+1]-1."""

    pos: object  # (T,)
    seq: object  # (T,)
    starts: object  # (n_tiles + 1,)
    n_tiles: int
    layer: int


class KVView(NamedTuple):
    """What the rows of one sequence, layer and key/value head may see of the cache."""

    k: object  # keys of all layers and heads, in the cache's format
    v: object  # values
    table: object  # (C,) the sequence's blocks
    first: int  # row of k and v where this head's slots begin
    window: int
    n_sink: int


class Tile(NamedTuple):
    """Query rows that are computed together: n_tokens tokens from row t, position p on, times the heads from h on."""

    t: int
    n_tokens: int
    p: int
    h: int


class Workspace(NamedTuple):
    """Buffers of one thread for the M query rows of a tile and a block of slots: pointers."""

    q: object  # (M * P,) float64 queries, divided by sqrt(E)
    q_sink: object  # the same of q_sink
    score: object  # (TILE_ROWS * BLOCK_SLOTS,) float64 scores of a block, then weights
    sink_score: object  # the same of the sinks in it
    sum: object  # (M * P,) float64 weighted sums of values so far
    weight_sum: object  # (M,) float64 sums of weights so far
    max_score: object  # (M,) float64 highest scores so far
    rescale: object  # (M,) float64 factors for the earlier sums
    block: object  # (BLOCK_SLOTS * P,) float32 keys or values, where they cannot be used as they lie
    keys_t: object  # (P * BLOCK_SLOTS,) float32 keys of a block, transposed


@njit(**INNER)
def allocate_workspace(M, E):
    """Memory for the Workspace of M query rows: its float64 and its float32 numbers."""
    P = round_to_width(E)
    return np.empty(2 * TILE_ROWS * BLOCK_SLOTS + M * (3 * P + 3)), np.empty(2 * BLOCK_SLOTS * P, np.float32)


@njit(**INNER)
def carve_workspace(doubles, singles, M, E):
    """The Workspace in that memory."""
    P = round_to_width(E)
    rows = 2 * TILE_ROWS * BLOCK_SLOTS
    each = rows + 3 * M * P
    return Workspace(
        pointer(doubles, rows),
        pointer(doubles, rows + M * P),
        pointer(doubles, 0),
        pointer(doubles, TILE_ROWS * BLOCK_SLOTS),
        pointer(doubles, rows + 2 * M * P),
        pointer(doubles, each),
        pointer(doubles, each + M),
        pointer(doubles, each + 2 * M),
        pointer(singles, 0),
        pointer(singles, BLOCK_SLOTS * P),
    )


# ---------------------------------------------------------------- one tile of query rows


@njit(**INNER)
def init_rows(queries, tile, work, n_sink):
    """Lay out a tile's query rows (token by token, head by head), with nothing seen so far."""
    E, share = queries.head_dim, queries.heads_per_kv
    P, root = round_to_width(E), math.sqrt(E)
    for m in range(tile.n_tokens * share):
        at = ((tile.t + m // share) * queries.n_heads + tile.h + m % share) * E
        for e in range(E):
            store_scalar(work.q, m * P + e, load_scalar(queries.q, at + e) / root)
        for e in range(E, P):
            store_scalar(work.q, m * P + e, 0.0)
        for e in range(P):
            store_scalar(work.sum, m * P + e, 0.0)
        store_scalar(work.max_score, m, -np.inf)
        store_scalar(work.weight_sum, m, 0.0)
        if n_sink > 0:
            for e in range(P):
                store_scalar(work.q_sink, m * P + e, load_scalar(queries.q_sink, at + e) / root if e < E else 0.0)


@njit(**INNER)
def finish_rows(queries, tile, work):
    """Write a tile's results: the sums, divided by the sums of weights."""
    E, share = queries.head_dim, queries.heads_per_kv
    P = round_to_width(E)
    for m in range(tile.n_tokens * share):
        weight_sum = load_scalar(work.weight_sum, m)
        at = ((tile.t + m // share) * queries.n_heads + tile.h + m % share) * E
        for e in range(E):
            store_scalar(queries.y, at + e, np.float32(load_scalar(work.sum, m * P + e) / weight_sum))


@njit(**INNER)
def transpose_block(keys, n_slots, P, work):
    """Transpose a block of keys. Slots up to a multiple of WIDTH are written, those too many like the last."""
    for s in range(0, n_slots, WIDTH):
        for e in range(0, P, WIDTH):
            source, target = skip_columns(skip_rows(keys, s), e).start, pointer(work.keys_t, e * BLOCK_SLOTS + s)
            transpose_square(source, keys.stride, n_slots - 1 - s, target, BLOCK_SLOTS)


@njit(**INNER)
def score_rows(M, m, n_slots, n_sinks, P, work):
    """Scores of the M query rows from m on with the slots of a block, of which the first n_sinks are sinks."""
    keys = StridedRows(work.keys_t, BLOCK_SLOTS)
    score, sink_score = StridedRows(work.score, BLOCK_SLOTS), StridedRows(work.sink_score, BLOCK_SLOTS)
    q, q_sink = skip_rows(StridedRows(work.q, P), m), skip_rows(StridedRows(work.q_sink, P), m)
    rescale = StridedRows(work.rescale, 1)
    weighted_sums(M, q, keys, P, score, rescale, True, round_to_width(n_slots))
    if n_sinks > 0:
        weighted_sums(M, q_sink, keys, P, sink_score, rescale, True, round_to_width(n_sinks))
        for row in range(M):
            for s in range(n_sinks):
                store_scalar(work.score, row * BLOCK_SLOTS + s, load_scalar(work.sink_score, row * BLOCK_SLOTS + s))


@njit(**INNER)
def mask(work, at, view, s, n_slots, p):
    """Give the positions from s on that position p does not see the score -inf: see cache.py."""
    for i in range(n_slots):  # without branches, so that LLVM vectorises it
        score = load_scalar(work.score, at + i)
        hidden = (s + i > p) | ((s + i <= p - view.window) & (s + i >= view.n_sink))
        store_scalar(work.score, at + i, -np.inf if hidden else score)


@njit(**INNER)
def online_softmax(work, m, at, n_slots):
    """Turn row m's scores of a block, from `at` on, into weights exp(score - highest so far); masked ones become 0.

    rescale becomes the factor for what was summed under a lower highest score: exactly 1 where nothing higher came.
    """
    top = splat(-np.inf)
    for s in range(n_slots, (n_slots + MANY_EXPS - 1) // MANY_EXPS * MANY_EXPS):
        store_scalar(work.score, at + s, -np.inf)
    for s in range(0, n_slots, WIDTH64):
        top = maximum(top, load_doubles(work.score, at + s))
    before = load_scalar(work.max_score, m)
    now = max(before, horizontal_max(top))
    store_scalar(work.max_score, m, now)
    level = now if now > -np.inf else 0.0  # nothing visible yet
    total_weight = splat(0.0)
    for s in range(0, n_slots, MANY_EXPS):
        total_weight = store_exps(work.score, at + s, level, total_weight)
    rescale = 1.0 if before == now else 0.0 if before == -np.inf else exp_scalar(before - level)
    store_scalar(work.rescale, m, rescale)
    store_scalar(work.weight_sum, m, load_scalar(work.weight_sum, m) * rescale + horizontal_sum(total_weight))


@njit(**INLINE)
def attend_block(queries, view, tile, s, n_slots, work):
    """Add a block, the n_slots positions from s on, to a tile's sums."""
    share, E = queries.heads_per_kv, queries.head_dim
    M, P = tile.n_tokens * share, round_to_width(E)
    first = view.first + load_scalar(view.table, s // BLOCK_SLOTS) * BLOCK_SLOTS
    transpose_block(block_rows(view.k, first, n_slots, E, work.block), n_slots, P, work)
    values = block_rows(view.v, first, n_slots, E, work.block)
    for m in range(0, M, TILE_ROWS):
        n, low, high = min(TILE_ROWS, M - m), tile.p + m // share, tile.p + min(m + TILE_ROWS - 1, M - 1) // share
        n_seen = min(n_slots, high + 1 - s)
        if n_seen <= 0:
            continue
        score_rows(n, m, n_seen, max(0, min(view.n_sink - s, n_seen)), P, work)
        for row in range(n):
            if s + n_seen - 1 > low or s <= high - view.window:
                mask(work, row * BLOCK_SLOTS, view, s, n_seen, tile.p + (m + row) // share)
            online_softmax(work, m + row, row * BLOCK_SLOTS, n_seen)
        weights = StridedRows(work.score, BLOCK_SLOTS)
        sums, rescale = skip_rows(StridedRows(work.sum, P), m), skip_rows(StridedRows(work.rescale, 1), m)
        weighted_sums(n, weights, values, n_seen, sums, rescale, False, P)


@njit(**INNER)
def attend_tile(queries, view, tile, work):
    """Attention of one tile over all blocks that any of its rows sees: those of sinks, and from the window on."""
    init_rows(queries, tile, work, view.n_sink)
    stop, oldest = tile.p + tile.n_tokens, max(0, tile.p - view.window + 1) // BLOCK_SLOTS * BLOCK_SLOTS
    s = 0
    while s < stop:
        if s >= view.n_sink and s < oldest:
            s = oldest
        attend_block(queries, view, tile, s, min(BLOCK_SLOTS, stop - s), work)
        s += BLOCK_SLOTS
    finish_rows(queries, tile, work)


# ---------------------------------------------------------------- all tiles, on all threads


@njit(**INNER)
def attend_tiles(doubles, singles, M, queries, k, v, cache, tiles, part, parts):
    """Every parts-th pair of a tile and a key/value head, from `part` on, so that long and short ones mix.

    doubles, singles: from `allocate_workspace` for M rows. k, v: pointers.
    """
    work = carve_workspace(doubles, singles, M, queries.head_dim)
    G, share = queries.n_heads // queries.heads_per_kv, queries.heads_per_kv
    for unit in range(part, tiles.n_tiles * G, parts):
        if abandoned():
            return
        i, g = unit % tiles.n_tiles, unit // tiles.n_tiles
        i = tiles.n_tiles - 1 - i if g % 2 == 1 else i  # else one thread would take all the longer ones of each pair
        t = load_scalar(tiles.starts, i)
        n = load_scalar(tiles.seq, t)
        window, n_sink = load_scalar(cache.window, n), load_scalar(cache.n_sink, n)
        table = pointer(cache.table, n * cache.columns)
        view = KVView(k, v, table, (tiles.layer * G + g) * cache.slots, window, n_sink)
        tile = Tile(t, load_scalar(tiles.starts, i + 1) - t, load_scalar(tiles.pos, t), g * share)
        attend_tile(queries, view, tile, work)


@njit(**INNER)
def attend_part(queries, k, v, cache, tiles, M, part, parts):
    """One thread's part, in a workspace of its own. M: query rows of the largest tile."""
    doubles, singles = allocate_workspace(M, queries.head_dim)
    attend_tiles(doubles, singles, M, queries, k, v, cache, tiles, part, parts)


@njit(**INNER_PARALLEL)
def attend_in_threads(queries, k, v, cache, tiles, M, parts):
    for part in prange(parts):
        attend_part(queries, k, v, cache, tiles, M, np.int64(part), parts)


@njit(**INNER)
def store_kv(k, v, keys, values, G, E, T, cache, tiles):
    """Write the keys and values of all rows into their layer; head by head, as they lie in the cache."""
    for g in range(G):
        for t in range(T):
            place = load_scalar(tiles.pos, t)
            at = load_scalar(tiles.seq, t) * cache.columns + place // BLOCK_SLOTS
            first = load_scalar(cache.table, at) * BLOCK_SLOTS + place % BLOCK_SLOTS
            row = (tiles.layer * G + g) * cache.slots + first
            store_head(keys, row, E, k, (t * G + g) * E)
            store_head(values, row, E, v, (t * G + g) * E)


@njit(**INNER)
def cut_tiles(seq, T, most, starts):
    """Write to `starts` the bounds of tiles over all rows: of one sequence each, and of at most so many rows."""
    n, first = 0, 0
    for t in range(T):
        if t == 0 or load_scalar(seq, t) != load_scalar(seq, t - 1) or t - first == most:
            store_scalar(starts, n, t)
            n, first = n + 1, t
    store_scalar(starts, n, T)
    return n


@njit(**INNER)
def tile_tokens(T, G, share):
    """Tokens of a tile, at most: such that its rows come in sixes or eights, where that is possible."""
    most = max(1, min(MAX_TILE_ROWS // share, T * G // (2 * num_threads())))
    even = TILE_ROWS // math.gcd(TILE_ROWS, share)
    return most // even * even if most >= even else most


@njit(**INNER)
def attend_rows(q, q_sink, k, v, cache, l, pos, seq, starts, y):
    """ops.attend into y. starts: room for the bounds of tiles."""
    T, H, E = q.shape
    G = k.shape[1]
    keys, values = pointers(cache.k), pointers(cache.v)
    blocks = Cache(
        pointer(cache.table, 0),
        pointer(cache.window, 0),
        pointer(cache.n_sink, 0),
        cache.table.shape[1],
        pool_slots(cache.k),
    )
    most = tile_tokens(T, G, H // G)
    n_tiles = cut_tiles(pointer(seq, 0), T, most, pointer(starts, 0))
    tiles = Tiles(pointer(pos, 0), pointer(seq, 0), pointer(starts, 0), n_tiles, l)
    store_kv(pointer(k, 0), pointer(v, 0), keys, values, G, E, T, blocks, tiles)
    queries = Queries(pointer(q, 0), pointer(q_sink, 0), pointer(y, 0), H, E, H // G)
    products = 0
    for t in range(T):
        seen = min(load_scalar(tiles.pos, t) + 1, load_scalar(blocks.window, load_scalar(tiles.seq, t)))
        products += seen * H * E
    if products < SERIAL_BELOW:
        attend_part(queries, keys, values, blocks, tiles, most * (H // G), np.int64(0), np.int64(1))
    else:
        attend_in_threads(queries, keys, values, blocks, tiles, most * (H // G), num_threads())


@njit(**INNER)
def attend(q, q_sink, k, v, cache, l, pos, seq):
    """ops.attend: all rows are written, then all tiles look."""
    T, H, E = q.shape
    y, starts = np.empty((T, H * E), np.float32), np.empty(T + 1, np.int64)
    attend_rows(q, q_sink, k, v, cache, l, pos, seq, starts, y)
    return y


@overload(ops.attend)
def _attend(q, q_sink, k, v, cache, l, pos, seq):
    return lambda q, q_sink, k, v, cache, l, pos, seq: attend(q, q_sink, k, v, cache, l, pos, seq)
