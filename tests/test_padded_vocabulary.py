"""Rows of the embedding beyond the tokenizer's pieces: never drawn unless asked, in either execution."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, random_weights, write_model_directory

import npllama
from npllama.inference import Llama

PIECES, ROWS = 2950, 3000
END = 2990  # an id beyond the pieces that ends a text
PADDED = dataclasses.replace(TINY, vocab_size=ROWS, eos_token_ids=(2,))
needs_numba = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose padding rows have larger logits than any piece."""
    weights = random_weights(PADDED, seed=5)
    weights["output"][PIECES:] *= 50
    path = tmp_path_factory.mktemp("padded") / "model"
    write_model_directory(path, PADDED, n_pieces=PIECES, weights=weights)
    return path


@pytest.fixture(scope="module", params=["numpy", pytest.param("numba", marks=needs_numba)])
def llm(request: pytest.FixtureRequest, folder: Path) -> Llama:
    with npllama.load(folder, backend=request.param) as opened:
        yield opened


WAYS = [
    {"temperature": 0},
    {"temperature": 0, "repeat_penalty": 1.3},
    {"temperature": 0.8, "top_k": 4},  # the compiled search
    {"temperature": 0.8, "top_k": 4, "repeat_penalty": 1.3},
    {"temperature": 0.8},
    {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 2.0, "top_k": 0, "top_p": 0.9, "repeat_penalty": 1.2},
]


@pytest.mark.parametrize("way", WAYS)
def test_ids_beyond_the_pieces_are_not_drawn_unless_asked(llm: Llama, way: dict[str, float]) -> None:
    prompt = [1, 70, 80, PIECES + 3]  # a padding id may be read
    for seed in range(3):
        tokens = llm.generate(prompt, max_tokens=20, seed=seed, **way).tokens
        assert max(tokens) < PIECES
    asked = llm.generate(prompt, max_tokens=20, seed=0, padding_ids=True, **way)
    assert max(asked.tokens) >= PIECES
    assert "".join(p.text for p in llm.stream(prompt, max_tokens=20, seed=0, padding_ids=True, **way)) == asked.text


def test_greedy_takes_the_largest_logit_of_the_pieces(llm: Llama) -> None:
    tokens = llm.generate([1, 70], max_tokens=8, temperature=0).tokens
    logits = llm.logits([1, 70, *tokens])[1:-1]
    assert logits[:, :PIECES].argmax(axis=-1).tolist() == tokens
    assert np.all(logits.argmax(axis=-1) >= PIECES)


def test_an_id_beyond_the_pieces_that_ends_a_text_ends_it(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "npllama.json").read_text())
    manifest["config"]["eos_token_ids"] = [2, END]
    (tmp_path / "npllama.json").write_text(json.dumps(manifest))
    with npllama.load(tmp_path) as llm:
        results = [llm.generate([1, 70], max_tokens=40, seed=seed) for seed in range(8)]
        assert all(max(r.tokens, default=0) < PIECES for r in results)
        assert "stop" in {r.finish_reason for r in results}


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_padding_ids_is_true_or_false(llm: Llama, value: object) -> None:
    with pytest.raises(npllama.UsageError, match=r"padding_ids='.*': needs True or False"):
        llm.generate("a", padding_ids=value)
