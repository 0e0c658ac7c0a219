"""The largest logits: what sampling looks for, in NumPy. kernels/top_k.py computes the same, compiled.

Axes: R rows of logits, V ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from npllama.errors import ModelError

BLOCK_LOGITS = 64
"""Most logits per block in the search for the largest: 500 blocks at V = 32,000."""

Search = Callable[[np.ndarray, int], np.ndarray]
"""A function like `top_k`: the compiled execution has one of its own."""

Drawing = Callable[[np.ndarray, int, tuple[float, float, float], Sequence[float]], list[int] | None]
"""A function that draws an id of each row of logits from its k largest (engine.draw), or gives None if it cannot."""


def not_finite() -> ModelError:
    """The error for logits of which one is NaN or infinite."""
    return ModelError(
        "the logits are not all finite (NaN or infinity): the weights are damaged, or the model overflows. "
        "Finite logits are needed to choose a token; check the model's files, or export the checkpoint again."
    )


def check_finite(logits: np.ndarray) -> None:
    """Raise ModelError unless all logits are finite."""
    if not np.isfinite(logits).all():
        raise not_finite()


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids (min(k, V),) of the k largest logits (V,), the largest first, among equals the lower id.

    Of rows of logits (R, V) the ids (R, min(k, V)). Raises ModelError for logits that are not finite: a search sees
    them all anyway.

    Is np.argsort(-logits, kind="stable")[:k], without sorting all: at least k logits reach the k-th largest of the
    maxima of disjoint blocks, so whatever is below it is not among the k largest.
    """
    if logits.ndim == 2:
        return np.array([top_k(row, k) for row in logits], np.int64)
    check_finite(logits)
    n_ids = len(logits)
    if k >= n_ids:
        return np.argsort(-logits, kind="stable")
    rows = max(1, min(BLOCK_LOGITS, n_ids // (4 * k)))
    n_blocks = n_ids // rows  # a block is a column, so that the maximum runs along whole rows
    peaks = logits[: rows * n_blocks].reshape(rows, n_blocks).max(axis=0)
    candidates = np.flatnonzero(logits >= np.partition(peaks, n_blocks - k)[n_blocks - k])
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order[:k]]
