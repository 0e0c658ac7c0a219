"""bfloat16: the upper half of a float32, 16 bits per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from npllama.numbers.formats import ArraySpec, NumberFormat, as_float32, check_exponents

EXPONENT = 0x7F80


class BF16(NamedTuple):
    """bits (..., rows, columns) uint16."""

    bits: np.ndarray


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (half to even; NaN stays NaN). Any shape, uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 -> float32, exactly."""
    return as_float32(bits, "bf16")


class BF16Format(NumberFormat):
    """bfloat16: float32's range with 8 bits of precision."""

    name, title, largest = "bf16", "bfloat16", "3.4e38"
    weight = BF16
    kernel = "npllama.execution.kernels.float_linear"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"bits": ArraySpec("<u2", shape)}

    def assemble(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> BF16:
        return BF16(arrays["bits"])

    def encode(self, block: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
        bits = block if dtype == "bf16" else bf16_bits(as_float32(block, dtype))
        check_exponents(self, bits, EXPONENT)
        return {"bits": bits}

    def widen(self, w: BF16) -> np.ndarray:
        return from_bf16(w.bits)


FORMAT = BF16Format()
