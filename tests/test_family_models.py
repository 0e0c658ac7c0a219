"""Small random models of the family, made with transformers: their logits, whatever scales positions or limits sight.

Each folder holds config.json, model.safetensors, 48 tokens and the float32 logits of transformers for all of them at
once. This runs in the execution that NPLLAMA_BACKEND names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from helpers import TINY, write_model_directory
from tiny_sentencepiece import NORMAL, USUAL, written

import npllama
from npllama.checkpoints import open_checkpoint
from npllama.generation.chunks import feed
from npllama.rope import frequencies
from npllama.store.export import export

TOLERANCE = 2e-4  # float32 differs by the order of summation
MODELS = [
    *("llama_default", "llama_tied_headdim16", "llama_linear", "llama_dynamic", "llama_yarn", "llama_llama3"),
    *("llama_longrope", "mistral_window8", "mistral_nowindow"),
]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer pieces than the 96 of the models, which come without a tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(written([*USUAL, *((chr(ord("!") + i), NORMAL) for i in range(90))], byte_fallback=False))
    return path


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, shared_data: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int], np.ndarray]:
    """A model directory, tokens and logits."""
    source, out = shared_data / "family" / "tiny" / request.param, tmp_path_factory.mktemp("family") / request.param
    export(source, out, tokenizer=tokenizer_file)
    return out, np.load(source / "tokens.npy").reshape(-1).tolist(), np.load(source / "logits.npy").reshape(-1, 96)


def test_the_logits_are_those_of_transformers(model: tuple[Path, list[int], np.ndarray]) -> None:
    path, tokens, needed = model
    with npllama.load(path, context=len(tokens)) as llm:
        np.testing.assert_allclose(llm.logits(tokens), needed, atol=TOLERANCE, rtol=0)


def test_token_after_token_gives_what_all_at_once_gives(model: tuple[Path, list[int], np.ndarray]) -> None:
    path, tokens, needed = model
    with npllama.load(path, context=len(tokens)) as llm:
        cache = llm.new_cache()
        found = [llm.engine.forward(cache, [token], [i], [0], [0]) for i, token in enumerate(tokens)]
        np.testing.assert_allclose(np.concatenate(found), needed, atol=TOLERANCE, rtol=0)


ROPE_KEYS: dict[str, dict[str, gguf_files.Typed]] = {
    "llama_default": {},
    "llama_tied_headdim16": {},
    "llama_linear": {"llama.rope.scaling.type": ("str", "linear")},
    "llama_yarn": {"llama.rope.scaling.type": ("str", "yarn")},
    "llama_llama3": {},
    "llama_longrope": {},
}


def as_gguf(source: Path, name: str) -> gguf_files.File:
    """A Hugging Face folder as llama.cpp's converter writes it: pairs adjacent, scaling in keys and in tensors."""
    with open_checkpoint(source) as opened:
        config, found = opened.config, opened.tensors
        tensors = {gguf_files.gguf_name(key): gguf_files.floats(t.rows(0, t.shape[0])) for key, t in found.items()}
    metadata = {key: typed for key, typed in gguf_files.metadata_of(config).items() if not key.startswith("tokenizer.")}
    metadata |= {
        "llama.attention.key_length": ("u32", config.head_dim),
        "llama.attention.value_length": ("u32", config.head_dim),
        **ROPE_KEYS[name],
    }
    scaling = config.rope_scaling
    if "llama.rope.scaling.type" in metadata:
        metadata["llama.rope.scaling.factor"] = ("f32", scaling.factor)
        metadata["llama.rope.scaling.original_context_length"] = ("u32", scaling.original_context or 1)
    if name == "llama_llama3":
        ratio = frequencies(None, config.head_dim, config.rope_theta, 1)[0]
        ratio = ratio / frequencies(scaling, config.head_dim, config.rope_theta, 1)[0]
        tensors["rope_freqs.weight"] = gguf_files.floats(ratio)
    if name == "llama_longrope":
        metadata["llama.rope.scaling.original_context_length"] = ("u32", scaling.original_context)
        metadata["llama.rope.scaling.attn_factor"] = ("f32", frequencies(scaling, config.head_dim, 1e4, 1)[1])
        for which in ("short", "long"):
            factors = np.array(getattr(scaling, f"{which}_factors"), np.float32)
            tensors[f"rope_factors_{which}.weight"] = gguf_files.floats(factors)
    return gguf_files.File(metadata, tensors)


@pytest.mark.parametrize("name", ROPE_KEYS)
def test_the_same_models_as_gguf_files_give_the_same_logits(
    name: str, shared_data: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    source = shared_data / "family" / "tiny" / name
    (tmp_path / "model.gguf").write_bytes(as_gguf(source, name).bytes())
    export(tmp_path / "model.gguf", tmp_path / "model", tokenizer=tokenizer_file)
    tokens, needed = np.load(source / "tokens.npy").reshape(-1).tolist(), np.load(source / "logits.npy")
    with npllama.load(tmp_path / "model", context=len(tokens)) as llm:
        np.testing.assert_allclose(llm.logits(tokens), needed.reshape(-1, 96), atol=TOLERANCE, rtol=0)


def test_memory_is_for_the_window_and_a_chunk_and_changes_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, sliding_window=9, max_seq_len=4096)
    write_model_directory(tmp_path / "model", config)
    ids = np.random.default_rng(5).integers(3, config.vocab_size, 1300).tolist()
    with npllama.load(tmp_path / "model", parallel=1) as llm:
        assert len(ids) > 2 * llm.chunk
        found = llm.logits(ids)
        pool = llm.runtime.scheduler.pool
        assert pool.capacity * 64 < 9 + 2 * llm.chunk + 5 * 64
        pool.check()
        whole = llm.engine.new_cache(1, len(ids), window=9)
        needed = list(feed(llm.engine, whole, ids, llm.chunk, every=True))
    np.testing.assert_allclose(found, np.concatenate(needed), atol=TOLERANCE, rtol=0)
