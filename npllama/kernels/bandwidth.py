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
        for i in range(part * size, min((part + 1) * size, data.shape[0])):
            total += data[i]
        sums[part] = total
    return sums
