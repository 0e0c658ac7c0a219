"""float32: a plain array, the format of norms and of all activations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npllama.numbers.formats import ArraySpec, NumberFormat, as_float32, check_exponents

EXPONENT = 0x7F800000


class F32Format(NumberFormat):
    """IEEE single precision, 32 bits per weight."""

    name, title, largest = "f32", "float32", "3.4e38"
    weight = np.ndarray
    kernel = "npllama.execution.kernels.float_linear"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"values": ArraySpec("<f4", shape)}

    def assemble(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        return arrays["values"]

    def encode(self, block: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
        values = np.ascontiguousarray(as_float32(block, dtype))
        check_exponents(self, values.view(np.uint32), EXPONENT)
        return {"values": values}

    def widen(self, w: np.ndarray) -> np.ndarray:
        return w

    def widen_rows(self, w: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return w[rows]


FORMAT = F32Format()
