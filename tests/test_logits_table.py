"""The committed table of SHA-256 of logits: they have the bits that they had before."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from slow import COMPILES_AGAIN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import hash_logits

pytest.importorskip("numba")
ENTRIES = hash_logits.entries()
COMPILED = [name for name, entry in ENTRIES.items() if entry.backend == "numba"]

only_compiled = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

FEW_CALLS = ("whole", "in chunks", "deep", "side by side")
"""Cases of large and of small calls that take little time."""

TABLE = json.loads(hash_logits.TABLE.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return {dtype: hash_logits.write_demo(folder, dtype) for dtype in hash_logits.WEIGHTS}


def test_weights_have_the_bytes_that_they_had(models: dict[str, Path]) -> None:
    assert {dtype: hash_logits.weights_hash(model) for dtype, model in models.items()} == TABLE["weights"]


def compiled() -> list[Any]:
    """The parts of the table; what differs from another one in the format of the cache alone is slow."""
    return [pytest.param(name, marks=COMPILES_AGAIN if ENTRIES[name].kv_dtype != "f32" else ()) for name in COMPILED]


@only_compiled
@pytest.mark.parametrize("name", compiled())
def test_compiled_logits_have_the_bits_that_they_had(models: dict[str, Path], name: str) -> None:
    if name not in TABLE:
        pytest.skip(f"the table has no {name!r}: python tools/hash_logits.py --write on this CPU adds it")
    entry = ENTRIES[name]
    found = hash_logits.hashes_of(models[entry.dtype], entry, 1)
    assert found == TABLE[name]
    few = [case for case in FEW_CALLS if case in found]
    for case, digest in hash_logits.hashes_of(models[entry.dtype], entry, 2, cases=few).items():
        assert digest == found[case], "the same on two threads"
    assert len({found[case] for case in ("whole", "in chunks", "one by one") if case in found}) == 1


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.cases == hash_logits.A_FEW])
def test_logits_in_numpy_have_the_bits_that_they_had(models: dict[str, Path], name: str) -> None:
    found = hash_logits.hashes_of(models[ENTRIES[name].dtype], ENTRIES[name], 1, "numpy")
    assert found == TABLE[name]
    assert found["whole"] == found["in chunks"]
