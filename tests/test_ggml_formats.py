"""The number formats of GGUF files: what a file's blocks become, and that nothing of them is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import BLOCKY, blocks, file_of, put
from helpers import quantize, write_tokenizer

import npllama
from npllama import ops
from npllama.checkpoints import open_checkpoint
from npllama.checkpoints.gguf.blocks import BLOCK_TYPES
from npllama.errors import CheckpointError
from npllama.numbers import FORMATS, NumberFormat, widen
from npllama.numbers.formats import Levels
from npllama.numbers.ggml import IQ4_LEVELS, GgmlFormat
from npllama.store.export import export
from npllama.store.opening import open_model
from npllama.weights import KINDS, tensor_names

NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
KEPT = ("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
RESCALED = {"Q4_K": "q4_1", "Q5_K": "q5_1", "IQ4_XS": "iq4_nl"}
MATRICES = [kind for kind, facts in KINDS.items() if not facts.is_norm]

each = pytest.mark.parametrize(
    "name", [number_format.name for number_format in FORMATS.values() if isinstance(number_format, GgmlFormat)]
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer.model", BLOCKY.vocab_size)
    return tmp_path / "tokenizer.model"


def write(folder: Path, types: dict[str, list[str]], order: str = "<") -> dict[str, np.ndarray]:
    """A GGUF file whose matrices have these types, by kind for each layer in turn; the numbers of each tensor."""
    file, numbers = file_of(BLOCKY, order=order)
    for kind, names in types.items():
        for i, tensor in enumerate(tensor_names(kind, BLOCKY.n_layers)):
            called, seed = gguf_files.gguf_name(tensor), len(numbers) * i + len(kind)
            found, numbers[tensor] = blocks(NUMBERS[names[i % len(names)]], numbers[tensor].shape, seed)
            file.tensors[called] = found if order == "<" else swapped(found)
    folder.mkdir(exist_ok=True)
    put(folder, file)
    return numbers


def everywhere(name: str) -> dict[str, list[str]]:
    """The same type in all matrices."""
    return {kind: [name] for kind in MATRICES}


def swapped(written: gguf_files.Written) -> gguf_files.Written:
    """Blocks of 32 with scales, minimums and fifth bits in the other byte order."""
    kind = BLOCK_TYPES[written.kind]
    raw = np.frombuffer(written.data, np.uint8).reshape(-1, kind.size).copy()
    n_halves = 4 if kind.minimums else 2
    for at, size in [(0, 2), (2, 2)][: n_halves // 2] + [(n_halves, 4)] * kind.name.startswith("Q5"):
        raw[:, at : at + size] = raw[:, at : at + size][:, ::-1]
    return dataclasses.replace(written, data=raw.tobytes())


def stored_layers(model: Path) -> Iterator[tuple[str, NumberFormat, np.ndarray]]:
    """Every matrix of a model directory: tensor, number format, the numbers it stands for."""
    with open_model(model) as opened:
        for kind in MATRICES:
            number_format = FORMATS[opened.manifest["tensors"][kind]["format"]]
            wide = widen(getattr(opened.weights, kind))
            layers = wide if KINDS[kind].in_layers else [wide]
            for tensor, one in zip(tensor_names(kind, opened.config.n_layers), layers, strict=True):
                yield tensor, number_format, one


# What a file holds is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", KEPT)
def test_a_file_keeps_its_format_and_its_numbers_to_the_bit(
    tmp_path: Path, tokenizer: Path, name: str, order: str
) -> None:
    numbers = write(tmp_path / "c", everywhere(name), order)
    said: list[str] = []
    export(tmp_path / "c", tmp_path / "m", tokenizer=tokenizer, note=said.append)
    for tensor, number_format, found in stored_layers(tmp_path / "m"):
        assert number_format.name == name.lower()
        np.testing.assert_array_equal(found.view(np.uint32), numbers[tensor].view(np.uint32), err_msg=tensor)
    assert not [remark for remark in said if "layers" in remark]


@pytest.mark.parametrize("name", KEPT)
def test_the_package_gguf_reads_the_numbers_that_are_stored(tmp_path: Path, tokenizer: Path, name: str) -> None:
    package = pytest.importorskip("gguf", reason="compares with the package gguf")
    write(tmp_path / "c", everywhere(name))
    export(tmp_path / "c", tmp_path / "m", tokenizer=tokenizer)
    theirs = {tensor.name: tensor for tensor in package.GGUFReader(tmp_path / "c" / "model.gguf").tensors}
    for tensor, _, found in stored_layers(tmp_path / "m"):
        other = theirs[gguf_files.gguf_name(tensor)]
        needed = package.dequantize(other.data, other.tensor_type).reshape(found.shape)
        np.testing.assert_array_equal(found.view(np.uint32), needed.view(np.uint32), err_msg=tensor)


@pytest.mark.parametrize(("name", "own"), RESCALED.items())
def test_types_of_two_scales_keep_their_levels_and_round_a_scale_to_float16(
    tmp_path: Path, tokenizer: Path, name: str, own: str
) -> None:
    numbers = write(tmp_path / "c", everywhere(name))
    export(tmp_path / "c", tmp_path / "m", tokenizer=tokenizer)
    with open_checkpoint(tmp_path / "c") as opened:
        for tensor, number_format, found in stored_layers(tmp_path / "m"):
            assert number_format.name == own
            levels, *scales = opened.tensors[tensor].parts[0].levels(0, len(found))
            narrow = (None if part is None else part.astype(np.float16).astype(np.float32) for part in scales)
            np.testing.assert_array_equal(found, Levels(levels, *narrow).widen().reshape(found.shape))
            assert 0 < np.abs(found - numbers[tensor]).max() < 2e-3 * np.abs(numbers[tensor]).max()


@pytest.mark.parametrize(
    ("name", "others"),
    {
        "Q4_0": ("q4_1", "q5_0", "q5_1", "q8_0"),
        "Q4_1": ("q5_1",),
        "Q5_0": ("q5_1", "q8_0"),
        "IQ4_NL": ("q8_0",),
    }.items(),
)
def test_a_wider_format_holds_the_same_numbers(name: str, others: tuple[str, ...]) -> None:
    kind = BLOCK_TYPES[NUMBERS[name]]
    written, numbers = blocks(NUMBERS[name], (19, 96), 1)
    levels = kind.levels(np.frombuffer(written.data, np.uint8).reshape(-1, kind.size))
    rows = type(levels)(*(None if part is None else part.reshape(19, 3, *part.shape[2:]) for part in levels))
    assert kind.level_set is not None
    holding = [own.name for own in FORMATS.values() if own.holds(kind.level_set)]
    assert sorted(holding) == sorted([name.lower(), *others])
    for other in holding:
        own = FORMATS[other]
        np.testing.assert_array_equal(widen(own.assemble(own.lay_out(rows), (19, 96))), numbers, err_msg=other)


# Several types in a file --------------------------------------------------------------------------------------------

TYPES = {
    "embedding and output of their own": (
        {"tok_embeddings": ["Q4_0"], "output": ["Q8_0"]},
        {"tok_embeddings": "q4_0", "output": "q8_0", "wq": "f32"},
        [],
    ),
    "layers of which one format holds all": (
        {"w2": ["Q4_0", "Q4_1"], "wv": ["Q5_0", "Q8_0"], "wk": ["Q5_K", "Q4_K"]},
        {"w2": "q4_1", "wv": "q8_0", "wk": "q5_1"},
        [],
    ),
    "layers that no format of theirs holds": (
        {"w2": ["Q6_K", "Q4_K"], "wv": ["Q4_1", "Q8_0"]},
        {"w2": "q6", "wv": "q8_0"},
        [
            "wv: its layers are Q4_1 and Q8_0; all are stored in q8_0",
            "w2: its layers are Q6_K and Q4_K; all are stored in q6",
        ],
    ),
    "types that become something else": (
        {"w1": ["Q2_K"], "w2": ["Q3_K"], "w3": ["Q6_K"], "wq": ["IQ4_XS"]},
        {"w1": "q6", "w2": "q5_0", "w3": "q6", "wq": "iq4_nl"},
        [],
    ),
}


@pytest.mark.parametrize(("types", "needed", "remarks"), TYPES.values(), ids=TYPES)
def test_each_kind_of_matrix_has_the_format_of_its_layers(
    tmp_path: Path, tokenizer: Path, types: dict[str, list[str]], needed: dict[str, str], remarks: list[str]
) -> None:
    numbers = write(tmp_path / "c", types)
    said: list[str] = []
    manifest = export(tmp_path / "c", tmp_path / "m", tokenizer=tokenizer, note=said.append)
    assert {kind: manifest["tensors"][kind]["format"] for kind in needed} == needed
    assert [remark for remark in said if "layers" in remark] == remarks
    for tensor, _, found in stored_layers(tmp_path / "m"):
        assert np.abs(found - numbers[tensor]).max() < 0.35 * numbers[tensor].std(), tensor


def test_a_dtype_that_is_asked_for_is_made_from_the_numbers(tmp_path: Path, tokenizer: Path) -> None:
    numbers = write(tmp_path / "c", everywhere("Q4_1"))
    export(tmp_path / "c", tmp_path / "f32", "f32", tokenizer)
    for tensor, _, found in stored_layers(tmp_path / "f32"):
        np.testing.assert_array_equal(found, numbers[tensor], err_msg=tensor)
    export(tmp_path / "c", tmp_path / "q8", "q8", tokenizer)
    for tensor, _, found in stored_layers(tmp_path / "q8"):
        np.testing.assert_array_equal(found, widen(quantize(numbers[tensor], "q8")), err_msg=tensor)


def test_a_quantized_file_generates_in_its_own_format(tmp_path: Path) -> None:
    write(tmp_path / "c", everywhere("Q4_1") | {"output": ["Q6_K"]})
    with npllama.load(tmp_path / "c" / "model.gguf", backend="numpy") as llm:
        assert llm.manifest["tensors"]["w2"]["format"] == "q4_1"
        assert llm.generate([1, 260], max_tokens=3, temperature=0).tokens


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "at"), [("Q4_0", 0), ("Q5_1", 2)])
def test_a_scale_or_minimum_that_is_not_finite_is_refused_by_place(
    tmp_path: Path, tokenizer: Path, name: str, at: int
) -> None:
    write(tmp_path / "c", {"wo": [name]})
    path, kind = tmp_path / "c" / "model.gguf", BLOCK_TYPES[NUMBERS[name]]
    written, _ = blocks(NUMBERS[name], (BLOCKY.dim, BLOCKY.dim), len("wo"))
    data = bytearray(path.read_bytes())
    block = data.index(written.data[: kind.size]) + kind.size * (BLOCKY.dim // 32 * 7 + 3)
    data[block + at : block + at + 2] = np.array([np.inf], "<f2").tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wo\[7, 96\] is .*(inf|nan).* finite number"):
        export(path, tmp_path / "m", tokenizer=tokenizer)
    assert not (tmp_path / "m").exists()


def test_a_scale_beyond_float16_is_refused_and_a_dtype_named(tmp_path: Path, tokenizer: Path) -> None:
    file, _ = file_of(BLOCKY)
    written, _ = blocks(NUMBERS["Q4_K"], (BLOCKY.dim, BLOCKY.dim), 1)
    raw = np.frombuffer(written.data, np.uint8).reshape(-1, 144).copy()
    raw[:, 2:4] = np.array([60000], "<f2").view(np.uint8)
    raw[:, 8:12] = 63  # offsets of six bits
    file.tensors["blk.1.attn_q.weight"] = dataclasses.replace(written, data=raw.tobytes())
    file.tensors["blk.0.attn_q.weight"] = written
    with pytest.raises(CheckpointError, match=r"attention\.wq\[0, 0\] is .*q4_1 cannot hold .* choose a --dtype"):
        export(put(tmp_path, file), tmp_path / "m", tokenizer=tokenizer)


# Numbers that are rounded to the formats ----------------------------------------------------------------------------


def relative_error(w: np.ndarray, name: str) -> float:
    return float(np.square(widen(quantize(w, name)) - w).sum() / np.square(w).sum())


@each
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (2, 20, 64)])
def test_numbers_are_rounded_to_near_ones(name: str, shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    q = quantize(w, name)
    assert (q.rows, q.columns) == shape[-2:]
    assert np.abs(widen(q) - w).max() < {"q8": 0.05, "q5": 0.25}.get(name[:2], 0.5)


def test_rounding_loses_no_more_than_the_common_way() -> None:
    """What ggml's reference leaves of normal numbers, as shares of their squares: 0.0077, 0.0055 ... (see below)."""
    w = np.random.default_rng(2).standard_normal((64, 1024), dtype=np.float32)
    found = {name: relative_error(w, name) for name in ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")}
    assert found["q4_0"] < 0.0077
    assert found["iq4_nl"] < found["q4_0"]
    assert found["q4_1"] < 0.0075
    assert found["q5_0"] < 0.0019
    assert found["q5_1"] < 0.0018
    assert found["q8_0"] < 3.5e-5


@each
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_numbers_that_cannot_be_stored_are_refused(name: str, value: float) -> None:
    w = np.zeros((4, 40), np.float32)
    w[3, 7] = value
    with pytest.raises(npllama.NpllamaError, match=f"number 127 cannot be stored in {name}.* up to 65,504"):
        quantize(w, name)


@each
def test_zeros_stay_zeros(name: str) -> None:
    assert not widen(quantize(np.zeros((3, 70), np.float32), name)).any()


# What a product is --------------------------------------------------------------------------------------------------


@each
def test_a_product_is_the_sum_of_integer_products_and_of_minimums(name: str) -> None:
    rng = np.random.default_rng(3)
    x, w = (
        rng.standard_normal((5, 72), dtype=np.float32),
        quantize(rng.standard_normal((20, 72), dtype=np.float32), name),
    )
    groups = np.zeros((5, 3, 32))
    groups.reshape(5, 96)[:, :72] = x
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(groups / scale) * scale).reshape(5, 96)[:, :72]
    expected = rounded @ widen(w).astype(np.float64).T
    assert np.abs(ops.linear(x, w) - expected).max() < 2e-6 * np.abs(expected).max()


@each
def test_some_rows_widen_to_what_they_are_in_the_whole(name: str) -> None:
    q = quantize(np.random.default_rng(4).standard_normal((50, 40), dtype=np.float32), name)
    rows = np.array([49, 0, 17, 17, 16])
    assert np.array_equal(ops.embed(q, rows), widen(q)[rows])


@pytest.mark.parametrize("column", range(32))
def test_a_code_of_five_bits_belongs_to_the_row_and_column_that_the_layout_names(column: int) -> None:
    own = FORMATS["q5_1"]
    arrays = {part: np.zeros(spec.shape, spec.dtype) for part, spec in own.arrays((32, 96)).items()}
    v, half, j = column // 8, column // 4 % 2, column % 4
    arrays["codes"][1, 2, 64 * v + 4 * 9 + j] |= 0b1011 << 4 * half
    arrays["codes"][1, 2, 256 + 4 * 9 + j] |= 1 << column // 4
    arrays["scales"][1, 2, 0, 9] = np.float16(1).view(np.uint16)
    arrays["scales"][1, 2, 1, 9] = np.float16(-0.5).view(np.uint16)
    expected = np.zeros((32, 96), np.float32)
    expected[16 + 9, 64:] = -0.5
    expected[16 + 9, 64 + column] += 0b11011
    assert np.array_equal(widen(own.assemble(arrays, (32, 96))), expected)


def test_the_levels_of_iq4_nl_ascend() -> None:
    assert list(IQ4_LEVELS) == sorted(set(IQ4_LEVELS))
