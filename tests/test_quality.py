"""Perplexity, KL divergence and agreement against their formulas."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import helpers
import numpy as np
import pytest

import npllama
from npllama.commands.cli import main
from npllama.errors import UsageError
from npllama.measure import quality as module
from npllama.measure.quality import log_softmax, quality, windows

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
        assert {len(window) for window in cut[:-1]} == {20}
        assert [i for window in cut for i in window[1:]] == ids
        assert len(cut[-1]) == 1 + len(ids) % 19 < 20


@pytest.mark.parametrize("n_ids", [2, 3, 18, 19, 20, 37, 38, 39, 58])
def test_texts_of_any_length_have_the_perplexity_of_their_logits(models: tuple[Path, Path], n_ids: int) -> None:
    with npllama.load(models[1]) as narrow, npllama.load(models[0]) as wide:
        text = TEXT[: n_ids - 1]  # each character is a piece, and one stands before the first
        ids = narrow.tokenizer.encode(text, bos=False)
        assert len(ids) == n_ids
        loss, kl = [], []
        for start in range(0, n_ids, 19):
            window = ids[start : start + 19]
            p, r = (m.logits([m.tokenizer.bos_id, *window]).astype(np.float64) for m in (narrow, wide))
            for t, target in enumerate(window):
                P, R = np.exp(p[t]) / np.exp(p[t]).sum(), np.exp(r[t]) / np.exp(r[t]).sum()
                loss.append(-np.log(P[target]))
                kl.append(sum(R * np.log(R / P)))
        found = quality(narrow, text, 20, wide)
        assert found.n_tokens == n_ids
        assert found.perplexity == pytest.approx(np.exp(np.mean(loss)), rel=1e-12)
        assert found.kl_divergence == pytest.approx(np.mean(kl), rel=1e-6)
        error = np.exp(np.mean(loss)) * np.std(loss) / np.sqrt(n_ids)
        assert found.perplexity_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(("own", "other"), [(8, 512), (512, 8), (16, 8)])
def test_neither_the_blocks_of_rows_nor_the_chunks_of_a_prompt_change_the_figures(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, own: int, other: int
) -> None:
    with npllama.load(models[1]) as narrow, npllama.load(models[0]) as wide:
        whole = quality(narrow, TEXT, 60, wide)
        monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 300 * 3)
        assert quality(narrow, TEXT, 60, wide) == whole
        monkeypatch.setattr(narrow, "chunk", own)
        monkeypatch.setattr(wide, "chunk", other)
        cut = dataclasses.asdict(quality(narrow, TEXT, 60, wide))
        assert cut == pytest.approx(dataclasses.asdict(whole), rel=1e-5)


def test_memory_does_not_grow_with_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(helpers.TINY, vocab_size=20_000, max_seq_len=256)
    helpers.write_model_directory(tmp_path / "model", config)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 20)

    def peak(n_ctx: int) -> int:
        with npllama.load(tmp_path / "model", "numpy") as llama:
            monkeypatch.setattr(llama, "chunk", 16)
            tracemalloc.start()
            try:
                quality(llama, TEXT, n_ctx, llama)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    assert peak(256) < peak(17) + 1_000_000  # an array (256, V) of float64 has 41 MB


@pytest.mark.parametrize(("text", "n_ctx", "message"), [("", 20, "at least one id is needed"), (TEXT, 1, "2 to 64")])
def test_windows_that_cannot_be_cut_are_refused(models: tuple[Path, Path], text: str, n_ctx: int, message: str) -> None:
    with npllama.load(models[0]) as llama, pytest.raises(UsageError, match=message):
        quality(llama, text, n_ctx)


def test_a_reference_with_other_ids_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(models[0], tmp_path / "other")
    content = (tmp_path / "other" / "tokenizer.model").read_bytes()
    swapped = content.replace(b"\n\x01t", b"\n\x01?").replace(b"\n\x01e", b"\n\x01t").replace(b"\n\x01?", b"\n\x01e", 1)
    (tmp_path / "other" / "tokenizer.model").write_bytes(swapped)
    manifest = json.loads((tmp_path / "other" / "npllama.json").read_text())
    manifest["tokenizer"]["sha256"] = hashlib.sha256(swapped).hexdigest()
    (tmp_path / "other" / "npllama.json").write_text(json.dumps(manifest))
    with (
        npllama.load(models[0]) as llama,
        npllama.load(tmp_path / "other") as other,
        pytest.raises(UsageError, match="cut the text into different ids"),
    ):
        quality(llama, TEXT, 20, other)


def test_large_logits_do_not_overflow() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[1e4, 0.0]], np.float32)), [[0.0, -1e4]])
    np.testing.assert_allclose(log_softmax(np.array([[3e38, -3e38]], np.float32)), [[0.0, -6e38]], rtol=1e-6)


def scaled(folder: Path, kind: str, factor: float) -> Path:
    """The model with all weights of one kind multiplied; a NaN makes all of them NaN."""
    weights = np.load(folder / f"{kind}.npy")
    np.save(folder / f"{kind}.npy", weights * np.float32(factor))
    return folder


@pytest.mark.parametrize("json_too", [[], ["--json"]])
@pytest.mark.parametrize(
    ("kind", "factor", "message"),
    [
        ("norm", np.nan, "the logits are not all finite"),
        ("output", np.inf, "the logits are not all finite"),
        ("output", 1e6, "its exponential, the perplexity, is beyond the largest number"),
    ],
)
@pytest.mark.parametrize("damaged", ["model", "reference"])
def test_figures_that_are_not_finite_are_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, factor: float, message: str, json_too: list[str],
    damaged: str,
) -> None:  # fmt: skip
    for name in ("model", "reference"):
        helpers.write_model_directory(tmp_path / name)
    scaled(tmp_path / damaged, kind, factor)
    (tmp_path / "text").write_text(TEXT)
    command = ["perplexity", str(tmp_path / "model"), "-f", str(tmp_path / "text"), "-c", "20"]
    assert main([*command, "--reference", str(tmp_path / "reference"), *json_too]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_a_perplexity_of_large_logits_is_that_of_the_formula(tmp_path: Path) -> None:
    helpers.write_model_directory(tmp_path / "model")
    with npllama.load(scaled(tmp_path / "model", "output", 100.0)) as llama:
        found = quality(llama, TEXT, 20, llama)
        loss = []
        for window in windows(llama, TEXT, 20):
            for row, target in zip(llama.logits(window).astype(np.longdouble), window[1:], strict=False):
                loss.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[target])
        assert np.mean(loss) > 100
        assert found.perplexity == pytest.approx(float(np.exp(np.mean(loss))), rel=1e-9)
        assert found.kl_divergence == 0


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


@pytest.mark.parametrize("content", [b"the cat\r\nsat", b"the cat\nsat", b"the cat\rsat\r\n", b"the cat\nsat\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_are_kept_and_a_byte_order_mark_is_not(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, mark: bytes
) -> None:
    (tmp_path / "text").write_bytes(mark + content)
    assert main(["perplexity", str(models[0]), "-f", str(tmp_path / "text"), "-c", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with npllama.load(models[0]) as llama:
        expected = quality(llama, content.decode(), 20)
        assert found["n_tokens"] == len(llama.tokenizer.encode(content.decode(), bos=False)) == expected.n_tokens
        assert found["perplexity"] == expected.perplexity


def test_an_empty_file_is_one_line(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf")
    assert main(["perplexity", str(models[0]), "-f", str(tmp_path / "text"), "-c", "20"]) == 2
    assert capsys.readouterr().err == "npllama: the text is empty, at least one id is needed; give a text.\n"


def test_a_text_of_one_id_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("Tom")
    with npllama.load() as demo:
        assert len(demo.tokenizer.encode("Tom", bos=False)) == 1
    assert main(["perplexity", "-f", str(tmp_path / "text")]) == 0
    assert "1 prediction in" in (shown := capsys.readouterr().out)
    assert "+/-" not in shown
    assert main(["perplexity", "-f", str(tmp_path / "text"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity_error"] is None
