"""Number formats of weights: how a matrix is stored, and what its stored numbers mean.

A format is a NamedTuple of arrays, so its type selects the kernel; plain float32 is a plain array.
Axes: a matrix is (rows, columns) = (outputs, inputs); any leading axes are layers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class F16(NamedTuple):
    """IEEE half precision. bits (..., rows, columns) uint16."""

    bits: np.ndarray


class BF16(NamedTuple):
    """bfloat16: the upper half of a float32. bits (..., rows, columns) uint16."""

    bits: np.ndarray


Weight = np.ndarray | F16 | BF16
"""A matrix in any number format."""


def f16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest float16 (half to even; beyond 65,504: infinity). Any shape, uint16."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (half to even; NaN stays NaN). Any shape, uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def widen(w: Weight) -> np.ndarray:
    """A matrix in any number format -> the same numbers in float32 (exact; float32 itself is not copied)."""
    if isinstance(w, F16):
        return w.bits.view(np.float16).astype(np.float32)
    if isinstance(w, BF16):
        return (w.bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return w
