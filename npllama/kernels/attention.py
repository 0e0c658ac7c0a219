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
from npllama.kernels import vector
from npllama.kernels.flags import INNER, INNER_PARALLEL
from npllama.kernels.panel import turn_square
from npllama.kernels.stored import block_rows, pointers, store_head
from npllama.kernels.tile import Rows, along, below
from npllama.kernels.vector import (
    DOUBLES,
    REGISTERS,
    WIDTH,
    add,
    element,
    exp,
    exp_one,
    highest,
    i64,
    load_doubles,
    maximum,
    num_threads,
    pointer,
    set_element,
    splat,
    store,
    sub,
    total,
    whole_vectors,
)

run_stop = register_jitable(kv.run_stop)
slot = register_jitable(kv.slot)

BLOCK = 64
"""Slots of a block."""

TOGETHER = 64
"""Query rows (tokens x heads of a group) that walk over the blocks together, as long as one token has not more.

Fewer where so many would leave a thread with less than two walks.
"""

ALONE = 1 << 12
"""Products of queries and keys below which one thread is sooner done than two have met."""


class Work(NamedTuple):
    """What one thread needs for the M query rows that it carries over the blocks, and for a block: pointers.

    Columns are in whole vectors: P of them, E rounded up to a multiple of WIDTH, what is beyond E zeros.
    """

    q: object  # (M * P,) float64 queries, divided by sqrt(E)
    q_sink: object  # the same, turned towards the sinks
    score: object  # (TILE * BLOCK,) float64 scores of a block, then weights, of the rows that are in hand
    sink_score: object  # the same of the sinks in it
    sum: object  # (M * P,) float64 weighted sums of values so far
    norm: object  # (M,) float64 sums of weights so far
    highest: object  # (M,) float64 highest scores so far
    keep: object  # (M,) float64 by what the earlier sums are scaled
    block: object  # (BLOCK * P,) float32 keys or values, where they cannot be used as they lie
    turned: object  # (P * BLOCK,) float32 keys of a block, one column after the other


class Seen(NamedTuple):
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
def room(M, E):
    """Room for the Work of M query rows: its numbers in float64, and in float32."""
    P = whole_vectors(E)
    return np.empty(2 * TILE * BLOCK + M * (3 * P + 3)), np.empty(2 * BLOCK * P, np.float32)


@njit(**INNER)
def divided(doubles, singles, M, E):
    """The Work in that room."""
    P = whole_vectors(E)
    rows = 2 * TILE * BLOCK
    each = rows + 3 * M * P
    return Work(
        pointer(doubles, rows),
        pointer(doubles, rows + M * P),
        pointer(doubles, 0),
        pointer(doubles, TILE * BLOCK),
        pointer(doubles, rows + 2 * M * P),
        pointer(doubles, each),
        pointer(doubles, each + M),
        pointer(doubles, each + 2 * M),
        pointer(singles, 0),
        pointer(singles, BLOCK * P),
    )


def make_tile(rows, vectors):
    """A tile of weighted sums in float64, whose lanes are columns.

    sum[m, j] = (first: 0, else keep[m] * sum[m, j]) + sum_i weight[m, i] * number[i, j]      i = 0 .. n-1, ascending
    """

    @intrinsic
    def tile(typingctx, weights, numbers, n, sums, keep, first):
        def generate(context, builder, signature, args):
            weights, numbers, n, sums, keep, first = args

            def row(matrix, m):
                start, stride = builder.extract_value(matrix, 0), builder.extract_value(matrix, 1)
                return builder.gep(start, [builder.mul(stride, m)])

            def columns(row):
                return [builder.gep(row, [ir.Constant(i64, v * DOUBLES)]) for v in range(vectors)]

            def number(pointer, i):
                return vector.broadcast(builder, builder.load(builder.gep(pointer, [i])), DOUBLES)

            few, zero = ir.VectorType(vector.f32, DOUBLES), vector.constant(vector.doubles.llvm, 0.0)
            places = [columns(row(sums, ir.Constant(i64, m))) for m in range(rows)]
            total = []
            for m, place in enumerate(places):
                kept = number(builder.extract_value(keep, 0), ir.Constant(i64, m))
                old = [builder.fmul(vector.read(builder, at, zero.type, 8), kept) for at in place]
                total.append([cgutils.alloca_once_value(builder, builder.select(first, zero, v)) for v in old])
            weight_rows = [row(weights, ir.Constant(i64, m)) for m in range(rows)]
            with cgutils.for_range_slice(builder, ir.Constant(i64, 0), n, ir.Constant(i64, 1), inc=True) as (i, _):
                value = [builder.fpext(vector.read(builder, at, few, 4), zero.type) for at in columns(row(numbers, i))]
                for m, weight_row in enumerate(weight_rows):
                    weight = number(weight_row, i)
                    for v in range(vectors):
                        new = vector.multiply_add(builder, weight, value[v], builder.load(total[m][v]))
                        builder.store(new, total[m][v])
            for m, place in enumerate(places):
                for v in range(vectors):
                    vector.write(builder, builder.load(total[m][v]), place[v], 8)
            return context.get_dummy_value()

        return types.void(weights, numbers, types.intp, sums, keep, types.boolean), generate

    return tile


TILE = 8 if REGISTERS >= 32 else 4
"""Rows of the large tile."""

large_tile, wide_row, narrow_row = make_tile(TILE, 2), make_tile(1, 8), make_tile(1, 2)


@njit(**INNER)
def weighted_sums(M, weights, numbers, n, sums, keep, first, columns):
    """The tile for M rows and so many columns, a multiple of WIDTH."""
    vector.keep_apart()
    m = 0
    while m + TILE <= M:
        for j in range(0, columns, WIDTH):
            large_tile(below(weights, m), along(numbers, j), n, along(below(sums, m), j), below(keep, m), first)
        m += TILE
    while m < M:
        j = 0
        while j + 4 * WIDTH <= columns:
            wide_row(below(weights, m), along(numbers, j), n, along(below(sums, m), j), below(keep, m), first)
            j += 4 * WIDTH
        while j < columns:
            narrow_row(below(weights, m), along(numbers, j), n, along(below(sums, m), j), below(keep, m), first)
            j += WIDTH
        m += 1


@njit(**INNER)
def weigh(work, m, at, n_slots):
    """Turn row m's scores of a block, from `at` on, into weights exp(score - highest so far); hidden ones become 0.

    What was summed under a lower highest score is scaled: a factor of exactly 1 where nothing higher came.
    """
    top = splat(-np.inf)
    for s in range(n_slots, (n_slots + DOUBLES - 1) // DOUBLES * DOUBLES):
        set_element(work.score, at + s, -np.inf)
    for s in range(0, n_slots, DOUBLES):
        top = maximum(top, load_doubles(work.score, at + s))
    before = element(work.highest, m)
    now = max(before, highest(top))
    set_element(work.highest, m, now)
    level = now if now > -np.inf else 0.0  # nothing visible yet
    total_weight = splat(0.0)
    for s in range(0, n_slots, DOUBLES):
        weight = exp(sub(load_doubles(work.score, at + s), splat(level)))
        store(work.score, at + s, weight)
        total_weight = add(total_weight, weight)
    keep = 1.0 if before == now else 0.0 if before == -np.inf else exp_one(before - level)
    set_element(work.keep, m, keep)
    set_element(work.norm, m, element(work.norm, m) * keep + total(total_weight))


@njit(**INNER)
def hide(work, at, slot_pos, s, n_slots, p, window, n_sink):
    """Give the slots that position p does not see the score -inf. slot_pos (S,) positions that the slots hold."""
    for i in range(n_slots):  # without branches, so that LLVM makes vectors of it
        there, score = element(slot_pos, s + i), element(work.score, at + i)
        hidden = (there < 0) | (there > p) | ((there <= p - window) & (there >= n_sink))
        set_element(work.score, at + i, -np.inf if hidden else score)


@njit(**INNER)
def start_rows(q, q_sink, work, t, n_tokens, h, share, n_sink):
    """Lay out the query rows (token by token, head by head of the group), with nothing seen so far."""
    E, H = q.shape[2], q.shape[1]
    P, root = whole_vectors(E), math.sqrt(E)
    for m in range(n_tokens * share):
        at = ((t + m // share) * H + h + m % share) * E
        for e in range(E):
            set_element(work.q, m * P + e, element(q, at + e) / root)
        for e in range(E, P):
            set_element(work.q, m * P + e, 0.0)
        for e in range(P):
            set_element(work.sum, m * P + e, 0.0)
        set_element(work.highest, m, -np.inf)
        set_element(work.norm, m, 0.0)
        if n_sink > 0:
            for e in range(P):
                set_element(work.q_sink, m * P + e, element(q_sink, at + e) / root if e < E else 0.0)


@njit(**INNER)
def finish_rows(work, t, n_tokens, h, share, E, y):
    """Write the sums, divided by the sums of weights. y (T, H*E)"""
    P = whole_vectors(E)
    for m in range(n_tokens * share):
        norm, at = element(work.norm, m), (t + m // share) * y.shape[1] + (h + m % share) * E
        for e in range(E):
            set_element(y, at + e, np.float32(element(work.sum, m * P + e) / norm))


@njit(**INNER)
def turn_block(keys, n_slots, P, work):
    """Lay out a block of keys column by column; slots up to a multiple of WIDTH, those too many like the last."""
    for s in range(0, n_slots, WIDTH):
        for e in range(0, P, WIDTH):
            source, target = along(below(keys, s), e).start, pointer(work.turned, e * BLOCK + s)
            turn_square(source, keys.stride, n_slots - 1 - s, target, BLOCK)


@njit(**INNER)
def score_rows(M, m, n_slots, n_sinks, P, work):
    """Scores of the M query rows from m on with the slots of a block, of which the first n_sinks are sinks."""
    keys, score, sink_score = Rows(work.turned, BLOCK), Rows(work.score, BLOCK), Rows(work.sink_score, BLOCK)
    q, q_sink, keep = below(Rows(work.q, P), m), below(Rows(work.q_sink, P), m), Rows(work.keep, 1)
    weighted_sums(M, q, keys, P, score, keep, True, whole_vectors(n_slots))
    if n_sinks > 0:
        weighted_sums(M, q_sink, keys, P, sink_score, keep, True, whole_vectors(n_sinks))
        for row in range(M):
            for s in range(n_sinks):
                set_element(work.score, row * BLOCK + s, element(work.sink_score, row * BLOCK + s))


@njit(**INNER)
def walk(q, q_sink, seen, first, p, t, n_tokens, h, share, work, y):
    """Attention of the rows t .. t+n_tokens-1, at positions from p on, for the query heads h .. h+share-1.

    first: where in the cache the slots of their key/value head begin.
    """
    E, last, n_sink = q.shape[2], p + n_tokens - 1, seen.n_sink
    M, P = n_tokens * share, whole_vectors(E)
    start_rows(q, q_sink, work, t, n_tokens, h, share, n_sink)
    used = min(last + 1, seen.S)  # later slots were never written
    for s in range(0, used, BLOCK):
        n_slots = min(BLOCK, used - s)
        oldest = newest = element(seen.pos, s)
        for i in range(s + 1, s + n_slots):
            oldest, newest = min(oldest, element(seen.pos, i)), max(newest, element(seen.pos, i))
        if newest <= p - seen.window and oldest >= n_sink:
            continue  # no row sees any of it
        turn_block(block_rows(seen.k, first + s, n_slots, E, work.block), n_slots, P, work)
        values = block_rows(seen.v, first + s, n_slots, E, work.block)
        for m in range(0, M, TILE):
            n, low, high = min(TILE, M - m), p + m // share, p + min(m + TILE - 1, M - 1) // share
            # Until the ring has gone round once, what these rows do not see yet are the last slots.
            n_seen = min(n_slots, high + 1 - s) if last < seen.S else n_slots
            if n_seen <= 0:
                continue
            score_rows(n, m, n_seen, max(0, min(n_sink - s, n_seen)), P, work)
            for row in range(n):
                if oldest < 0 or newest > low or oldest <= high - seen.window:
                    hide(work, row * BLOCK, seen.pos, s, n_seen, p + (m + row) // share, seen.window, n_sink)
                weigh(work, m + row, row * BLOCK, n_seen)
            weights, sums, keep = Rows(work.score, BLOCK), below(Rows(work.sum, P), m), below(Rows(work.keep, 1), m)
            weighted_sums(n, weights, values, n_seen, sums, keep, False, P)
    finish_rows(work, t, n_tokens, h, share, E, y)


@njit(**INNER)
def walks(q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y):
    """Every parts-th pair of a tile and a key/value head, from `part` on: so that long and short walks mix.

    tiles (n + 1,): tile i is the rows tiles[i] .. tiles[i+1]-1.
    """
    M = max(TOGETHER, q.shape[1] // G)
    doubles, singles = room(M, q.shape[2])
    walks_in(doubles, singles, M, q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y)


@njit(**INNER)
def walks_in(doubles, singles, M, q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y):
    """The same in the `room` for M query rows."""
    N, S, n_tiles = cache.pos.shape[1], cache.pos.shape[2], tiles.shape[0] - 1
    work, share = divided(doubles, singles, M, q.shape[2]), q.shape[1] // G
    k, v = pointers(cache.k), pointers(cache.v)
    for unit in range(part, n_tiles * G, parts):
        i, g = unit % n_tiles, unit // n_tiles
        i = n_tiles - 1 - i if g % 2 == 1 else i  # else one thread would take all the longer ones of each pair
        t = element(tiles, i)
        n_tokens, p, sequence = element(tiles, i + 1) - t, element(pos, t), l * N + element(seq, t)
        seen = Seen(k, v, pointer(cache.pos, sequence * S), S, cache.window, cache.n_sink)
        walk(q, q_sink, seen, (sequence * G + g) * S, p, t, n_tokens, g * share, share, work, y)


@njit(**INNER_PARALLEL)
def walks_in_threads(q, q_sink, k, v, slot_pos, window, n_sink, l, pos, seq, tiles, G, y):
    """`walks`, each thread its part. The parts of the cache one by one: a parallel loop takes no tuples in tuples."""
    parts = num_threads()
    for part in prange(parts):
        cache = kv.KVCache(k, v, slot_pos, window, n_sink)
        walks(q, q_sink, cache, l, pos, seq, tiles, G, np.int64(part), parts, y)


@njit(**INNER)
def store_rows(k, v, cache, l, pos, seq, start, stop):
    """Write the keys and values of rows start .. stop-1 into layer l; head by head, as they lie in the cache."""
    _, G, E = k.shape
    N, S, keys, values = cache.pos.shape[1], cache.pos.shape[2], pointers(cache.k), pointers(cache.v)
    for t in range(start, stop):
        set_element(cache.pos, (l * N + seq[t]) * S + slot(cache, pos[t]), pos[t])
    for g in range(G):
        for t in range(start, stop):
            row = ((l * N + seq[t]) * G + g) * S + slot(cache, pos[t])
            store_head(keys, row, E, k, (t * G + g) * E)
            store_head(values, row, E, v, (t * G + g) * E)


@njit(**INNER)
def tile_rows(seq, start, stop, most):
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
        store_rows(k, v, cache, l, pos, seq, start, stop)
        G = k.shape[1]
        tiles = tile_rows(seq, start, stop, max(1, min(TOGETHER * G // H, (stop - start) * G // (2 * num_threads()))))
        products = (stop - start) * min(pos[stop - 1] + 1, cache.pos.shape[2]) * H * E
        if products < ALONE:
            walks(q, q_sink, cache, l, pos, seq, tiles, G, np.int64(0), np.int64(1), y)
        else:
            walks_in_threads(
                q, q_sink, cache.k, cache.v, cache.pos, cache.window, cache.n_sink, l, pos, seq, tiles, G, y
            )
        start = stop
    return y


@overload(ops.attend)
def _attend(q, q_sink, k, v, cache, l, pos, seq):
    return lambda q, q_sink, k, v, cache, l, pos, seq: attend(q, q_sink, k, v, cache, l, pos, seq)
