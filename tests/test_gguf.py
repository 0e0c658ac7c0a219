"""GGUF files: versions, byte orders, parts, number formats, metadata, and vocabularies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import (
    BLOCKY,
    File,
    changed,
    file_of,
    floats,
    header,
    metadata_of,
    put,
    quantized,
    with_keys,
    write_gguf,
    write_split,
)
from helpers import TINY, write_safetensors_checkpoint
from tiny_sentencepiece import BYTES, NORMAL, USUAL, written

import npllama
from npllama.checkpoints import open_checkpoint
from npllama.checkpoints.gguf.reader import BlockView, Numbers
from npllama.config import ModelConfig
from npllama.errors import CheckpointError
from npllama.numbers import widen
from npllama.numbers.bf16 import BF16
from npllama.rope import RopeScaling
from npllama.store.export import export


def refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path).close()
    assert "\n" not in str(caught.value)


def config_of(path: Path) -> ModelConfig:
    with open_checkpoint(path) as opened:
        return opened.config


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_read_in_both_byte_orders(tmp_path: Path, order: str, tied: bool) -> None:
    weights = write_gguf(tmp_path, order=order, tied=tied)
    with open_checkpoint(tmp_path / "model.gguf") as opened:
        assert (opened.layout, opened.config, opened.tied, opened.warnings) == ("gguf", TINY, tied, ())
        assert opened.tensors.keys() == weights.keys()
        for name, w in weights.items():
            found = opened.tensors[name].rows(0, w.shape[0])
            np.testing.assert_array_equal(found, w, err_msg=name)
            assert found.dtype == np.float32


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_floats_keep_their_format(tmp_path: Path, dtype: str, order: str) -> None:
    weights = write_gguf(tmp_path, dtype=dtype, order=order)
    with open_checkpoint(tmp_path) as opened:
        tensor = opened.tensors["output"]
        assert tensor.dtype == dtype
        rows = tensor.rows(5, 9)
        wide = widen(BF16(rows)) if dtype == "bf16" else rows.astype(np.float32)
        np.testing.assert_allclose(wide, weights["output"][5:9], rtol=1e-2)


def test_matrices_of_every_type_of_blocks_are_read_in_one_file(tmp_path: Path) -> None:
    file, needed = quantized()
    with open_checkpoint(put(tmp_path, file)) as opened:
        assert len(needed) == 2 + 7 * BLOCKY.n_layers
        for name, tensor in opened.tensors.items():
            if len(tensor.shape) == 2:
                w = needed[gguf_files.gguf_name(name)]
                assert tensor.dtype == "f32"
                np.testing.assert_array_equal(tensor.rows(0, len(w)), w, err_msg=name)
                np.testing.assert_array_equal(tensor.rows(7, 12), w[7:12], err_msg=name)


def test_the_package_gguf_reads_the_same_numbers(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="compares with the package gguf")
    path = put(tmp_path, quantized()[0])
    theirs = {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}
    with open_checkpoint(path) as opened:
        for name, tensor in opened.tensors.items():
            other = theirs[gguf_files.gguf_name(name)]
            needed = package.dequantize(other.data, other.tensor_type).reshape(other.shape[::-1])
            np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), needed, err_msg=name)


def test_blocks_are_decoded_in_pieces_that_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, needed = quantized()
    monkeypatch.setattr("npllama.checkpoints.gguf.reader.PIECE_BYTES", 500)
    with open_checkpoint(put(tmp_path, file)) as opened:
        np.testing.assert_array_equal(opened.tensors["output"].rows(2, 9), needed["output.weight"][2:9])


def test_levels_and_scales_can_be_had_themselves(tmp_path: Path) -> None:
    file, needed = quantized()
    with open_checkpoint(put(tmp_path, file)) as opened:
        for name, tensor in opened.tensors.items():
            if len(tensor.shape) == 2:
                (view,) = tensor.parts
                assert isinstance(view, BlockView)
                found = view.levels(3, 5)
                assert found.levels.shape == (2, view.shape[1] // view.kind.group, view.kind.group)
                assert set(np.unique(found.levels)) <= set(view.kind.values)
                assert (found.minimums is not None) == view.kind.minimums
                rows = found.widen().reshape(2, -1)
                np.testing.assert_array_equal(rows, needed[gguf_files.gguf_name(name)][3:5])


def test_a_file_of_the_package_gguf_is_read(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writes with the package gguf")
    file, weights = file_of(BLOCKY)
    gguf_files.write_with_package(tmp_path / "model.gguf", file.metadata, weights.items(), "Q8_0")
    with open_checkpoint(tmp_path) as opened:
        assert opened.config == BLOCKY
        for name, w in weights.items():
            np.testing.assert_allclose(opened.tensors[name].rows(0, len(w)), w, atol=0.02, err_msg=name)


def test_a_model_exports_to_the_same_files_from_gguf_and_from_hugging_face(tmp_path: Path) -> None:
    write_safetensors_checkpoint(tmp_path / "hf")
    write_gguf(tmp_path / "gguf")
    tokenizer = tmp_path / "hf" / "tokenizer.model"  # not the vocabulary inside the GGUF file
    one, other = (export(tmp_path / kind, tmp_path / f"{kind}-model", None, tokenizer) for kind in ("hf", "gguf"))
    assert one == other


def test_the_vocabulary_inside_becomes_the_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path)
    manifest = export(tmp_path, tmp_path / "model")
    assert manifest["tokenizer"]["kind"] == "bpe"
    with npllama.load(tmp_path / "model", backend="numpy") as llm:
        assert llm.tokenizer.encode("\u4e00\u4e02")[-2:] == [259, 261]


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 11])
def test_a_file_in_parts_is_one_checkpoint_whichever_part_is_given(tmp_path: Path, parts: int) -> None:
    weights = write_split(tmp_path, parts)
    for path in (tmp_path, *tmp_path.iterdir()):
        with open_checkpoint(path) as opened:
            assert opened.config == TINY
            for name, w in weights.items():
                np.testing.assert_array_equal(opened.tensors[name].rows(0, len(w)), w)


def test_parts_that_are_missing_mixed_up_or_renamed_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, 3)
    first, second, third = sorted(tmp_path.iterdir())
    kept = third.read_bytes()
    third.unlink()
    refused(tmp_path, r"model-00003-of-00003\.gguf is missing beside model-0000[12]-of-00003\.gguf; download all parts")
    third.write_bytes(second.read_bytes())
    refused(tmp_path, r"model-00003-of-00003\.gguf is another part than its name says")
    third.write_bytes(kept)
    (tmp_path / "other.gguf").write_bytes(first.read_bytes())
    refused(tmp_path / "other.gguf", r"other\.gguf is a part of 3 according to its metadata; give it the name")


def test_parts_whose_tensors_are_not_as_many_as_announced_are_refused(tmp_path: Path) -> None:
    file, _ = file_of()
    parts = gguf_files.split(file, 2)
    parts[0].metadata["split.tensors.count"] = ("i32", 99)
    for i, part in enumerate(parts):
        put(tmp_path, part, f"m-{i + 1:05d}-of-00002.gguf")
    refused(tmp_path, r"m-00001-of-00002\.gguf and its other parts have 21 tensors, but 99 are announced")


# Folders --------------------------------------------------------------------------------------------------------------


def test_two_models_in_a_folder_are_not_chosen_between(tmp_path: Path) -> None:
    write_gguf(tmp_path)
    put(tmp_path, b"GGUF", "a.gguf")
    refused(tmp_path, r"more than one checkpoint \(a\.gguf, model\.gguf\); give the file that is meant")
    assert config_of(tmp_path / "model.gguf") == TINY


# Metadata -------------------------------------------------------------------------------------------------------------


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    numbers = {kind: (kind, 3) for kind in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f64")}
    more = {"f32": ("f32", 0.1), "bool": ("bool", 1), "str": ("str", "é"), "strs": ("[str]", ["a", "", "漢"])}
    for order in ("<", ">"):
        file = File({**numbers, **more, "i16s": ("[i16]", [-1, 2]), "bools": ("[bool]", [0, 1])}, order=order)
        found = header(put(tmp_path, file)).metadata
        assert {key: found[key] for key in numbers} == dict.fromkeys(numbers, 3)
        assert (found["f32"], found["bool"], found["str"], found["strs"]) == (0.1, True, "é", ["a", "", "漢"])
        for key, needed in (("i16s", [-1, 2]), ("bools", [False, True])):
            assert isinstance(found[key], Numbers)
            assert found[key].array.tolist() == needed


def test_a_vocabulary_alone_can_be_read_but_is_no_checkpoint(tmp_path: Path) -> None:
    path = put(tmp_path, File(metadata_of()))
    assert not header(path).tensors
    refused(path, "model.gguf has no tensors: it is a vocabulary alone; give the file of a whole model")


def test_the_config_of_a_family_member_is_read(tmp_path: Path) -> None:
    keys = {
        "llama.attention.key_length": ("u32", 4),
        "llama.attention.value_length": ("u32", 4),
        "llama.attention.sliding_window": ("u32", 9),
        "llama.rope.scaling.type": ("str", "yarn"),
        "llama.rope.scaling.factor": ("f32", 4.0),
        "llama.rope.scaling.original_context_length": ("u32", 16),
        "tokenizer.ggml.eot_token_id": ("u32", 7),
        "general.quantization_version": ("u32", 2),
        "general.type": ("str", "model"),
    }
    config = config_of(changed(tmp_path, lambda file: file.metadata.update(keys)))
    assert config.eos_token_ids == (2, 7)
    assert config.sliding_window == 9
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor, config.rope_scaling.original_context) == (
        "yarn",
        4,
        16,
    )


def test_what_a_file_may_leave_out_has_the_values_of_llama_cpp(tmp_path: Path) -> None:
    few = ("llama.attention.head_count_kv", "llama.rope.dimension_count", "llama.rope.freq_base", "llama.vocab_size")
    many = dataclasses.replace(TINY, n_kv_heads=6)
    file, _ = file_of(many)
    file.metadata = {
        key: typed for key, typed in file.metadata.items() if key not in few and not key.startswith("tokenizer.")
    }
    with open_checkpoint(put(tmp_path, file)) as opened:
        assert opened.config == many
        assert opened.vocabulary is None


def test_a_byte_level_vocabulary_without_ids_begins_and_ends_with_11(tmp_path: Path) -> None:
    path = with_keys(
        tmp_path,
        tokenizer__ggml__model=("str", "gpt2"),
        tokenizer__ggml__bos_token_id=None,
        tokenizer__ggml__eos_token_id=None,
    )
    assert (config_of(path).bos_token_id, config_of(path).eos_token_ids) == (11, (11,))


def test_control_tokens_that_end_a_turn_by_their_name_end_a_text(tmp_path: Path) -> None:
    tokens = [f"x{i}" for i in range(300)]
    tokens[7], tokens[8], tokens[9] = "<|eot_id|>", "<|im_end|>", "<|end_of_text|>"
    types = [3 if i == 7 else 4 if i == 9 else 1 for i in range(300)]  # the one between is an ordinary token
    path = with_keys(tmp_path, tokenizer__ggml__tokens=("[str]", tokens), tokenizer__ggml__token_type=("[i32]", types))
    assert config_of(path).eos_token_ids == (2, 7, 9)


def test_the_table_of_rotary_positions_becomes_part_of_the_config(tmp_path: Path) -> None:
    table = np.array([1.0, 8.0], np.float32)
    path = changed(tmp_path, lambda file: file.tensors.update({"rope_freqs.weight": floats(table)}))
    assert config_of(path).rope_scaling == RopeScaling(kind="divisors", divisors=(1.0, 8.0))
    long = changed(
        tmp_path,
        lambda file: file.tensors.update(
            {f"rope_factors_{which}.weight": floats(table * n) for n, which in ((1, "short"), (2, "long"))}
        ),
    )
    scaling = config_of(long).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.short_factors, scaling.long_factors) == ("longrope", (1.0, 8.0), (2.0, 16.0))
    wrong = np.ones(3, np.float32)
    path = changed(tmp_path, lambda file: file.tensors.update({"rope_freqs.weight": floats(wrong)}))
    refused(path, "divisors of scaled rotary positions has 3 numbers, but heads of 4 elements need 2")
    path = changed(tmp_path, lambda file: file.tensors.update({"rope_freqs.weight": floats(table, "f16")}))
    refused(path, "rope_freqs.weight is no vector of float32")


def test_a_long_llama_3_without_its_table_of_rotary_positions_is_warned_of(tmp_path: Path) -> None:
    for context, n_warnings in ((8192, 0), (131072, 1)):
        config = dataclasses.replace(TINY, vocab_size=128256, max_seq_len=context, n_layers=1)
        file, _ = file_of(config, tied=True, dtype="f16")
        file.metadata = {key: typed for key, typed in file.metadata.items() if not key.startswith("tokenizer.")}
        with open_checkpoint(put(tmp_path, file)) as opened:
            assert len(opened.warnings) == n_warnings
            assert all("the file has no rope_freqs.weight" in warning for warning in opened.warnings)


def test_keys_that_are_not_known_are_named(tmp_path: Path) -> None:
    with open_checkpoint(with_keys(tmp_path, llama__zoo=("u32", 1))) as opened:
        assert opened.warnings == ("'llama.zoo' is not known and was ignored",)


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokens = [f"x{i}" for i in range(299)]
    path = with_keys(
        tmp_path,
        tokenizer__ggml__tokens=("[str]", tokens),
        tokenizer__ggml__scores=None,
        tokenizer__ggml__token_type=None,
    )
    refused(path, "the vocabulary has 299 tokens, but token_embd.weight 300 rows")


def test_biases_and_other_norms_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"):
        extra = {name: floats(np.ones(24, np.float32))}
        refused(changed(tmp_path, lambda file, extra=extra: file.tensors.update(extra)), f"tensor '{name}' .* no place")


def test_the_vocabulary_is_handed_over_as_python_has_it(tmp_path: Path) -> None:
    more = {
        "tokenizer.ggml.merges": ("[str]", ["a b", "c d"]),
        "tokenizer.ggml.padding_token_id": ("u32", 0xFFFFFFFF),  # of a tokenizer without padding
        "tokenizer.ggml.unknown_token_id": ("u32", 0),
        "tokenizer.chat_template": ("str", "{{ messages }}"),
    }
    with open_checkpoint(changed(tmp_path, lambda file: file.metadata.update(more))) as opened:
        found = opened.vocabulary
    assert found is not None
    assert found["model"] == "llama"
    assert found["pre"] == "default"
    assert found["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert found["scores"][2] == -2.0
    assert found["token_type"][:4] == [2, 3, 3, 6]
    assert (found["bos_token_id"], found["unknown_token_id"], found["add_bos_token"]) == (1, 0, True)
    assert found["merges"] == ["a b", "c d"]
    assert found["chat_template"] == "{{ messages }}"
    assert "padding_token_id" not in found
    assert {type(found[key]) for key in ("tokens", "scores", "token_type")} == {list}


# A real model ---------------------------------------------------------------------------------------------------------


def test_every_tensor_of_a_real_model_is_that_of_the_package_gguf(smollm2: Path) -> None:
    package = pytest.importorskip("gguf", reason="compares with the package gguf")
    theirs = {tensor.name: tensor for tensor in package.GGUFReader(smollm2).tensors}
    with open_checkpoint(smollm2) as opened:
        assert len(theirs) == len(opened.tensors) == 272
        for name, tensor in opened.tensors.items():
            other = theirs[gguf_files.gguf_name(name)]
            needed = package.dequantize(other.data, other.tensor_type).reshape(other.shape[::-1])
            found = tensor.rows(0, tensor.shape[0])
            np.testing.assert_array_equal(found.view(np.uint32), needed.view(np.uint32), err_msg=name)


def test_a_real_model_gives_the_logits_and_the_text_of_transformers(
    smollm2: Path, shared_data: Path, tmp_path: Path
) -> None:
    pieces = [*USUAL, *BYTES, *((chr(0x20000 + i), NORMAL) for i in range(48893))]
    (tmp_path / "tokenizer.model").write_bytes(written(pieces))  # not its own: the test feeds ids
    export(smollm2, tmp_path / "model", dtype="f32", tokenizer=tmp_path / "tokenizer.model")  # as the logits are
    golden = json.loads((shared_data / "family" / "golden" / "smollm2_135m_q4_1_logits.json").read_text())
    with npllama.load(tmp_path / "model", context=256) as llm:
        for case in golden["cases"]:
            needed, found = case["f32"], llm.logits(case["ids"])
            assert found.argmax(axis=1).tolist() == needed["argmax"]
            ids, logits = zip(*needed["last_top20"], strict=True)
            np.testing.assert_allclose(found[-1, list(ids)], logits, atol=1e-3, rtol=0)
            np.testing.assert_allclose(
                np.logaddexp.reduce(found, axis=1, dtype=np.float64), needed["logsumexp"], atol=1e-3, rtol=0
            )
            greedy = llm.generate(case["ids"], max_tokens=len(needed["greedy20"]), temperature=0).tokens
            assert greedy == needed["greedy20"][: len(greedy)]
            assert len(greedy) in (20, needed["greedy20"].index(2) if 2 in needed["greedy20"] else 20)
