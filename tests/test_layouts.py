"""Checkpoints of every layout give the same config and weights; what does not fit together is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import as_dtype, halves_from_pairs, hugging_face_name, random_weights, safetensors_bytes
from torch_files import (
    MODEL_ARGS,
    PARAMS,
    SMALL,
    hugging_face_tensors,
    stored,
    torch_legacy,
    torch_zip,
    write_hugging_face,
    write_llama2c,
    write_meta,
)

from npllama.checkpoints import Checkpoint, open_checkpoint
from npllama.errors import CheckpointError
from npllama.numbers import widen
from npllama.numbers.bf16 import BF16

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def numbers(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All weights, bfloat16 widened to float32, in their own order."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        rows = tensor.rows(0, tensor.shape[0])
        assert rows.shape == tensor.shape
        found[name] = widen(BF16(rows)) if tensor.dtype == "bf16" else rows
    return found


def check(path: Path, weights: dict[str, np.ndarray], dtype: str = "f32", tied: bool = False) -> Checkpoint:
    """The checkpoint at `path` has exactly these weights, rounded to `dtype`."""
    with open_checkpoint(path) as checkpoint:
        found = numbers(checkpoint)
    assert found.keys() == weights.keys() - ({"output"} if tied else set())
    assert checkpoint.tied is tied
    for name, rows in found.items():
        assert checkpoint.tensors[name].dtype == dtype
        rounded = as_dtype(weights[name], dtype)
        np.testing.assert_array_equal(rows, widen(BF16(rounded)) if dtype == "bf16" else rounded, err_msg=name)
    return checkpoint


def refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path).close()
    assert "\n" not in str(caught.value)


# Real weights ---------------------------------------------------------------------------------------------------------

SIX = ("meta", "ckpt", "hf-bin", "hf-safetensors", "meta-bf16", "meta-mp2-f16")


@pytest.mark.parametrize("kind", SIX)
def test_the_same_real_weights_come_out_of_every_layout(shared_data: Path, kind: str) -> None:
    with open_checkpoint(shared_data / "stories260K-hf-safetensors") as reference:
        weights = numbers(reference)
    dtype = kind.rpartition("-")[2] if kind.startswith("meta-") else "f32"
    if kind == "ckpt":
        np.testing.assert_array_equal(weights.pop("output"), weights["tok_embeddings"])
    checkpoint = check(shared_data / f"stories260K-{kind}", weights, dtype, tied=kind == "ckpt")
    same = dataclasses.replace(checkpoint.config, max_seq_len=reference.config.max_seq_len)
    assert same == reference.config
    assert checkpoint.folder == shared_data / f"stories260K-{kind}"
    assert checkpoint.warnings == ()


# Meta -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_meta_release_is_merged_from_its_shards(tmp_path: Path, dtype: str, shards: int) -> None:
    checkpoint = check(tmp_path, write_meta(tmp_path, dtype, shards), dtype)
    assert checkpoint.layout == "meta"
    assert checkpoint.config == SMALL


def test_a_legacy_file_is_read_like_a_zip_file(tmp_path: Path) -> None:
    check(tmp_path, write_meta(tmp_path, "bf16", save=torch_legacy), "bf16")


def test_blocks_of_rows_cross_the_borders_of_shards(tmp_path: Path) -> None:
    weights = write_meta(tmp_path, shards=2)
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("tok_embeddings", "layers.1.attention.wq", "layers.0.attention.wo", "output"):
            tensor = checkpoint.tensors[name]
            for start, stop in [(0, 5), (9, 15), (11, 12), (12, 24), (7, 7), (tensor.shape[0] - 1, tensor.shape[0])]:
                rows = tensor.rows(start, stop)
                assert rows.flags.c_contiguous
                np.testing.assert_array_equal(rows, weights[name][start:stop], err_msg=name)


def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path) -> None:
    params = {"n_heads": 24, "n_kv_heads": 24, "n_layers": 1, "multiple_of": 24, "vocab_size": 48}
    config = dataclasses.replace(
        SMALL, n_heads=24, n_kv_heads=24, head_dim=2, n_layers=1, hidden_dim=72, vocab_size=48, dim=48
    )
    weights = random_weights(config, 3)
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, **params, "dim": 48, "hidden_dim": 72}))
    for i in range(24):
        tree = {}
        for name, w in weights.items():
            axis = 1 if name.endswith(("tok_embeddings", "wo", "w2")) else 0
            tree[f"{name}.weight"] = stored(w if w.ndim == 1 else np.split(w, 24, axis)[i])
        (tmp_path / f"consolidated.{i:02d}.pth").write_bytes(torch_zip(tree))
    checkpoint = check(tmp_path, weights)
    with checkpoint:
        numbers(checkpoint)
        assert len(checkpoint.pool) <= 8


def test_an_embedding_split_over_the_vocabulary_is_joined_by_rows(tmp_path: Path) -> None:
    weights = write_meta(tmp_path, shards=2)

    def rows(i: int) -> Callable[..., None]:
        def edit(tree: dict[str, object]) -> None:
            tree["tok_embeddings.weight"] = stored(np.split(weights["tok_embeddings"], 2)[i])

        return edit

    for i in range(2):
        rewrite(tmp_path / f"consolidated.{i:02d}.pth", weights, i, rows(i))
    check(tmp_path, weights)


def rewrite(path: Path, weights: dict[str, np.ndarray], i: int, edit: Callable[..., None], shards: int = 2) -> None:
    """Write one shard again, after `edit` has changed its tensors."""
    tree: dict[str, object] = {}
    for name, w in weights.items():
        axis = 1 if name.endswith(("tok_embeddings", "wo", "w2")) else 0
        tree[f"{name}.weight"] = stored(w if w.ndim == 1 else np.split(w, shards, axis)[i])
    edit(tree)
    path.write_bytes(torch_zip(tree))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop("norm.weight"), "1 of 21 tensors are missing, first 'norm.weight'"),
        (
            lambda t: t.update({"layers.2.attention_norm.weight": stored(np.ones(24))}),
            "'layers.2.attention_norm.weight'",
        ),
        (lambda t: t.update({"output.bias": stored(np.ones(300))}), "'output.bias'.*: biases are not supported"),
        (
            lambda t: t.update({"norm.weight": stored(np.ones(23))}),
            r"'norm' has shape \[23\].* needs \[24\] in each of 2",
        ),
        (
            lambda t: t.update({"output.weight": stored(np.ones((300, 24)))}),
            r"has shape \[300, 24\].* needs \[150, 24\]",
        ),
        (
            lambda t: t.update({"output.weight": stored(np.ones((150, 24)), "f16")}),
            "is f16, but f32 in the first shard",
        ),
        (lambda t: t.update({"norm.weight": stored(np.ones(24))}), "'norm' differs from the first shard's"),
        (lambda t: t.update({"norm.weight": "text"}), "'norm.weight' is 'a str', but a tensor of"),
        (lambda t: t.update({"module.norm.weight": stored(np.ones(24))}), "'norm.weight' stands there twice"),
        (lambda t: t.clear(), "holds no dict of tensors"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(tmp_path: Path, edit: Callable[..., None], reason: str) -> None:
    weights = write_meta(tmp_path, shards=2)
    rewrite(tmp_path / "consolidated.01.pth", weights, 1, edit)
    refused(tmp_path, f"^consolidated.01.pth.*{reason}")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_meta(tmp_path, shards=4)
    (tmp_path / "consolidated.01.pth").unlink()
    refused(tmp_path, r"^consolidated\.01\.pth is missing beside consolidated\.02\.pth")


@pytest.mark.parametrize("n_there", [1, 3])
def test_the_last_shards_missing_show_in_the_shapes(tmp_path: Path, n_there: int) -> None:
    write_meta(tmp_path, shards=4)
    for i in range(n_there, 4):
        (tmp_path / f"consolidated.{i:02d}.pth").unlink()
    reason = f"has shape .* it may be one of 4 shards, of which {n_there} are here: download all"
    refused(tmp_path, rf"^consolidated\.00\.pth: tensor 'tok_embeddings' {reason}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_kv_heads": 3}, r"'layers\.0\.attention\.wk' has shape \[8, 24\], but params\.json needs \[12, 24\]"),
        ({"multiple_of": 128}, r"'layers\.0\.feed_forward\.w1' has shape \[64, 24\], .* needs \[128, 24\]"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_layers": 1}, r"tensor 'layers\.1\..*' \(and 8 more\) has no place: no LLaMA 2 of this config has it"),
        ({"n_layers": 3}, r"9 of 30 tensors are missing, first 'layers\.2\.attention_norm\.weight'"),
        ({"dim": 48}, "'tok_embeddings' has shape"),
        ({"vocab_size": 299}, "vocab_size is 299, but tok_embeddings has 300 rows"),
    ],
)
def test_params_that_contradict_the_weights_are_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_meta(tmp_path, **changes)
    refused(tmp_path, reason)


@pytest.mark.parametrize("text", ["[]", "{", '{"dim": 24, "dim": 24}', '{"dim": NaN}', "\udcff"])
def test_a_params_json_that_is_no_sound_json_is_named(tmp_path: Path, text: str) -> None:
    write_meta(tmp_path)
    (tmp_path / "params.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, r"^params\.json: ")


def test_a_params_json_of_a_megabyte_is_refused_unread(tmp_path: Path) -> None:
    write_meta(tmp_path)
    (tmp_path / "params.json").write_bytes(b" " * ((1 << 20) + 1))
    refused(tmp_path, r"^params\.json has more than the 1,048,576 bytes that such a file may have")


def test_weights_without_an_embedding_are_refused(tmp_path: Path) -> None:
    write_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes(torch_zip({"norm.weight": stored(np.ones(24))}))
    refused(tmp_path, r"^consolidated\.00\.pth has no matrix 'tok_embeddings\.weight'")


def test_a_missing_params_json_is_named(tmp_path: Path) -> None:
    write_meta(tmp_path)
    (tmp_path / "params.json").unlink()
    refused(tmp_path, r"^params\.json is missing beside consolidated\.00\.pth")


def test_the_wrong_norm_eps_of_the_first_llama_2_is_pointed_out(tmp_path: Path) -> None:
    def write(extra: dict[str, object], vocabulary: int) -> tuple[str, ...]:
        config = dataclasses.replace(SMALL, vocab_size=vocabulary)
        tree = {f"{name}.weight": stored(w) for name, w in random_weights(config, 0).items()}
        (tmp_path / "consolidated.00.pth").write_bytes(torch_zip({**tree, **extra}))
        (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "norm_eps": 1e-6}))
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.config.max_seq_len == (2048 if extra else 4096)
            return checkpoint.warnings

    assert len(write({}, 32000)) == 1
    assert "norm_eps 1e-06" in write({}, 32000)[0]
    assert write({}, 300) == ()
    assert write({"layers.0.attention.inner_attention.rope.freqs": stored(np.ones(2))}, 32000) == ()  # LLaMA 1


def test_an_unknown_key_of_params_json_is_a_warning(tmp_path: Path) -> None:
    write_meta(tmp_path, zoo=1)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.warnings == ("params.json: 'zoo' is not known and was ignored",)


# llama2.c -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama2c_checkpoint_is_its_model_alone(tmp_path: Path, prefix: str, tied: bool) -> None:
    checkpoint = check(tmp_path, write_llama2c(tmp_path, tied=tied, prefix=prefix), tied=tied)
    assert checkpoint.layout == "llama2.c"
    assert checkpoint.config == dataclasses.replace(SMALL, max_seq_len=64)


def test_another_name_or_the_file_itself_will_do(tmp_path: Path) -> None:
    weights = write_llama2c(tmp_path)
    (tmp_path / "ckpt.pt").rename(tmp_path / "out.pt")
    check(tmp_path, weights, tied=True)
    check(tmp_path / "out.pt", weights, tied=True)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"model": {}, "model_args": MODEL_ARGS}, "holds no dict of tensors"),
        ({"model": {"x": None}, "model_args": []}, "'model' and 'model_args' must be dicts"),
        ({"model": {"x": None}, "model_args": {**MODEL_ARGS, "n_heads": 0}}, "model_args: n_heads is 0"),
        ({"model": {"x": None}, "model_args": {**MODEL_ARGS, "dim": stored(np.ones(1))}}, "model_args: dim is a View"),
        ({"model": {"x": None}, "model_args": MODEL_ARGS}, "21 of 21 tensors are missing"),
    ],
)
def test_a_llama2c_checkpoint_that_is_none_is_refused(tmp_path: Path, tree: object, reason: str) -> None:
    (tmp_path / "ckpt.pt").write_bytes(torch_zip(tree))
    refused(tmp_path, f"^ckpt.pt.*{reason}")


# Hugging Face ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_hugging_face_folder_is_read_with_its_rows_turned_back(
    tmp_path: Path, suffix: str, files: int, dtype: str
) -> None:
    checkpoint = check(tmp_path, write_hugging_face(tmp_path, files=files, suffix=suffix, dtype=dtype), dtype)
    assert checkpoint.layout == "hugging-face"
    assert checkpoint.config == SMALL


def test_blocks_of_turned_rows_may_begin_and_end_inside_a_head(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("layers.0.attention.wq", "layers.1.attention.wk"):
            for start, stop in [(0, 1), (1, 2), (3, 6), (2, 8), (5, 5)]:
                rows = checkpoint.tensors[name].rows(start, stop)
                assert rows.flags.c_contiguous
                np.testing.assert_array_equal(rows, weights[name][start:stop])


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    check(tmp_path / "safetensors", write_hugging_face(tmp_path / "safetensors", tied=True), tied=True)
    weights = write_hugging_face(tmp_path / "bin", suffix="bin", tied=True)
    check(tmp_path / "bin", weights, tied=True)
    tree = {name: stored(w, key=f"{i}") for i, (name, w) in enumerate(hugging_face_tensors(weights).items())}
    tree["lm_head.weight"] = tree["model.embed_tokens.weight"]
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(torch_zip(tree))
    check(tmp_path / "bin", weights, tied=True)


def test_a_tied_head_that_is_stored_all_the_same_must_be_equal(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path, tied=True)
    tensors = {name: (w, "f32") for name, w in hugging_face_tensors(weights).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    check(tmp_path, weights, tied=True)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"][0] + 1, "f32")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    refused(tmp_path, r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'")
    tensors["lm_head.weight"] = (weights["tok_embeddings"], "f16")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    refused(tmp_path, r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'")


def test_a_head_may_be_missing_only_where_the_config_says_tied(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, tied=True, tie_word_embeddings=False)
    refused(tmp_path, r"1 of 21 tensors are missing, first 'lm_head\.weight'")
    write_hugging_face(tmp_path, tied=True, tie_word_embeddings=1)
    refused(tmp_path, r"^config\.json: tie_word_embeddings is neither true nor false")


def test_heads_wider_than_the_model_are_turned_by_their_own_size(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, head_dim=10)
    weights = random_weights(config, 1)
    write_hugging_face(tmp_path, head_dim=10)
    tensors = {name: (w, "f32") for name, w in hugging_face_tensors(weights, config).items()}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    check(tmp_path, weights)


def test_tables_that_follow_from_the_config_are_ignored(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path, suffix="bin")
    tree = {name: stored(w) for name, w in hugging_face_tensors(weights).items()}
    tree["model.layers.0.self_attn.rotary_emb.inv_freq"] = stored(np.ones(2))
    (tmp_path / "pytorch_model.bin").write_bytes(torch_zip(tree))
    check(tmp_path, weights)


def test_end_of_text_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    write_hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.eos_token_ids == (5, 6)
    assert checkpoint.warnings == ()


@pytest.mark.parametrize(
    ("said", "eos", "dropped"),
    [
        ([2, 99999, -1], (2,), "eos_token_id 99999, -1 dropped: no id of the vocabulary of"),
        (300, (2,), "eos_token_id 300 dropped"),
        (-1, (2,), "eos_token_id -1 dropped"),
        ([-1, 7], (7,), "eos_token_id -1 dropped"),
        (["2", True, 3.0, 5], (5,), "eos_token_id '2', True, 3.0 dropped"),
        ([-1, -2, -3, -4, -5], (2,), "eos_token_id -1, -2, -3 and 2 more dropped"),
    ],
)
def test_ids_of_the_generation_config_that_cannot_be_used_are_dropped_with_its_name(
    tmp_path: Path, said: object, eos: tuple[int, ...], dropped: str
) -> None:
    write_hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said, "bos_token_id": 70000}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.config.eos_token_ids, checkpoint.config.bos_token_id) == (eos, 1)
        bos, other = checkpoint.warnings
    assert bos.startswith("generation_config.json: bos_token_id 70000 dropped")
    assert other.startswith(f"generation_config.json: {dropped}")


def test_minus_one_means_no_end_of_text_in_config_json_too(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, eos_token_id=[7, -1])
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.eos_token_ids == (7,)
        assert checkpoint.warnings[0].startswith("config.json: eos_token_id -1 dropped")


def test_too_many_ends_of_text_are_refused_with_the_name_of_their_file(tmp_path: Path) -> None:
    write_hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3] * 257}))
    refused(tmp_path, r"^generation_config\.json: eos_token_id lists 257 ids, but at most 256")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "attention_bias is True: biases in attention"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rotary positions of type 'ntk'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
        ({"num_key_value_heads": 5}, "num_attention_heads is 6 and num_key_value_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_what_the_config_asks_for_and_is_not_built_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_hugging_face(tmp_path, **changes)
    refused(tmp_path, rf"^config\.json: {reason}|^config\.json: .*{reason}")


def test_biases_in_the_weights_are_refused_though_the_config_is_silent(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path)
    tensors = {name: (w, "f32") for name, w in hugging_face_tensors(weights).items()}
    tensors["model.layers.0.self_attn.q_proj.bias"] = (np.ones(24), "f32")
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    refused(
        tmp_path, r"^model\.safetensors: tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'.*biases are not supported"
    )


# The index of several files -------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def reindex(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "\ud800", "C:\\x", ".hidden", 1, None, ["x"]]
)
def test_the_index_names_files_without_folders(tmp_path: Path, place: object) -> None:
    write_hugging_face(tmp_path, files=2)
    reindex(tmp_path, lambda places: places.update({"model.norm.weight": place}))
    refused(tmp_path, rf"^{INDEX}: weight_map must give each tensor a file name without a folder")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda p: p.update({"model.norm.weight": "absent.safetensors"}), r"^absent\.safetensors cannot be read"),
        (lambda p: p.update({"zoo": p["model.norm.weight"]}), rf"tensor 'zoo' is missing, though {INDEX} says"),
        (lambda p: p.clear(), rf"^{INDEX}: weight_map must give"),
        (lambda p: p.update({f"x{i}": f"f{i}" for i in range(1100)}), r"names 1,102 files, but at most 1,024"),
    ],
)
def test_an_index_that_contradicts_the_files_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, str]], object], reason: str
) -> None:
    write_hugging_face(tmp_path, files=2)
    reindex(tmp_path, edit)
    refused(tmp_path, reason)


@pytest.mark.parametrize("change", [1e-7, np.nan, "bf16", "rows"])
def test_one_tensor_in_two_files_is_refused_where_the_two_differ(tmp_path: Path, change: object) -> None:
    weights = write_hugging_face(tmp_path, files=2)
    second = {name: (w, "f32") for name, w in list(hugging_face_tensors(weights).items())[1::2]}
    copy = weights["tok_embeddings"].copy()
    if isinstance(change, float):
        copy[299, 23] += change
    second["model.embed_tokens.weight"] = (
        copy[: 299 if change == "rows" else 300],
        "bf16" if change == "bf16" else "f32",
    )
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(second))
    refused(tmp_path, r"^model-00002-of-00002\.safetensors: tensor 'model\.embed_tokens\.weight' stands there twice")


def test_files_of_a_download_cache_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path / "snapshot", files=2)
    (tmp_path / "blobs").mkdir()
    for path in list((tmp_path / "snapshot").iterdir()):
        shutil.move(path, tmp_path / "blobs" / path.name)
        os.symlink(f"../blobs/{path.name}", path)
    check(tmp_path / "snapshot", weights)


# Which layout ---------------------------------------------------------------------------------------------------------


def test_safetensors_come_before_bin_in_one_folder(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, seed=1, suffix="bin")
    check(tmp_path, write_hugging_face(tmp_path, seed=2))


def test_two_checkpoints_in_one_folder_are_refused_until_one_is_named(tmp_path: Path) -> None:
    meta = write_meta(tmp_path, seed=1, shards=2)
    hugging_face = write_hugging_face(tmp_path, seed=2)
    llama2c = write_llama2c(tmp_path, seed=3)
    refused(
        tmp_path, r"more than one checkpoint \(consolidated\.00\.pth, model\.safetensors, ckpt\.pt\); give the file"
    )
    check(tmp_path / "consolidated.00.pth", meta)
    check(tmp_path / "model.safetensors", hugging_face)
    check(tmp_path / "ckpt.pt", llama2c, tied=True)


def test_a_file_that_is_given_is_taken_whatever_lies_beside_it(tmp_path: Path) -> None:
    whole = write_hugging_face(tmp_path, seed=1)
    older = write_hugging_face(tmp_path, seed=2, suffix="bin")
    parts = write_hugging_face(tmp_path, seed=3, files=2)
    for name, weights in {"model.safetensors": whole, "pytorch_model.bin": older, INDEX: parts, "": whole}.items():
        os.utime(tmp_path / name, (1, 1))  # files' times say nothing
        check(tmp_path / name, weights)
    check(tmp_path / "model-00001-of-00002.safetensors", parts)


def test_any_file_of_a_checkpoint_opens_it(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta", shards=2)
    for name in ("params.json", "consolidated.01.pth"):
        check(tmp_path / "meta" / name, meta)
    sharded = write_hugging_face(tmp_path / "hf", files=2)
    for name in ("config.json", INDEX, "model-00002-of-00002.safetensors"):
        check(tmp_path / "hf" / name, sharded)
    single = write_meta(tmp_path / "single")
    (tmp_path / "single" / "consolidated.00.pth").rename(tmp_path / "single" / "weights.pt")
    check(tmp_path / "single" / "weights.pt", single)


def test_the_format_is_known_by_the_content_and_not_by_the_name(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    check(tmp_path, weights)


def test_files_that_a_trainer_leaves_beside_the_weights_are_ignored(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "best.pt"):
        (tmp_path / name).write_bytes(b"x")
    check(tmp_path, weights)


def test_wrapped_state_dicts_are_unwrapped(tmp_path: Path) -> None:
    for key in ("model", "state_dict", "module"):
        weights = write_meta(tmp_path, save=lambda tree, key=key: torch_zip({key: tree, "epoch": 3}))
        check(tmp_path, weights)


def test_the_state_of_an_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "optimizer_zip.pt", tmp_path / "x.pt")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    refused(tmp_path, r"^x\.pt is the state of an optimizer")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], r"holds no checkpoint \(nothing\)"),
        (["model.txt", "README.md"], r"holds no checkpoint \('README\.md', 'model\.txt'\)"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds a LoRA adapter alone"),
        (["model-00001-of-00002.safetensors"], r"the index of model-00001-of-00002\.safetensors .* is missing"),
        (["a.pt", "b.pt"], r"holds no checkpoint .*; if it is 'a\.pt', give that file"),
        (["config.json", "model.fp16.safetensors", "training_args.bin"], r"if it is 'model\.fp16\.safetensors', give"),
        (["adapter_model.bin"], "holds a LoRA adapter alone"),
        (["adapters.npz", "config.json"], "holds a LoRA adapter alone"),
        (["zero_to_fp32.py", "latest"], r"split; join it with its zero_to_fp32\.py"),
        (["__0_0.distcp", ".metadata"], "split; join it with `accelerate merge-weights`"),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused_with_what_it_holds(
    tmp_path: Path, files: list[str], reason: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, reason)


def test_a_part_without_its_index_is_refused(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, files=2)
    (tmp_path / INDEX).unlink()
    refused(tmp_path / "model-00001-of-00002.safetensors", rf"^{INDEX} is missing beside model-00001-of-00002")


def test_a_variant_is_opened_by_any_of_its_files(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path, files=2)
    text = (tmp_path / INDEX).read_text().replace("model-0", "model.fp16-0")
    (tmp_path / INDEX).unlink()
    (tmp_path / "model.safetensors.index.fp16.json").write_text(text)
    for i in (1, 2):
        part = tmp_path / f"model-0000{i}-of-00002.safetensors"
        part.rename(tmp_path / f"model.fp16-0000{i}-of-00002.safetensors")
    check(tmp_path / "model.safetensors.index.fp16.json", weights)
    check(tmp_path / "model.fp16-00002-of-00002.safetensors", weights)


def test_a_missing_config_json_is_named(tmp_path: Path) -> None:
    write_hugging_face(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, r"^config\.json is missing beside model\.safetensors")


def test_a_path_that_does_not_exist_or_cannot_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "^nothing cannot be read: No such file")
    refused(tmp_path / "nothing.json", "cannot be read: No such file")
    refused(tmp_path / ("x" * 5000), "cannot be read: File name too long")
    refused(Path("a\0b"), "the path .* is impossible")


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(folder: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", listdir)
    refused(tmp_path, "cannot be read: Permission denied; check its permissions")


def test_opening_reads_no_weights_and_closing_leaves_no_file_open(tmp_path: Path) -> None:
    write_meta(tmp_path, shards=2)
    checkpoint = open_checkpoint(tmp_path)
    assert 0 < len(checkpoint.pool) <= 2
    checkpoint.close()
    assert len(checkpoint.pool) == 0


def test_the_order_of_rows_that_these_tests_write_is_that_of_the_converter_of_transformers() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert halves_from_pairs(rows, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert hugging_face_name("layers.0.attention.wq") == "model.layers.0.self_attn.q_proj.weight"
