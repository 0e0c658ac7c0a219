"""sampling.largest compiled: the search through all logits, once for each token that is drawn."""

from __future__ import annotations

import numpy as np
from numba import njit

from npllama.kernels.flags import INNER, SERIAL
from npllama.kernels.vector import WIDTH, add, element, highest, load, maximum, mul, set_element, splat, total

BLOCK = 4 * WIDTH
"""Logits that are looked at together: most have nothing among them that is large enough."""


@njit(**INNER)
def peak(logits, block):
    """The largest of a block of logits."""
    i = block * BLOCK
    low = maximum(load(logits, i), load(logits, i + WIDTH))
    high = maximum(load(logits, i + 2 * WIDTH), load(logits, i + 3 * WIDTH))
    return highest(maximum(low, high))


@njit(**INNER)
def nothing(logits, block):
    """Zero times the logits of a block, added up in lanes: zero, or NaN if one is not finite."""
    i, zero = block * BLOCK, splat(np.float32(0))
    low = add(mul(load(logits, i), zero), mul(load(logits, i + WIDTH), zero))
    high = add(mul(load(logits, i + 2 * WIDTH), zero), mul(load(logits, i + 3 * WIDTH), zero))
    return add(low, high)


@njit(**INNER)
def keep(number, i, found, ids):
    """Put a number and its place among the k largest so far, if it is one; of equals the first stays first."""
    at = found.shape[0] - 1
    if number <= element(found, at):
        return
    while at > 0 and element(found, at - 1) < number:
        set_element(found, at, element(found, at - 1))
        set_element(ids, at, element(ids, at - 1))
        at -= 1
    set_element(found, at, number)
    set_element(ids, at, i)


@njit(**SERIAL)
def largest(logits, ids):
    """Write the places of the k largest logits (V,) float32 to ids (k,) int64: see sampling.largest.

    Returns whether all logits are finite; if not, ids mean nothing.

    V must have k whole blocks: what is below the k-th largest of their peaks is not among the k largest, and only the
    blocks that reach it are looked through.
    """
    V, k = logits.shape[0], ids.shape[0]
    n_blocks = V // BLOCK
    peaks, found = np.empty(n_blocks, np.float32), np.full(k, -np.inf, np.float32)
    check = splat(np.float32(0))
    for block in range(n_blocks):
        number = peak(logits, block)
        check = add(check, nothing(logits, block))
        set_element(peaks, block, number)
        keep(number, block, found, ids)
    zero = total(check)
    for i in range(n_blocks * BLOCK, V):
        zero += element(logits, i) * np.float32(0)
    if zero != np.float32(0):
        return False
    least = element(found, k - 1)
    found[:] = -np.inf
    for block in range(n_blocks):
        if element(peaks, block) >= least:
            for i in range(block * BLOCK, (block + 1) * BLOCK):
                if element(logits, i) >= least:
                    keep(element(logits, i), i, found, ids)
    for i in range(n_blocks * BLOCK, V):
        keep(element(logits, i), i, found, ids)
    return True
