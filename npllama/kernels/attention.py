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
from npllama.kernels.stored import block_rows, store_head
from npllama.kernels.tile import ROWS, Rows, along, below, copy_row, multiply
from npllama.kernels.vector import (
    REGISTERS,
    WIDTH,
    add,
    div,
    exp,
    exp_one,
    floats,
    highest,
    i64,
    load,
    maximum,
    mul,
    num_threads,
    pointer,
    splat,
    store,
    store_last,
    sub,
    total,
)

run_stop = register_jitable(kv.run_stop)
slot = register_jitable(kv.slot)

BLOCK = 64
"""Slots of a block."""

TOGETHER = 24
"""Query rows (tokens x heads of a group) that walk over the blocks together, as long as one token has not more."""

ALONE = 1 << 12
"""Products of queries and keys below which one thread is sooner done than two have met."""


class Work(NamedTuple):
    """What one thread needs for the M query rows that it carries over the blocks.

    Columns are in vectors, of which the last overlaps the one before where E is no multiple of WIDTH, and is the only
    one, of zeros and then E numbers, where E is less.
    """

    q: np.ndarray  # (M * (E + WIDTH),) queries, as copy_row lays them out
    q_sink: np.ndarray  # the same, turned towards the sinks
    score: np.ndarray  # (M * BLOCK,) scores of a block, then weights
    sum: np.ndarray  # (M * (E + WIDTH),) weighted sums of values so far, vector by vector
    norm: np.ndarray  # (M,) sums of weights so far
    highest: np.ndarray  # (M,) highest scores so far
    keep: np.ndarray  # (M,) by what the earlier sums are scaled
    keys: np.ndarray  # (BLOCK * (E + WIDTH),) a block of keys, where they cannot be used as they lie
    values: np.ndarray  # the same of values
    spare: np.ndarray  # (M * ROWS,)


@njit(**INNER)
def make_work(M, E):
    """Room for so many query rows."""
    stride = E + WIDTH
    wide, block = np.empty((3, M * stride), np.float32), np.empty((2, BLOCK * stride), np.float32)
    each = np.empty((3, M), np.float32)
    score, spare = np.empty(M * BLOCK, np.float32), np.empty(M * ROWS, np.float32)
    return Work(wide[0], wide[1], score, wide[2], each[0], each[1], each[2], block[0], block[1], spare)


def make_gather(rows, vectors):
    """A tile of weighted sums: sum[m] = keep[m] * sum[m] + sum_s weight[m, s] * value[s], some vectors of columns."""

    @intrinsic
    def gather(typingctx, weights, values, n_slots, sums, keep):
        def generate(context, builder, signature, args):
            weights, values, n_slots, sums, keep = args
            zero, one = ir.Constant(i64, 0), ir.Constant(i64, 1)

            def row(matrix, m):
                start, stride = builder.extract_value(matrix, 0), builder.extract_value(matrix, 1)
                return builder.gep(start, [builder.mul(stride, m)])

            def columns(row):
                return [builder.gep(row, [ir.Constant(i64, v * WIDTH)]) for v in range(vectors)]

            def number(pointer, i):
                return vector.broadcast(builder, builder.load(builder.gep(pointer, [i])), WIDTH)

            places = [columns(row(sums, ir.Constant(i64, m))) for m in range(rows)]
            total = []
            for m, place in enumerate(places):
                kept = number(keep, ir.Constant(i64, m))
                old = [vector.read(builder, one_place, floats.llvm, 4) for one_place in place]
                total.append([cgutils.alloca_once_value(builder, builder.fmul(v, kept)) for v in old])
            weight_rows = [row(weights, ir.Constant(i64, m)) for m in range(rows)]
            with cgutils.for_range_slice(builder, zero, n_slots, one, inc=True) as (s, _):
                value = [vector.read(builder, part, floats.llvm, 4) for part in columns(row(values, s))]
                for m, weight_row in enumerate(weight_rows):
                    weight = number(weight_row, s)
                    for v in range(vectors):
                        new = vector.multiply_add(builder, weight, value[v], builder.load(total[m][v]))
                        builder.store(new, total[m][v])
            for m, place in enumerate(places):
                for v in range(vectors):
                    vector.write(builder, builder.load(total[m][v]), place[v], 4)
            return context.get_dummy_value()

        return types.void(weights, values, types.intp, sums, keep), generate

    return gather


GATHERED = 8 if REGISTERS >= 32 else 4
"""Rows of the large tile, which is two vectors wide: more operations for each number loaded."""

gather_large, gather_rows, gather_one = make_gather(GATHERED, 2), make_gather(GATHERED, 1), make_gather(1, 1)


@njit(**INNER)
def gather_block(M, values, n_slots, work, E):
    """Add a block's values, each by its weight, to the sums of M query rows."""
    vector.keep_apart()
    stride, j = E + WIDTH, 0
    while j < E:
        column, wide = along(values, min(j, E - WIDTH)), j + 2 * WIDTH <= E
        m = 0
        while m < M:
            weights, sums = Rows(pointer(work.score, m * BLOCK), BLOCK), Rows(pointer(work.sum, m * stride + j), stride)
            keep = pointer(work.keep, m)
            if m + GATHERED > M:
                gather_one(weights, column, n_slots, sums, keep)
                if wide:
                    gather_one(weights, along(column, WIDTH), n_slots, along(sums, WIDTH), keep)
                m += 1
            elif wide:
                gather_large(weights, column, n_slots, sums, keep)
                m += GATHERED
            else:
                gather_rows(weights, column, n_slots, sums, keep)
                m += GATHERED
        j += 2 * WIDTH if wide else WIDTH


@njit(**INNER)
def weigh(work, m, n_slots, scale):
    """Turn a row's scores of a block into weights exp(score / sqrt(E) - highest so far); hidden ones become 0.

    What was summed under a lower highest score is scaled: a factor of exactly 1 where nothing higher came.
    """
    at, top = m * BLOCK, splat(np.float32(-np.inf))
    for s in range(n_slots, (n_slots + WIDTH - 1) // WIDTH * WIDTH):
        work.score[at + s] = np.float32(-np.inf)
    for s in range(0, n_slots, WIDTH):
        score = mul(load(work.score, at + s), splat(scale))
        store(work.score, at + s, score)
        top = maximum(top, score)
    before = work.highest[m]
    now = max(before, highest(top))
    work.highest[m] = now
    level = now if now > np.float32(-np.inf) else np.float32(0)  # nothing visible yet
    total_weight = splat(np.float32(0))
    for s in range(0, n_slots, WIDTH):
        weight = exp(sub(load(work.score, at + s), splat(level)))
        store(work.score, at + s, weight)
        total_weight = add(total_weight, weight)
    work.keep[m] = np.float32(1) if before == now else exp_one(before - level)
    work.norm[m] = work.norm[m] * work.keep[m] + total(total_weight)


@njit(**INNER)
def hide(work, m, slot_pos, s, n_slots, p, window, n_sink):
    """Give the slots that position p does not see the score -inf. slot_pos (S,) positions that the slots hold."""
    for i in range(n_slots):  # without branches, so that LLVM makes vectors of it
        at = slot_pos[s + i]
        hidden = (at < 0) | (at > p) | ((at <= p - window) & (at >= n_sink))
        work.score[m * BLOCK + i] = np.float32(-np.inf) if hidden else work.score[m * BLOCK + i]


@njit(**INNER)
def start_rows(q, q_sink, work, t, n_tokens, h, share, n_sink):
    """Lay out the query rows (token by token, head by head of the group), with nothing seen so far."""
    E, H = q.shape[2], q.shape[1]
    for m in range(n_tokens * share):
        at = ((t + m // share) * H + h + m % share) * E
        copy_row(q, at, E, work.q, m * (E + WIDTH))
        if n_sink > 0:
            copy_row(q_sink, at, E, work.q_sink, m * (E + WIDTH))
        work.highest[m], work.norm[m] = np.float32(-np.inf), np.float32(0)
        for e in range(0, E, WIDTH):
            store(work.sum, m * (E + WIDTH) + e, splat(np.float32(0)))


@njit(**INNER)
def finish_rows(work, t, n_tokens, h, share, E, y):
    """Write the sums, divided by the sums of weights. y (T, H*E)"""
    for m in range(n_tokens * share):
        norm = splat(work.norm[m])
        at = (t + m // share) * y.shape[1] + (h + m % share) * E
        for j in range(0, E, WIDTH):
            result = div(load(work.sum, m * (E + WIDTH) + j), norm)
            if E >= WIDTH:
                store(y, at + min(j, E - WIDTH), result)
            else:
                store_last(y, at + E - WIDTH, result, E)


@njit(**INNER)
def score_block(M, q, keys, first, stop, present, E, work):
    """Scores of M query rows with the slots first .. stop-1 of a block, before scaling.

    Up to ROWS - 1 slots more are computed, where that many are present; `weigh` overwrites them.
    """
    for i in range(first, stop, ROWS):
        out = Rows(pointer(work.score, i), BLOCK)
        multiply(M, Rows(pointer(q, 0), E + WIDTH), below(keys, i), present - i, out, E, work.spare)


@njit(**INNER)
def walk(q, q_sink, cache, l, n, p, t, n_tokens, g, G, work, y):
    """Attention of the rows t .. t+n_tokens-1, at positions from p on, for the query heads of head g of G."""
    E, S = q.shape[2], cache.pos.shape[2]
    share, last, n_sink = q.shape[1] // G, p + n_tokens - 1, cache.n_sink
    M, scale, slot_pos = n_tokens * share, np.float32(1) / np.float32(math.sqrt(E)), cache.pos[l, n]
    start_rows(q, q_sink, work, t, n_tokens, g * share, share, n_sink)
    used, first = min(last + 1, S), ((l * cache.pos.shape[1] + n) * G + g) * S  # later slots were never written
    for s in range(0, used, BLOCK):
        n_slots, present = min(BLOCK, used - s), min(BLOCK, S - s)
        oldest, newest = slot_pos[s], slot_pos[s]
        for i in range(s + 1, s + n_slots):
            oldest, newest = min(oldest, slot_pos[i]), max(newest, slot_pos[i])
        if newest <= p - cache.window and oldest >= n_sink:
            continue  # no row sees any of it
        keys = block_rows(cache.k, first + s, n_slots, E, work.keys)
        from_sink = max(0, min(n_sink - s, n_slots))
        score_block(M, work.q, keys, from_sink, n_slots, present, E, work)
        score_block(M, work.q_sink, keys, 0, from_sink, from_sink, E, work)
        for m in range(M):
            if oldest < 0 or newest > p or oldest <= last - cache.window:
                hide(work, m, slot_pos, s, n_slots, p + m // share, cache.window, n_sink)
            weigh(work, m, n_slots, scale)
        gather_block(M, block_rows(cache.v, first + s, n_slots, E, work.values), n_slots, work, E)
    finish_rows(work, t, n_tokens, g * share, share, E, y)


@njit(**INNER)
def walks(q, q_sink, cache, l, pos, seq, tiles, G, part, parts, y):
    """Every parts-th pair of a tile and a key/value head, from `part` on: so that long and short walks mix.

    tiles (n + 1,): tile i is the rows tiles[i] .. tiles[i+1]-1.
    """
    share, n_tiles = q.shape[1] // G, tiles.shape[0] - 1
    work = make_work(max(TOGETHER, share), q.shape[2])
    for unit in range(part, n_tiles * G, parts):
        t, g = tiles[unit % n_tiles], unit // n_tiles
        walk(q, q_sink, cache, l, seq[t], pos[t], t, tiles[unit % n_tiles + 1] - t, g, G, work, y)


@njit(**INNER_PARALLEL)
def walks_in_threads(q, q_sink, k, v, slot_pos, window, n_sink, l, pos, seq, tiles, G, y):
    """`walks`, each thread its part. The parts of the cache one by one: a parallel loop takes no tuples in tuples."""
    parts = num_threads()
    for part in prange(parts):
        cache = kv.KVCache(k, v, slot_pos, window, n_sink)
        walks(q, q_sink, cache, l, pos, seq, tiles, G, np.int64(part), parts, y)


@njit(**INNER)
def store_rows(k, v, cache, l, pos, seq, start, stop):
    """Write the keys and values of rows start .. stop-1 into layer l."""
    _, G, E = k.shape
    for t in range(start, stop):
        n, s = seq[t], slot(cache, pos[t])
        cache.pos[l, n, s] = pos[t]
        for g in range(G):
            store_head(cache.k, l, n, g, s, k, (t * G + g) * E)
            store_head(cache.v, l, n, g, s, v, (t * G + g) * E)


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
        tiles = tile_rows(seq, start, stop, max(1, TOGETHER * k.shape[1] // H))
        products = (stop - start) * min(pos[stop - 1] + 1, cache.pos.shape[2]) * H * E
        if products < ALONE:
            walks(q, q_sink, cache, l, pos, seq, tiles, k.shape[1], np.int64(0), np.int64(1), y)
        else:
            walks_in_threads(
                q, q_sink, cache.k, cache.v, cache.pos, cache.window, cache.n_sink, l, pos, seq, tiles, k.shape[1], y
            )
        start = stop
    return y


@overload(ops.attend)
def _attend(q, q_sink, k, v, cache, l, pos, seq):
    return lambda q, q_sink, k, v, cache, l, pos, seq: attend(q, q_sink, k, v, cache, l, pos, seq)
