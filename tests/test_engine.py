"""The engine: which execution is chosen, what a batch may be, and what the cache of compiled code survives."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import threading
from pathlib import Path

import helpers
import numpy as np
import pytest
from slow import COMPILES_AGAIN

from npllama import model, ops
from npllama.errors import ModelError, UsageError
from npllama.execution import compiled, compiled_code
from npllama.execution import engine as engine_module
from npllama.execution.engine import Engine, choose_backend
from npllama.generation.sampling.basic import Allowed, Draw, draw_rows
from npllama.options import SamplingOptions
from npllama.store.opening import OpenModel, open_model
from npllama.system import machine

needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    folder = tmp_path_factory.mktemp("engine") / "model"
    helpers.write_model_directory(folder)
    return open_model(folder)


@pytest.fixture(scope="module")
def engine(opened: OpenModel) -> Engine:
    return Engine(opened)


def feed(engine: Engine, ids: list[int], chunk: int) -> np.ndarray:
    """Logits of every id, the prompt cut into chunks."""
    cache = engine.new_cache(1, len(ids))
    rows = []
    for start in range(0, len(ids), chunk):
        pos = range(start, min(start + chunk, len(ids)))
        rows.append(engine.forward(cache, ids[start : start + chunk], pos, [0] * len(pos), range(len(pos))))
    return np.concatenate(rows)


IDS = [1, 7, 30, 5, 5, 12, 40, 3, 2, 21, 8]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(engine: Engine, chunk: int) -> None:
    np.testing.assert_allclose(feed(engine, IDS, chunk), feed(engine, IDS, len(IDS)), atol=1e-5)


def test_sequences_side_by_side_give_the_logits_of_each_alone(engine: Engine) -> None:
    first, second = IDS[:6], IDS[4:]
    cache = engine.new_cache(3, 16)
    tokens, seq = first + second, [2] * len(first) + [0] * len(second)
    pos = [*range(len(first)), *range(len(second))]
    together = engine.forward(cache, tokens, pos, seq, range(len(tokens)))
    apart = np.concatenate([feed(engine, first, 99), feed(engine, second, 99)])
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_only_the_rows_asked_for_come_back(engine: Engine) -> None:
    cache = engine.new_cache(1, 16)
    every = engine.forward(cache, IDS, range(len(IDS)), [0] * len(IDS), range(len(IDS)))
    some = engine.forward(cache, IDS, range(len(IDS)), [0] * len(IDS), [9, 2])
    none = engine.forward(cache, IDS, range(len(IDS)), [0] * len(IDS), [])
    np.testing.assert_allclose(some, every[[9, 2]], atol=1e-5)
    assert none.shape == (0, helpers.TINY.vocab_size)


@pytest.mark.parametrize(
    ("tokens", "pos", "seq", "out", "message"),
    [
        ([], [], [], [], "at least one"),
        ([1, 2], [0], [0, 0], [0], "equally many"),
        ([-1], [0], [0], [0], "token ids must be 0 to"),
        ([10**6], [0], [0], [0], "token ids must be 0 to"),
        ([1], [-1], [0], [0], "positions must be 0 to"),
        ([1], [0], [1], [0], "seq must be 0 to 0"),
        ([1], [0], [0], [1], "out must be 0 to 0"),
        ([1, 2], [0, 2], [0, 0], [0], "ascending by one"),
    ],
)
def test_a_batch_that_would_address_foreign_memory_is_refused(
    engine: Engine, tokens: list[int], pos: list[int], seq: list[int], out: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        engine.forward(engine.new_cache(1, 8), tokens, pos, seq, out)


def test_rows_of_a_sequence_that_stand_apart_are_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="must stand together"):
        engine.forward(engine.new_cache(2, 8), [1, 2, 3], [0, 0, 1], [0, 1, 0], [0])


def test_a_cache_beyond_the_free_memory_is_refused_with_the_arithmetic(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000)
    with pytest.raises(ModelError, match=r"KV cache for 512 positions needs .* MB are free; ask for a smaller context"):
        engine.new_cache(1, 512)


def test_sinks_and_windows_below_none_are_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="-1 sinks and a window of 6"):
        engine.new_cache(1, 8, window=6, n_sink=-1)
    with pytest.raises(UsageError, match="3 sinks and a window of -6"):
        engine.new_cache(1, 8, window=-6, n_sink=3)


def test_a_closed_engine_says_so(opened: OpenModel) -> None:
    engine = Engine(opened)
    cache = engine.new_cache(1, 4)
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.forward(cache, [1], [0], [0], [0])


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_threads_that_are_no_number_of_threads_are_refused(opened: OpenModel, threads: object) -> None:
    with pytest.raises(UsageError, match="is not a number of threads"):
        Engine(opened, threads=threads)


def test_an_unknown_backend_is_refused(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="backend='torch' is not known"):
        choose_backend("torch", opened, print)
    monkeypatch.setenv("NPLLAMA_BACKEND", "fortran")
    with pytest.raises(UsageError, match="NPLLAMA_BACKEND='fortran' is not known"):
        choose_backend("auto", opened, print)


def test_auto_is_numpy_without_numba(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPLLAMA_BACKEND", raising=False)
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto", opened, print) == "numpy"
    with pytest.raises(UsageError, match="needs the package numba, which is not installed"):
        choose_backend("numba", opened, print)


def test_opening_a_small_model_writes_nothing(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NPLLAMA_BACKEND", raising=False)
    monkeypatch.setenv("NPLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    assert Engine(opened).backend == "numpy"
    assert not (tmp_path / "cache").exists()


def test_auto_is_numpy_for_a_small_model_that_nothing_is_compiled_for(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NPLLAMA_BACKEND", raising=False)
    monkeypatch.setenv("NPLLAMA_CACHE_DIR", str(tmp_path))
    pytest.importorskip("numba")
    said: list[str] = []
    assert choose_backend("auto", opened, said.append) == "numpy"
    assert "using NumPy" in said[0]
    (tmp_path / f"{compiled_code.forward_name(opened.weights)}-cpu").touch()
    assert choose_backend("auto", opened, print) == "numba"


def test_the_environment_decides_auto_and_an_explicit_backend_wins(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPLLAMA_BACKEND", "numpy")
    assert choose_backend("auto", opened, print) == "numpy"
    pytest.importorskip("numba")
    assert choose_backend("numba", opened, print) == "numba"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8", "q6", "q4"])
def test_every_step_gives_and_takes_float32(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 or float16 between two steps would double the work, or lose digits, without a sign."""
    helpers.write_any_model(tmp_path / "model", dtype)
    seen: set[str] = set()

    def watched(name: str):
        step = getattr(ops, name)

        def run(*arguments):
            result = step(*arguments)
            for array in (result, *(a for a in arguments[:2] if isinstance(a, np.ndarray) and a.dtype.kind == "f")):
                assert array.dtype == np.float32, name
            seen.add(name)
            return result

        return run

    steps = ("attend", "embed", "linear", "rms_norm", "rope", "swiglu")
    for name in steps:
        monkeypatch.setattr(model, name, watched(name))
    engine = Engine(open_model(tmp_path / "model"), "numpy")
    assert feed(engine, IDS, 4).dtype == np.float32
    assert seen == set(steps)


@needs_numba
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_forward_compiles_once_and_agrees_with_numpy(dtype: str, tmp_path: Path) -> None:
    helpers.write_model_directory(tmp_path / "model", dtype=dtype)
    opened = open_model(tmp_path / "model")
    compiled, plain = Engine(opened, "numba"), Engine(opened, "numpy")
    for chunk in (1, 3, 99):
        np.testing.assert_allclose(feed(compiled, IDS, chunk), feed(plain, IDS, chunk), atol=1e-4)
    cache = compiled.new_cache(2, 6, window=3, n_sink=2)
    compiled.forward(cache, np.array([1, 2], np.int32), [0, 0], (0, 1), [])
    assert len(compiled.compiled.function.signatures) == 1
    assert compiled.compiled.function.nopython_signatures[0].return_type.dtype.name == "float32"


@needs_numba
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("q8", "f32"),
        ("q4", "f32"),
        *(pytest.param(*case, marks=COMPILES_AGAIN) for case in (("q6", "f16"), ("q4", "q8"))),
    ],
)
def test_quantized_models_give_the_same_bits_in_both_executions(dtype: str, kv_dtype: str, tmp_path: Path) -> None:
    helpers.write_any_model(tmp_path / "model", dtype)
    opened = open_model(tmp_path / "model")
    compiled, plain = (Engine(opened, backend, kv_dtype=kv_dtype) for backend in ("numba", "numpy"))
    for chunk in (1, 3, 99):
        assert np.array_equal(feed(compiled, IDS, chunk), feed(plain, IDS, chunk))


@needs_numba
@COMPILES_AGAIN
@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_a_narrow_cache_gives_the_same_in_both_executions(kv_dtype: str, opened: OpenModel) -> None:
    compiled, plain = (Engine(opened, backend, kv_dtype=kv_dtype) for backend in ("numba", "numpy"))
    exact = feed(Engine(opened, "numpy"), IDS, 4)
    for chunk in (1, 3, 99):
        # A key that rounds the other way, because its last bit differs, is a step of the format off.
        np.testing.assert_allclose(feed(compiled, IDS, chunk), feed(plain, IDS, chunk), atol=2e-3)
    assert 1e-6 < np.abs(feed(compiled, IDS, 4) - exact).max() < 0.1


def test_an_unknown_format_of_the_cache_is_refused(opened: OpenModel) -> None:
    with pytest.raises(UsageError, match="kv_dtype='q5' is not known; it needs one of f32, f16, q8"):
        Engine(opened, kv_dtype="q5")


def test_a_narrow_cache_fits_where_a_wide_one_does_not(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 50_000)
    with pytest.raises(ModelError, match="bytes in f32"):
        Engine(opened).new_cache(1, 512)
    assert Engine(opened, kv_dtype="q8").new_cache(1, 512).table.shape == (1, 8)


@needs_numba
@pytest.mark.parametrize("dtype", ["q8", "q6", "q4"])
def test_quantized_logits_have_the_same_bits_however_the_prompt_is_cut(dtype: str, tmp_path: Path) -> None:
    helpers.write_any_model(tmp_path / "model", dtype)
    engine = Engine(open_model(tmp_path / "model"), "numba")
    ids = [*IDS, *range(30, 40), *IDS, *IDS]
    whole = feed(engine, ids, len(ids))
    for chunk in (1, 7, 16):
        np.testing.assert_array_equal(feed(engine, ids, chunk), whole)
    cache = engine.new_cache(2, 64)
    tokens, pos, seq = [5, 6, *ids], [0, 1, *range(len(ids))], [1, 1, *[0] * len(ids)]
    np.testing.assert_array_equal(engine.forward(cache, tokens, pos, seq, range(2, len(tokens))), whole)
    engine.threads = 1
    np.testing.assert_array_equal(feed(engine, ids, 7), whole)


RUN = """
import sys, numpy as np
from npllama.execution.engine import Engine
from npllama.store.opening import open_model
said = []
engine = Engine(open_model(sys.argv[1]), "numba", None, said.append)
logits = engine.forward(engine.new_cache(1, 4), [1, 7, 3], range(3), [0] * 3, range(3))
print(logits.tobytes().hex()[:64], *said, sep="\\n")
"""


def run(folder: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that computes a few logits with the compiled execution."""
    env = {**os.environ, "NPLLAMA_CACHE_DIR": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], env=env, capture_output=True, text=True, check=False
    )


@COMPILES_AGAIN
@needs_numba
def test_compiled_code_is_kept_and_damage_costs_one_compilation(opened: OpenModel, tmp_path: Path) -> None:
    cold = run(opened.path, tmp_path / "cache")
    assert "compiling kernels" in cold.stdout
    (file,) = (tmp_path / "cache").glob("forward-*")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    warm = run(opened.path, tmp_path / "cache")
    assert warm.stdout == cold.stdout.splitlines()[0] + "\n"

    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 0x10
    file.write_bytes(content)
    mended = run(opened.path, tmp_path / "cache")
    assert mended.returncode == 0
    assert "its checksum does not match" in mended.stdout
    assert mended.stdout.splitlines()[0] == warm.stdout.splitlines()[0]
    assert run(opened.path, tmp_path / "cache").stdout == warm.stdout

    other = "1" if os.environ.get("NPLLAMA_PLAIN_KERNELS", "0") == "0" else "0"
    assert "compiling kernels" in run(opened.path, tmp_path / "cache", NPLLAMA_PLAIN_KERNELS=other).stdout
    assert run(opened.path, tmp_path / "cache").stdout == warm.stdout, "plain kernels and others are kept side by side"


@COMPILES_AGAIN
@needs_numba
def test_a_cache_directory_that_others_can_write_to_is_not_used(opened: OpenModel, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    result = run(opened.path, tmp_path / "cache")
    assert result.returncode == 0
    assert "can be written by others" in result.stdout
    assert not list((tmp_path / "cache").iterdir())


@needs_numba
@pytest.mark.parametrize(
    ("n_bytes", "own", "rounds"), [(1e6, None, "20000"), (1e8, None, "4000"), (1e9, None, "1500"), (1e9, "7", "7")]
)
def test_how_long_idle_threads_spin_follows_from_the_models_size(n_bytes: float, own: str | None, rounds: str) -> None:
    """OpenMP says what it found; the environment is left as it was."""
    program = f"""
import os
from npllama.execution import threads
threads.start_numba(print)
with threads.numba_threads_later({int(n_bytes)}):
    pass
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"GOMP_SPINCOUNT": own} if own else {})
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(own)
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr


@needs_numba
def test_python_threads_at_once_get_the_same_numbers_as_alone(opened: OpenModel) -> None:
    engines = [Engine(opened, "numba"), Engine(opened, "numba")]
    alone = feed(engines[0], IDS, 4)
    found: list[np.ndarray] = []
    workers = [
        threading.Thread(target=lambda e=e: found.extend(feed(e, IDS, 4) for _ in range(20)))
        for e in (*engines, *engines)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80
    assert all(np.array_equal(one, alone) for one in found)


@needs_numba
def test_weights_are_read_ahead_where_they_fit(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefetched = []
    monkeypatch.setattr(opened, "prefetch", lambda: prefetched.append(machine.free_memory()))
    for free in (2 * opened.size_bytes, 4 * opened.size_bytes):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        Engine(opened, "numba").close()
    assert prefetched == [4 * opened.size_bytes]


def test_a_users_own_settings_of_malloc_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert not machine.keep_freed_memory()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    assert machine.keep_freed_memory() == glibc


@pytest.mark.parametrize("n_logits", [1, 63, 64, 1000, 32000])
@pytest.mark.parametrize("kind", ["spread", "ties", "ascending", "equal", "very low"])
def test_the_largest_logits_are_found_in_both_executions(engine: Engine, n_logits: int, kind: str) -> None:
    logits = np.random.default_rng(n_logits).standard_normal(n_logits).astype(np.float32)
    if kind == "ties":
        logits = logits.round()
    elif kind == "ascending":
        logits.sort()
    elif kind == "equal":
        logits[:] = -np.finfo(np.float32).max
    elif kind == "very low":
        logits[::2] = -np.finfo(np.float32).max
    for k in (1, 2, 40, 64, 65, 500):
        expected = np.argsort(-logits, kind="stable")[:k]
        assert np.array_equal(engine.top_k(logits, k), expected), k


@pytest.mark.parametrize("n_rows", [1, 3, 9])
def test_the_largest_logits_of_several_rows_are_those_of_each(engine: Engine, n_rows: int) -> None:
    logits = np.random.default_rng(n_rows).standard_normal((n_rows, 5000)).astype(np.float32).round(1)
    for rows in (logits, logits[:, :4321]):
        for k in (1, 40, 500):
            assert np.array_equal(engine.top_k(rows, k), np.argsort(-rows, axis=1, kind="stable")[:, :k])
    logits[-1, 4999] = np.nan
    with pytest.raises(ModelError, match="the logits are not all finite"):
        engine.top_k(logits, 40)


@pytest.mark.parametrize("n_rows", [1, 3, 9])
@pytest.mark.parametrize("rounded", [False, True])
def test_ids_are_drawn_as_numpy_draws_them(engine: Engine, n_rows: int, rounded: bool) -> None:
    rng = np.random.default_rng(n_rows)
    logits = (3 * rng.standard_normal((n_rows, 5000))).astype(np.float32)
    logits = logits.round() if rounded else logits  # many ties
    extremes = [SamplingOptions(temperature=t, min_p=0.0, top_p=1.0) for t in (1e-300, 1e-3, 1e300)]
    limits = [
        SamplingOptions(top_k=k, top_p=p, min_p=m) for k in (1, 2, 64) for p in (0.0, 0.6, 1.0) for m in (0.0, 1.0)
    ]
    for options in (SamplingOptions(), SamplingOptions(repeat_penalty=1.3), *extremes, *limits):
        for _ in range(20):
            numbers = [0.0, *rng.random(n_rows)][:n_rows] if options.top_p < 1 else rng.random(n_rows).tolist()
            draws = [Draw(Allowed(5000), [1, 2, 3], options, number) for number in numbers]
            assert draw_rows(logits, draws, engine.top_k, engine.draw) == draw_rows(logits, draws), options
    assert (engine.draw(logits, 40, (0.9, 0.0, 1.0), [0.5] * n_rows) is None) == (engine.backend == "numpy")
    draws = [Draw(Allowed(5000), (), SamplingOptions(), 1 - 2.0**-53) for _ in range(n_rows)]
    logits[-1, 4999] = np.nan
    expected = [*draw_rows(logits[:-1], draws[:-1]), None] if n_rows > 1 else [None]
    assert draw_rows(logits, draws, engine.top_k, engine.draw) == expected


@pytest.mark.parametrize("n_logits", [64, 1000, 32001])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_both_searches_see_every_logit_that_is_not_finite(engine: Engine, n_logits: int, value: float) -> None:
    logits = np.full(n_logits, np.finfo(np.float32).max)
    logits[::2] *= -1
    engine.top_k(logits, 1)  # sums of finite logits that overflow are no matter
    for place in {0, 17, n_logits // 2, n_logits - 1}:
        damaged = logits.copy()
        damaged[place] = value
        with pytest.raises(ModelError, match="the logits are not all finite"):
            engine.top_k(damaged, 1)


@needs_numba
def test_the_compiled_search_is_what_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.arange(5000, dtype=np.float32)
    monkeypatch.setattr(compiled.search, "top_k", None)
    assert engine.top_k(logits, 40).tolist() == list(range(4999, 4959, -1))


@pytest.mark.parametrize(("n_tokens", "buffer"), [(3, 2048), (40, engine_module.BUFFER_OF_MANY)])
def test_numpys_buffer_is_short_for_many_tokens_changes_no_bit_and_is_put_back(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch, n_tokens: int, buffer: int
) -> None:
    engine, ids, seen = Engine(opened, "numpy"), np.arange(n_tokens), []
    swiglu = model.swiglu

    def look(*arguments: np.ndarray) -> np.ndarray:
        seen.append(np.getbufsize())
        if len(seen) == 3:
            raise ZeroDivisionError
        return swiglu(*arguments)

    def forward() -> bytes:
        return engine.forward(engine.new_cache(1, 64), ids, ids, ids * 0, ids).tobytes()

    expected = forward()
    before = np.setbufsize(2048)
    try:
        assert forward() == expected
        monkeypatch.setattr(model, "swiglu", look)
        assert forward() == expected
        with pytest.raises(ZeroDivisionError):
            forward()
        assert np.getbufsize() == 2048
    finally:
        np.setbufsize(before)
    assert seen == [buffer] * 3
