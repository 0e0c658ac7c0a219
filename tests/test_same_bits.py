"""Compiled logits are the same to the bit: for any number of threads, from a cache or not, beside whatever else."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment
from helpers import TINY, write_any_model

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

# Large enough that every step goes to several threads, and no width is a multiple of a vector, group or block.
WIDE = dataclasses.replace(TINY, dim=180, n_heads=6, n_kv_heads=3, head_dim=30, hidden_dim=500, max_seq_len=512)

OTHERS = {"f32": "q4", "f16": "f32", "bf16": "f32", "q8": "f32", "q6": "q4", "q4": "q8"}

PROGRAM = """
import hashlib, sys
import numpy as np
from npllama.engine import Engine
from npllama.weights import open_model

engines = {path: Engine(open_model(path), "numba", threads=1) for path in sys.argv[2:]}
engine = engines[sys.argv[1]]
ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, 150)
for threads in (1, 2, 4):
    engine.threads = threads
    cache = engine.new_cache(1, 150)
    parts = [engine.forward(cache, ids[a:b], range(a, b), [0] * (b - a), range(b - a)) for a, b in
             [(0, 1), (1, 6), (6, 140), *((t, t + 1) for t in range(140, 150))]]
    logits = np.concatenate(parts)
    assert np.isfinite(logits).all()
    print(hashlib.sha256(logits.tobytes()).hexdigest())
"""


def digests(model: Path, *opened: Path, cache: Path) -> list[str]:
    """Digests of a model's logits with 1, 2 and 4 threads, in a process that has opened these models in this order."""
    env = environment(NUMBA_NUM_THREADS="4", NPLLAMA_CACHE_DIR=str(cache))
    command = [sys.executable, "-c", PROGRAM, *map(str, (model, *opened))]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bits")
    for dtype in OTHERS:
        write_any_model(folder / dtype, dtype, WIDE)
    return {dtype: folder / dtype for dtype in OTHERS}


@pytest.mark.parametrize(("dtype", "other"), OTHERS.items())
def test_threads_cache_and_other_models_change_no_bit(
    models: dict[str, Path], dtype: str, other: str, tmp_path: Path
) -> None:
    model = models[dtype]
    cold = digests(model, model, cache=tmp_path)
    assert len(cold) == 3
    assert len(set(cold)) == 1, "1, 2 and 4 threads"
    assert len(list(tmp_path.glob("forward-*"))) == 1
    assert digests(model, models[other], model, cache=tmp_path) == cold, "from the cache, after another model"
    assert digests(model, model, models[other], cache=tmp_path) == cold, "before another model"
