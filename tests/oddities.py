"""A table of odd checkpoints, as people have them: each row makes one, and says what is right for it.

A row is a function of an empty folder with a decorator. `@loads(says)` takes it into READ: the checkpoint must be read,
its logits must be, to the bit, those of the weights that the row returns, and a note must contain `says`.
`@refuses(what)` takes it into REFUSED: the error must be one line that contains `what`, a regular expression. A row may
return (weights or None, the file to open). A tokenizer of 300 pieces lies one folder above.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf_files import write_gguf
from helpers import hugging_face_config, random_weights, safetensors_bytes, write_tokenizer
from llama2c_files import version_0
from torch_files import (
    MODEL_ARGS,
    PARAMS,
    SMALL,
    hugging_face_tensors,
    stored,
    torch_zip,
    write_hugging_face,
    write_llama2c,
    write_meta,
)

Weights = dict[str, np.ndarray]
Maker = Callable[[Path], object]

READ: dict[str, tuple[Maker, str]] = {}
REFUSED: dict[str, tuple[Maker, str]] = {}


def loads(says: str = "") -> Callable[[Maker], Maker]:
    """Take a row into the table of checkpoints that are read, with a note that contains `says`."""

    def take(maker: Maker) -> Maker:
        READ[maker.__name__] = (maker, says)
        return maker

    return take


def refuses(what: str) -> Callable[[Maker], Maker]:
    """Take a row into the table of checkpoints that are refused with one line that contains `what`."""

    def take(maker: Maker) -> Maker:
        REFUSED[maker.__name__] = (maker, what)
        return maker

    return take


# Small makers ---------------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn"
INDEX = "model.safetensors.index.json"


def hugging_face(
    folder: Path,
    extra: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    rename: Callable[[str], str] = lambda name: name,
    note: object = None,
    suffix: str = "safetensors",
    **changes: object,
) -> Weights:
    """A folder with one weight file: tensors added or left out, all names changed, and a note in the header."""
    weights = write_hugging_face(folder, suffix=suffix, **changes)
    tensors = {rename(name): w for name, w in {**hugging_face_tensors(weights), **(extra or {})}.items()}
    for name in without:
        del tensors[name]
    if suffix == "bin":
        (folder / "pytorch_model.bin").write_bytes(torch_zip({name: stored(w) for name, w in tensors.items()}))
    else:
        (folder / "model.safetensors").write_bytes(noted(tensors, note))
    return weights


def noted(tensors: dict[str, np.ndarray], note: object) -> bytes:
    """A safetensors file whose "__metadata__" is `note`."""
    data = safetensors_bytes({name: (w, "f32") for name, w in tensors.items()})
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8 : 8 + size]), "__metadata__": note}).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def indexed(folder: Path, first: Weights, second: Weights, index_only: tuple[str, ...] = ()) -> None:
    """Two shards of these tensors, and their index, which names some tensors that are nowhere."""
    place = {}
    for i, tensors in enumerate((first, second)):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        (folder / name).write_bytes(noted(tensors, {"format": "pt"}))
        place |= dict.fromkeys(tensors, name)
    place |= dict.fromkeys(index_only, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))


def halves(folder: Path, **options: object) -> tuple[Weights, Weights, Weights]:
    """The weights of a folder with config.json and no weight file, and its tensors in two parts."""
    weights = write_hugging_face(folder, **options)
    (folder / "model.safetensors").unlink()
    tensors = hugging_face_tensors(weights)
    names = list(tensors)
    return weights, {n: tensors[n] for n in names[:9]}, {n: tensors[n] for n in names[9:]}


def config(folder: Path, **changes: object) -> Weights:
    """A sound folder whose config.json says something more."""
    return write_hugging_face(folder, **changes)


def tied(weights: Weights) -> Weights:
    return {**weights, "output": weights["tok_embeddings"]}


# Which file is the model ----------------------------------------------------------------------------------------------


@loads("model.safetensors is read; model.safetensors.index.json beside it is not")
def an_index_of_an_older_model_with_its_shards(folder: Path) -> Weights:
    write_hugging_face(folder, seed=9, files=2)
    return write_hugging_face(folder, seed=1)


@loads("model.safetensors is read; model.safetensors.index.json beside it is not")
def an_index_of_an_older_model_without_its_shards(folder: Path) -> Weights:
    write_hugging_face(folder, seed=9, files=2)
    for part in folder.glob("model-*"):
        part.unlink()
    return write_hugging_face(folder, seed=1)


@loads("pytorch_model.bin is read; pytorch_model.bin.index.json beside it is not")
def a_bin_index_of_an_older_model(folder: Path) -> Weights:
    write_hugging_face(folder, seed=9, files=2, suffix="bin")
    return write_hugging_face(folder, seed=1, suffix="bin")


@loads("index.json is read; pytorch_model.bin, pytorch_model.bin.index.json beside it is not")
def a_bin_index_beside_safetensors_in_shards(folder: Path) -> Weights:
    write_hugging_face(folder, seed=9, suffix="bin")
    write_hugging_face(folder, seed=8, files=2, suffix="bin")
    return write_hugging_face(folder, seed=1, files=3)


@loads("the LoRA adapter beside it (adapter_model.safetensors) is not: merge it first")
def an_adapter_beside_a_whole_model(folder: Path) -> Weights:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(noted({"lora_A": np.ones((2, 2))}, {}))
    return write_hugging_face(folder)


@loads()
def one_part_of_one_without_an_index(folder: Path) -> Weights:
    weights = write_hugging_face(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    return weights


@loads()
def one_part_of_one_in_the_older_format_given_as_a_file(folder: Path) -> tuple[Weights, Path]:
    weights = write_hugging_face(folder, suffix="bin")
    part = folder / "pytorch_model-00001-of-00001.bin"
    (folder / "pytorch_model.bin").rename(part)
    return weights, part


@loads("model.safetensors is read; consolidated.safetensors beside it is not")
def a_release_of_mistral_with_both_formats(folder: Path) -> Weights:
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / "consolidated.safetensors").write_bytes(noted({"x": np.ones(2)}, {}))
    return write_hugging_face(folder)


@loads()
def consolidated_safetensors_alone(folder: Path) -> Weights:
    weights = random_weights(SMALL, 4)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    data = noted({f"{name}.weight": w for name, w in weights.items()}, {"format": "pt"})
    (folder / "consolidated.safetensors").write_bytes(data)
    return weights


@refuses("adapter_model.safetensors is of a LoRA adapter alone; merge it")
def an_adapter_given_as_a_file(folder: Path) -> tuple[None, Path]:
    an_adapter_beside_a_whole_model(folder)
    return None, folder / "adapter_model.safetensors"


@refuses("holds a LoRA adapter alone; merge it")
def an_adapter_in_the_older_format_alone(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(torch_zip({"lora_A": stored(np.ones((2, 2)))}))


@refuses("model.safetensors: its tensors are those of a LoRA adapter; merge it")
def an_adapter_under_the_name_of_a_model(folder: Path) -> None:
    hugging_face(folder, rename=lambda name: f"base_model.model.{name.replace('.weight', '.lora_A.weight')}")


@refuses("model.safetensors: its tensors are those of a LoRA adapter; merge it")
def a_model_whose_adapter_is_not_merged(folder: Path) -> None:
    extra = {f"{LAYER}.q_proj.lora_A.default.weight": np.ones((2, 24))}
    hugging_face(folder, extra, rename=lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))


@refuses(
    r"model-00001-of-00002.safetensors cannot be read: .*beside .*index.json lies pytorch_model.bin: give that file"
)
def an_index_without_its_shards_beside_a_bin(folder: Path) -> None:
    an_index_of_an_older_model_without_its_shards(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@refuses("its folder 'original' holds one: give that")
def a_checkpoint_one_folder_further(folder: Path) -> None:
    write_meta(folder / "original")


# Indexes and tensors --------------------------------------------------------------------------------------------------


@loads()
def buffers_in_the_index_alone(folder: Path) -> Weights:
    weights, first, second = halves(folder)
    indexed(folder, first, second, ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"))
    return weights


@loads()
def a_tied_head_in_the_index_alone(folder: Path) -> Weights:
    weights, first, second = halves(folder, tied=True)
    indexed(folder, first, second, ("lm_head.weight",))
    return tied(weights)


@loads()
def an_index_with_other_wrappers_than_its_shards(folder: Path) -> Weights:
    weights, first, second = halves(folder)
    indexed(folder, first, second)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {f"module.llm.{name}": place for name, place in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return weights


@loads()
def a_shard_of_buffers_that_is_missing(folder: Path) -> Weights:
    weights, first, second = halves(folder)
    indexed(folder, first, second)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.rotary_emb.inv_freq"] = "model-00003-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    return weights


@loads()
def a_tensor_that_the_index_forgets(folder: Path) -> Weights:
    weights, first, second = halves(folder)
    indexed(folder, first, second)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    return weights


@loads()
def equal_tensors_in_two_shards(folder: Path) -> Weights:
    weights, first, second = halves(folder)
    same = "model.embed_tokens.weight"
    indexed(folder, first, {**second, same: first[same].copy(), "model.norm.weight": second["model.norm.weight"]})
    return weights


@refuses("model-00002-of-00002.safetensors: tensor 'model.embed_tokens.weight' stands there twice or in another file")
def unequal_tensors_in_two_shards(folder: Path) -> None:
    _, first, second = halves(folder)
    indexed(folder, first, {**second, "model.embed_tokens.weight": first["model.embed_tokens.weight"] * 2})


@loads()
def tied_weights_of_save_model(folder: Path) -> Weights:
    """It keeps the first of the names in alphabetical order, and notes the other."""
    weights = write_hugging_face(folder, tied=True)
    tensors = hugging_face_tensors(tied(weights))
    del tensors["model.embed_tokens.weight"]
    note = {"format": "pt", "model.embed_tokens.weight": "lm_head.weight"}
    (folder / "model.safetensors").write_bytes(noted(tensors, note))
    return tied(weights)


@loads()
def tied_weights_of_save_model_of_which_config_json_knows_nothing(folder: Path) -> Weights:
    weights = tied_weights_of_save_model(folder)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(SMALL, tied=False)))
    return weights


@loads()
def a_tied_embedding_under_the_name_of_the_head(folder: Path) -> Weights:
    weights = write_hugging_face(folder, tied=True)
    tensors = hugging_face_tensors(tied(weights))
    del tensors["model.embed_tokens.weight"]
    (folder / "model.safetensors").write_bytes(noted(tensors, {"format": "pt"}))
    return tied(weights)


BUFFERS: dict[str, np.ndarray] = {
    f"{LAYER}.rotary_emb.inv_freq": np.ones(2),
    f"{LAYER}.rotary_emb.cos_cached": np.ones((1, 1, 8, 4)),
    f"{LAYER}.rotary_emb.sin_cached": np.ones((1, 1, 8, 4)),
    f"{LAYER}.rope.inv_freq": np.ones(2),
    f"{LAYER}.masked_bias": np.full((), -1e9),
    f"{LAYER}.bias": np.tril(np.ones((1, 1, 8, 8))),
    f"{LAYER}.causal_mask": np.ones((8, 8)),
    f"{LAYER}.total_ops": np.zeros(1),
    f"{LAYER}.core_attention._extra_state": np.zeros(0),
    "model.causal_mask": np.ones((8, 8)),
    "model.position_ids": np.arange(8.0),
    "model.rotary_emb.original_inv_freq": np.ones(2),
    "model.freqs_cis": np.ones((8, 2)),
    "total_params": np.zeros(1),
}


@loads()
def buffers_of_all_versions(folder: Path) -> Weights:
    return hugging_face(folder, BUFFERS)


@loads()
def masks_of_llama2c(folder: Path) -> Weights:
    weights = write_llama2c(folder, tied=False)
    tree = {f"_orig_mod.{name}.weight": stored(w) for name, w in weights.items()}
    tree |= {f"_orig_mod.layers.{l}.attention.mask": stored(np.ones((1, 1, 8, 8))) for l in range(2)}
    (folder / "ckpt.pt").write_bytes(torch_zip({"model": tree, "model_args": MODEL_ARGS}))
    return weights


ATTENTION = {"q_proj": 24, "k_proj": 8, "v_proj": 8, "o_proj": 24}
MLP = {"gate_proj": 64, "up_proj": 64, "down_proj": 24}


def zeros(part: str, modules: dict[str, int]) -> dict[str, np.ndarray]:
    return {f"model.layers.{l}.{part}.{m}.bias": np.zeros(n) for l in range(2) for m, n in modules.items()}


@loads("model.safetensors: 8 biases are all zero and were left out")
def biases_that_are_all_zero(folder: Path) -> Weights:
    return hugging_face(folder, zeros("self_attn", ATTENTION))


@loads("14 biases are all zero and were left out")
def biases_that_config_json_announces_and_are_all_zero(folder: Path) -> Weights:
    extra = {**zeros("self_attn", ATTENTION), **zeros("mlp", MLP)}
    return hugging_face(folder, extra, attention_bias=True, mlp_bias=True)


@loads()
def biases_of_norms_and_head_that_are_minus_zero(folder: Path) -> Weights:
    extra = {"model.norm.bias": -np.zeros(24), "lm_head.bias": np.zeros(300)}
    return hugging_face(folder, extra, suffix="bin")


@loads()
def zero_biases_of_a_release_of_meta(folder: Path) -> Weights:
    weights = write_meta(folder, use_biases=True)
    tree = {f"{name}.weight": stored(w) for name, w in weights.items()}
    tree |= {f"layers.{l}.attention.wq.bias": stored(np.zeros(24)) for l in range(2)}
    (folder / "consolidated.00.pth").write_bytes(torch_zip(tree))
    return weights


@refuses("tensor 'model.layers.1.mlp.up_proj.bias' .*biases are not supported")
def one_bias_among_zeros(folder: Path) -> None:
    extra = zeros("mlp", MLP)
    extra["model.layers.1.mlp.up_proj.bias"][63] = 1e-30
    hugging_face(folder, extra, mlp_bias=True)


@refuses("config.json: mlp_bias is True: biases in the feed-forward network")
def biases_that_are_announced_and_missing(folder: Path) -> None:
    hugging_face(folder, zeros("self_attn", ATTENTION), attention_bias=True, mlp_bias=True)


# Names that wrappers change -------------------------------------------------------------------------------------------


@loads("the names of its tensors begin with 'base_model.model.', which was left out")
def names_of_a_merged_adapter(folder: Path) -> Weights:
    return hugging_face(folder, rename=lambda name: f"base_model.model.{name}")


@loads()
def names_of_fsdp_and_activation_checkpointing(folder: Path) -> Weights:
    def rename(name: str) -> str:
        return "_fsdp_wrapped_module." + name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")

    return hugging_face(folder, rename=rename, suffix="bin")


@loads()
def names_of_several_wrappers(folder: Path) -> Weights:
    return hugging_face(folder, rename=lambda name: f"_forward_module.module._orig_mod.model.{name}", suffix="bin")


@loads("last.ckpt: the names of its tensors begin with 'model.', which was left out")
def a_lightning_checkpoint(folder: Path) -> tuple[Weights, Path]:
    weights = write_hugging_face(folder)
    (folder / "model.safetensors").unlink()
    tree = {f"model.{name}": stored(w) for name, w in hugging_face_tensors(weights).items()}
    path = folder / "last.ckpt"
    path.write_bytes(torch_zip({"epoch": 1, "state_dict": tree, "loops": {}}))
    return weights, path


@loads()
def the_body_without_its_prefix(folder: Path) -> Weights:
    return hugging_face(folder, rename=lambda name: name.removeprefix("model."))


@loads("the names of its tensors begin with 'llm.', which was left out")
def another_prefix_before_metas_names(folder: Path) -> Weights:
    weights = write_meta(folder)
    tree = {f"llm.module.{name}.weight": stored(w) for name, w in weights.items()}
    (folder / "consolidated.00.pth").write_bytes(torch_zip({"model_state_dict": {"model": tree}}))
    return weights


@loads()
def a_tensor_under_two_names_that_are_one(folder: Path) -> Weights:
    weights = write_hugging_face(folder)
    tensors = hugging_face_tensors(weights)
    return hugging_face(folder, {"module.model.norm.weight": tensors["model.norm.weight"]})


@refuses(r"tensors are missing, first .* \(there is 'student.model.embed_tokens.weight'\)")
def two_models_in_one_file(folder: Path) -> None:
    weights = write_hugging_face(folder)
    tensors = hugging_face_tensors(weights)
    both = {f"{who}.{name}": w for who in ("student", "teacher") for name, w in tensors.items()}
    (folder / "model.safetensors").write_bytes(noted(both, None))


@refuses(r"has no matrix 'tok_embeddings.weight' \(there is 'model.embed_tokens.weight'\)")
def names_of_hugging_face_beside_params_json(folder: Path) -> None:
    weights = write_meta(folder)
    tree = {name: stored(w) for name, w in hugging_face_tensors(weights).items()}
    (folder / "consolidated.00.pth").write_bytes(torch_zip(tree))


@refuses("'model.layers.0.self_attn.q_proj.qweight' is part of quantized weights")
def quantized_tensors_without_a_word_in_the_config(folder: Path) -> None:
    hugging_face(folder, rename=lambda name: name.replace("q_proj.weight", "q_proj.qweight"))


# What config.json says ------------------------------------------------------------------------------------------------


@loads()
def positions_scaled_by_one(folder: Path) -> Weights:
    return config(folder, rope_scaling={"type": "linear", "factor": 1.0})


@loads()
def yarn_by_one(folder: Path) -> Weights:
    said = {"rope_type": "yarn", "factor": 1, "beta_fast": 32, "original_max_position_embeddings": 4096}
    return config(folder, rope_scaling=said)


@loads()
def llama_3s_scaling_by_one(folder: Path) -> Weights:
    said = {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return config(folder, rope_theta=None, rope_parameters={**said, "rope_theta": 10000.0})


@loads()
def a_factor_of_one_and_no_type(folder: Path) -> Weights:
    return config(folder, rope_scaling={"rope_type": None, "factor": 1.0})


@loads()
def bitsandbytes_switched_off(folder: Path) -> Weights:
    said = {"load_in_8bit": False, "load_in_4bit": False, "llm_int8_threshold": 6.0, "bnb_4bit_quant_type": "fp4"}
    return config(folder, quantization_config={**said, "quant_method": "bitsandbytes", "_load_in_8bit": False})


@loads()
def a_quantization_config_of_nothing(folder: Path) -> Weights:
    return config(
        folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}, "ignore": ["x"]}
    )


@loads()
def an_empty_quantization_config(folder: Path) -> Weights:
    return config(folder, quantization_config={})


@loads("vocabulary: the last 413 of 713 rows have no piece in the tokenizer")
def a_vocabulary_padded_by_many_rows(folder: Path) -> Weights:
    weights = random_weights(dataclasses.replace(SMALL, vocab_size=713), 5)
    write_hugging_face(folder, vocab_size=713)
    (folder / "model.safetensors").write_bytes(noted(hugging_face_tensors(weights), {"format": "pt"}))
    return weights


@refuses("has 301 pieces, but the checkpoint's vocabulary has 300 rows: more pieces than rows")
def a_tokenizer_with_more_pieces_than_rows(folder: Path) -> None:
    write_tokenizer(folder / "tokenizer.model", 301)
    write_hugging_face(folder)


# Files that are something else ----------------------------------------------------------------------------------------


@loads()
def metadata_null(folder: Path) -> Weights:
    return hugging_face(folder, note=None)


@loads()
def a_header_of_five_megabytes(folder: Path) -> Weights:
    return hugging_face(folder, note={"ss_tag_frequency": json.dumps({"a": 1}) * 10, "notes": "x" * (5 << 20)})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13\n"
PAGE = b"\xef\xbb\xbf\r\n  <!DOCTYPE HTML><html><body>Sign in</body></html>"


def replaced(folder: Path, write: Maker, name: str, data: bytes) -> None:
    write(folder)
    (folder / name).write_bytes(data)


@refuses("config.json: it is a Git-LFS pointer")
def a_pointer_for_config_json(folder: Path) -> None:
    replaced(folder, write_hugging_face, "config.json", POINTER)


@refuses("params.json: it is a web page")
def a_page_for_params_json(folder: Path) -> None:
    replaced(folder, write_meta, "params.json", PAGE)


@refuses("model.safetensors.index.json: it is a Git-LFS pointer")
def a_pointer_for_the_index(folder: Path) -> None:
    replaced(folder, lambda f: write_hugging_face(f, files=2), INDEX, POINTER)


@refuses("generation_config.json: it is a web page")
def a_page_for_generation_config_json(folder: Path) -> None:
    replaced(folder, write_hugging_face, "generation_config.json", PAGE)


@refuses("tokenizer.model: found a Git-LFS pointer")
def a_pointer_for_the_tokenizer(folder: Path) -> None:
    replaced(folder, write_hugging_face, "tokenizer.model", POINTER)


@refuses("tokenizer.model: found a web page")
def a_page_for_the_tokenizer(folder: Path) -> None:
    replaced(folder, write_hugging_face, "tokenizer.model", PAGE)


@refuses("model.safetensors is a web page")
def a_page_for_the_weights(folder: Path) -> None:
    replaced(folder, write_hugging_face, "model.safetensors", PAGE)


@loads()
def a_file_of_llama2c_without_a_magic_number(folder: Path) -> Weights:
    weights = random_weights(SMALL, 0, tied=True)
    (folder / "stories.bin").write_bytes(version_0(SMALL, weights))
    (folder / "other.bin").write_bytes(b"something else")
    return weights


@loads("model.safetensors is read; model-Q8_0.gguf beside it is not")
def a_gguf_file_beside_what_it_was_made_from(folder: Path) -> Weights:
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF")
    return hugging_face(folder)


@loads()
def a_gguf_file_among_files_of_a_trainer(folder: Path) -> Weights:
    weights = write_gguf(folder, config=SMALL)
    (folder / "best.pt").write_bytes(b"x")
    return weights


@refuses("holds no checkpoint .*; its folder 'gguf' holds one: give that")
def a_gguf_file_one_folder_below(folder: Path) -> None:
    write_gguf(folder / "gguf", config=SMALL)


@refuses("model.safetensors is a Git-LFS pointer.*beside model.safetensors lies model.gguf: give that file")
def a_damaged_file_beside_a_gguf_file(folder: Path) -> None:
    write_gguf(folder, config=SMALL)
    replaced(folder, write_hugging_face, "model.safetensors", POINTER)


@refuses("model.safetensors is a text that begins with 'Access to model meta-llama/Llama-2-7b-hf is restricted")
def words_of_a_server_for_the_weights(folder: Path) -> None:
    text = b"Access to model meta-llama/Llama-2-7b-hf is restricted.\nPlease log in."
    replaced(folder, write_hugging_face, "model.safetensors", text)


@refuses(r"tokenizer\.json: its model is of type 'Unigram'; BPE is supported. Use the checkpoint's tokenizer\.model")
def a_tokenizer_of_another_type(folder: Path) -> None:
    write_hugging_face(folder)
    (folder.parent / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unigram"}}')
