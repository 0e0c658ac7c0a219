"""Files of llama2.c: every version, what is wrong with them, and the vocabulary of tokenizer.bin."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, random_weights
from llama2c_files import version_0, version_1, version_2, vocabulary

import npllama
from npllama.checkpoints import Checkpoint, open_checkpoint
from npllama.checkpoints.llama2c_bin import read_tokenizer_bin
from npllama.errors import CheckpointError
from npllama.store.export import export


def write(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    return folder / "model.bin"


def check(opened: Checkpoint, weights: dict[str, np.ndarray]) -> None:
    assert opened.layout == "llama2.c-bin"
    assert opened.tied == ("output" not in weights)
    assert opened.tensors.keys() == weights.keys()
    for name, w in weights.items():
        tensor = opened.tensors[name]
        assert tensor.shape == w.shape
        np.testing.assert_array_equal(tensor.rows(0, w.shape[0]), w, err_msg=name)
        np.testing.assert_array_equal(tensor.rows(3, 7), w[3:7], err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_float32_weights_of_both_versions_are_read(tmp_path: Path, version: int, tied: bool) -> None:
    weights = random_weights(TINY, 1, tied)
    path = write(tmp_path, {0: version_0, 1: version_1}[version](TINY, weights))
    with open_checkpoint(path) as opened:
        check(opened, weights)
        assert opened.config == TINY
        assert opened.vocabulary is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("group", [8, 32, 48])
def test_eight_bit_weights_are_read_though_groups_run_on_over_rows(tmp_path: Path, group: int, tied: bool) -> None:
    config = dataclasses.replace(TINY, hidden_dim=40, vocab_size=304)
    data, rounded = version_2(config, random_weights(config, 2, tied), group)
    with open_checkpoint(write(tmp_path, data)) as opened:
        check(opened, rounded)
        assert opened.tensors["layers.0.feed_forward.w2"].dtype == "f32"


def test_a_folder_with_one_such_file_is_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, version_0(TINY, random_weights(TINY, 1, True)))
    (tmp_path / "tokenizer.bin").write_bytes(vocabulary(400))
    (tmp_path / "tok300.bin").write_bytes(vocabulary(300))  # whose name says that it is of this size
    with open_checkpoint(tmp_path) as opened:
        assert opened.vocabulary is not None
        assert len(opened.vocabulary["tokens"]) == TINY.vocab_size
    (tmp_path / "other.bin").write_bytes((tmp_path / "model.bin").read_bytes())
    with pytest.raises(CheckpointError, match=r"more than one checkpoint \(model\.bin, other\.bin\)"):
        open_checkpoint(tmp_path)


def damaged(version: int, change: str) -> bytes:
    weights = random_weights(TINY, 1, True)
    if version == 2:
        config = dataclasses.replace(TINY, hidden_dim=48, vocab_size=304)
        data = bytearray(version_2(config, random_weights(config, 1, True), 24)[0])
    else:
        data = bytearray({0: version_0, 1: version_1}[version](TINY, weights))
    at, code, value = {
        "version": (4, "<i", 3),
        "tied": (36, "<B", 2),
        "group": (37, "<i", 0),
        "large group": (37, "<i", 1 << 30),
        "other group": (37, "<i", 7),
        "heads": (20, "<i", 5),
        "no heads": (20, "<i", 0),
        "layers": (16, "<i", 1 << 30),
        "vocabulary": (28, "<i", -300),
        "context": (24, "<i", 65),
    }.get(change, (0, "<0s", b""))
    data[at : at + struct.calcsize(code)] = struct.pack(code, value)
    return bytes(
        data[:-1] if change == "short" else data[:100] if change == "header" else data + b"\0" * (change == "long")
    )


@pytest.mark.parametrize(
    ("version", "change", "reason"),
    [
        (0, "short", r"model\.bin has .* bytes, but what its header says takes"),
        (0, "long", r"model\.bin has .* bytes, but what its header says takes"),
        (0, "context", r"model\.bin has .* bytes, but what its header says takes"),
        (1, "short", r"model\.bin has .* bytes, but what its header says takes"),
        (1, "version", "is of version 3 of llama2.c's files, but 0, 1 or 2"),
        (1, "tied", "neither tied nor untied"),
        (1, "heads", "the width 24 is no multiple of the 5 heads"),
        (1, "no heads", "no multiple of the 0 heads"),
        (1, "layers", "n_layers is 1073741824"),
        (1, "vocabulary", "vocab_size is -300"),
        (1, "header", "ends inside its header"),
        (2, "short", r"model\.bin has .* bytes, but what its header says takes"),
        (2, "group", "the group size is 0"),
        (2, "large group", "the group size is 1073741824"),
        (2, "other group", "no whole groups of 7"),
    ],
)
def test_files_that_are_not_what_their_header_says_are_refused(
    tmp_path: Path, version: int, change: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(write(tmp_path, damaged(version, change)))


# tokenizer.bin --------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_tokenizer_are_those_of_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(vocabulary(262))
    found = read_tokenizer_bin(tmp_path / "tokenizer.bin", 262)
    assert found["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert found["tokens"][259:] == ["\u2581é", "x0", "x1"]
    assert found["token_type"] == [2, 3, 3, *[6] * 256, 1, 1, 1]
    assert found["scores"][:3] == [0.0, -1.0, -2.0]
    assert (found["model"], found["bos_token_id"], found["eos_token_id"]) == ("llama", 1, 2)


@pytest.mark.parametrize(
    ("data", "n", "reason"),
    [
        (vocabulary(262), 263, "it ends before piece 262 of 263"),
        (vocabulary(262), 261, "10 bytes follow its 261 pieces"),
        (vocabulary(262)[:-1], 262, "piece 261 of 2 bytes is announced"),
        (vocabulary(262, p260=b"\xff"), 262, "piece 260 is not UTF-8"),
        (struct.pack("<ifi", 7, 0, -1), 1, "piece 0 of -1 bytes"),
        (struct.pack("<ifi", 7, 0, 1 << 30), 1, "piece 0 of 1,073,741,824 bytes"),
        (struct.pack("<ifi", 7, float("nan"), 0), 1, "the score of piece 0 is nan"),
        (b"", 1, "it ends before piece 0 of 1"),
    ],
)
def test_a_tokenizer_of_another_size_or_damaged_is_refused(tmp_path: Path, data: bytes, n: int, reason: str) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^tokenizer\.bin: {reason}.*does not belong to these weights"):
        read_tokenizer_bin(tmp_path / "tokenizer.bin", n)


# Real weights ---------------------------------------------------------------------------------------------------------


def test_the_file_of_a_trained_model_gives_the_logits_of_transformers(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = shared_data / "stories260K-meta" / "tokenizer.model"
    export(shared_data / "stories260K.bin", tmp_path / "model", tokenizer=tokenizer)
    with npllama.load(tmp_path / "model") as llm, np.load(shared_data / "golden" / "stories260K_logits.npz") as golden:
        n = sum(name.startswith("ids_") for name in golden)
        assert n >= 5
        for i in range(n):
            found = llm.logits(golden[f"ids_{i}"].tolist())
            np.testing.assert_allclose(found, golden[f"logits_{i}"], atol=2e-4, rtol=0)


def test_the_vocabulary_of_a_trained_model_is_that_of_its_sentencepiece_file(shared_data: Path) -> None:
    import sentencepiece

    with open_checkpoint(shared_data / "stories260K.bin") as opened:
        found = opened.vocabulary
    assert found is not None
    own = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "stories260K-meta" / "tokenizer.model"))
    ids = range(own.vocab_size())
    assert found["tokens"] == [own.IdToPiece(i) for i in ids]
    np.testing.assert_array_equal(found["scores"], [own.GetScore(i) for i in ids])
    assert [t == 6 for t in found["token_type"]] == [own.IsByte(i) for i in ids]
    assert [t == 3 for t in found["token_type"]] == [own.IsControl(i) for i in ids]
