"""Is a cache one for this model, and does it hold what a position sees? Kernels check neither.

Axes: L layers, N sequences, G key/value heads, S slots, E head size, C entries of a table.
"""

from __future__ import annotations

import numpy as np

from npllama.cache import BLOCK_SLOTS, Int8KV, KVCache, Stored, n_blocks, n_groups
from npllama.errors import UsageError
from npllama.numbers.f16 import F16

_Part = tuple[str, np.ndarray, tuple[int, ...], np.dtype]
_INT64, _INT32, _FLOAT32, _UINT16, _INT8 = (np.dtype(name) for name in ("int64", "int32", "float32", "uint16", "int8"))


def check_fits(cache: KVCache, n_layers: int, n_kv_heads: int, head_dim: int, kv_dtype: str) -> None:
    """Raise UsageError unless this is a cache for such a model, and laid out as kernels address it.

    Kernels compute addresses from all that is checked here: type, shape, number format and layout (C-contiguous,
    aligned, writable) of every array. What the tables say is checked for each batch, by `check_rows`.
    """
    if type(cache) is not KVCache or type(cache.table) is not np.ndarray or cache.table.ndim != 2:
        found = f" with table {_described(cache.table)}" if type(cache) is KVCache else ""
        raise UsageError(
            f"a KVCache with table int32 (sequences, entries) is needed; got a {type(cache).__name__}{found}; "
            f"take one from this model's new_cache."
        )
    N, C = cache.table.shape
    S = _slots(cache)
    shape = (n_layers, n_kv_heads, S, head_dim)
    parts: list[_Part] = [("table", cache.table, (N, C), _INT32)]
    parts += [(name, getattr(cache, name), (N,), _INT64) for name in ("window", "n_sink", "length")]
    for name, stored in (("k", cache.k), ("v", cache.v)):
        parts += _parts(name, stored, shape, kv_dtype)
    for name, array, needed, dtype in parts:
        if not (type(array) is np.ndarray and array.shape == needed and array.dtype == dtype and array.flags.carray):
            raise UsageError(
                f"this cache does not fit the model: its {name} is {_described(array)}, the model needs "
                f"{dtype} {needed}, C-contiguous and writable; take one from this model's new_cache."
            )


def _slots(cache: KVCache) -> int:
    """Slots of the pool, by its keys: a whole number of blocks; or UsageError."""
    keys = cache.k if isinstance(cache.k, np.ndarray) else cache.k[0] if isinstance(cache.k, tuple) else None
    if not isinstance(keys, np.ndarray) or keys.ndim != 4 or keys.shape[2] % BLOCK_SLOTS:
        raise UsageError(
            f"this cache does not fit the model: its k is {_described(keys if keys is not None else cache.k)}, the "
            f"model needs whole blocks of {BLOCK_SLOTS} slots, (layers, heads, slots, head size); take one from this "
            f"model's new_cache."
        )
    return int(keys.shape[2])


def _parts(name: str, stored: Stored, shape: tuple[int, ...], kv_dtype: str) -> list[_Part]:
    """The arrays of keys or values in a number format: name, array, and the shape and type that it needs."""
    if kv_dtype == "f32":
        return [(name, stored, shape, _FLOAT32)]  # type: ignore[list-item] # any other is refused
    if kv_dtype == "f16" and type(stored) is F16:
        return [(f"{name}.bits", stored.bits, shape, _UINT16)]
    if kv_dtype == "q8" and type(stored) is Int8KV:
        scales = (*shape[:-1], n_groups(shape[-1]))
        return [(f"{name}.codes", stored.codes, shape, _INT8), (f"{name}.scales", stored.scales, scales, _FLOAT32)]
    raise UsageError(
        f"this cache does not fit the model: its {name} is {_described(stored)}, the model keeps {kv_dtype}; "
        f"take one from this model's new_cache."
    )


def _described(found: object) -> str:
    if not isinstance(found, np.ndarray):
        return f"a {type(found).__name__}"
    layout = "" if found.flags.c_contiguous else ", not C-contiguous"
    layout += "" if found.flags.aligned else ", not aligned"
    return f"{found.dtype} {found.shape}{layout}{'' if found.flags.writeable else ', read-only'}"


def check_rows(cache: KVCache, seqs: np.ndarray, firsts: np.ndarray, lasts: np.ndarray) -> None:
    """Raise UsageError unless sequences seqs can be fed the positions firsts .. lasts, (n,) each: kernels do not look.

    The positions before are written, and a block of the pool is there for all that the rows see or write. So a position
    that is fed again is computed anew, or refused where what it sees has been given back.
    """
    blocks, limit = _slots(cache) // BLOCK_SLOTS, cache.table.shape[1] * BLOCK_SLOTS
    table = cache.table.view(np.uint32)  # NO_BLOCK becomes the largest number
    told = (cache.window[seqs], cache.n_sink[seqs], cache.length[seqs], seqs, firsts, lasts)
    for window, n_sink, length, n, first, last in zip(*[part.tolist() for part in told], strict=True):
        if window < 1 or n_sink < 0:
            raise UsageError(f"sequence {n} has a window of {window} and {n_sink} sinks; it needs at least 1 and 0.")
        if first > length:
            raise UsageError(
                f"position {first} of sequence {n} cannot be fed: {length} are written; feed those before it first."
            )
        if last >= limit:
            raise UsageError(
                f"position {last} of sequence {n} is beyond the {limit} that the cache has room for; make a larger one."
            )
        oldest, end = max(0, first - window + 1) // BLOCK_SLOTS, last // BLOCK_SLOTS + 1
        sinks = min(n_blocks(n_sink), oldest) if n_sink else 0
        if max(table[n, oldest:end].tolist()) >= blocks or (sinks and max(table[n, :sinks].tolist()) >= blocks):
            raise UsageError(
                f"position {first} of sequence {n} cannot be fed: it sees or writes positions that have no block of "
                f"the cache, because they were given back or none was taken; clear the sequence and feed it from 0 on."
            )
