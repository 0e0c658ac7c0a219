"""The safetensors reader: every number format, and every way in which header and data may disagree."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import safetensors_bytes

from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.layouts import read_tree
from npllama.checkpoints.tensors import Tensor, View
from npllama.errors import CheckpointError
from npllama.numbers import widen
from npllama.numbers.bf16 import BF16

BASE = (np.arange(24, dtype=np.float32) / 4 - 3).reshape(4, 6)
POOL = Pool()


@pytest.fixture(autouse=True)
def _close_files() -> Iterator[None]:
    yield
    POOL.close()


def read(tmp_path: Path, data: bytes) -> dict[str, View]:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tree = read_tree(InputFile(path, POOL))
    assert isinstance(tree, dict)
    return tree


def file_of(header: object, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) + pad) + text + b" " * pad + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
def test_numbers_of_every_float_format_are_read(tmp_path: Path, dtype: str) -> None:
    view = read(tmp_path, safetensors_bytes({"pad": (np.ones(1), "f16"), "x": (BASE, dtype)}))["x"]
    rows = Tensor("x", view.shape, (view,)).rows(1, 4)
    np.testing.assert_array_equal(widen(BF16(rows)) if dtype == "bf16" else rows, BASE[1:4])


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="compares with the safetensors library")
    tensors = {"b": BASE.astype(np.float16), "a": BASE, "c": BASE[0].astype(np.float64), "ids": np.arange(3)}
    views = read(tmp_path, library.save(tensors, metadata={"format": "pt"}))
    assert views["ids"].dtype == "i64"
    for name in ("a", "b", "c"):
        view = views[name]
        np.testing.assert_array_equal(Tensor(name, view.shape, (view,)).rows(0, view.shape[0]), tensors[name])


def test_padding_and_metadata_and_unknown_fields_are_accepted(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "x": {**entry(), "note": 1}, "empty": entry("F16", [0, 3], [8, 8])}
    views = read(tmp_path, file_of(header, bytes(8), pad=7))
    assert views["x"].shape == (2,)
    assert views["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"x": entry(offsets=[0, 4])}, "has 4 bytes, not what its shape needs"),
        ({"x": entry(offsets=[8, 0])}, "has -8 bytes, not what its shape needs"),
        ({"x": entry(offsets=[0, 4, 8])}, "no whole numbers"),
        ({"x": entry(offsets=[4, 12])}, "overlap or leave holes"),
        ({"x": entry(), "y": entry()}, "overlap or leave holes"),
        ({"x": entry(), "y": entry(offsets=[8, 16])}, "end at byte .*, but it has"),
        ({}, "end at byte .*, but it has"),
        ({"x": entry(shape=[2.0])}, "no whole numbers"),
        ({"x": entry(shape=[True, 2])}, "no whole numbers"),
        ({"x": entry(shape=[-2])}, "no whole numbers"),
        ({"x": entry(shape=[1] * 9)}, "no whole numbers"),
        ({"x": entry(shape=[10**17, 10**17])}, "not what its shape needs"),
        ({"x": entry(shape=2)}, "no whole numbers"),
        ({"x": entry(dtype="f32")}, "is of type 'f32'"),
        ({"x": entry(dtype="Q4_0")}, "is of type 'Q4_0'"),
        ({"x": entry(dtype=4)}, "is of type unknown"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "lacks dtype, shape or data_offsets"),
        ({"x": 1}, "lacks dtype, shape or data_offsets"),
        ({"x": entry(), "__metadata__": {"a": 1}}, "__metadata__ is no object of texts"),
        ({"x": entry(), "__metadata__": "a"}, "__metadata__ is no object of texts"),
        (b'{"x":1,"x":1}', "key 'x' stands twice"),
        (b'{"x":{"dtype":"F32","dtype":"F16"}}', "key 'dtype' stands twice"),
        (b'{"x":NaN}', "NaN is not JSON"),
        (b'{"x":' + b"9" * 400 + b"}", "400 digits"),
        (b'{"x":' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than"),
        (b'{"\xff":1}', "not UTF-8"),
        (b"{    ", "not JSON"),
    ],
)
def test_headers_that_disagree_with_the_data_are_refused(tmp_path: Path, header: object, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"^model.safetensors: .*{reason}"):
        read(tmp_path, file_of(header, bytes(8)))


def test_metadata_may_be_null_and_name_tensors_that_were_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, file_of({"x": entry(), "__metadata__": None}, bytes(8)))["x"].shape == (2,)
    notes = {"y": "x", "z": "absent", "x": "x", "format": "pt"}
    views = read(tmp_path, file_of({"x": entry(), "__metadata__": notes}, bytes(8)))
    assert views.keys() == {"x", "y"}
    assert views["x"] == views["y"]


@pytest.mark.parametrize(
    "note", ["x" * (6 << 20), '\\"' * (2 << 20), "\U0001f999" * (1 << 20), "{[" * (3 << 20)], ids=lambda note: note[:2]
)
def test_a_header_of_many_megabytes_takes_its_size_and_little_more(tmp_path: Path, note: str) -> None:
    header = {"__metadata__": {"notes": note, "y": "x"}, "x": entry()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(json.dumps(header, ensure_ascii=False).encode(), bytes(8), pad=1 << 20))
    tracemalloc.start()
    try:
        tree = read_tree(InputFile(path, POOL))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(tree, dict)
    assert tree.keys() == {"x", "y"}
    assert peak < path.stat().st_size + (8 << 20)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"x":{"dtype":"F32"' + b" " * 2000 + b"}}", "header: not JSON"),
        (b'{"' + b"x" * 2000 + b'":1}', "a name of 2,002 bytes, but at most 1,024 are read"),
        (b"{" + b",".join(b'"%d":{}' % i for i in range(65537)) + b"}", "more than 65,536 tensors"),
        (b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(65537)) + b"}}", "more than 65,536 texts"),
        (b"{" + b",".join(b'"%d":[1]' % i for i in range(1025)) + b"}", "more than 1,024 entries are no objects"),
        (b'{"__metadata__":null,"__metadata__":null}', "key '__metadata__' stands twice"),
        (b'{"__metadata__":{"a":null}}', "__metadata__ is no object of texts"),
        (b'{"x":{},}', "a text in quotes is needed at byte 8"),
        (b'{"x" {}}', "a colon is missing at byte 4"),
        (b'{"x":{} "y":{}}', "a comma is missing"),
        (b"{}{}", "something follows its end at byte 2"),
        (b'{"x', "a text has no end"),
        (b'{"x\\', "a text has no end"),
        (b'{"\\x":1}', "not JSON"),
    ],
)
def test_headers_beyond_their_bounds_are_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"^model.safetensors: .*{reason}"):
        read(tmp_path, file_of(header))


def test_a_brace_inside_an_entry_is_no_end_of_it(tmp_path: Path) -> None:
    views = read(tmp_path, file_of({"}": {**entry(), "a": "}", "b": {"c": ["{"]}}}, bytes(8)))
    assert views["}"].shape == (2,)


def test_a_header_longer_than_its_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 30) + b"{}")
    with open(path, "r+b") as file:
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="a header of 1,073,741,824 bytes is announced"):
        read_tree(InputFile(path, POOL))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = safetensors_bytes({"x": (BASE, "f32")})
    for size in (20, len(whole) - 1):
        with pytest.raises(
            CheckpointError, match=r"^model\.safetensors: .* is damaged or incomplete: download it again"
        ):
            read(tmp_path, whole[:size])


def test_a_type_that_is_no_float_cannot_be_a_weight(tmp_path: Path) -> None:
    view = read(tmp_path, file_of({"x": entry("I8", [8], [0, 8])}, bytes(8)))["x"]
    with pytest.raises(CheckpointError, match="tensor 'x' is of type i8, but f32, f16, bf16 or f64 is needed"):
        view.check_weight("x")
