"""Read memory as fast as it goes: the yardstick for decoding, which reads every weight once for each token."""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, njit, prange

from npllama.kernels.flags import PARALLEL


@njit(**PARALLEL)
def read(data):
    """Sum (n,) int64 once through, each thread its own contiguous part. Integers, so that the sum is a vector's."""
    parts = get_num_threads()
    sums = np.zeros(parts, np.int64)
    size = (data.shape[0] + parts - 1) // parts
    for part in prange(parts):
        total = np.int64(0)
        # Over a slice: an index that might be negative, counted from the end, would be a gather eight times slower.
        for number in data[part * size : (part + 1) * size]:
            total += number
        sums[part] = total
    return sums
