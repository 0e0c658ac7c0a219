"""Model directories of every format version: old ones open, new facts say the version that they need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, write_model_directory, write_safetensors_checkpoint, write_tokenizer

import npllama
from npllama.config import ModelConfig
from npllama.errors import ModelError, UsageError
from npllama.options import SamplingOptions
from npllama.store.export import export, quantize_model
from npllama.store.opening import open_model
from npllama.version import FIRST_READER, SINCE, VERSION

VERSION_1 = {
    "bos_token_id": 1,
    "dim": 8,
    "eos_token_ids": [2],
    "head_dim": 4,
    "hidden_dim": 12,
    "max_seq_len": 32,
    "n_heads": 2,
    "n_kv_heads": 1,
    "n_layers": 1,
    "norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 300,
}
SHAPES_1 = {
    "tok_embeddings": [300, 8],
    "attention_norm": [1, 8],
    "wq": [1, 8, 8],
    "wk": [1, 4, 8],
    "wv": [1, 4, 8],
    "wo": [1, 8, 8],
    "ffn_norm": [1, 8],
    "w1": [1, 12, 8],
    "w2": [1, 8, 12],
    "w3": [1, 12, 8],
    "norm": [8],
}


def write_version_1(folder: Path) -> None:
    """A directory as npllama 0.1.0 writes it, spelled out: nothing of the package has a say in it."""
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.model", 300)
    tensors = {}
    for kind, shape in SHAPES_1.items():
        number_format, dtype, part = ("f32", "<f4", "values") if "norm" in kind else ("f16", "<f2", "bits")
        np.save(folder / f"{kind}.npy", np.random.default_rng(len(kind)).normal(size=shape).astype(dtype))
        record = {"dtype": dtype, "file": f"{kind}.npy", "sha256": digest(folder / f"{kind}.npy"), "shape": shape}
        tensors[kind] = {"arrays": {part: record}, "format": number_format, "shape": shape}
    tokenizer = {"file": "tokenizer.model", "sha256": digest(folder / "tokenizer.model"), "size": 300}
    manifest = {"config": VERSION_1, "format": "npllama", "tensors": tensors, "tokenizer": tokenizer, "version": 1}
    (folder / "npllama.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def manifest_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "npllama.json").read_text())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_directory_of_version_1_opens_and_means_what_it_meant(tmp_path: Path) -> None:
    write_version_1(tmp_path / "old")
    with npllama.load(tmp_path / "old") as llm:
        assert (llm.config.add_bos_token, llm.config.add_eos_token) == (True, False)
        assert llm.generate("the cat", max_tokens=3, seed=1).usage.prompt_tokens == 1 + len(" the cat")
    with open_model(tmp_path / "old") as opened:
        assert opened.sampling is None
        assert opened.config.to_json() == VERSION_1


def test_the_demo_model_is_of_version_1() -> None:
    manifest = manifest_of(npllama.inference.DEMO)
    assert (manifest["version"], set(manifest["config"])) == (1, set(VERSION_1))


def test_an_export_without_new_facts_is_what_version_1_wrote(tmp_path: Path, checkpoint: Path) -> None:
    export(checkpoint, tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert set(manifest) == {"config", "format", "tensors", "tokenizer", "version"}
    assert (manifest["version"], set(manifest["config"])) == (1, set(VERSION_1))
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
    assert (tmp_path / "out" / "npllama.json").read_text() == text


def test_new_facts_survive_export_and_quantize_and_say_the_version_they_need(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    (checkpoint / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
    export(checkpoint, tmp_path / "out")
    quantize_model(tmp_path / "out", tmp_path / "small", "q8")
    for folder in (tmp_path / "out", tmp_path / "small"):
        assert (manifest_of(folder)["version"], manifest_of(folder)["needs_npllama"]) == (2, FIRST_READER[2])
        with open_model(folder) as opened:
            assert (opened.config.add_bos_token, opened.config.add_eos_token) == (False, True)
            assert opened.sampling == SamplingOptions(0.6, 50, 0.9, 0.0, 1.0)


@pytest.mark.parametrize(
    ("said", "key", "stored"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", {"kind": "linear", "factor": 2.0}),
        ({"model_type": "mistral", "sliding_window": 9}, "sliding_window", 9),
    ],
)
def test_scaled_positions_and_a_window_are_facts_of_version_2(
    tmp_path: Path, checkpoint: Path, said: dict[str, object], key: str, stored: object
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": [], **said}))
    export(checkpoint, tmp_path / "out")
    quantize_model(tmp_path / "out", tmp_path / "small", "q8")
    for folder in (tmp_path / "out", tmp_path / "small"):
        manifest = manifest_of(folder)
        assert (manifest["version"], set(manifest["config"])) == (2, {*VERSION_1, key})
        assert manifest["config"][key] == stored


def test_absent_keys_of_the_config_mean_their_default() -> None:
    config = dataclasses.replace(TINY, add_bos_token=False)
    assert ModelConfig.from_json(config.to_json()) == config
    assert "add_bos_token" not in TINY.to_json()
    assert ModelConfig.from_json(TINY.to_json()) == TINY
    with pytest.raises(UsageError, match="add_bos_token is 1, but true or false is needed"):
        ModelConfig.from_json({**TINY.to_json(), "add_bos_token": 1})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(version=VERSION + 1, needs_npllama="7.1"), "install npllama '7.1' or newer"),
        (lambda m: m.update(version=VERSION + 1), "install the npllama that wrote it"),
        (lambda m: m.update(version=0), f"has version '0', this npllama reads version 1 to {VERSION}"),
        (lambda m: m.update(zoo=1), f"'zoo' belongs to a later format than the versions 1 to {VERSION} that npllama"),
        (lambda m: m["config"].update(zoo=1), "config: key 'zoo' is not known in the config: 'zoo' belongs to a later"),
        (lambda m: m["config"].update(add_bos_token=False), "has 'add_bos_token', which needs version 2, but says"),
        (lambda m: m.update(sampling={}), "has 'sampling', which needs version 2, but says version 1"),
        (lambda m: m.update(version=2, sampling=None), "sampling is 'None', an object is needed"),
        (lambda m: m.update(version=2, sampling={"top_k": 1}), "sampling has no 'min_p', which is needed"),
        (
            lambda m: m.update(version=2, sampling={**SamplingOptions().to_json(), "top_p": 7}),
            "sampling: top_p='7': needs a number from 0 to 1",
        ),
        (
            lambda m: m.update(version=2, sampling={**SamplingOptions().to_json(), "zoo": 7}),
            "sampling has 'zoo', which this version does not know",
        ),
    ],
)
def test_what_a_version_does_not_have_is_refused_by_name(tmp_path: Path, edit, said: str) -> None:
    write_model_directory(tmp_path / "m")
    manifest = manifest_of(tmp_path / "m")
    edit(manifest)
    (tmp_path / "m" / "npllama.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "m")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_that_may_be_absent_is_one_that_came_later_or_is_a_control_id() -> None:
    optional = {f.name for f in dataclasses.fields(ModelConfig) if f.default is not dataclasses.MISSING}
    assert optional - set(SINCE) == {"bos_token_id", "eos_token_ids"}
    assert set(SINCE.values()) <= set(FIRST_READER)
    assert max(FIRST_READER) == VERSION
