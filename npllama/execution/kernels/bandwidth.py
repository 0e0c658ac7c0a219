"""Read memory as fast as possible: the yardstick for decoding, which reads every weight once for each token."""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, njit, prange

from npllama.execution.kernels.flags import INNER, PARALLEL
from npllama.execution.kernels.simd import add, horizontal_sum, load, splat
from npllama.execution.kernels.target import WIDTH

STREAMS = 4
"""Streams that each thread reads at the same time: more or fewer are slower."""


@njit(**INNER)
def stream_part(data, start, size):
    """The sum of STREAMS pieces of `size` numbers, one after the other from `start` on."""
    one = two = three = four = splat(np.float32(0))
    for i in range(start, start + size - WIDTH + 1, WIDTH):
        one = add(one, load(data, i))
        two = add(two, load(data, i + size))
        three = add(three, load(data, i + 2 * size))
        four = add(four, load(data, i + 3 * size))
    return horizontal_sum(add(add(one, two), add(three, four)))


@njit(**PARALLEL)
def stream_memory(data):
    """Read (n,) float32 once through, each thread its own contiguous part. Returns a sum per thread."""
    parts = get_num_threads()
    sums = np.zeros(parts, np.float32)
    size = data.shape[0] // (parts * STREAMS)
    for part in prange(parts):
        sums[part] = stream_part(data, np.int64(part) * STREAMS * size, size)
    return sums
