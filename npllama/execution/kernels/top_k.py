"""drawing/top_k.top_k compiled: the search for the largest of all logits of each row, and the draw of an id."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from npllama.execution.kernels.flags import INNER, INNER_PARALLEL, SERIAL
from npllama.execution.kernels.simd import (
    add,
    exp_scalar,
    horizontal_max,
    horizontal_sum,
    load,
    load_scalar,
    maximum,
    mul,
    splat,
    store_scalar,
)
from npllama.execution.kernels.target import WIDTH

BLOCK_LOGITS = 4 * WIDTH
"""Logits of a block: most blocks have none that is among the top k, and are skipped by their maximum."""

SERIAL_BELOW = 8
"""Fewer rows are searched by one thread: starting others costs more than it saves."""


@njit(**INNER)
def block_max(logits, block):
    """The largest of a block of logits."""
    i = block * BLOCK_LOGITS
    low = maximum(load(logits, i), load(logits, i + WIDTH))
    high = maximum(load(logits, i + 2 * WIDTH), load(logits, i + 3 * WIDTH))
    return horizontal_max(maximum(low, high))


@njit(**INNER)
def zero_if_finite(logits, block):
    """Zero times the logits of a block, added up in lanes: zero, or NaN if one is not finite."""
    i, zero = block * BLOCK_LOGITS, splat(np.float32(0))
    low = add(mul(load(logits, i), zero), mul(load(logits, i + WIDTH), zero))
    high = add(mul(load(logits, i + 2 * WIDTH), zero), mul(load(logits, i + 3 * WIDTH), zero))
    return add(low, high)


@njit(**INNER)
def insert(number, i, values, ids):
    """Put a number and its index among the k largest so far, if it is one. Of equals the first stays first."""
    at = values.shape[0] - 1
    if number <= load_scalar(values, at):
        return
    while at > 0 and load_scalar(values, at - 1) < number:
        store_scalar(values, at, load_scalar(values, at - 1))
        store_scalar(ids, at, load_scalar(ids, at - 1))
        at -= 1
    store_scalar(values, at, number)
    store_scalar(ids, at, i)


@njit(**INNER)
def search_row(logits, ids):
    """Write the indices of the k largest logits (V,) to ids (k,); whether all logits are finite.

    The k-th largest of the blocks' maxima is a lower bound for the top k: only the blocks that reach it are searched.
    """
    V, k = logits.shape[0], ids.shape[0]
    n_blocks = V // BLOCK_LOGITS
    block_maxima, values = np.empty(n_blocks, np.float32), np.full(k, -np.inf, np.float32)
    check = splat(np.float32(0))
    for block in range(n_blocks):
        number = block_max(logits, block)
        check = add(check, zero_if_finite(logits, block))
        store_scalar(block_maxima, block, number)
        insert(number, block, values, ids)
    zero = horizontal_sum(check)
    for i in range(n_blocks * BLOCK_LOGITS, V):
        zero += load_scalar(logits, i) * np.float32(0)
    if zero != np.float32(0):
        return False
    least = load_scalar(values, k - 1)
    values[:] = -np.inf
    for block in range(n_blocks):
        if load_scalar(block_maxima, block) >= least:
            for i in range(block * BLOCK_LOGITS, (block + 1) * BLOCK_LOGITS):
                if load_scalar(logits, i) >= least:
                    insert(load_scalar(logits, i), i, values, ids)
    for i in range(n_blocks * BLOCK_LOGITS, V):
        insert(load_scalar(logits, i), i, values, ids)
    return True


@njit(**INNER)
def draw_one(logits, ids, chances, number):
    """The id that a number from [0, 1) stands for, of the k largest: what sampling/basic.py's `candidates` says."""
    top_p, min_p, temperature = load_scalar(chances, 0), load_scalar(chances, 1), load_scalar(chances, 2)
    k, largest = ids.shape[0], np.float64(logits[ids[0]])
    below = np.empty(k, np.float64)
    total, n = 0.0, 0
    for i in range(k):
        weight = exp_scalar(np.float64(logits[ids[i]]) - largest)
        total += weight
        store_scalar(below, i, total)
        n += 1 if weight >= min_p else 0
    for i in range(1, n if top_p < 1 else 0):
        if not load_scalar(below, i - 1) < top_p * total:
            n = i
            break
    total = 0.0
    for i in range(n):
        total += exp_scalar((np.float64(logits[ids[i]]) - largest) / temperature)
        store_scalar(below, i, total)
    at = 0
    while load_scalar(below, at) <= number * total:
        at += 1
    return ids[at]


@njit(**INNER)
def search_and_draw(logits, ids, cuts, chances, numbers, drawn, r):
    """The r-th row: its largest logits, and an id of them where there are numbers. Returns whether it is finite."""
    some, best = logits[r, : cuts[r, 0]], ids[r, : cuts[r, 1]]
    finite = search_row(some, best)
    if finite and r < numbers.shape[0]:
        store_scalar(drawn, r, draw_one(some, best, chances[r], load_scalar(numbers, r)))
    return finite


@njit(**INNER_PARALLEL)
def search_in_threads(logits, ids, cuts, chances, numbers, drawn, finite):
    """search_and_draw for every row, each by one thread."""
    for r in prange(logits.shape[0]):
        finite[r] = search_and_draw(logits, ids, cuts, chances, numbers, drawn, np.int64(r))


@njit(**SERIAL)
def top_k(logits, ids, cuts, chances, numbers, drawn):
    """Write the indices of the k largest logits of each row (R, V) float32 to ids (R, most), as drawing/top_k.

    cuts (R, 2) int64: how many of a row's first logits count, n, and k; n must have k whole blocks. numbers (R,), or
    (0,) for none: an id of each row is drawn with them, to drawn (R,) int64, with chances (R, 3) float64, top_p, min_p
    and temperature, above 0. Returns whether all logits are finite; if not, what is written means nothing.
    """
    R = logits.shape[0]
    if R < SERIAL_BELOW:
        finite = True
        for r in range(R):
            finite = search_and_draw(logits, ids, cuts, chances, numbers, drawn, r) and finite
        return finite
    each = np.empty(R, np.bool_)
    search_in_threads(logits, ids, cuts, chances, numbers, drawn, each)
    return each.all()
