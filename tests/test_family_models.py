"""Small random models of the family, made with transformers: their logits, whatever scales positions or limits sight.

Each folder holds config.json, model.safetensors, 48 tokens and the float32 logits of transformers for all of them at
once. This runs in the execution that NPLLAMA_BACKEND names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, write_model_directory
from tiny_sentencepiece import NORMAL, USUAL, written

import npllama
from npllama import cache as kv
from npllama.export import export

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
        cache = llm.borrow_cache()
        found = [llm.engine.forward(cache, [token], [i], [0], [0]) for i, token in enumerate(tokens)]
        np.testing.assert_allclose(np.concatenate(found), needed, atol=TOLERANCE, rtol=0)


def test_memory_is_for_the_window_and_a_chunk_and_the_ring_changes_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, sliding_window=9, max_seq_len=4096)
    write_model_directory(tmp_path / "model", config)
    ids = np.random.default_rng(5).integers(3, config.vocab_size, 1300).tolist()
    with npllama.load(tmp_path / "model") as llm:
        assert len(ids) > 2 * llm.chunk
        assert llm.borrow_cache().pos.shape[2] == 9 + llm.chunk - 1
        found = llm.logits(ids)
        whole = llm.engine.new_cache(1, len(ids), window=9)
        needed = [llm.read(whole, ids, start, every=True) for start in range(0, len(ids), llm.chunk)]
    np.testing.assert_allclose(found, np.concatenate(needed), atol=TOLERANCE, rtol=0)


def test_a_chunk_is_stored_in_one_run_though_the_ring_laps() -> None:
    window, chunk = 9, 64
    cache = kv.allocate(1, 1, 1, window + chunk - 1, 4, window)
    for start in (0, 64, 128, 1000):
        pos = np.arange(start, start + chunk)
        assert kv.run_stop(cache, pos, np.zeros(chunk, np.int64), 0, 10**6) == chunk
