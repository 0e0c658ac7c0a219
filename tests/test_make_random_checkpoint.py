"""The random checkpoints that measurements use are what a Meta release would be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT
from helpers import write_tokenizer

from npllama.checkpoints.configs.meta import from_meta
from npllama.numbers import widen
from npllama.store.export import export
from npllama.store.opening import open_model

PARAMS = {"dim": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 4, "norm_eps": 1e-5, "vocab_size": -1}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_random_checkpoint", ROOT / "tools" / "make_random_checkpoint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_random_checkpoint_of_two_shards_exports(tmp_path: Path, tool: ModuleType, dtype: str):
    config = from_meta(PARAMS, vocab_size=300)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    write_tokenizer(folder / "tokenizer.model", 300)
    for shard in range(2):
        name = f"consolidated.{shard:02d}.pth"
        tool.write_shard(folder / name, tool.shard_shapes(config, 2), dtype, [0, shard])
    assert export(folder, tmp_path / "m")["tensors"]["w2"]["format"] == dtype
    with open_model(tmp_path / "m") as model:
        assert model.config == config
        assert (model.weights.norm == 1).all()
        spread = widen(model.weights.w1).std() * np.sqrt(config.dim)
        assert spread == pytest.approx(1, abs=0.05)
