"""The CPU that kernels are compiled for: what its vector units can do, and how it may like its memory prefetched.

Chosen by the features of Numba's target, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included. Without fused multiply-add
`llvm.fma` would be a slow call, without float16 conversion a crash.
"""

from __future__ import annotations

from npllama.execution.kernels.flags import PLAIN
from npllama.execution.kernels.numba_internals import target_machine
from npllama.execution.prefetching.ahead import BYTES, HALVES, NONE, PACKED, Prefetch

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

ZEN = CPU.startswith("znver")

SHORT_LOOPS = not ZEN
"""Loops over a group's codes stay loops, for CPUs that prefetch line by line; on Zen they are unrolled."""

PREFETCHES = {
    PACKED: Prefetch("groups", 8192) if ZEN else Prefetch("lines", 4096),
    BYTES: NONE if CPU == "znver4" else Prefetch("groups", 8192) if ZEN else Prefetch("lines", 4096),
    HALVES: NONE if CPU == "znver4" else Prefetch("lines", 4096),
}
"""What is best where nothing was measured, as far as the CPU's name tells."""
