"""Export: the numbers that arrive, the tokenizer that is taken, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers import TINY, as_dtype, random_weights, stacked, write_safetensors_checkpoint, write_tokenizer

from npllama.errors import CheckpointError, NpllamaError, UsageError
from npllama.numbers import FORMATS, widen
from npllama.numbers.bf16 import BF16
from npllama.numbers.f16 import F16
from npllama.store import export as module
from npllama.store.export import export
from npllama.store.opening import check_hashes, open_model
from npllama.weights import Weights

PLAIN_FORMATS = ("f32", "f16", "bf16")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(kind: type[NpllamaError], *args: object, **options: object) -> str:
    """The one-line message with which an export is refused."""
    with pytest.raises(kind) as caught:
        export(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("target", PLAIN_FORMATS)
@pytest.mark.parametrize("source", [*PLAIN_FORMATS, "f64"])
def test_every_weight_arrives_rounded_once_to_the_format_asked_for(tmp_path: Path, source: str, target: str):
    weights = write_safetensors_checkpoint(tmp_path / "c", dtype=source)
    export(tmp_path / "c", tmp_path / "m", dtype=target)
    with open_model(tmp_path / "m") as model:
        for kind, found in zip(Weights._fields, model.weights, strict=True):
            w = as_dtype(stacked(weights, TINY.n_layers)[kind], source)
            w = widen(BF16(w)) if source == "bf16" else w.astype(np.float32)
            expected = as_dtype(w, "f32" if "norm" in kind else target)
            if expected.dtype != np.float32:
                assert isinstance(found, F16 if target == "f16" else BF16)
                np.testing.assert_array_equal(found.bits, expected.view(np.uint16))
            else:
                np.testing.assert_array_equal(found, expected)


def test_a_tied_output_is_stored_once(tmp_path: Path):
    write_safetensors_checkpoint(tmp_path / "c", tied=True)
    manifest = export(tmp_path / "c", tmp_path / "m")
    assert "output" not in manifest["tensors"]
    with open_model(tmp_path / "m") as model:
        assert model.weights.output is model.weights.tok_embeddings


@pytest.mark.parametrize(
    ("dtype", "dtypes", "expected"),
    [
        ("f32", {}, {}),
        ("f16", {}, {}),
        ("bf16", {}, {}),
        ("f64", {}, dict.fromkeys(("tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"), "f32")),
        ("f16", {"output": "f32"}, {"output": "f32"}),
        ("f16", {"output": "bf16", "layers.1.feed_forward.w2": "bf16"}, {"output": "bf16", "w2": "f32"}),
        ("bf16", {"norm": "f32", "layers.0.attention_norm": "f32"}, {}),
    ],
)
def test_without_a_dtype_matrices_keep_what_loses_nothing(
    tmp_path: Path, dtype: str, dtypes: dict[str, str], expected: dict[str, str]
):
    write_safetensors_checkpoint(tmp_path / "c", dtype=dtype, dtypes=dtypes)
    tensors = export(tmp_path / "c", tmp_path / "m")["tensors"]
    for kind, tensor in tensors.items():
        assert tensor["format"] == ("f32" if "norm" in kind else expected.get(kind, dtype)), kind


@pytest.mark.parametrize(
    ("value", "target", "found"),
    [
        (65520.0, "f16", "is 65520.0, which float16 cannot hold (its largest number is 65,504)"),
        (-1e30, "f16", "is -1e+30, which float16 cannot hold"),
        (3.4e38, "bf16", "is 3.4e+38, which bfloat16 cannot hold (its largest number is 3.4e38)"),
        (1e300, "f32", "is 1e+300, which float32 cannot hold"),
        (np.inf, "f32", "is inf, and a weight must be a finite number"),
        (-np.inf, "f16", "is -inf, and a weight must be a finite number"),
        (np.nan, "bf16", "is nan, and a weight must be a finite number"),
    ],
)
def test_a_number_that_the_format_cannot_hold_is_named(
    tmp_path: Path, value: float, target: str, found: str, monkeypatch: pytest.MonkeyPatch
):
    weights = {name: w.astype(np.float64) for name, w in random_weights(TINY, 0).items()}
    weights["layers.1.feed_forward.w2"][17, 43] = value
    write_safetensors_checkpoint(tmp_path / "c", weights=weights, dtype="f64")
    monkeypatch.setattr(module, "BLOCK_BYTES", 5 * 44 * 4)
    message = refusal(CheckpointError, tmp_path / "c", tmp_path / "m", dtype=target)
    assert f"layers.1.feed_forward.w2[17, 43] {found}" in message
    assert str(tmp_path / "c") in message
    assert sorted(os.listdir(tmp_path)) == ["c"]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_a_number_that_is_not_finite_is_found_without_conversion_too(tmp_path: Path, dtype: str):
    weights = random_weights(TINY, 0)
    weights["norm"][3] = np.inf
    write_safetensors_checkpoint(tmp_path / "c", weights=weights, dtype=dtype)
    assert "norm[3] is inf" in refusal(CheckpointError, tmp_path / "c", tmp_path / "m")


def test_the_largest_float16_is_accepted():
    block = np.array([[65504.0, -65519.0]], np.float32)
    bits = FORMATS["f16"].encode(block, "f32")["bits"]
    assert bits.view(np.float16).tolist() == [[65504.0, -65504.0]]


def test_the_same_checkpoint_gives_the_same_bytes_whatever_the_block(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    export(checkpoint, tmp_path / "a", dtype="bf16")
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    export(checkpoint, tmp_path / "b", dtype="bf16")
    os.rename(checkpoint, tmp_path / "elsewhere")
    export(tmp_path / "elsewhere", tmp_path / "c", dtype="bf16")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_the_manifest_tells_the_sha256_of_every_file(tmp_path: Path, checkpoint: Path):
    manifest = export(checkpoint, tmp_path / "m")
    assert manifest == json.loads((tmp_path / "m" / "npllama.json").read_text())
    written = {
        record["file"]: record["sha256"] for t in manifest["tensors"].values() for record in t["arrays"].values()
    }
    written["tokenizer.model"] = manifest["tokenizer"]["sha256"]
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files(tmp_path / "m").items()}
    del found["npllama.json"]
    assert written == found
    check_hashes(tmp_path / "m")


def test_numpy_reads_the_files(tmp_path: Path, checkpoint: Path):
    export(checkpoint, tmp_path / "m")
    weights = random_weights(TINY, 0)
    for kind, expected in stacked(weights, TINY.n_layers).items():
        np.testing.assert_array_equal(np.load(tmp_path / "m" / f"{kind}.npy"), expected)


@pytest.mark.parametrize("target", PLAIN_FORMATS)
def test_memory_stays_below_twice_the_largest_tensor(tmp_path: Path, target: str):
    write_safetensors_checkpoint(tmp_path / "c", replace(TINY, n_layers=1, dim=600, hidden_dim=10_000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        export(tmp_path / "c", tmp_path / "m", dtype=target)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 2 * 600 * 10_000 * 4


def test_progress_counts_every_byte_and_names_tensors(tmp_path: Path, checkpoint: Path):
    steps: list[tuple[int, int, str]] = []
    export(checkpoint, tmp_path / "m", progress=lambda *step: steps.append(step))
    with open_model(tmp_path / "m") as model:
        assert steps[-1][0] == model.size_bytes
    assert {total for _, total, _ in steps} == {steps[-1][0]}
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert {name for _, _, name in steps} == set(random_weights(TINY, 0))


def test_all_layouts_of_the_same_weights_become_the_same_model(tmp_path: Path, shared_data: Path):
    names = ["ckpt", "hf-bin", "hf-safetensors", "meta"]
    found = [export(shared_data / f"stories260K-{name}", tmp_path / name)["tensors"] for name in names]
    hashes = [{kind: t["arrays"]["values"]["sha256"] for kind, t in tensors.items()} for tensors in found]
    for name, one in zip(names, hashes, strict=True):
        assert one.items() <= hashes[-1].items(), name


def test_two_shards_of_float16_become_one_model_of_float16(tmp_path: Path, shared_data: Path):
    export(shared_data / "stories260K-meta-mp2-f16", tmp_path / "f16")
    export(shared_data / "stories260K-meta", tmp_path / "rounded", dtype="f16")
    kinds = [name for name in files(tmp_path / "f16") if name.endswith(".npy") and "norm" not in name]
    assert all(files(tmp_path / "f16")[name] == files(tmp_path / "rounded")[name] for name in kinds)


# ---------------------------------------------------------------- the tokenizer


def test_the_tokenizer_beside_the_weights_is_taken_and_named(tmp_path: Path, checkpoint: Path):
    write_tokenizer(tmp_path / "tokenizer.model", 290)
    notes: list[str] = []
    export(checkpoint, tmp_path / "m", note=notes.append)
    assert notes == [f"tokenizer: {checkpoint / 'tokenizer.model'}"]
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


def test_without_one_the_tokenizer_of_the_parent_is_taken(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    (checkpoint / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    notes: list[str] = []
    monkeypatch.chdir(checkpoint)
    export(".", tmp_path / "m", note=notes.append)
    assert notes == [f"tokenizer: {tmp_path / 'tokenizer.model'}"]


def test_the_tokenizer_asked_for_comes_first(tmp_path: Path, checkpoint: Path):
    write_tokenizer(tmp_path / "other.model", 299)
    manifest = export(checkpoint, tmp_path / "m", tokenizer=tmp_path / "other.model")
    assert manifest["tokenizer"]["size"] == 299


def test_a_checkpoint_without_a_tokenizer_is_refused_with_the_places_looked_at(tmp_path: Path, checkpoint: Path):
    (checkpoint / "tokenizer.model").unlink()
    message = refusal(CheckpointError, checkpoint, tmp_path / "m")
    assert f"(looked for tokenizer.model and tokenizer.json in {checkpoint} and {tmp_path})" in message
    assert "name it with --tokenizer FILE" in message


def test_a_tokenizer_that_was_asked_for_and_is_missing_is_named(tmp_path: Path, checkpoint: Path):
    assert f"(looked for {tmp_path / 'no'})" in refusal(
        CheckpointError, checkpoint, tmp_path / "m", tokenizer=tmp_path / "no"
    )


def test_a_tokenizer_that_was_asked_for_and_is_no_file_is_called_that(tmp_path: Path, checkpoint: Path):
    for asked, reason in {"/dev/null": "null: found no regular file", "a\0b": r"(looked for a\x00b)"}.items():
        assert reason in refusal(NpllamaError, checkpoint, tmp_path / "m", tokenizer=asked)


@pytest.mark.parametrize("pieces", [301, 1000])
def test_a_tokenizer_with_more_pieces_than_the_vocabulary_is_refused(tmp_path: Path, checkpoint: Path, pieces: int):
    write_tokenizer(checkpoint / "tokenizer.model", pieces)
    assert f"has {pieces:,} pieces, but the checkpoint's vocabulary has 300" in refusal(
        CheckpointError, checkpoint, tmp_path / "m"
    )


@pytest.mark.parametrize("rows", [301, 320, 365, 713])
def test_a_vocabulary_padded_by_any_number_of_rows_is_accepted_and_said(tmp_path: Path, rows: int):
    write_safetensors_checkpoint(tmp_path / "c", replace(TINY, vocab_size=rows))
    write_tokenizer(tmp_path / "c" / "tokenizer.model", 300)
    notes: list[str] = []
    assert export(tmp_path / "c", tmp_path / "m", note=notes.append)["tokenizer"]["size"] == 300
    assert notes[1:] == [f"vocabulary: the last {rows - 300} of {rows} rows have no piece in the tokenizer"]
    with open_model(tmp_path / "m") as model:
        assert model.config.vocab_size == rows


def test_a_folder_asked_for_stands_for_its_tokenizer(tmp_path: Path, checkpoint: Path):
    (checkpoint / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "m", tokenizer=tmp_path)
    message = refusal(CheckpointError, checkpoint, tmp_path / "n", tokenizer=tmp_path / "empty")
    assert f"(looked for tokenizer.model and tokenizer.json in {tmp_path / 'empty'})" in message


def test_a_tokenizer_by_another_name_is_pointed_at(tmp_path: Path, checkpoint: Path):
    (checkpoint / "tokenizer.model").rename(checkpoint / "spiece.model")
    assert "which may be 'spiece.model'" in refusal(CheckpointError, checkpoint, tmp_path / "m")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1b\0\0\0" + bytes(4) + b"\5\0\0\0<unk>", "a tokenizer.bin of llama2.c"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git-LFS pointer, not the file itself"),
        (b"\xef\xbb\xbf\n <Html>", "a web page"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
    ],
)
def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path, checkpoint: Path, data: bytes, what: str):
    (tmp_path / "other").write_bytes(data)
    message = refusal(NpllamaError, checkpoint, tmp_path / "m", tokenizer=tmp_path / "other")
    assert message.startswith(f"other: found {what}")
    assert "a SentencePiece tokenizer.model with <s> and </s> as control pieces is needed" in message


def test_a_file_that_is_no_tokenizer_is_refused_before_anything_is_written(tmp_path: Path, checkpoint: Path):
    (checkpoint / "tokenizer.model").write_bytes(b"not a model")
    refusal(NpllamaError, checkpoint, tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


# ---------------------------------------------------------------- arguments and the script


def test_an_unknown_dtype_is_wrong_usage(tmp_path: Path, checkpoint: Path):
    assert f"dtype 'int4' is not known; choose one of {', '.join(FORMATS)}." in refusal(
        UsageError, checkpoint, tmp_path / "m", dtype="int4"
    )


def test_a_folder_without_a_checkpoint_leaves_nothing(tmp_path: Path):
    (tmp_path / "c").mkdir()
    refusal(CheckpointError, tmp_path / "c", tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_the_script_of_a_clone_exports_without_numba_and_torch(tmp_path: Path, checkpoint: Path):
    script = (
        "import runpy, sys; sys.modules['numba'] = sys.modules['torch'] = None;"
        "sys.argv = ['export.py', *sys.argv[2:]] if sys.argv[1] == '-' else sys.argv;"
        f"runpy.run_path({str(ROOT / 'tools' / 'export.py')!r}, run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [sys.executable, "-c", script, "-", checkpoint, tmp_path / "m", "--dtype", "f16"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open_model(tmp_path / "m") as model:
        assert isinstance(model.weights.wq, F16)
