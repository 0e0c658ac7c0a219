"""Is a cache one for this model, and does it still hold what a position sees? Kernels check neither.

Axes: L layers, N sequences, G key/value heads, S slots, E head size.
"""

from __future__ import annotations

import numpy as np

from npllama.cache import Int8KV, KVCache, Stored, n_groups
from npllama.errors import UsageError, quote
from npllama.numbers.f16 import F16

_Part = tuple[str, np.ndarray, tuple[int, ...], np.dtype]
_INT64, _FLOAT32, _UINT16, _INT8 = (np.dtype(name) for name in ("int64", "float32", "uint16", "int8"))


def check_fits(cache: KVCache, n_layers: int, n_kv_heads: int, head_dim: int, kv_dtype: str) -> None:
    """Raise UsageError unless this is a cache for such a model, and laid out as kernels address it.

    Kernels compute addresses from all that is checked here: type, shape, number format and layout (C-contiguous,
    aligned, writable) of every array, and whether sinks and window fit into the slots.
    """
    if type(cache) is not KVCache or type(cache.pos) is not np.ndarray or cache.pos.ndim != 3:
        found = f" with pos {_described(cache.pos)}" if type(cache) is KVCache else ""
        raise UsageError(
            f"a KVCache with pos int64 (layers, sequences, slots) is needed; got a {type(cache).__name__}{found}; "
            f"take one from this model's new_cache."
        )
    _, N, S = cache.pos.shape
    shape = (n_layers, N, n_kv_heads, S, head_dim)
    parts: list[_Part] = [("pos", cache.pos, (n_layers, N, S), _INT64)]
    for name, stored in (("k", cache.k), ("v", cache.v)):
        parts += _parts(name, stored, shape, kv_dtype)
    for name, array, needed, dtype in parts:
        if not (type(array) is np.ndarray and array.shape == needed and array.dtype == dtype and array.flags.carray):
            raise UsageError(
                f"this cache does not fit the model: its {name} is {_described(array)}, the model needs "
                f"{dtype} {needed}, C-contiguous and writable; take one from this model's new_cache."
            )
    window, n_sink = cache.window, cache.n_sink
    if type(window) is not int or type(n_sink) is not int or not 0 <= n_sink <= n_sink + window - 1 < S:
        raise UsageError(
            f"a cache of {S} slots cannot hold {quote(n_sink)} sinks and a window of {quote(window)} positions; "
            f"take one from this model's new_cache."
        )


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


def check_kept(cache: KVCache, n: int, p: int) -> None:
    """Raise UsageError when position p of sequence n would see positions that later ones have replaced in the ring.

    That is so when p is fed again after the ring has gone on past it. Sinks have slots of their own.
    """
    low, ring = max(cache.n_sink, p - cache.window + 1), cache.pos.shape[2] - cache.n_sink
    held = cache.pos[0, n, cache.n_sink :]  # an interrupted call has written the first layer, if any
    if low >= p or held.max() < low + ring:
        return
    seen = np.arange(low, p)
    gone = seen[held[(seen - cache.n_sink) % ring] > seen]
    if len(gone):
        raise UsageError(
            f"position {p} of sequence {n} cannot be fed again: it sees positions {low} to {p - 1}, of which later "
            f"ones have replaced {gone[0]} to {gone[-1]}; clear the sequence and feed it again, or keep more slots."
        )
