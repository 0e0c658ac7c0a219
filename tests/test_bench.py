"""npllama bench and warmup: what they measure, print and refuse."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from command_line import run, share_compiled
from helpers import write_model_directory
from slow import COMPILES_AGAIN

import npllama
from npllama.errors import ContextError
from npllama.execution.engine import Engine
from npllama.measure import bench
from npllama.store.opening import open_model

needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

RATES = ("avg_ts", "stddev_ts", "median_ts", "gb_per_s", "bandwidth_gb_per_s", "share_of_bandwidth", "gflops")
NUMBERS = (*RATES, "ttft_s", "import_s", "compile_s", "load_s", "peak_rss_mb")
COUNTS = ("n_prompt", "n_gen", "n_depth", "n_threads")
MEASUREMENT = {
    "type": "object",
    "additionalProperties": False,
    "required": [*NUMBERS, *COUNTS, "samples_ts", "backend", "dtype", "kv_dtype", "shape"],
    "properties": {
        **{name: {"type": "number", "minimum": 0} for name in NUMBERS},
        **{name: {"type": "integer", "minimum": 0} for name in COUNTS},
        "samples_ts": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}},
        "backend": {"enum": ["numpy", "numba"]},
        "dtype": {"type": "string"},
        "kv_dtype": {"enum": ["f32", "f16", "q8"]},
        "shape": {"type": "string"},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model"
    write_model_directory(path)
    return path


def test_json_has_one_object_for_each_test_with_llama_benchs_names(folder: Path) -> None:
    done = run(
        "bench", folder, "-p", "4,8", "-n", "2", "-d", "0,3", "-r", "2", "-t", "1", "--json", "--kv-dtype", "f16"
    )
    assert done.code == 0, done.err
    found = json.loads(done.text)
    jsonschema.validate(found, {"type": "array", "items": MEASUREMENT})
    assert [(one["n_prompt"], one["n_gen"], one["n_depth"]) for one in found] == [
        (4, 0, 0),
        (8, 0, 0),
        (4, 0, 3),
        (8, 0, 3),
        (0, 2, 0),
        (0, 2, 3),
    ]
    for one in found:
        assert len(one["samples_ts"]) == 2
        assert one["avg_ts"] == pytest.approx(np.mean(one["samples_ts"]))
        assert one["kv_dtype"] == "f16"
        assert (one["share_of_bandwidth"] > 0) == (one["n_gen"] > 0)


def test_the_table_names_every_test_and_the_bandwidth(folder: Path) -> None:
    done = run("bench", "-m", folder, "-p", "4", "-n", "2", "-d", "5", "-r", "1")
    assert done.code == 0, done.err
    for words in ("pp4 @ d5", "tg2 @ d5", "read bandwidth", "first token after", "peak memory"):
        assert words in done.text


def test_a_shape_is_written_measured_and_removed(tmp_path: Path) -> None:
    done = run(
        "bench", "--shape", "15m", "--dtype", "q8", "-p", "2", "-n", "0", "-r", "1", "--json", TMPDIR=str(tmp_path)
    )
    assert done.code == 0, done.err
    (one,) = json.loads(done.text)
    assert (one["shape"], one["dtype"]) == ("15m", "q8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-m", "model", "--shape", "15m"), 2, "a model and --shape were given"),
        (("--dtype", "q4"), 2, "--dtype goes with --shape"),
        (("-p", "0", "-n", "0"), 2, "nothing to measure"),
        (("-p", "64", "-d", "64", "-c", "100"), 1, "64 + 64 + 0 tokens does not fit"),
        (("-p", "many"), 2, "is not a whole number"),
        (("--kv-dtype", "q5"), 2, "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run("bench", *arguments, NPLLAMA_BACKEND="numpy")
    assert done.code == code, done.err
    assert message in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_a_test_longer_than_the_context_is_refused(folder: Path) -> None:
    with (
        npllama.load(folder, context=8) as llama,
        pytest.raises(ContextError, match=r"3 \+ 4 \+ 2 tokens does not fit"),
    ):
        list(bench.Bench(llama).seconds(4, 2, 3, 1))


def test_generation_goes_as_many_steps_in_a_call_as_generate_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = os.environ.get("NPLLAMA_BACKEND", "numba")
    with npllama.load(folder, context=40, backend=backend) as llama:
        forward, calls = llama.engine.forward, []

        def counted(*arguments: Any) -> np.ndarray:
            calls.append(arguments)
            return forward(*arguments)

        monkeypatch.setattr(llama.engine, "forward", counted)
        monkeypatch.setattr(bench, "steps_ahead", lambda step_s: 8 if step_s < math.inf else 0)
        cache = llama.new_cache()
        bench.Bench(llama).generate(cache, 0, 30)
        assert cache.length[0] == 30
        assert len(calls) == (30 if backend == "numpy" else 1)


def test_bytes_read_for_a_token_are_those_of_all_matrices_but_the_table(folder: Path) -> None:
    with open_model(folder) as opened:
        w = opened.weights
        every = sum(a.nbytes for a in w)
        assert bench.weight_bytes(w) == every - w.tok_embeddings.nbytes
        assert bench.Yardstick(Engine(opened, threads=1))() > 1e6


def test_the_bandwidth_beside_a_test_is_that_of_before_and_after() -> None:
    bandwidths = iter([10.0, 20.0, 40.0, 60.0])
    long, short = bench.BETWEEN_S, bench.BETWEEN_S / 4
    found = list(bench.beside([long, short, 3 * short, short], lambda: next(bandwidths)))
    assert found == [(long, 15.0), (short, 30.0), (3 * short, 30.0), (short, 50.0)]
    assert next(bandwidths, None) is None


def test_operations_are_two_for_each_weight_and_token(folder: Path) -> None:
    with open_model(folder) as opened:
        w, c = opened.weights, opened.config
        in_layers = sum(getattr(w, kind).size for kind in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
        llama = SimpleNamespace(config=c)
        assert bench.operations(llama, 1, 5) == 2 * (5 * in_layers + w.output.size)


@needs_numba
def test_a_profile_has_every_step_and_about_the_time_of_the_whole(folder: Path) -> None:
    with npllama.load(folder, backend="numba", threads=1) as llama:
        steps, whole = bench.profile(llama, 8, repetitions=3)
    products = {"linear", "linears"}
    assert {name for name, _ in steps} == {"embed", "rms_norm", *products, "rope", "rope_to_sinks", "attend", "swiglu"}
    assert all(seconds > 0 for _, seconds in steps)
    assert whole > 0


@needs_numba
@COMPILES_AGAIN
def test_what_was_warmed_up_starts_without_compiling(folder: Path, tmp_path: Path) -> None:
    first = run("warmup", folder, "--kv-dtype", "q8", NPLLAMA_CACHE_DIR=str(tmp_path))
    assert first.code == 0, first.err
    assert "compiling" in first.err
    share_compiled(tmp_path)
    arguments = ("generate", "-m", folder, "-p", "a", "-n", "1", "--kv-dtype", "q8", "--backend", "numba")
    second = run(*arguments, NPLLAMA_CACHE_DIR=str(tmp_path))
    assert second.code == 0
    assert "compiling" not in second.err


@needs_numba
def test_a_warmup_that_can_keep_nothing_fails(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("warmup", folder, NPLLAMA_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.code == 1
    assert "could not be kept" in done.err
