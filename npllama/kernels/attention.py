"""ops.attend compiled: softmax over blocks of slots, without ever holding all scores.

A few rows of one sequence, for the query heads that share a key/value head, walk together over the blocks of the cache;
so each key and value is read once for all of them. What has been summed so far is kept relative to the highest score
so far, and scaled when a higher one appears (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867).

Blocks begin at fixed slots, and a hidden slot adds an exact zero. So a row's result depends on its position and on what
the cache holds for it alone, to the bit: not on how the prompt was cut, nor on the rows beside it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from npllama import cache as kv
from npllama import ops
from npllama.kernels import simd
from npllama.kernels.flags import INNER, INNER_PARALLEL
from npllama.kernels.gemm_f32 import transpose_square
from npllama.kernels.gemv_f32 import StridedRows, skip_columns, skip_rows
from npllama.kernels.kv_formats import block_rows, pointers, store_head
from npllama.kernels.simd import (
    REGISTERS,
    WIDTH,
    WIDTH64,
    add,
    exp,
    exp_scalar,
    horizontal_max,
    horizontal_sum,
    i64,
    load_doubles,
    load_scalar,
    maximum,
    num_threads,
    pointer,
    round_to_width,
    splat,
    store,
    store_scalar,
    sub,
)

run_stop = register_jitable(kv.run_stop)
slot = register_jitable(kv.slot)

BLOCK_SLOTS = 64
"""Slots of a block."""

MAX_QUERY_ROWS = 64
"""Query rows (tokens x heads of a group) that walk over the blocks together, as long as one token has not more.

Fewer where so many would leave a thread with less than two walks.
"""

SERIAL_BELOW = 1 << 12
"""Products of queries and keys below which one thread is sooner done than two have met."""


class Workspace(NamedTuple):
    """What one thread needs for the M query rows that it carries over the blocks, and for a block: pointers.

    Columns are in whole vectors: P of them, E rounded up to a multiple of WIDTH, what is beyond E zeros.
    """

    q: object  # (M * P,) float64 queries, divided by sqrt(E)
    q_sink: object  # the same, turned towards the sinks
    score: object  # (TILE * BLOCK,) float64 scores of a block, then weights, of the rows that are in hand
    sink_score: object  # the same of the sinks in it
    sum: object  # (M * P,) float64 weighted sums of values so far
    weight_sum: object  # (M,) float64 sums of weights so far
    max_score: object  # (M,) float64 highest scores so far
    rescale: object  # (M,) float64 by what the earlier sums are scaled
    block: object  # (BLOCK * P,) float32 keys or values, where they cannot be used as they lie
    keys_t: object  # (P * BLOCK,) float32 keys of a block, one column after the other


class KVView(NamedTuple):
    """What the rows of one sequence and layer may look at: pointers into the cache, its size, and its rules.

    Pointers, because a kernel that takes an array out of a tuple counts a reference to it, and threads that count at
    the same time wait for each other: up to a half of a single token's attention.
    """

    k: object  # keys of all layers, sequences and heads, in the cache's format
    v: object  # values
    pos: object  # (S,) the positions that the slots hold
    S: int
    window: int
    n_sink: int


@njit(**INNER)
def allocate_workspace(M, E):
    """Room for the Work of M query rows: its numbers in float64, and in float32."""
    P = round_to_width(E)
    return np.empty(2 * TILE_ROWS * BLOCK_SLOTS + M * (3 * P + 3)), np.empty(2 * BLOCK_SLOTS * P, np.float32)


@njit(**INNER)
def carve_workspace(doubles, singles, M, E):
    """The Work in that room."""
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


def make_weighted_sum(rows, vectors):
    """A tile of weighted sums in float64, whose lanes are columns.

    sum[m, j] = (first: 0, else keep[m] * sum[m, j]) + sum_i weight[m, i] * number[i, j]      i = 0 .. n-1, ascending
    """

    @intrinsic
    def gemv_f32(typingctx, weights, numbers, n, sums, rescale, first):
        def generate(context, builder, signature, args):
            weights, numbers, n, sums, rescale, first = args

            def row(matrix, m):
                start, stride = builder.extract_value(matrix, 0), builder.extract_value(matrix, 1)
                return builder.gep(start, [builder.mul(stride, m)])

            def columns(row):
                return [builder.gep(row, [ir.Constant(i64, v * WIDTH64)]) for v in range(vectors)]

            def number(pointer, i):
                return simd.broadcast(builder, builder.load(builder.gep(pointer, [i])), WIDTH64)

            few, zero = ir.VectorType(simd.f32, WIDTH64), simd.constant(simd.doubles.llvm, 0.0)
            places = [columns(row(sums, ir.Constant(i64, m))) for m in range(rows)]
            total = []
            for m, place in enumerate(places):
                kept = number(builder.extract_value(rescale, 0), ir.Constant(i64, m))
                old = [builder.fmul(simd.read(builder, at, zero.type, 8), kept) for at in place]
                total.append([cgutils.alloca_once_value(builder, builder.select(first, zero, v)) for v in old])
            weight_rows = [row(weights, ir.Constant(i64, m)) for m in range(rows)]
            with cgutils.for_range_slice(builder, ir.Constant(i64, 0), n, ir.Constant(i64, 1), inc=True) as (i, _):
                value = [builder.fpext(simd.read(builder, at, few, 4), zero.type) for at in columns(row(numbers, i))]
                for m, weight_row in enumerate(weight_rows):
                    weight = number(weight_row, i)
                    for v in range(vectors):
                        new = simd.multiply_add(builder, weight, value[v], builder.load(total[m][v]))
                        builder.store(new, total[m][v])
            for m, place in enumerate(places):
                for v in range(vectors):
                    simd.write(builder, builder.load(total[m][v]), place[v], 8)
            return context.get_dummy_value()

        return types.void(weights, numbers, types.intp, sums, rescale, types.boolean), generate

    return gemv_f32


TILE_ROWS = 8 if REGISTERS >= 32 else 4
"""Rows of the large tile."""

tile_sum, wide_row_sum, narrow_row_sum = (
    make_weighted_sum(TILE_ROWS, 2),
    make_weighted_sum(1, 8),
    make_weighted_sum(1, 2),
)


@njit(**INNER)
def weighted_sums(M, weights, numbers, n, sums, rescale, first, columns):
    """The tile for M rows and so many columns, a multiple of WIDTH."""
    simd.noinline()
    m = 0
    while m + TILE_ROWS <= M:
        for j in range(0, columns, WIDTH):
            tile_sum(
                skip_rows(weights, m),
                skip_columns(numbers, j),
                n,
                skip_columns(skip_rows(sums, m), j),
                skip_rows(rescale, m),
                first,
            )
        m += TILE_ROWS
    while m < M:
        j = 0
        while j + 4 * WIDTH <= columns:
            wide_row_sum(
                skip_rows(weights, m),
                skip_columns(numbers, j),
                n,
                skip_columns(skip_rows(sums, m), j),
                skip_rows(rescale, m),
                first,
            )
            j += 4 * WIDTH
        while j < columns:
            narrow_row_sum(
                skip_rows(weights, m),
                skip_columns(numbers, j),
                n,
                skip_columns(skip_rows(sums, m), j),
                skip_rows(rescale, m),
                first,
            )
            j += WIDTH
        m += 1


@njit(**INNER)
def online_softmax(work, m, at, n_slots):
    """Turn row m's scores of a block, from `at` on, into weights exp(score - highest so far); hidden ones become 0.

    What was summed under a lower highest score is scaled: a factor of exactly 1 where nothing higher came.
    """
    top = splat(-np.inf)
    for s in range(n_slots, (n_slots + WIDTH64 - 1) // WIDTH64 * WIDTH64):
        store_scalar(work.score, at + s, -np.inf)
    for s in range(0, n_slots, WIDTH64):
        top = maximum(top, load_doubles(work.score, at + s))
    before = load_scalar(work.max_score, m)
    now = max(before, horizontal_max(top))
    store_scalar(work.max_score, m, now)
    level = now if now > -np.inf else 0.0  # nothing visible yet
    total_weight = splat(0.0)
    for s in range(0, n_slots, WIDTH64):
        weight = exp(sub(load_doubles(work.score, at + s), splat(level)))
        store(work.score, at + s, weight)
        total_weight = add(total_weight, weight)
    rescale = 1.0 if before == now else 0.0 if before == -np.inf else exp_scalar(before - level)
    store_scalar(work.rescale, m, rescale)
    store_scalar(work.weight_sum, m, load_scalar(work.weight_sum, m) * rescale + horizontal_sum(total_weight))


@njit(**INNER)
def mask(work, at, slot_pos, s, n_slots, p, window, n_sink):
    """Give the slots that position p does not see the score -inf. slot_pos (S,) positions that the slots hold."""
    for i in range(n_slots):  # without branches, so that LLVM makes vectors of it
        there, score = load_scalar(slot_pos, s + i), load_scalar(work.score, at + i)
        hidden = (there < 0) | (there > p) | ((there <= p - window) & (there >= n_sink))
        store_scalar(work.score, at + i, -np.inf if hidden else score)


@njit(**INNER)
def init_rows(q, q_sink, work, t, n_tokens, h, heads_per_kv, n_sink):
    """Lay out the query rows (token by token, head by head of the group), with nothing seen so far."""
    E, H = q.shape[2], q.shape[1]
    P, root = round_to_width(E), math.sqrt(E)
    for m in range(n_tokens * heads_per_kv):
        at = ((t + m // heads_per_kv) * H + h + m % heads_per_kv) * E
        for e in range(E):
            store_scalar(work.q, m * P + e, load_scalar(q, at + e) / root)
        for e in range(E, P):
            store_scalar(work.q, m * P + e, 0.0)
        for e in range(P):
            store_scalar(work.sum, m * P + e, 0.0)
        store_scalar(work.max_score, m, -np.inf)
        store_scalar(work.weight_sum, m, 0.0)
        if n_sink > 0:
            for e in range(P):
                store_scalar(work.q_sink, m * P + e, load_scalar(q_sink, at + e) / root if e < E else 0.0)


@njit(**INNER)
def finish_rows(work, t, n_tokens, h, heads_per_kv, E, y):
    """Write the sums, divided by the sums of weights. y (T, H*E)"""
    P = round_to_width(E)
    for m in range(n_tokens * heads_per_kv):
        weight_sum, at = (
            load_scalar(work.weight_sum, m),
            (t + m // heads_per_kv) * y.shape[1] + (h + m % heads_per_kv) * E,
        )
        for e in range(E):
            store_scalar(y, at + e, np.float32(load_scalar(work.sum, m * P + e) / weight_sum))


@njit(**INNER)
def transpose_block(keys, n_slots, P, work):
    """Lay out a block of keys column by column; slots up to a multiple of WIDTH, those too many like the last."""
    for s in range(0, n_slots, WIDTH):
        for e in range(0, P, WIDTH):
            source, target = skip_columns(skip_rows(keys, s), e).start, pointer(work.keys_t, e * BLOCK_SLOTS + s)
            transpose_square(source, keys.stride, n_slots - 1 - s, target, BLOCK_SLOTS)


@njit(**INNER)
def score_rows(M, m, n_slots, n_sinks, P, work):
    """Scores of the M query rows from m on with the slots of a block, of which the first n_sinks are sinks."""
    keys, score, sink_score = (
        StridedRows(work.keys_t, BLOCK_SLOTS),
        StridedRows(work.score, BLOCK_SLOTS),
        StridedRows(work.sink_score, BLOCK_SLOTS),
    )
    q, q_sink, rescale = (
        skip_rows(StridedRows(work.q, P), m),
        skip_rows(StridedRows(work.q_sink, P), m),
        StridedRows(work.rescale, 1),
    )
    weighted_sums(M, q, keys, P, score, rescale, True, round_to_width(n_slots))
    if n_sinks > 0:
        weighted_sums(M, q_sink, keys, P, sink_score, rescale, True, round_to_width(n_sinks))
        for row in range(M):
            for s in range(n_sinks):
                store_scalar(work.score, row * BLOCK_SLOTS + s, load_scalar(work.sink_score, row * BLOCK_SLOTS + s))


@njit(**INNER)
def attend_tile(q, q_sink, kv_view, first, p, t, n_tokens, h, heads_per_kv, work, y):
    """Attention of the rows t .. t+n_tokens-1, at positions from p on, for the query heads h .. h+share-1.

    first: where in the cache the slots of their key/value head begin.
    """
    E, last, n_sink = q.shape[2], p + n_tokens - 1, kv_view.n_sink
    M, P = n_tokens * heads_per_kv, round_to_width(E)
    init_rows(q, q_sink, work, t, n_tokens, h, heads_per_kv, n_sink)
    used = min(last + 1, kv_view.S)  # later slots were never written
    for s in range(0, used, BLOCK_SLOTS):
        n_slots = min(BLOCK_SLOTS, used - s)
        oldest = newest = load_scalar(kv_view.pos, s)
        for i in range(s + 1, s + n_slots):
            oldest, newest = min(oldest, load_scalar(kv_view.pos, i)), max(newest, load_scalar(kv_view.pos, i))
        if newest <= p - kv_view.window and oldest >= n_sink:
            continue  # no row sees any of it
        transpose_block(block_rows(kv_view.k, first + s, n_slots, E, work.block), n_slots, P, work)
        values = block_rows(kv_view.v, first + s, n_slots, E, work.block)
        for m in range(0, M, TILE_ROWS):
            n, low, high = (
                min(TILE_ROWS, M - m),
                p + m // heads_per_kv,
                p + min(m + TILE_ROWS - 1, M - 1) // heads_per_kv,
            )
            # Until the ring has gone round once, what these rows do not see yet are the last slots.
            n_seen = min(n_slots, high + 1 - s) if last < kv_view.S else n_slots
            if n_seen <= 0:
                continue
            score_rows(n, m, n_seen, max(0, min(n_sink - s, n_seen)), P, work)
            for row in range(n):
                if oldest < 0 or newest > low or oldest <= high - kv_view.window:
                    mask(
                        work,
                        row * BLOCK_SLOTS,
                        kv_view.pos,
                        s,
                        n_seen,
                        p + (m + row) // heads_per_kv,
                        kv_view.window,
                        n_sink,
                    )
                online_softmax(work, m + row, row * BLOCK_SLOTS, n_seen)
            weights, sums, rescale = (
                StridedRows(work.score, BLOCK_SLOTS),
                skip_rows(StridedRows(work.sum, P), m),
                skip_rows(StridedRows(work.rescale, 1), m),
            )
            weighted_sums(n, weights, values, n_seen, sums, rescale, False, P)
    finish_rows(work, t, n_tokens, h, heads_per_kv, E, y)


@njit(**INNER)
def attend_tiles(q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y):
    """Every parts-th pair of a tile and a key/value head, from `part` on: so that long and short walks mix.

    tiles (n + 1,): tile i is the rows tiles[i] .. tiles[i+1]-1.
    """
    M = max(MAX_QUERY_ROWS, q.shape[1] // G)
    doubles, singles = allocate_workspace(M, q.shape[2])
    attend_tiles_in(doubles, singles, M, q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y)


@njit(**INNER)
def attend_tiles_in(doubles, singles, M, q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y):
    """The same in the `room` for M query rows."""
    N, S, n_tiles = cache.pos.shape[1], cache.pos.shape[2], tiles.shape[0] - 1
    work, heads_per_kv = carve_workspace(doubles, singles, M, q.shape[2]), q.shape[1] // G
    k, v = pointers(cache.k), pointers(cache.v)
    for unit in range(part, n_tiles * G, parts):
        i, g = unit % n_tiles, unit // n_tiles
        i = n_tiles - 1 - i if g % 2 == 1 else i  # else one thread would take all the longer ones of each pair
        t = load_scalar(tiles, i)
        n_tokens, p, sequence = load_scalar(tiles, i + 1) - t, load_scalar(pos, t), l * N + load_scalar(seq, t)
        kv_view = KVView(k, v, pointer(cache.pos, sequence * S), S, cache.window, cache.n_sink)
        attend_tile(q, q_sink, kv_view, (sequence * G + g) * S, p, t, n_tokens, g * heads_per_kv, heads_per_kv, work, y)


@njit(**INNER_PARALLEL)
def attend_in_threads(q, q_sink, k, v, slot_pos, window, n_sink, l, pos, seq, tiles, G, y):
    """`walks`, each thread its part. The parts of the cache one by one: a parallel loop takes no tuples in tuples."""
    parts = num_threads()
    for part in prange(parts):
        cache = kv.KVCache(k, v, slot_pos, window, n_sink)
        attend_tiles(q, q_sink, cache, l, pos, seq, tiles, G, np.int64(part), parts, y)


@njit(**INNER)
def store_kv(k, v, cache, l, pos, seq, start, stop):
    """Write the keys and values of rows start .. stop-1 into layer l; head by head, as they lie in the cache."""
    _, G, E = k.shape
    N, S, keys, values = cache.pos.shape[1], cache.pos.shape[2], pointers(cache.k), pointers(cache.v)
    for t in range(start, stop):
        store_scalar(cache.pos, (l * N + seq[t]) * S + slot(cache, pos[t]), pos[t])
    for g in range(G):
        for t in range(start, stop):
            row = ((l * N + seq[t]) * G + g) * S + slot(cache, pos[t])
            store_head(keys, row, E, k, (t * G + g) * E)
            store_head(values, row, E, v, (t * G + g) * E)


@njit(**INNER)
def cut_tiles(seq, start, stop, most):
    """Bounds of tiles over the rows start .. stop-1: of one sequence each, and of at most so many rows."""
    tiles, n = np.empty(stop - start + 1, np.int64), 0
    for t in range(start, stop):
        if t == start or seq[t] != seq[t - 1] or t - tiles[n - 1] == most:
            tiles[n] = t
            n += 1
    tiles[n] = stop
    return tiles[: n + 1]


@njit(**INNER)
def attend(q, q_sink, k, v, cache, l, pos, seq):
    """ops.attend: as many rows at once as can be written before any looks; then on."""
    T, H, E = q.shape
    y = np.empty((T, H * E), np.float32)
    start = 0
    while start < T:
        stop = run_stop(cache, pos, seq, start, T)
        while stop < T and seq[stop] != seq[stop - 1]:
            stop = run_stop(cache, pos, seq, stop, T)
        store_kv(k, v, cache, l, pos, seq, start, stop)
        G = k.shape[1]
        tiles = cut_tiles(
            seq, start, stop, max(1, min(MAX_QUERY_ROWS * G // H, (stop - start) * G // (2 * num_threads())))
        )
        products = (stop - start) * min(pos[stop - 1] + 1, cache.pos.shape[2]) * H * E
        if products < SERIAL_BELOW:
            attend_tiles(q, q_sink, cache, l, pos, seq, tiles, G, np.int64(0), np.int64(1), y)
        else:
            attend_in_threads(
                q, q_sink, cache.k, cache.v, cache.pos, cache.window, cache.n_sink, l, pos, seq, tiles, G, y
            )
        start = stop
    return y


@overload(ops.attend)
def _attend(q, q_sink, k, v, cache, l, pos, seq):
    return lambda q, q_sink, k, v, cache, l, pos, seq: attend(q, q_sink, k, v, cache, l, pos, seq)
