"""Number formats: how a matrix is stored, and what its stored numbers mean. One module each, and one registry.

Files, in the order in which to read them:

    formats.py      what a format is, and the registry
    f32.py          float32: a plain array
    f16.py          IEEE half precision
    bf16.py         bfloat16
    blocks.py       how numbers stand in a quantized matrix: groups of columns, blocks of rows, 8-bit scales
    activations.py  the input of products with one, rounded to 8 bits
    rounding.py     float32 to a quantized matrix: the search for scales
    groups.py       what quantized formats share
    q8.py           8 bits
    q6.py           6 bits
    q4.py           4 bits
    ggml.py         q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl: those of GGUF files

A new format is a module like q8.py, a kernel like execution/kernels/q8.py (named by the format's `kernel`), and its
place in the last line here. Export, quantize, info, bench and both executions find it through the registry.
"""

from __future__ import annotations

from npllama.numbers import bf16, f16, f32, ggml, q4, q6, q8
from npllama.numbers.formats import (
    FORMATS,
    ArraySpec,
    NumberFormat,
    UnstorableError,
    Weight,
    format_of,
    named,
    register,
    widen,
    widen_rows,
)

__all__ = [
    "FORMATS",
    "ArraySpec",
    "NumberFormat",
    "UnstorableError",
    "Weight",
    "format_of",
    "named",
    "register",
    "widen",
    "widen_rows",
]

for _format in (f32.FORMAT, f16.FORMAT, bf16.FORMAT, q8.FORMAT, q6.FORMAT, q4.FORMAT, *ggml.FORMATS):
    register(_format)
