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
    "every other slot": lambda: changed(v=lambda a: np.repeat(a, 2, axis=3)[:, :, :, ::2]),
    "a broadcast array": lambda: changed(v=lambda a: np.broadcast_to(a[:1], a.shape)),
    "read-only keys": lambda: changed(k=read_only),
    "read-only positions": lambda: changed(pos=read_only),
    "unaligned": lambda: changed(v=unaligned),
    "fewer slots for values": lambda: changed(v=lambda a: a[:, :, :, :5].copy()),
    "more sequences in pos": lambda: changed(pos=lambda a: np.repeat(a, 3, axis=1)),
    "more slots in pos": lambda: changed(pos=lambda a: np.repeat(a, 2, axis=2)),
    "pos of one layer": lambda: changed(pos=lambda a: a[0]),
    "pos in 32 bits": lambda: changed(pos=lambda a: a.astype(np.int32)),
    "keys alone in f16": lambda: other()._replace(k=F16(np.zeros((1, 1, 1, 1, 1), np.uint16))),
    "a list": lambda: other()._replace(k=[0.0]),
    "a subclass of an array": lambda: changed(k=lambda a: a.view(np.recarray)),
    "more sinks than slots": lambda: other()._replace(n_sink=20),
    "fewer sinks than none": lambda: other()._replace(n_sink=-1),
    "a window of none": lambda: other()._replace(window=0),
    "a window beyond the slots": lambda: other()._replace(window=1 << 40),
    "a window that is no integer": lambda: other()._replace(window=2.0),
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
    short = getattr(cache.v, kind)[:, :, :, :4].copy()
    with pytest.raises(UsageError, match=rf"its v\.{kind} is .* take one from this model's new_cache"):
        feed(narrow, cache._replace(v=cache.v._replace(**{kind: short})), [1, 2])
    with pytest.raises(UsageError, match=r"its k is float32 .*, the model keeps q8"):
        feed(narrow, other(), [1, 2])


IDS = [1, 7, 30, 5, 9, 12, 40, 3, 2, 21]


def test_a_position_that_sees_what_the_ring_has_replaced_is_refused(engine: Engine) -> None:
    cache = engine.new_cache(1, 4)
    last = feed(engine, cache, IDS[:6])
    for p in (1, 2, 3, 4):
        with pytest.raises(UsageError, match=rf"position {p} of sequence 0 cannot be fed again: it sees positions"):
            feed(engine, cache, [IDS[p]], p)
    np.testing.assert_allclose(feed(engine, cache, [IDS[5]], 5), last, atol=1e-5)


def test_a_position_that_is_fed_again_gives_the_same_where_all_it_sees_is_kept(engine: Engine) -> None:
    cache = engine.new_cache(2, 9, window=4, n_sink=2)
    alone = [feed(engine, cache, [token], p, 1) for p, token in enumerate(IDS)]
    for p in (9, 8, 7, 6):
        for again in range(p, len(IDS)):
            np.testing.assert_allclose(feed(engine, cache, [IDS[again]], again, 1), alone[again], atol=1e-5)
    with pytest.raises(UsageError, match=r"position 4 of sequence 1 .* replaced 2 to 2;"):
        feed(engine, cache, IDS[4:6], 4, 1)
    np.testing.assert_allclose(feed(engine, cache, IDS[:1], 0, 1), alone[0], atol=1e-5)


@pytest.mark.parametrize(("n_slots", "window", "n_sink"), [(4, 4, 0), (6, 3, 0), (7, 3, 2), (8, 8, 0), (12, 2, 1)])
def test_feeding_again_is_refused_or_right_never_silently_wrong(
    engine: Engine, n_slots: int, window: int, n_sink: int
) -> None:
    """Sequences of random jumps back, against a ring that loses nothing."""
    rng = np.random.default_rng(n_slots)
    cache, wide = (engine.new_cache(1, slots, window, n_sink) for slots in (n_slots, 500))
    p, refused = 0, 0
    for _ in range(80):
        n = int(rng.integers(1, 6))
        ids = rng.integers(0, C.vocab_size, n).tolist()
        try:
            found = feed(engine, cache, ids, p)
        except UsageError:
            refused += 1
            p = 0
            kv.clear(cache, 0)
            kv.clear(wide, 0)
            continue
        np.testing.assert_allclose(found, feed(engine, wide, ids, p), atol=1e-5)
        p = max(0, p + n - int(rng.integers(0, 16)) * int(rng.integers(0, 2)))
    assert refused
