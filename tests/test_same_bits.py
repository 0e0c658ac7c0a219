"""Compiled logits are the same to the bit: for any number of threads, however a text is cut, beside whatever else."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, share_compiled
from helpers import TINY, write_any_model

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

# Large enough that every step goes to several threads, and no width is a multiple of a vector, group or block.
WIDE = dataclasses.replace(TINY, dim=180, n_heads=6, n_kv_heads=3, head_dim=30, hidden_dim=500, max_seq_len=512)

FORMATS = ("f32", "f16", "bf16", "q8", "q6", "q4")

PROGRAM = """
import hashlib, sys
import numpy as np
from npllama.execution.engine import Engine
from npllama.store.opening import open_model

engines = [Engine(open_model(path), "numba", threads=1) for path in sys.argv[1:]]
ids = np.random.default_rng(0).integers(0, engines[0].config.vocab_size, 150)
for engine in engines:
    for threads in (1, 2, 4):
        engine.threads = threads
        cache = engine.new_cache(1, 150)
        parts = [engine.forward(cache, ids[a:b], range(a, b), [0] * (b - a), range(b - a)) for a, b in
                 [(0, 1), (1, 6), (6, 140), *((t, t + 1) for t in range(140, 150))]]
        logits = np.concatenate(parts)
        assert np.isfinite(logits).all()
        whole = engine.forward(engine.new_cache(1, 150), ids, range(150), [0] * 150, range(150))
        assert np.array_equal(whole, logits)
        print(hashlib.sha256(logits.tobytes()).hexdigest())
"""


def digests(*opened: Path, cache: Path) -> list[list[str]]:
    """Digests of each model's logits with 1, 2 and 4 threads, in a process that opens all of them in this order."""
    env = environment(NUMBA_NUM_THREADS="4", NPLLAMA_CACHE_DIR=str(cache))
    command = [sys.executable, "-c", PROGRAM, *map(str, opened)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    return [found[i : i + 3] for i in range(0, len(found), 3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bits")
    for dtype in FORMATS:
        write_any_model(folder / dtype, dtype, WIDE)
    return {dtype: folder / dtype for dtype in FORMATS}


@pytest.fixture(scope="module")
def cold(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Digests of each model in a process that finds nothing compiled. What it compiles serves the whole run."""
    found = {}
    for dtype, model in models.items():
        own = tmp_path_factory.mktemp(f"compiled-{dtype}")
        (found[dtype],) = digests(model, cache=own)
        assert len(list(own.glob("forward-*"))) == 1
        share_compiled(own)
    return found


@pytest.mark.parametrize("dtype", FORMATS)
def test_threads_change_no_bit(cold: dict[str, list[str]], dtype: str) -> None:
    assert len(cold[dtype]) == 3
    assert len(set(cold[dtype])) == 1


@pytest.mark.parametrize("step", [1, -1])
def test_neither_the_cache_nor_models_opened_before_or_after_change_a_bit(
    models: dict[str, Path], cold: dict[str, list[str]], step: int
) -> None:
    shared = Path(os.environ["NPLLAMA_CACHE_DIR"])
    order = FORMATS[::step]
    assert digests(*(models[dtype] for dtype in order), cache=shared) == [cold[dtype] for dtype in order]
