"""Odd checkpoints, as people have them: read rightly in both executions, or refused in one line (see oddities.py)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import oddities
import pytest
from helpers import write_model_directory, write_tokenizer
from torch_files import SMALL

import npllama
from npllama.store.export import export

IDS = [1, 299, 0, 7, 123, 7]
BACKENDS = ["numpy"] if os.environ.get("NPLLAMA_BACKEND") == "numpy" else ["numpy", "numba"]


def made(maker: oddities.Maker, folder: Path) -> tuple[oddities.Weights | None, Path]:
    """What a row says about the checkpoint that it makes, and the path to open; a tokenizer lies one folder above."""
    folder.mkdir()
    write_tokenizer(folder.parent / "tokenizer.model", SMALL.vocab_size)
    said = maker(folder)
    if isinstance(said, tuple):
        return said
    assert said is None or isinstance(said, dict)
    return said, folder


def logits(folder: Path, backend: str) -> np.ndarray:
    with npllama.load(folder, backend=backend) as llm:
        return llm.logits(IDS)


@pytest.mark.parametrize("name", oddities.READ)
def test_an_odd_checkpoint_gives_the_logits_of_its_weights(name: str, tmp_path: Path) -> None:
    maker, says = oddities.READ[name]
    weights, path = made(maker, tmp_path / "checkpoint")
    assert weights is not None
    notes: list[str] = []
    export(path, tmp_path / "exported", note=notes.append)
    assert any(says in note for note in notes), notes
    sound = dataclasses.replace(SMALL, vocab_size=len(weights["tok_embeddings"]))
    write_model_directory(tmp_path / "sound", sound, weights=weights)
    for backend in BACKENDS:
        np.testing.assert_array_equal(logits(tmp_path / "exported", backend), logits(tmp_path / "sound", backend))


@pytest.mark.parametrize("name", oddities.REFUSED)
def test_an_odd_checkpoint_is_refused_in_one_line_that_names_what_is_wrong(name: str, tmp_path: Path) -> None:
    maker, reason = oddities.REFUSED[name]
    _, path = made(maker, tmp_path / "checkpoint")
    with pytest.raises(npllama.NpllamaError, match=reason) as caught:
        export(path, tmp_path / "exported")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()
