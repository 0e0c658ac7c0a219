"""How this process multiplies quantized weights, and digests of what comes out: a module, and a program."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from helpers import as_mapped, quantize


def multiply(x: np.ndarray, w: Any) -> np.ndarray:
    """The compiled x @ w.T."""
    from compiled_ops import OPS

    product: np.ndarray = OPS["linear"](x, as_mapped(w))
    return product


def products() -> dict[str, np.ndarray]:
    """Products of all formats, of awkward sizes, with a zero group."""
    rng, found = np.random.default_rng(0), {}
    for rows, columns in ((300, 172), (1030, 288)):
        w, x = rng.standard_normal((rows, columns)), rng.standard_normal((43, columns), dtype=np.float32)
        x[4, 32:64] = 0
        for number_format in ("q4", "q6", "q8", "q4_1", "iq4_nl", "q5_1"):
            quantized = quantize(w.astype(np.float32), number_format)
            for tokens in (len(x), 9):  # too few for a strip
                found[f"{number_format} {rows} {tokens}"] = multiply(x[:tokens], quantized)
    return found


def report() -> dict[str, Any]:
    """How products are multiplied here, and digests of the products."""
    from npllama.execution.kernels.amx import USED
    from npllama.execution.kernels.int8_dot import DOT

    digests = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in products().items()}
    return {"dot": DOT, "amx": USED, "digests": digests}


if __name__ == "__main__":
    print(json.dumps(report()))
