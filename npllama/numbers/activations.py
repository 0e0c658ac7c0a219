"""The input of a product with a quantized matrix, rounded to 8 bits."""

from __future__ import annotations

import numpy as np

from npllama.numbers.blocks import GROUP

MIN_MAGNITUDE = 1e-30
"""A group of activations below it counts as zero: the quotient 127 / magnitude must not overflow."""


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round the input of a product with a quantized matrix to 8 bits.

        scale[t, q] = max_k |x[t, q, k]| / 127        code[t, q, k] = rint(x[t, q, k] * (127 / max_k |x[t, q, k]|))

    x (T, K) float32. Every operation is float32, half rounds to even; a group that is not finite gets a scale that is
    not finite. Returns codes (T, Q, GROUP) int8, zero beyond column K, and scales (T, Q) float32.
    """
    T, K = x.shape
    n_groups = -(-K // GROUP)
    groups = np.zeros((T, n_groups * GROUP), np.float32)
    groups[:, :K] = x
    groups = groups.reshape(T, n_groups, GROUP)  # (T, K) -> (T, Q, GROUP)
    magnitude = np.abs(groups).max(axis=-1)
    zero = magnitude < np.float32(MIN_MAGNITUDE)
    scale = np.where(zero, np.float32(0), magnitude / np.float32(127))
    with np.errstate(invalid="ignore"):  # infinity times 0, and NaN as an integer: their scale is not finite either
        factor = np.where(zero, np.float32(0), np.float32(127) / np.where(zero, np.float32(1), magnitude))
        return np.rint(groups * factor[..., None]).astype(np.int8), scale
