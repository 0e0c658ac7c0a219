"""The CPU that kernels are compiled for: what its vector units can do, and how it likes its memory prefetched.

Chosen by the features of Numba's target, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included. Without fused multiply-add
`llvm.fma` would be a slow call, without float16 conversion a crash.
"""

from __future__ import annotations

from npllama.execution.kernels.flags import PLAIN
from npllama.execution.kernels.numba_internals import target_machine

TRIPLE, CPU, FEATURES = target_machine()
ARM64 = TRIPLE.startswith(("aarch64", "arm64"))


def has(feature: str) -> bool:
    """Whether the target has a CPU feature, by LLVM's name. Never so for plain kernels."""
    return not PLAIN and f"+{feature}" in FEATURES.split(",")


FMA = has("fma") or (ARM64 and not PLAIN)
HAS_F16 = has("f16c") or (ARM64 and not PLAIN)
AVX512 = has("avx512f") and has("avx512vl") and has("avx512bw") and has("avx512dq")

WIDTH = 16 if AVX512 else 8
"""float32 numbers in a vector register."""

WIDTH64 = WIDTH // 2
"""float64 numbers in a vector register."""

REGISTERS = 32 if AVX512 else 16
"""Vector registers that a tile may fill with its sums."""

PREFETCH_LINES = not CPU.startswith("znver")
"""Quantized kernels prefetch line by line into L2, in short loops; on Zen a whole group into L1, loops unrolled."""

NO_PREFETCH = CPU == "znver4"
"""Formats of 8 and 16 bits leave prefetching to the hardware, which is faster on Zen 4."""
