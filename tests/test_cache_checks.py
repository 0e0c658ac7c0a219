"""What a cache must be before any kernel addresses it, and which positions can be fed to it again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import helpers
import numpy as np
import pytest

from npllama import cache as kv
from npllama.cache import Int8KV, KVCache
from npllama.errors import UsageError
from npllama.execution.engine import Engine
from npllama.numbers.f16 import F16
from npllama.store.opening import OpenModel, open_model

BACKENDS = ["numpy"] if os.environ.get("NPLLAMA_BACKEND") == "numpy" else ["numpy", "numba"]
C = helpers.TINY


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    folder = tmp_path_factory.mktemp("cache") / "model"
    helpers.write_model_directory(folder)
    return open_model(folder)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest, opened: OpenModel) -> Engine:
    return Engine(opened, request.param)


@pytest.fixture(scope="module", params=BACKENDS)
def narrow(request: pytest.FixtureRequest, opened: OpenModel) -> Engine:
    return Engine(opened, request.param, kv_dtype="q8")


def feed(engine: Engine, cache: Any, ids: list[int], start: int = 0, seq: int = 0) -> np.ndarray:
    pos = range(start, start + len(ids))
    return engine.forward(cache, ids, pos, [seq] * len(ids), [len(ids) - 1])


def other(L: int = C.n_layers, G: int = C.n_kv_heads, E: int = C.head_dim, kv_dtype: str = "f32") -> KVCache:
    """A cache for a model of another shape."""
    return kv.allocate(L, 1, G, 8, E, kv_dtype=kv_dtype)


def changed(**arrays: Callable[[np.ndarray], np.ndarray]) -> KVCache:
    """A cache of this model with other arrays in place of its own."""
    cache = other()
    return cache._replace(**{name: change(getattr(cache, name)) for name, change in arrays.items()})


def read_only(a: np.ndarray) -> np.ndarray:
    a.setflags(write=False)
    return a


def unaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)
    return raw[1:].view(a.dtype).reshape(a.shape)


FOREIGN: dict[str, Callable[[], object]] = {
    "fewer layers": lambda: other(L=C.n_layers - 1),
    "more layers": lambda: other(L=C.n_layers + 1),
    "fewer heads": lambda: other(G=C.n_kv_heads // 2 or 3),
    "more heads": lambda: other(G=2 * C.n_kv_heads),
    "smaller heads": lambda: other(E=C.head_dim // 2),
    "larger heads": lambda: other(E=2 * C.head_dim),
    "f16": lambda: other(kv_dtype="f16"),
    "q8": lambda: other(kv_dtype="q8"),
    "float64": lambda: changed(k=lambda a: a.astype(np.float64)),
    "other byte order": lambda: changed(v=lambda a: a.astype(a.dtype.newbyteorder())),
    "Fortran order": lambda: changed(k=np.asfortranarray),
    "every other slot": lambda: changed(v=lambda a: np.repeat(a, 2, axis=2)[:, :, ::2]),
    "a broadcast array": lambda: changed(v=lambda a: np.broadcast_to(a[:1], a.shape)),
    "read-only keys": lambda: changed(k=read_only),
    "a read-only table": lambda: changed(table=read_only),
    "unaligned": lambda: changed(v=unaligned),
    "fewer slots for values": lambda: changed(v=lambda a: a[:, :, :5].copy()),
    "more sequences in the table": lambda: changed(table=lambda a: np.repeat(a, 3, axis=0)),
    "blocks that are not whole": lambda: changed(k=lambda a: a[:, :, :5].copy(), v=lambda a: a[:, :, :5].copy()),
    "windows of other sequences": lambda: changed(window=lambda a: np.repeat(a, 2)),
    "a table of one sequence": lambda: changed(table=lambda a: a[0]),
    "a table in 64 bits": lambda: changed(table=lambda a: a.astype(np.int64)),
    "lengths in 32 bits": lambda: changed(length=lambda a: a.astype(np.int32)),
    "keys alone in f16": lambda: other()._replace(k=F16(np.zeros((1, 1, 64, 1), np.uint16))),
    "a list": lambda: other()._replace(k=[0.0]),
    "a subclass of an array": lambda: changed(k=lambda a: a.view(np.recarray)),
    "a window that is no array": lambda: other()._replace(window=2),
    "sinks that are floats": lambda: changed(n_sink=lambda a: a.astype(np.float64)),
    "a tuple": lambda: tuple(other()),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_cache_that_is_not_this_models_is_refused_before_anything_is_computed(engine: Engine, kind: str) -> None:
    with pytest.raises(UsageError, match=r"new_cache\.$") as caught:
        feed(engine, FOREIGN[kind](), [1, 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["scales", "codes"])
def test_each_array_of_a_narrow_cache_is_checked(narrow: Engine, kind: str) -> None:
    cache = narrow.new_cache(1, 8)
    assert feed(narrow, cache, [1, 2]).shape == (1, C.vocab_size)
    assert isinstance(cache.v, Int8KV)
    short = getattr(cache.v, kind)[:, :, :32].copy()
    with pytest.raises(UsageError, match=rf"its v\.{kind} is .* take one from this model's new_cache"):
        feed(narrow, cache._replace(v=cache.v._replace(**{kind: short})), [1, 2])
    with pytest.raises(UsageError, match=r"its k is float32 .*, the model keeps q8"):
        feed(narrow, other(), [1, 2])


IDS = [1, 7, 30, 5, 9, 12, 40, 3, 2, 21]


@pytest.mark.parametrize(("window", "n_sink"), [(0, 0), (-3, 0), (5, -1)])
def test_windows_and_sinks_out_of_range_are_refused(engine: Engine, window: int, n_sink: int) -> None:
    cache = engine.new_cache(1, 64)
    cache.window[0], cache.n_sink[0] = window, n_sink
    with pytest.raises(UsageError, match="it needs at least 1 and 0"):
        feed(engine, cache, IDS)


@pytest.mark.parametrize("block", [-1, -2, 3, 1 << 30])
@pytest.mark.parametrize("entry", [0, 1])
def test_a_position_without_a_block_of_the_pool_is_refused(engine: Engine, block: int, entry: int) -> None:
    cache = engine.new_cache(1, 192)
    feed(engine, cache, list(range(64)))
    cache.table[0, entry] = block
    with pytest.raises(UsageError, match=r"position 64 of sequence 0 cannot be fed: .* have no block"):
        feed(engine, cache, [1], 64)
    cache.window[0] = 1  # sees itself alone: what it sees is in the second block
    if entry == 0:
        feed(engine, cache, [1], 64)
        cache.n_sink[0] = 2
    with pytest.raises(UsageError, match="cannot be fed"):
        feed(engine, cache, [1], 64)


def test_positions_that_nothing_was_fed_before_or_that_are_beyond_the_table_are_refused(engine: Engine) -> None:
    cache = engine.new_cache(2, 64)
    feed(engine, cache, IDS, seq=1)
    with pytest.raises(UsageError, match="position 11 of sequence 1 cannot be fed: 10 are written"):
        feed(engine, cache, [1], 11, 1)
    with pytest.raises(UsageError, match="position 3 of sequence 0 cannot be fed: 0 are written"):
        feed(engine, cache, [1], 3, 0)
    with pytest.raises(UsageError, match="position 64 of sequence 1 is beyond the 64"):
        feed(engine, cache, [5] * 55, 10, 1)
    assert cache.length.tolist() == [0, 10]


def test_what_was_fed_again_forgets_what_came_after(engine: Engine) -> None:
    cache = engine.new_cache(1, 64)
    alone = [feed(engine, cache, [token], p) for p, token in enumerate(IDS)]
    for p in (9, 4, 0):
        np.testing.assert_allclose(feed(engine, cache, [IDS[p]], p), alone[p], atol=1e-5)
        assert cache.length.tolist() == [p + 1]
    with pytest.raises(UsageError, match="position 9 of sequence 0 cannot be fed: 1 are written"):
        feed(engine, cache, [1], 9)


def test_a_call_that_fails_leaves_its_positions_unwritten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = engine.new_cache(1, 64)
    feed(engine, cache, IDS)

    def broken(*arguments: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_arguments", broken)
    with pytest.raises(KeyboardInterrupt):
        feed(engine, cache, IDS[4:], 4)
    assert cache.length.tolist() == [4]
