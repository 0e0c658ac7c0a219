"""The CPU affinity of the threads of compiled calls."""

from __future__ import annotations

from numba import njit, prange, types

from npllama.execution.kernels.flags import INNER_PARALLEL, SERIAL

_set_affinity = types.ExternalFunction(
    "sched_setaffinity", types.int32(types.int32, types.uintp, types.CPointer(types.uint64))
)


@njit(**INNER_PARALLEL)
def pin_each(masks):
    for i in prange(masks.shape[0]):
        _set_affinity(0, masks.shape[1] * 8, masks[i].ctypes)


@njit(**SERIAL)
def pin_threads(masks):
    """Let thread i of a compiled call run on the CPUs of masks[i] only. masks (n_threads, words) uint64."""
    pin_each(masks)
