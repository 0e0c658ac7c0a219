"""model.forward compiled whole, or taken from a cache; and what its machine code is made for."""

from __future__ import annotations

import re
from typing import Any

import numba
from numba import njit, types
from numba.core import config
from numba.core.errors import NumbaError
from numba.extending import register_jitable

from npllama import model
from npllama.errors import ModelError
from npllama.kernels import attention, largest, linear, matrix_unit, places, steps  # noqa: F401 (importing registers the overloads)
from npllama.kernels.deferred import compiled_as_one
from npllama.kernels.flags import SERIAL

register_jitable(model.attention)
register_jitable(model.feed_forward)

SETTINGS = (
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "DEBUG_ARRAY_OPT_RUNTIME",
    "DEBUG_NRT",
    "DISABLE_INTEL_SVML",
    "ENABLE_AVX",
    "ENABLE_PROFILING",
    "EXTEND_VARIABLE_LIFETIMES",
    "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS",
    "LOOP_VECTORIZE",
    "OPT",
    "SLP_VECTORIZE",
)
"""Settings of Numba that change machine code."""


def target() -> str:
    """The CPU that code is compiled for: name and features, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included.

    And whether the system lets this process use its matrix unit, and the settings of Numba that change code.
    """
    settings = [f"{name}={getattr(config, name, None)!r}" for name in SETTINGS]
    cpu = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
    return "|".join((*cpu, str(matrix_unit.USED), *settings))


def compile_forward(arguments: tuple[Any, ...], cache: Any) -> Any:
    """model.forward, compiled for arguments of these types or taken from the cache: a disk_cache.DiskCache, or None."""
    function = njit(**SERIAL)(model.forward)
    try:
        _compile(function, tuple(numba.typeof(a) for a in arguments), cache)
    except NumbaError as error:
        said = re.search(r"NumbaTypeError: (.*)", str(error))  # the sentence of an overload, out of forty lines
        reason = said.group(1) if said else str(error).splitlines()[0]
        raise ModelError(
            f"this model cannot be compiled: {reason}; use --backend numpy, or export it again."
        ) from error
    return function


def compile_bind(cache: Any) -> Any:
    """places.bind, compiled or from the cache (see compile_forward)."""
    _compile(places.bind, (types.Array(types.uint64, 2, "C"),), cache)
    return places.bind


def compile_largest(cache: Any) -> Any:
    """largest.largest, compiled or from the cache (see compile_forward)."""
    _compile(largest.largest, (types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")), cache)
    return largest.largest


def _compile(function: Any, arguments: tuple[Any, ...], cache: Any) -> None:
    if cache is not None:
        function._cache = cache
    with compiled_as_one():
        function.compile(arguments)
