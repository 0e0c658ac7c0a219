"""GGUF files that are damaged, hostile or of another kind of model: each is refused on one line."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import File, Written, file_of, floats, header, put, with_keys
from helpers import TINY

from npllama.checkpoints import open_checkpoint
from npllama.errors import CheckpointError


def refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path).close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general__architecture": ("str", "qwen2")}, r"general.architecture is 'qwen2' \(biases on q, k and v\)"),
        ({"general__architecture": ("str", "gemma3")}, r"general.architecture is 'gemma3' \(norms on q and k"),
        ({"general__architecture": ("str", "command-r")}, r"is 'command-r' \(LayerNorm"),
        ({"general__architecture": ("str", "new")}, "is 'new', but only 'llama' is supported"),
        ({"general__architecture": None}, "general.architecture is 'None'"),
        ({"general__architecture": ("[u8]", [1, 2])}, "general.architecture is a Numbers"),
        ({"general__type": ("str", "adapter")}, "general.type is 'adapter'"),
        ({"general__type": ("[u8]", [1, 2])}, "general.type is a Numbers"),
        ({"llama__expert_count": ("u32", 8)}, "llama.expert_count is 8, which is not supported"),
        ({"llama__attention__causal": ("bool", 0)}, "llama.attention.causal is False"),
        ({"llama__logit_scale": ("f32", 8.0)}, "llama.logit_scale is 8.0"),
        ({"llama__embedding_scale": ("[f32]", [1.0, 2.0])}, "llama.embedding_scale is a Numbers"),
        ({"llama__rope__dimension_count": ("u32", 2)}, "llama.rope.dimension_count is 2, but heads have 4 elements"),
        ({"llama__attention__value_length": ("u32", 8)}, "value_length is 8, but heads have 4 elements"),
        ({"llama__attention__head_count": ("u32", 0)}, "a width of 24 and 0 heads are impossible"),
        ({"llama__attention__head_count": ("[u32]", [6, 6])}, "a width of 24 and a Numbers heads are impossible"),
        ({"llama__attention__head_count_kv": ("[u32]", [2, 2])}, "n_kv_heads is a Numbers"),
        ({"llama__attention__head_count_kv": ("u32", 4)}, "every key/value head must serve"),
        ({"llama__block_count": ("u64", 1 << 40)}, "n_layers is 1099511627776"),
        ({"llama__block_count": ("u32", 513)}, "n_layers is 513"),
        ({"llama__block_count": ("u32", 3)}, "tensors are missing, first 'blk.2.attn_norm.weight'"),
        ({"llama__block_count": ("u32", 1)}, "tensor 'blk.1.attn_q.weight' .* has no place"),
        ({"llama__feed_forward_length": ("u32", 45)}, r"tensor 'layers.0.feed_forward.w1' has shape \[44, 24\]"),
        ({"llama__feed_forward_length": None}, "feed_forward_length is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": ("f32", 0.0)}, "norm_eps is 0.0"),
        ({"llama__attention__layer_norm_rms_epsilon": ("f32", float("nan"))}, "norm_eps is nan"),
        ({"llama__rope__freq_base": ("f32", float("inf"))}, "rope_theta is inf"),
        ({"llama__rope__scaling__type": ("str", "ntk")}, "rope.scaling.type is 'ntk': not supported"),
        ({"llama__attention__sliding_window": ("f32", 4.0)}, "sliding_window is 4.0, but a whole number"),
        ({"llama__context_length": ("u32", 0)}, "max_seq_len is 0"),
        ({"tokenizer__ggml__eos_token_id": ("u32", 300)}, "eos_token_id is 300, but a whole number from 0 to 299"),
        ({"tokenizer__ggml__bos_token_id": ("i32", -1)}, "bos_token_id is -1"),
        ({"tokenizer__ggml__tokens": ("[str]", ["a"])}, "scores is no array of 1 floating-point numbers"),
        ({"tokenizer__ggml__tokens": ("[u8]", [1])}, "tokens is no list of texts"),
        ({"tokenizer__ggml__merges": ("str", "a b")}, "merges is no list of texts"),
        ({"tokenizer__ggml__scores": ("[i32]", [0] * 300)}, "scores is no array of 300 floating-point numbers"),
        ({"tokenizer__ggml__token_type": ("[f32]", [1.0] * 300)}, "token_type is no array of 300 whole numbers"),
        ({"general__alignment": ("u32", 48)}, "general.alignment is '48', but a power of two"),
        ({"general__alignment": ("u32", 0)}, "general.alignment is '0'"),
        ({"general__alignment": ("u32", 1 << 31)}, "general.alignment is '2147483648'"),
        ({"general__alignment": ("str", "32")}, "general.alignment is '32'"),
    ],
)
def test_metadata_of_another_kind_of_model_or_damaged_is_refused(
    tmp_path: Path, changes: dict[str, gguf_files.Typed | None], reason: str
) -> None:
    refused(with_keys(tmp_path, **changes), rf"^model\.gguf: .*{reason}")


# Damage ---------------------------------------------------------------------------------------------------------------

SMALL = {"general.architecture": ("str", "llama")}


def raw(data: bytes) -> gguf_files.Typed:
    return "raw", data


HOSTILE: dict[str, tuple[File | bytes, str]] = {
    "nothing but the magic": (b"GGUF", "its header needs 8 bytes"),
    "version 1": (File({}, version=1), "is GGUF of version 1, but 2 or 3 is needed"),
    "version 4": (File({}, version=4), "is GGUF of version 4"),
    "version 0": (File({}, version=0), "is GGUF of version 0"),
    "2^64 - 1 tensors": (File({}, n_tensors=2**64 - 1), "tensors and 0 keys are announced"),
    "2^62 keys": (File({}, n_keys=2**62), "keys are announced"),
    "keys that are not there": (File({}, n_keys=1000), "its header needs"),
    "an empty key": (File({"": ("u8", 1)}), "stands there twice, or is empty"),
    "a key of 2^63 bytes": (File({"a": ("u8", 1)}, n_keys=2).head() + struct.pack("<Q", 2**63), "a key of 9,223"),
    "a key that is not UTF-8": (
        File({}, n_keys=1).head() + struct.pack("<Q", 1) + b"\xff" + bytes(9),
        "a key is not UTF-8",
    ),
    "a text of 2^40 bytes": (File({"a": raw(struct.pack("<IQ", 8, 2**40))}), "the value of 'a' of 1,099,511,627,776"),
    "an array of 2^40 numbers": (File({"a": raw(struct.pack("<IIQ", 9, 4, 2**40))}), "values of 'a' are announced"),
    "an array of 2^40 texts": (File({"a": raw(struct.pack("<IIQ", 9, 8, 2**40))}), "texts of 'a' are announced"),
    "an array of a million texts": (File({"a": raw(struct.pack("<IIQ", 9, 8, 10**6))}), "its header needs 8,000,"),
    "a text of an array that is long": (
        File({"a": raw(struct.pack("<IIQQ", 9, 8, 1, 2**63))}),
        "a text of 9,223,372,036,854,775,808 bytes is announced in 'a'",
    ),
    "an array of arrays": (File({"a": raw(struct.pack("<IIQ", 9, 9, 1) * 300)}), "is of type 9"),
    "a type that does not exist": (File({"a": raw(struct.pack("<I", 13))}), "is of type 13"),
    "a truth that is neither": (File({"a": raw(struct.pack("<IB", 7, 2))}), "is neither true nor false"),
    "texts that are not UTF-8": (File({"a": ("[str]", [b"\xff"])}), "a text of 'a' is not UTF-8"),
    "bytes after a vocabulary": (File(SMALL).bytes() + b"\0" * 40, "its tensors end at byte"),
}


@pytest.mark.parametrize(("file", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, file: File | bytes, reason: str) -> None:
    refused(put(tmp_path, file), rf"^model\.gguf.*{reason}")


def tensor(name: str = "x", kind: int = 0, shape: tuple[int, ...] = (2, 4), size: int = 32, **more: object) -> File:
    return File(SMALL, {name: Written(kind, shape, bytes(size))}, **more)  # type: ignore[arg-type]


TENSORS: dict[str, tuple[File | bytes, str]] = {
    "a long name": (tensor("x" * 65), "the name of a tensor of 65 bytes"),
    "no axis": (tensor(shape=()), "has 0 axes, but 1 to 4"),
    "five axes": (tensor(shape=(1,) * 5), "has 5 axes"),
    "an axis of nothing": (tensor(shape=(2, 0)), r"has the shape \[2, 0\]"),
    "2^124 numbers": (tensor(shape=(2**62, 2**62)), "has the shape"),
    "2^61 numbers": (tensor(shape=(2**61,)), "its tensors end at byte"),
    "a type of old": (tensor(kind=4), "is of type Q4_2, which is not read"),
    "a type that is not read": (tensor(kind=16), "is of type IQ2_XXS, which is not read; use a file of another type"),
    "a type that does not exist": (tensor(kind=2**32 - 1), "is of type 4294967295"),
    "rows that are no whole blocks": (
        tensor(kind=2, shape=(2, 16), size=18),
        "rows of 16, which are no whole blocks of 32",
    ),
    "an offset before the data": (tensor(offsets={"x": 2**64 - 32}), "begins at byte .*, not at"),
    "an offset that leaves a hole": (tensor(offsets={"x": 32}), "begins at byte"),
    "an offset that is not aligned": (tensor(offsets={"x": 4}), "begins at byte"),
    "less data than its shape": (tensor(shape=(2, 5)), "its tensors end at byte"),
    "data cut off": (tensor().bytes()[:-1], "its tensors end at byte"),
    "data that goes on": (tensor().bytes() + bytes(1), "its tensors end at byte"),
    "another alignment than it says": (
        File(SMALL, {name: Written(0, (5,), bytes(20)) for name in "xy"}, alignment=64),
        "tensor 'y' begins at byte .*, not at",
    ),
}


@pytest.mark.parametrize(("file", "reason"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_cover_the_file_are_refused(tmp_path: Path, file: File | bytes, reason: str) -> None:
    refused(put(tmp_path, file), rf"^model\.gguf: .*{reason}")


def test_a_name_or_a_key_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    twice = File({"aa": ("u8", 1), "ab": ("u8", 1)}).bytes().replace(b"ab", b"aa")
    refused(put(tmp_path, twice), "key 'aa' stands there twice")
    one = Written(0, (8,), bytes(32))
    twice = File(SMALL, {"xa": one, "xb": one}).bytes().replace(b"xb", b"xa")
    refused(put(tmp_path, twice), "tensor 'xa' stands there twice")


def test_every_alignment_and_a_file_without_its_last_padding_are_read(tmp_path: Path) -> None:
    for alignment in (1, 8, 64, 4096):
        file, weights = file_of()
        file.alignment = alignment
        file.metadata["general.alignment"] = ("u32", alignment)
        with open_checkpoint(put(tmp_path, file)) as opened:
            np.testing.assert_array_equal(opened.tensors["norm"].rows(0, TINY.dim), weights["norm"])
    short = floats(np.ones(3, np.float32))
    whole = File(SMALL, {"x": short}).bytes()
    assert header(put(tmp_path, whole[:-20])).tensors.keys() == {"x"}


def test_a_header_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with open(path, "wb") as out:
        out.write(File({}, n_keys=9000).head())
        for i in range(5):
            out.write(struct.pack("<Q", 1) + bytes([65 + i]) + struct.pack("<IIQ", 9, 0, 1 << 24))
            out.seek(1 << 24, os.SEEK_CUR)
        out.truncate(1 << 30)
    refused(path, "a header of more than 67,108,864 bytes is not read")
