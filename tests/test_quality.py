"""Perplexity, KL divergence and agreement against their formulas."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest

import npllama
from npllama.cli import main
from npllama.errors import UsageError
from npllama.quality import log_softmax, quality, windows

TEXT = "the cat sat on the mat and then it ran. " * 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quality")
    helpers.write_model_directory(folder / "f32", dtype="f32")
    helpers.write_model_directory(folder / "bf16", dtype="bf16")
    return folder / "f32", folder / "bf16"


def test_the_figures_are_those_of_the_formulas(models: tuple[Path, Path]) -> None:
    with npllama.load(models[1]) as narrow, npllama.load(models[0]) as wide:
        found = quality(narrow, TEXT, 20, wide)
        loss, kl, same = [], [], []
        for window in windows(narrow, TEXT, 20):
            p, r = (np.exp(model.logits(window).astype(np.float64)) for model in (narrow, wide))
            for t, target in enumerate(window[1:]):
                P, R = p[t] / p[t].sum(), r[t] / r[t].sum()
                loss.append(-np.log(P[target]))
                kl.append(sum(R * np.log(R / P)))
                same.append(P.argmax() == R.argmax())
        assert found.n_tokens == len(loss)
        assert found.perplexity == pytest.approx(np.exp(np.mean(loss)))
        assert found.kl_divergence == pytest.approx(np.mean(kl))
        assert found.top_1_agreement == pytest.approx(np.mean(same))
        assert 0 < found.kl_divergence < 0.01


def test_a_model_is_no_distance_from_itself(models: tuple[Path, Path]) -> None:
    with npllama.load(models[0]) as llama:
        found = quality(llama, TEXT, 20, llama)
        assert found.kl_divergence == 0
        assert found.top_1_agreement == 1
        assert found.reference_perplexity == found.perplexity


def test_every_id_of_the_text_is_predicted_once(models: tuple[Path, Path]) -> None:
    with npllama.load(models[0]) as llama:
        ids = llama.tokenizer.encode(TEXT, bos=False)
        cut = list(windows(llama, TEXT, 20))
        assert all(window[0] == llama.tokenizer.bos_id for window in cut)
        assert [i for window in cut for i in window[1:]] == ids[: 19 * (len(ids) // 19)]


@pytest.mark.parametrize(("text", "n_ctx", "message"), [("short", 60, "one window needs 59"), (TEXT, 1, "2 to 64")])
def test_windows_that_cannot_be_cut_are_refused(models: tuple[Path, Path], text: str, n_ctx: int, message: str) -> None:
    with npllama.load(models[0]) as llama, pytest.raises(UsageError, match=message):
        quality(llama, text, n_ctx)


def test_large_logits_do_not_overflow() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[1e4, 0.0]], np.float32)), [[0.0, -1e4]])


def test_the_command_prints_the_protocol_and_the_figures(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    command = ["perplexity", str(models[1]), "-f", str(tmp_path / "text"), "-c", "20", "--reference", str(models[0])]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "predictions in windows of 20 ids, BOS first" in shown
    assert "KL divergence" in shown
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_ctx"] == 20


def test_a_text_that_is_not_utf8_is_an_expected_failure(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"ab\xffc")
    assert main(["perplexity", str(models[0]), "-f", str(tmp_path / "text")]) == 1
    assert "is not text in UTF-8 (invalid start byte at byte 2); convert it" in capsys.readouterr().err
