"""Odd checkpoints, as people have them: read rightly in both executions, or refused in one line (see oddities.py)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import oddities
import pytest
from helpers import write_model_directory, write_tokenizer
from torch_files import SMALL

import npllama
from npllama.export import export

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
    weights, path = made(oddities.READ[name], tmp_path / "checkpoint")
    export(path, tmp_path / "exported")
    write_model_directory(tmp_path / "sound", SMALL, weights=weights)
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


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (
            "an_index_of_an_older_model_with_its_shards",
            "model.safetensors is read; model.safetensors.index.json beside it is not",
        ),
        ("a_bin_index_of_an_older_model", "pytorch_model.bin is read; pytorch_model.bin.index.json beside it is not"),
        ("an_adapter_beside_a_whole_model", "the LoRA adapter beside it (adapter_model.safetensors) is not"),
        ("a_release_of_mistral_with_both_formats", "model.safetensors is read; consolidated.safetensors beside it"),
        ("biases_that_are_all_zero", "model.safetensors: 8 biases are all zero and were left out"),
        ("names_of_a_merged_adapter", "the names of its tensors begin with 'base_model.model.', which was left out"),
        ("a_vocabulary_padded_by_many_rows", "vocabulary: the last 40 of 300 rows have no piece in the tokenizer"),
    ],
)
def test_what_was_chosen_or_left_out_is_said(name: str, note: str, tmp_path: Path) -> None:
    _, path = made(oddities.READ[name], tmp_path / "checkpoint")
    notes: list[str] = []
    export(path, tmp_path / "exported", note=notes.append)
    assert any(note in said for said in notes), notes
