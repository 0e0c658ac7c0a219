"""The compiler flags of every kernel, and the switches that are read once.

No fastmath: reassociation gives other bits in a fresh compile than from a cache, element-wise code then differs with
the number of threads, and a product contracted with a sum is not what NumPy computes. Where one rounding is meant for
both, a kernel says `fma`. Every kernel states its flags, because one that does not inherits those of whoever compiles
it first.
"""

from __future__ import annotations

import os
from typing import Any

SERIAL: dict[str, Any] = {"error_model": "numpy", "fastmath": False, "boundscheck": False, "nogil": True}
# For a kernel that only kernels call: without an entry from Python, whose call would crash.
INNER: dict[str, Any] = {**SERIAL, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
PARALLEL: dict[str, Any] = {**SERIAL, "parallel": True}
INNER_PARALLEL: dict[str, Any] = {**INNER, "parallel": True}

# Read once, before anything compiles: a later change would be ignored. Part of the key of the compile cache.
PLAIN = os.environ.get("NPLLAMA_PLAIN_KERNELS", "0") not in ("", "0")
