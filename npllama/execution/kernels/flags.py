"""The compiler flags of every kernel, and the switches that are read once.

No fastmath: with reassociation, fresh and kept code give different bits (see kernels/__init__.py). Contraction is not
what NumPy computes; a kernel that means one rounding says `fma`. Every kernel states its flags: one that does not
inherits those of its first caller.
"""

from __future__ import annotations

import os
from typing import Any

SERIAL: dict[str, Any] = {
    "error_model": "numpy",
    "fastmath": False,
    "boundscheck": False,
    "nogil": True,
    "forceinline": False,
}
# For a kernel that only kernels call: it has no entry from Python.
INNER: dict[str, Any] = {**SERIAL, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
PARALLEL: dict[str, Any] = {**SERIAL, "parallel": True}
INNER_PARALLEL: dict[str, Any] = {**INNER, "parallel": True}
# For a part of a kernel that stands in a function of its own to be read, or to be chosen by format.
INLINE = {**INNER, "forceinline": True}

# Read once, before anything compiles: a later change would be ignored. Part of the key of the compile cache.
PLAIN = os.environ.get("NPLLAMA_PLAIN_KERNELS", "0") not in ("", "0")
