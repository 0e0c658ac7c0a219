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
