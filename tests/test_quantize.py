"""Export and quantize to q8, q6 and q4: sizes, what is stored, what is refused."""

from __future__ import annotations

from pathlib import Path

import helpers
import numpy as np
import pytest

from npllama.commands.cli import main
from npllama.errors import CheckpointError, ModelError, UsageError
from npllama.numbers import widen
from npllama.numbers.q4 import Q4
from npllama.numbers.q6 import Q6
from npllama.numbers.q8 import Q8
from npllama.store.export import export, quantize_model
from npllama.store.opening import check_hashes, open_model
from npllama.weights import KINDS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    helpers.write_safetensors_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", ["q8", "q6", "q4"])
def test_export_stores_what_quantizing_the_weights_gives(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    weights = helpers.stacked(helpers.random_weights(helpers.TINY, 0), helpers.TINY.n_layers)
    export(checkpoint, tmp_path / "model", dtype)
    check_hashes(tmp_path / "model")
    with open_model(tmp_path / "model") as opened:
        for kind, stored in opened.weights._asdict().items():
            if KINDS[kind].is_norm:
                np.testing.assert_array_equal(stored, weights[kind])
                continue
            stored_as = "q6" if dtype == "q4" and kind == "output" else dtype
            assert isinstance(stored, {"q8": Q8, "q6": Q6, "q4": Q4}[stored_as]), kind
            again = helpers.quantize(weights[kind].astype(np.float32), stored_as)
            np.testing.assert_array_equal(widen(stored), widen(again))


def test_a_tied_embedding_is_stored_as_the_output_that_it_is(tmp_path: Path) -> None:
    helpers.write_safetensors_checkpoint(tmp_path / "checkpoint", tied=True)
    export(tmp_path / "checkpoint", tmp_path / "model", "q4")
    with open_model(tmp_path / "model") as opened:
        assert isinstance(opened.weights.tok_embeddings, Q6)
        assert opened.weights.output is opened.weights.tok_embeddings


@pytest.mark.parametrize("dtype", ["q8", "q6", "q4"])
def test_quantizing_a_model_gives_the_files_of_exporting_its_checkpoint(
    checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    export(checkpoint, tmp_path / "wide")
    export(checkpoint, tmp_path / "exported", dtype)
    quantize_model(tmp_path / "wide", tmp_path / "quantized", dtype)
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert sorted(path.name for path in (tmp_path / "quantized").iterdir()) == names
    for name in names:
        assert (tmp_path / "quantized" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_models_are_quantized_from_the_numbers_they_hold(tmp_path: Path, dtype: str) -> None:
    helpers.write_model_directory(tmp_path / "narrow", dtype=dtype, tied=True)
    quantize_model(tmp_path / "narrow", tmp_path / "q8", "q8")
    with open_model(tmp_path / "narrow") as narrow, open_model(tmp_path / "q8") as q8:
        expected = helpers.quantize(widen(narrow.weights.w1), "q8")
        np.testing.assert_array_equal(widen(q8.weights.w1), widen(expected))
        assert q8.weights.output is q8.weights.tok_embeddings


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "q8", "q8")
    with pytest.raises(ModelError, match="is q8 already, and rounding twice loses more"):
        quantize_model(tmp_path / "q8", tmp_path / "q4", "q4")
    assert not (tmp_path / "q4").exists()


def test_only_quantized_formats_are_accepted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'f16' is not a quantized format; choose one of q8, q6, q4"):
        quantize_model(tmp_path, tmp_path / "out", "f16")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "must be a finite number"), (1e9, "largest number is 1,000,000")]
)
def test_numbers_that_cannot_be_quantized_are_refused_by_name(tmp_path: Path, value: float, message: str) -> None:
    weights = helpers.random_weights(helpers.TINY, 0)
    weights["layers.1.feed_forward.w2"][20, 3] = value
    helpers.write_safetensors_checkpoint(tmp_path / "checkpoint", weights=weights)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.feed_forward\.w2.*20.*3.*{message}"):
        export(tmp_path / "checkpoint", tmp_path / "model", "q4")
    assert not (tmp_path / "model").exists()


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    helpers.write_model_directory(tmp_path / "wide")
    assert main(["quantize", str(tmp_path / "wide"), str(tmp_path / "q4")]) == 0
    assert "matrices in q4 and q6" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "wide"), str(tmp_path / "q4")]) == 1
    assert main(["quantize", str(tmp_path / "wide"), str(tmp_path / "q4"), "--force", "--dtype", "q8"]) == 0
