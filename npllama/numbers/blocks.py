"""How numbers stand in a quantized matrix: groups of columns share a scale, rows stand interleaved in blocks."""

from __future__ import annotations

import numpy as np

GROUP = 32
"""Columns of a row that share a scale."""

BLOCK_ROWS = 16
"""Rows that stand interleaved."""

_SCALE_CODES = np.arange(256, dtype=np.uint16)

SCALES = ((_SCALE_CODES & 0x80) << 8 | (_SCALE_CODES & 0x7F) << 5).view(np.float16).astype(np.float32)
"""What an 8-bit scale stands for: a float16 of its sign, the exponent's last two and the mantissa's first five bits.

0 to 4.8e-4 in 127 steps that grow from 1.9e-6 fourfold, then the negative ones. A step is at most 1/32 of the scale
down to an eighth of the largest scale of a row, then always the same.
"""
