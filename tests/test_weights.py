"""Opening a model directory: what is accepted, what is refused and with which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, as_dtype, stacked, write_model_directory

from npllama.errors import ModelError, NpllamaError, UsageError
from npllama.numbers import ArraySpec
from npllama.numbers.bf16 import BF16
from npllama.numbers.f16 import F16
from npllama.store.npy import npy_header
from npllama.store.opening import (
    check_hashes,
    open_model,
    vocabulary_fits,
)
from npllama.weights import Weights, kind_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_directory(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, *keys: str, value: object) -> None:
    """Set one value of the manifest."""
    manifest = json.loads((folder / "npllama.json").read_text())
    at = manifest
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    (folder / "npllama.json").write_text(json.dumps(manifest))


def refusal(folder: Path) -> str:
    """The message with which a directory is refused: one line that says what to do."""
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message


# ---------------------------------------------------------------- what is opened


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_array_is_what_was_written(tmp_path: Path, dtype: str):
    weights = stacked(write_model_directory(tmp_path / "m", dtype=dtype), TINY.n_layers)
    with open_model(tmp_path / "m") as model:
        for kind, found in zip(Weights._fields, model.weights, strict=True):
            bits = found if isinstance(found, np.ndarray) else found.bits
            expected = as_dtype(weights[kind], "f32" if "norm" in kind else dtype)
            np.testing.assert_array_equal(bits, expected.view(np.uint16) if bits.dtype == np.uint16 else expected)


def test_the_type_of_a_matrix_says_its_number_format(tmp_path: Path):
    write_model_directory(tmp_path / "f16", dtype="f16")
    write_model_directory(tmp_path / "bf16", dtype="bf16")
    with open_model(tmp_path / "f16") as a, open_model(tmp_path / "bf16") as b:
        assert isinstance(a.weights.wq, F16)
        assert isinstance(b.weights.wq, BF16)
        assert isinstance(a.weights.norm, np.ndarray)


def test_arrays_are_read_only_aligned_plain_arrays(folder: Path):
    with open_model(folder) as model:
        for w in model.weights:
            assert type(w) is np.ndarray
            assert not w.flags.writeable
            assert w.flags.c_contiguous
            assert w.ctypes.data % 64 == 0


def test_a_tied_output_is_the_embedding_table_itself(tmp_path: Path):
    write_model_directory(tmp_path / "m", tied=True)
    with open_model(tmp_path / "m") as model:
        assert model.weights.output is model.weights.tok_embeddings
        assert not (tmp_path / "m" / "output.npy").exists()


def test_the_size_counts_the_numbers_of_all_arrays(folder: Path):
    with open_model(folder) as model:
        assert model.size_bytes == sum(w.nbytes for w in model.weights)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_an_open_model_holds_one_file_for_each_array(folder: Path):
    before = len(os.listdir("/proc/self/fd"))
    with open_model(folder):
        assert len(os.listdir("/proc/self/fd")) - before == len(Weights._fields)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are listed in /proc")
def test_closing_frees_the_maps(folder: Path):
    model = open_model(folder)
    assert str(folder) in Path("/proc/self/maps").read_text()
    model.close()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_an_array_outlives_the_model_it_came_from(folder: Path):
    with open_model(folder) as model:
        wq = model.weights.wq
        expected = np.array(wq)
    np.testing.assert_array_equal(wq, expected)


def test_a_closed_model_refuses_to_give_weights(folder: Path):
    model = open_model(folder)
    model.close()
    model.close()
    with pytest.raises(UsageError, match=r"is closed; open it again"):
        _ = model.weights


def test_opening_reads_no_weights(folder: Path):
    """A model of 9 GB in files without contents opens in the memory of one process."""
    big = TINY.to_json() | {"dim": 4096, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128, "hidden_dim": 11008}
    manifest = json.loads((folder / "npllama.json").read_text())
    manifest["config"] = big | {"n_layers": 10}
    shapes = kind_shapes(type(TINY).from_json(manifest["config"]))
    for kind, tensor in manifest["tensors"].items():
        record = tensor["arrays"]["values"]
        tensor["shape"] = record["shape"] = list(shapes[kind])
        spec = ArraySpec("<f4", shapes[kind])
        with open(folder / record["file"], "wb") as file:
            file.write(npy_header(spec))
            file.truncate(len(npy_header(spec)) + spec.size_bytes)
    (folder / "npllama.json").write_text(json.dumps(manifest))
    script = (
        "import resource, sys; from npllama.store.opening import open_model;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024);"
        "before = peak(); model = open_model(sys.argv[1]);"  # before: a new process inherits its parent's peak
        "print(model.size_bytes, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    size, growth = map(int, done.stdout.split())
    assert size > 8e9
    assert growth < 200e6


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1000000, 64), (512, 9, 7)])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<u2", "|i1", "|u1"])
def test_numpy_reads_the_header_we_write(tmp_path: Path, shape: tuple[int, ...], dtype: str):
    header = npy_header(ArraySpec(dtype, shape))
    assert len(header) % 64 == 0
    (tmp_path / "a.npy").write_bytes(header)
    with open(tmp_path / "a.npy", "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(dtype))


# ---------------------------------------------------------------- what is no model directory


def test_a_path_that_does_not_exist_is_named(tmp_path: Path):
    assert "No such file or directory" in refusal(tmp_path / "nowhere")


def test_a_path_that_cannot_be_one_is_refused():
    with pytest.raises(ModelError, match="cannot be opened"):
        open_model("a\0b")


def test_a_file_is_no_model_directory(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    assert "is a file, and a model is a directory" in refusal(tmp_path / "model.bin")


@pytest.mark.parametrize("sign", ["params.json", "consolidated.00.pth", "ckpt.pt", "model.safetensors", "config.json"])
def test_a_checkpoint_is_recognised_and_the_export_command_given(tmp_path: Path, sign: str):
    (tmp_path / sign).write_bytes(b"")
    message = refusal(tmp_path)
    assert "is a checkpoint, not a model directory (it holds no npllama.json)" in message
    assert f"convert it once with 'npllama export {tmp_path} OUT'" in message


def test_a_directory_without_a_manifest_is_an_unfinished_export(folder: Path):
    (folder / "npllama.json").unlink()
    assert "holds no npllama.json, so it is no model directory, or an export that did not finish" in refusal(folder)


# ---------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "not JSON"),
        (b"[]", "an object"),
        (b'{"format": "npllama", "format": "npllama"}', "stands twice"),
        (b'{"format": NaN}', "NaN"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"format": "gguf"}', "has format 'gguf', a model directory says 'npllama'"),
        (b'{"format": "npllama"}', "has version 'None', this npllama reads version 1"),
        (b'{"format": "npllama", "version": 99}', "has version '99', this npllama reads version 1 to 4"),
        (b'{"format": "npllama", "version": true}', "has version 'True', this npllama reads version 1"),
        (b" " * (1 << 20) + b"{}", "bytes, at most 1,048,576 are accepted"),
        (b'{"format": "npllama", "version": 1}', "the manifest has no 'config', which is needed"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(folder: Path, text: bytes, found: str):
    (folder / "npllama.json").write_bytes(text)
    assert found in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "value", "found"),
    [
        (["extra"], 1, "the manifest has 'extra', which this version does not know"),
        (["config"], [], "config is '[]', an object is needed"),
        (["config", "n_heads"], 0, "config: n_heads is 0"),
        (["config", "dim"], 26, "shape of tensor tok_embeddings is '[300, 24]', needed is '[300, 26]'"),
        (["tensors"], None, "tensors is 'None', an object is needed"),
        (["tensors", "wz"], {}, "tensors has 'wz', which this version does not know"),
        (["tensors", "wq"], "?", "tensor wq is '?', an object is needed"),
        (["tensors", "wq", "format"], "q9", "tensor wq has number format 'q9', needed is one of f32 f16 bf16"),
        (["tensors", "wq", "format"], ["f32"], "tensor wq has number format"),
        (["tensors", "norm", "format"], "f16", "tensor norm has number format 'f16', needed is one of f32;"),
        (["tensors", "norm", "shape"], [24.0], "shape of tensor norm is '[24.0]', needed is '[24]'"),
        (["tensors", "norm", "arrays"], {}, "tensor norm, arrays has no 'values', which is needed"),
        (["tensors", "norm", "arrays", "values", "dtype"], "<f8", "array values: dtype is '<f8', needed is '<f4'"),
        (["tensors", "norm", "arrays", "values", "file"], "../norm.npy", "file is '../norm.npy', needed is 'norm.npy'"),
        (["tensors", "norm", "arrays", "values", "shape"], [25], "array values: shape is '[25]', needed is '[24]'"),
        (["tensors", "norm", "arrays", "values", "sha256"], "0" * 63, "sha256 of tensor norm, array values is '000"),
        (["tokenizer"], {}, "tokenizer has no 'file', which is needed"),
        (["tokenizer", "file"], "/etc/passwd", "tokenizer: file is '/etc/passwd', needed is 'tokenizer.model'"),
        (["tokenizer", "sha256"], None, "sha256 of the tokenizer is 'None', needed are 64 hexadecimal digits"),
        (["tokenizer", "size"], 301, "tokenizer: size is '301', but vocab_size of the config is 300"),
        (["tokenizer", "size"], True, "tokenizer: size is 'True', but"),
        (["tokenizer", "sha256"], "0" * 64, "is not the tokenizer that was exported (sha256 differs"),
    ],
)
def test_a_wrong_value_in_the_manifest_is_named(folder: Path, keys: list[str], value: object, found: str):
    edit(folder, *keys, value=value)
    assert found in refusal(folder)


def test_a_tensor_that_is_missing_from_the_manifest_is_named(folder: Path):
    manifest = json.loads((folder / "npllama.json").read_text())
    del manifest["tensors"]["w2"]
    (folder / "npllama.json").write_text(json.dumps(manifest))
    assert "tensors has no 'w2', which is needed" in refusal(folder)


@pytest.mark.parametrize("rows", [-1, 0, 1, 64, 413, 100_000])
def test_a_vocabulary_may_be_padded_by_any_number_of_rows(rows: int):
    assert vocabulary_fits(32000, 32000 + rows) == (rows >= 0)
    assert not vocabulary_fits(0, 32000)


def test_a_damaged_tokenizer_is_refused_although_it_might_load(folder: Path):
    data = bytearray((folder / "tokenizer.model").read_bytes())
    data[2000] ^= 1
    (folder / "tokenizer.model").write_bytes(data)
    assert "is not the tokenizer that was exported" in refusal(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["npllama.json", "tokenizer.model", "wq.npy"])
@pytest.mark.parametrize(("data", "what"), [(POINTER, "is a Git-LFS pointer"), (b" <HTML>", "is a web page")])
def test_a_pointer_or_a_page_instead_of_a_file_is_named(folder: Path, name: str, data: bytes, what: str):
    (folder / name).write_bytes(data)
    message = refusal(folder)
    assert f"{folder / name}: " in message
    assert what in message


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["wq.npy", "norm.npy", "tokenizer.model"])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    assert f"{name}: is missing, and a model directory needs it; export the checkpoint again." in refusal(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["npllama.json", "tokenizer.model", "wq.npy"])
def test_a_pipe_is_refused_instead_of_waited_for(folder: Path, name: str):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: is not a regular file" in refusal(folder)


def test_a_directory_in_the_place_of_a_file_is_refused(folder: Path):
    (folder / "wq.npy").unlink()
    (folder / "wq.npy").mkdir()
    assert "wq.npy: is not a regular file" in refusal(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_without_permission_is_named(folder: Path):
    (folder / "wq.npy").chmod(0)
    assert "wq.npy: cannot be read (Permission denied)" in refusal(folder)


def test_a_directory_that_may_not_be_looked_into_is_not_called_empty(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "lstat", refuse)
    assert "npllama.json: cannot be read (Permission denied)" in refusal(folder)


@pytest.mark.parametrize("change", [-1, 1, -4000])
def test_a_file_of_another_size_is_refused(folder: Path, change: int):
    data = (folder / "wq.npy").read_bytes() + b"\0"
    (folder / "wq.npy").write_bytes(data[: len(data) - 1 + change])
    assert "wq.npy: has" in refusal(folder)
    assert "shape (2, 24, 24) of <f4 needs exactly 4,736;" in refusal(folder)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 24, 24), ">f4"),
        np.zeros((2, 24, 24), "<f8"),
        np.asfortranarray(np.zeros((2, 24, 24), "<f4")),
        np.zeros((24, 2, 24), "<f4"),
        np.zeros((2, 24, 24), "V4"),
    ],
    ids=["big-endian", "float64", "Fortran order", "other shape", "no numbers"],
)
def test_an_array_that_is_laid_out_otherwise_is_refused(folder: Path, array: np.ndarray):
    np.save(folder / "wq.npy", array)
    assert "wq.npy: its header is '{" in refusal(folder)
    assert "needed is '{" in refusal(folder)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"", "begins with '"),
        (b"\x93NUMPY\x01", "begins with '"),
        (b"\x93NUMPY\x03\x00" + bytes(200), "begins with '"),
        (b"PK\x03\x04" + bytes(200), "begins with '"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(200), "has a header of 65,535 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(200), "has a header of 4,294,967,295 bytes"),
        (b"\x93NUMPY\x01\x00\x75\x00" + b" " * 200, "an end at a multiple of 64"),
        (b"\x93NUMPY\x01\x00\x00\x00" + bytes(200), "an end at a multiple of 64"),
        (b"\x93NUMPY\x01\x00\x36\x00" + b"{" * 20, "its header is"),
    ],
)
def test_a_file_that_is_not_npy_is_refused(folder: Path, start: bytes, found: str):
    (folder / "wq.npy").write_bytes(start)
    assert found in refusal(folder)


def test_a_header_of_version_two_is_read(folder: Path):
    array = np.load(folder / "wq.npy")
    with open(folder / "wq.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    with open_model(folder) as model:
        np.testing.assert_array_equal(model.weights.wq, array)


# ---------------------------------------------------------------- hashes


def test_hashes_of_a_sound_model_agree_and_progress_reaches_the_end(folder: Path):
    seen: list[tuple[int, int, str]] = []
    check_hashes(folder, lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in folder.glob("*.npy"))
    assert {name for _, _, name in seen} == {path.name for path in folder.glob("*.npy")}


def test_one_flipped_bit_is_found_and_its_file_named(folder: Path):
    data = bytearray((folder / "w3.npy").read_bytes())
    data[-1] ^= 1
    (folder / "w3.npy").write_bytes(data)
    open_model(folder).close()
    with pytest.raises(ModelError, match=r"the contents of w3\.npy are not what was exported \(sha256 differs"):
        check_hashes(folder)


def test_many_damaged_files_are_summed_up(folder: Path):
    for path in folder.glob("*.npy"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match="and 8 more are not what was exported"):
        check_hashes(folder)


# ---------------------------------------------------------------- damage at random


@pytest.mark.parametrize("name", ["npllama.json", "wq.npy", "tokenizer.model"])
def test_a_file_damaged_at_random_opens_or_is_refused_in_the_family(folder: Path, name: str):
    sound = (folder / name).read_bytes()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(300):
        (folder / name).write_bytes(mutated(sound, rng))
        try:
            open_model(folder).close()
        except NpllamaError:
            refused += 1
    assert refused > 150


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut out, doubled or cut off."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(len(out) + 1)), int(rng.integers(1, 9))
        change = rng.integers(4)
        if change == 0:
            out[at : at + size] = rng.bytes(min(size, len(out) - at))
        elif change == 1:
            del out[at : at + size]
        elif change == 2:
            out[at:at] = out[at : at + size]
        else:
            del out[at:]
    return bytes(out)
