"""Each step of the model against its definition in float64, in the execution that the run is of."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
from helpers import as_mapped, quantize

from npllama import cache as kv
from npllama import ops, rope
from npllama.numbers import widen
from npllama.numbers.bf16 import BF16, bf16_bits
from npllama.numbers.f16 import F16, f16_bits

THETA = 10000.0
# float32 sums of up to a few hundred products of ordinary numbers: relative to the largest value of the result.
TOLERANCE = 3e-6


def steps() -> list[Any]:
    """The NumPy steps, and the kernels in the run of the compiled execution; in that of the plain ones these alone."""
    found = [] if os.environ.get("NPLLAMA_PLAIN_KERNELS", "0") != "0" else [pytest.param(ops, id="numpy")]
    if os.environ.get("NPLLAMA_BACKEND") != "numpy":
        pytest.importorskip("numba")
        from compiled_ops import OPS

        found.append(pytest.param(SimpleNamespace(**OPS), id="numba"))
    return found


both = pytest.mark.parametrize("step", steps())


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def plain(head_dim: int) -> tuple[np.ndarray, float]:
    """The last arguments of ops.rotation for positions that are not scaled."""
    return rope.frequencies(None, head_dim, THETA, 4096)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0.0) <= TOLERANCE * np.abs(expected).max(initial=1e-30)


SIZES = [(1, 1, 1), (1, 7, 3), (2, 16, 8), (3, 17, 5), (7, 33, 1), (13, 64, 21), (1, 172, 64), (20, 288, 37)]


@both
@pytest.mark.parametrize("narrow", [None, F16, BF16])
@pytest.mark.parametrize(("T", "K", "N"), SIZES)
def test_linear(step: Any, narrow: Callable[..., Any] | None, T: int, K: int, N: int) -> None:
    x, w = random(T, T, K), random(N, N, K)
    if narrow is not None:
        w = narrow((f16_bits if narrow is F16 else bf16_bits)(w))
    w = as_mapped(w)
    close(step.linear(x, w), naive.linear(x, widen(w)))


@both
def test_embedding_rows_are_the_tables(step: Any) -> None:
    table, tokens = as_mapped(random(0, 9, 19)), np.array([8, 0, 3, 3])
    np.testing.assert_array_equal(step.embed(table, tokens), table[tokens])
    for narrow in map(as_mapped, (F16(f16_bits(table)), BF16(bf16_bits(table)))):
        np.testing.assert_array_equal(step.embed(narrow, tokens), widen(narrow)[tokens])


FORMATS: dict[str, Callable[[np.ndarray], Any]] = {
    "f32": as_mapped,
    "f16": lambda w: as_mapped(F16(f16_bits(w))),
    "bf16": lambda w: as_mapped(BF16(bf16_bits(w))),
    "q8": lambda w: as_mapped(quantize(w, "q8")),
    "q6": lambda w: as_mapped(quantize(w, "q6")),
    "q4": lambda w: as_mapped(quantize(w, "q4")),
}


@both
@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("formats", [["f32"], *([f] * n for f in FORMATS for n in (2, 3)), ["q4", "f16", "q4"]])
def test_several_products_at_once_are_those_one_by_one(step: Any, formats: list[str], T: int) -> None:
    x = random(1, T, 72)
    ws = tuple(
        FORMATS[f](random(n, rows, 72)) for n, (f, rows) in enumerate(zip(formats, (1200, 40, 300), strict=False))
    )
    found = step.linears(x, ws)
    assert len(found) == len(ws)
    for y, w in zip(found, ws, strict=True):
        assert np.array_equal(y, step.linear(x, w))


@both
@pytest.mark.parametrize("number_format", ["q8", "q6", "q4"])
def test_embedding_rows_come_out_of_their_blocks(step: Any, number_format: str) -> None:
    table, tokens = as_mapped(quantize(random(0, 37, 52), number_format)), np.array([36, 0, 17, 17, 15, 16])
    np.testing.assert_array_equal(step.embed(table, tokens), widen(table)[tokens])


@both
@pytest.mark.parametrize(("T", "D"), [(1, 1), (1, 64), (3, 17), (40, 288)])
def test_rms_norm(step: Any, T: int, D: int) -> None:
    x, gain = random(1, T, D), random(2, D)
    close(step.rms_norm(x, gain, 1e-5), naive.rms_norm(x, gain, 1e-5))
    close(step.rms_norm(np.zeros_like(x), gain, 1e-5), np.zeros((T, D)))


@both
def test_scaling_a_row_changes_nothing_in_its_norm(step: Any) -> None:
    x, gain = random(1, 2, 48), random(2, 48)
    close(step.rms_norm(x * np.float32(1024), gain, 1e-12), step.rms_norm(x, gain, 1e-12))


@both
@pytest.mark.parametrize(("T", "H", "E"), [(1, 1, 2), (3, 2, 8), (5, 3, 18), (2, 4, 64)])
def test_rope(step: Any, T: int, H: int, E: int) -> None:
    x, pos = random(1, T, H, E), np.arange(T) * 991 + 3
    close(step.rope(x, *ops.rotation(pos, *plain(E))), naive.rope(x, pos, THETA))


@both
def test_rope_keeps_lengths_and_depends_on_distance_alone(step: Any) -> None:
    q, k = random(1, 1, 1, 16), random(2, 1, 1, 16)
    products = []
    for p in (0, 7, 1000):
        a = step.rope(q, *ops.rotation(np.array([p + 5]), *plain(16)))
        b = step.rope(k, *ops.rotation(np.array([p]), *plain(16)))
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(q), rel=1e-6)
        products.append(float((a * b).sum()))
    assert products == pytest.approx([products[0]] * 3, abs=1e-4)


def test_angles_of_late_positions_are_exact_to_float32() -> None:
    cos, _ = ops.rotation(np.array([1_000_000]), *plain(4))
    assert cos[0, 0] == np.float32(np.cos(np.float64(1_000_000)))


def test_the_scale_of_a_rotation_stretches_without_turning() -> None:
    pos = np.arange(50)
    for found, whole in zip(ops.rotation(pos, plain(8)[0], 1.25), ops.rotation(pos, *plain(8)), strict=True):
        close(found, 1.25 * whole)


@both
@pytest.mark.parametrize("shape", [(1, 1), (1, 172), (3, 17), (40, 96)])
def test_swiglu(step: Any, shape: tuple[int, int]) -> None:
    gate, up = random(1, *shape) * np.float32(3), random(2, *shape)
    close(step.swiglu(gate, up), naive.swiglu(gate, up))


@both
def test_swiglu_is_the_float32_nearest_to_its_equation(step: Any) -> None:
    gate = np.linspace(-100, 100, 20_011, dtype=np.float32).reshape(1, -1)
    up, exact = random(2, *gate.shape), gate.astype(np.longdouble)
    expected = (exact / (1 + np.exp(-exact)) * up).astype(np.float32)
    assert np.array_equal(step.swiglu(gate, up), expected)


@both
def test_rms_norm_divides_by_the_float32_nearest_to_the_root(step: Any) -> None:
    x, gain = random(3, 50, 1000) * np.float32(30), random(4, 1000)
    exact = np.sqrt(np.mean(np.square(x.astype(np.longdouble)), axis=-1, keepdims=True) + np.longdouble(1e-5))
    assert np.array_equal(step.rms_norm(x, gain, 1e-5), gain * (x * (1 / exact).astype(np.float32)))


@both
def test_swiglu_of_gates_far_out_is_the_limit(step: Any) -> None:
    gate = np.array([[-200.0, -100.0, -90.0, 90.0, 200.0]], np.float32)
    found = step.swiglu(gate, np.ones_like(gate))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, [[0, 0, 0, 90, 200]], atol=1e-30)


def attend(step: Any, cache: kv.KVCache, q: Any, k: Any, v: Any, pos: np.ndarray, seq: np.ndarray, l: int) -> Any:
    """Rotate and attend, as model.attention does."""
    E = q.shape[2]
    turn = ops.rotation(pos, *plain(E))
    sink = ops.rotation(np.minimum(pos, cache.n_sink[seq] + cache.window[seq] - 1), *plain(E))
    q_sink = step.rope_to_sinks(q, *sink, cache)
    return step.attend(step.rope(q, *turn), q_sink, step.rope(k, *turn), v, cache, l, pos, seq)


def in_chunks(step: Any, cache: kv.KVCache, q: Any, k: Any, v: Any, chunk: int, n: int = 0) -> np.ndarray:
    rows = []
    for start in range(0, len(q), chunk):
        part = slice(start, start + chunk)
        pos = np.arange(len(q))[part]
        rows.append(attend(step, cache, q[part], k[part], v[part], pos, np.full(len(pos), n), 1))
    return np.concatenate(rows)


HEADS = [(1, 1, 2), (4, 2, 8), (6, 1, 10), (3, 3, 48)]


@both
@pytest.mark.parametrize(("H", "G", "E"), HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 99])
def test_attention_is_the_masked_softmax(step: Any, H: int, G: int, E: int, chunk: int) -> None:
    T = 33
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    cache = kv.allocate(2, 1, G, T + 5, E)
    close(in_chunks(step, cache, q, k, v, chunk), naive.attention(q, k, v, range(T), T, 0, THETA))


@both
@pytest.mark.parametrize("n_sink", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_a_query_sees_the_last_window_and_the_sinks(step: Any, n_sink: int, chunk: int) -> None:
    T, H, G, E, window = 50, 4, 2, 8, 8
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    cache = kv.allocate(2, 1, G, T, E, window, n_sink)
    close(in_chunks(step, cache, q, k, v, chunk), naive.attention(q, k, v, range(T), window, n_sink, THETA))


def scattered(cache: kv.KVCache, seed: int) -> kv.KVCache:
    """The same cache with its blocks anywhere in the pool; those that nobody has are full of NaN."""
    rng = np.random.default_rng(seed)
    blocks = 3 * cache.table.size
    more = kv.allocate_pool(
        *(a.shape[0] for a in (kv.arrays(cache)[0],)),
        kv.n_kv_heads(cache),
        kv.arrays(cache)[0].shape[3],
        blocks,
        *cache.table.shape,
    )
    for array in kv.arrays(more):
        array[:] = np.nan
    more.table[:] = rng.permutation(blocks)[: cache.table.size].reshape(cache.table.shape)
    more.window[:], more.n_sink[:] = cache.window, cache.n_sink
    return more


@both
@pytest.mark.parametrize(("window", "n_sink"), [(0, 0), (200, 0), (130, 70), (90, 0), (90, 3), (64, 64), (20, 130)])
def test_many_rows_see_what_they_see_one_by_one(step: Any, window: int, n_sink: int) -> None:
    """Over several blocks of slots and of rows, some of which see only a part of a block, wherever they lie."""
    T, H, G, E = 200, 10, 2, 18
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    cache = kv.allocate(2, 1, G, T, E, window, n_sink)
    whole = in_chunks(step, cache, q, k, v, T)
    close(whole, naive.attention(q, k, v, range(T), window or T, n_sink, THETA))
    same = close if step is ops else np.testing.assert_array_equal  # NumPy adds runs of adjacent blocks at once
    same(in_chunks(step, kv.allocate(2, 1, G, T, E, window, n_sink), q, k, v, 67), whole)
    same(in_chunks(step, scattered(cache, 0), q, k, v, 1), whole)
    same(in_chunks(step, scattered(cache, 1), q, k, v, 67), whole)


@both
def test_blocks_out_of_the_window_are_not_looked_at(step: Any) -> None:
    """A text goes on for ever in few blocks: what no later query sees is taken by the next positions."""
    T, H, G, E, window, n_sink = 900, 4, 2, 8, 100, 5
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    cache = kv.allocate_pool(2, G, E, 5, 1, kv.n_blocks(T))
    cache.window[:], cache.n_sink[:] = window, n_sink
    free, rows = list(range(5)), []
    for start in range(0, T, 60):
        pos = np.arange(start, start + 60)
        for c in range(len(cache.table[0])):
            if c > 0 and cache.table[0, c] >= 0 and (c + 1) * 64 <= start - window + 1:
                free.append(int(cache.table[0, c]))
                cache.table[0, c] = kv.NO_BLOCK
        for c in {start // 64, pos[-1] // 64}:
            if cache.table[0, c] == kv.NO_BLOCK:
                cache.table[0, c] = free.pop(0)
        rows.append(attend(step, cache, q[pos], k[pos], v[pos], pos, np.zeros(60, np.int64), 1))
    close(np.concatenate(rows), naive.attention(q, k, v, range(T), window, n_sink, THETA))


@both
@pytest.mark.parametrize("kv_dtype", kv.KV_DTYPES)
def test_a_shared_block_is_copied_and_then_its_own(step: Any, kv_dtype: str) -> None:
    """Two sequences with the same first 70 positions: the second shares a block and has a copy of the other."""
    T, H, G, E = 100, 4, 2, 32
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    cache = kv.allocate_pool(2, G, E, 4, 2, 2, kv_dtype)
    cache.table[0] = 3, 1
    alone = in_chunks(step, cache, q, k, v, T)
    cache.table[1] = 3, 0
    kv.copy_block(cache, 1, 0)
    q[70:], k[70:], v[70:] = random(4, 30, H, E), random(5, 30, G, E), random(6, 30, G, E)
    pos, zero = np.arange(70, T), np.zeros(30, np.int64)
    forked = attend(step, cache, q[70:], k[70:], v[70:], pos, zero + 1, 1)
    whole = in_chunks(step, kv.allocate(2, 1, G, T, E, kv_dtype=kv_dtype), q, k, v, T)
    close(forked, whole[70:])
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    close(attend(step, cache, q[99:], k[99:], v[99:], pos[-1:], zero[:1], 1), alone[99:])


@both
def test_sequences_in_one_batch_do_not_see_each_other(step: Any) -> None:
    H, G, E = 4, 2, 8
    lengths, order = {0: 5, 1: 9, 2: 1}, (2, 0, 1)
    q, k, v = ({n: random(10 * i + n, lengths[n], h, E) for n in lengths} for i, h in enumerate((H, G, G)))
    cache = kv.allocate(1, 3, G, 12, E)
    pos = np.concatenate([np.arange(lengths[n]) for n in order])
    seq = np.concatenate([np.full(lengths[n], n) for n in order])
    together = attend(step, cache, *(np.concatenate([a[n] for n in order]) for a in (q, k, v)), pos, seq, 0)
    expected = [naive.attention(q[n], k[n], v[n], range(lengths[n]), 99, 0, THETA) for n in order]
    close(together, np.concatenate(expected))


STEP_OF_FORMAT = {"f16": 2**-11, "q8": 1 / 254}
"""Largest rounding error: of a number itself in f16, of the largest of its group in q8."""


@both
@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
@pytest.mark.parametrize(("H", "G", "E"), [*HEADS, (4, 1, 64), (2, 2, 100)])
@pytest.mark.parametrize("chunk", [1, 7, 99])
def test_a_query_sees_keys_and_values_as_a_narrow_cache_keeps_them(
    step: Any, kv_dtype: str, H: int, G: int, E: int, chunk: int
) -> None:
    T = 33
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    k[3] = 0
    cache = kv.allocate(2, 2, G, T + 5, E, kv_dtype=kv_dtype)
    found = in_chunks(step, cache, q, k, v, chunk, n=1)
    own = slice(64, 64 + T)  # the second sequence's block
    keys, values = (kv.read(part, 1, own).transpose(1, 0, 2) for part in (cache.k, cache.v))
    for stored, exact in ((keys, naive.rope(k, range(T), THETA)), (values, v)):
        size = np.abs(exact) if kv_dtype == "f16" else np.abs(exact).max(axis=-1, keepdims=True)
        assert (np.abs(stored - exact) <= 1.001 * STEP_OF_FORMAT[kv_dtype] * size + 1e-6).all()
        assert not np.allclose(stored, exact, atol=1e-5)
    close(found, naive.attention(q, k, values, range(T), T, 0, THETA, keys))


@both
@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_a_narrow_cache_gives_the_same_however_the_rows_are_cut(step: Any, kv_dtype: str) -> None:
    T, H, G, E = 50, 4, 2, 8
    q, k, v = random(1, T, H, E), random(2, T, G, E), random(3, T, G, E)
    one, *others = (
        in_chunks(step, kv.allocate(2, 1, G, T, E, 8, 2, kv_dtype), q, k, v, chunk) for chunk in (1, 4, 7, 50)
    )
    for other in others:
        close(other, one)


@pytest.mark.parametrize(("kv_dtype", "share"), [("f16", 1 / 2), ("q8", 36 / 128)])
def test_a_narrow_cache_takes_less_memory(kv_dtype: str, share: float) -> None:
    cache = kv.allocate(1, 1, 2, 10, 64, kv_dtype=kv_dtype)
    assert sum(part.nbytes for part in cache.k) == share * kv.allocate(1, 1, 2, 10, 64).k.nbytes
    assert kv.size_bytes(1, 2, 64, 64, kv_dtype) == 2 * sum(part.nbytes for part in cache.k)


@pytest.mark.parametrize("special", [65504.0, 65519.9, 1e5, 6e-8, 3e-8, 1e-5, 0.0, -0.0, np.inf, 1 + 2**-11, np.pi])
def test_a_float16_cache_rounds_as_numpy_does(special: float) -> None:
    for step in (case.values[0] for case in steps()):
        cache = kv.allocate(1, 1, 1, 4, 16, kv_dtype="f16")
        v, zero = np.full((1, 1, 16), special, np.float32), np.zeros((1, 1, 16), np.float32)
        step.attend(zero, zero, zero, v, cache, 0, np.zeros(1, np.int64), np.zeros(1, np.int64))
        np.testing.assert_array_equal(cache.v.bits[0, 0, 0], f16_bits(v[0, 0]))


def test_memory_of_attention_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(1, 20, 2, 4), random(2, 20, 1, 4), random(3, 20, 1, 4)
    whole = in_chunks(ops, kv.allocate(2, 1, 1, 20, 4), q, k, v, 20)
    sizes: list[int] = []
    inner = ops._attend_rows
    monkeypatch.setattr(ops, "_attend_rows", lambda q, *rest: sizes.append(len(q)) or inner(q, *rest))
    monkeypatch.setattr(ops, "MAX_SCORES", 120)
    close(in_chunks(ops, kv.allocate(2, 1, 1, 20, 4), q, k, v, 20), whole)
    assert sizes == [3] * 6 + [2]
