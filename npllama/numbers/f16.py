"""float16: IEEE half precision, 16 bits per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from npllama.numbers.formats import ArraySpec, NumberFormat, as_float32, check_exponents

EXPONENT = 0x7C00


class F16(NamedTuple):
    """bits (..., rows, columns) uint16: a float16 array cannot be an argument of compiled code."""

    bits: np.ndarray


def f16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest float16 (half to even; beyond 65,504: infinity). Any shape, uint16."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def from_f16(bits: np.ndarray) -> np.ndarray:
    """Bits of float16 -> float32, exactly."""
    return bits.view(np.float16).astype(np.float32)


class F16Format(NumberFormat):
    """IEEE half precision, 16 bits per weight."""

    name, title, largest = "f16", "float16", "65,504"
    weight = F16
    kernel = "npllama.execution.kernels.float_linear"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"bits": ArraySpec("<f2", shape)}

    def assemble(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> F16:
        return F16(arrays["bits"].view(np.uint16))

    def encode(self, block: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
        bits = block.view(np.uint16) if dtype == "f16" else f16_bits(as_float32(block, dtype))
        check_exponents(self, bits, EXPONENT)
        return {"bits": bits}

    def widen(self, w: F16) -> np.ndarray:
        return from_f16(w.bits)


FORMAT = F16Format()
