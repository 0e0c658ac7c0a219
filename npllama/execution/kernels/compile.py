"""model.forward compiled whole, and the other functions that Python calls."""

from __future__ import annotations

import re
from typing import Any

import numba
from numba import njit, types
from numba.core.errors import NumbaError
from numba.extending import register_jitable

from npllama import model
from npllama.errors import ModelError
from npllama.execution.kernels import affinity, amx, attention, elementwise, linear, planned, rounding, top_k  # noqa: F401 (importing registers the overloads)
from npllama.execution.kernels.flags import SERIAL
from npllama.execution.kernels.formats import import_kernels
from npllama.execution.kernels.numba_internals import (
    compile_once,
    define_symbol,
    is_private,
    native_address,
    target_machine,
)

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

_F32, _F64, _I64 = types.float32, types.float64, types.int64
TOP_K_TYPES = tuple(
    types.Array(element, n, "C") for element, n in ((_F32, 2), (_I64, 2), (_I64, 2), (_F64, 2), (_F64, 1), (_I64, 1))
)
"""Of the arguments of top_k.top_k."""


def target() -> str:
    """What code is compiled for: the CPU with its features, whether AMX may be used, and Numba's settings."""
    settings = [f"{name}={getattr(numba.config, name, None)!r}" for name in SETTINGS]
    return "|".join((*target_machine(), str(amx.USED), *settings))


def compile_forward(arguments: tuple[Any, ...], cache: Any) -> Any:
    """model.forward, compiled for arguments of these types or taken from the cache: a disk_cache.DiskCache, or None."""
    import_kernels()
    function = njit(**SERIAL)(model.forward)
    try:
        compile_once(function, types_of(arguments), cache)
    except NumbaError as error:
        said = re.search(r"NumbaTypeError: (.*)", str(error))  # the sentence of an overload, out of forty lines
        reason = said.group(1) if said else str(error).splitlines()[0]
        raise ModelError(
            f"this model cannot be compiled: {reason}; use --backend numpy, or export it again."
        ) from error
    return function


def types_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numba's types of arguments."""
    return tuple(numba.typeof(a) for a in arguments)


def compile_steps(forward: Any, name: str, argument_types: tuple[Any, ...], cache: Any) -> Any:
    """planned.run for a compiled model.forward, compiled or from the cache (see compile_forward). Needs top_k.top_k.

    name: one for these types of arguments, by which the code finds model.forward. None where this Numba has no way to.
    """
    parts = (name, forward, argument_types[:-1]), (planned.TOP_K, top_k.top_k, TOP_K_TYPES)
    for symbol, function, its_types in parts:
        address = native_address(function, its_types)
        if not address:
            return None
        define_symbol(symbol, address)
    run = planned.make_run(name)
    try:
        compile_once(run, argument_types, cache)
    except Exception as error:
        if not is_private(error):
            raise
        return None
    return run


def compile_pin_threads(cache: Any) -> Any:
    """affinity.pin_threads, compiled or from the cache (see compile_forward)."""
    compile_once(affinity.pin_threads, (types.Array(types.uint64, 2, "C"),), cache)
    return affinity.pin_threads


def compile_top_k(cache: Any) -> Any:
    """top_k.top_k, compiled or from the cache (see compile_forward)."""
    compile_once(top_k.top_k, TOP_K_TYPES, cache)
    return top_k.top_k


def compile_rounding(best: Any, stored: Any) -> tuple[Any, Any]:
    """rounding.best_scales and stored_scales, compiled or from their caches (see compile_forward)."""
    groups, floats = types.Array(types.float32, 2, "C"), types.Array(types.float32, 1, "C")
    rule, levels = (types.float32, types.float32, groups), types.Array(types.int8, 2, "C")
    compile_once(rounding.best_scales, (groups, floats, *rule, floats), best)
    codes = types.Array(types.uint8, 1, "C")
    compile_once(rounding.stored_scales, (groups, floats, floats, *rule, codes, levels), stored)
    return rounding.best_scales, rounding.stored_scales
