"""The random checkpoints that measurements use are what a Meta release, or a file of llama.cpp, would be."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT
from gguf_files import BLOCKY
from helpers import write_tokenizer

from npllama.checkpoints import open_checkpoint
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


def test_a_random_gguf_file_has_the_types_of_its_kind_and_exports(tmp_path: Path, tool: ModuleType):
    config = dataclasses.replace(BLOCKY, vocab_size=300, n_layers=8)
    write_tokenizer(tmp_path / "tokenizer.model", 300)
    tool.write_gguf(tmp_path / "model.gguf", config, "Q4_K_M", 0)
    with open_checkpoint(tmp_path) as opened:
        assert opened.config == config
        found = {name: tensor.stored_as for name, tensor in opened.tensors.items() if len(tensor.shape) == 2}
    assert found["output"] == "Q6_K"
    wide = [i for i in range(8) if found[f"layers.{i}.feed_forward.w2"] == "Q6_K"]
    assert wide == [0, 3, 6, 7] == [i for i in range(8) if found[f"layers.{i}.attention.wv"] == "Q6_K"]
    assert {kind for name, kind in found.items() if not name.endswith(("output", "wv", "w2"))} == {"Q4_K"}
    formats = {kind: tensor["format"] for kind, tensor in export(tmp_path, tmp_path / "m")["tensors"].items()}
    assert (formats["w1"], formats["w2"], formats["output"]) == ("q4_1", "q6", "q6")
