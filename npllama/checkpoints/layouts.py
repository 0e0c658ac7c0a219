"""The three kinds of checkpoints: a release of Meta, a Hugging Face folder, a training checkpoint of llama2.c."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from npllama.checkpoints import names
from npllama.checkpoints.checkpoint import Checkpoint, merge
from npllama.checkpoints.configs import hugging_face, meta
from npllama.checkpoints.files import InputFile, Pool, read_whole, sniff
from npllama.checkpoints.pytorch import read_legacy, read_zip
from npllama.checkpoints.safetensors import read_safetensors
from npllama.checkpoints.shard import Rename, Shard, equal, state_dict
from npllama.checkpoints.tensors import Tensor, View
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, UsageError, quote
from npllama.system import strict_json
from npllama.weights import KINDS, hugging_face_name, kind_of, tensor_shapes

META_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
META_WHOLE = "consolidated.safetensors"
INDEX = re.compile(r"(model\.safetensors|pytorch_model\.bin)\.index(\.[\w-]+)?\.json")
HF_SHARD = re.compile(r"(model|pytorch_model)(\.[\w-]+)?-\d{5}-of-\d{5}\.(safetensors|bin)")
HF_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model-00001-of-00001.safetensors", "pytorch_model-00001-of-00001.bin"),
)
"""The first that is there is taken, as transformers does, whose older files may lie beside newer ones."""
LLAMA_1 = "layers.0.attention.inner_attention.rope.freqs"
LLAMA_1_CONTEXT = 2048
MAX_FILES = 1024


def read_tree(file: InputFile) -> object:
    """The content of a weight file: the object tree of PyTorch's, or the tensors of a safetensors file by name."""
    readers: dict[str, Callable[[InputFile], object]] = {
        "zip": read_zip,
        "legacy": read_legacy,
        "safetensors": read_safetensors,
    }
    kind = sniff(file)
    if kind not in readers:
        raise CheckpointError(
            f"{file.name} is a file of {kind}, but its name says PyTorch or safetensors; give it the name that it had"
        )
    return readers[kind](file)


def read_json(
    path: Path, max_bytes: int = strict_json.MAX_BYTES, max_digits: int = strict_json.MAX_DIGITS
) -> dict[str, object]:
    """A small JSON object of a checkpoint; CheckpointError naming the file."""
    data = read_whole(path, max_bytes)
    try:
        return strict_json.parse_object(data, max_bytes, max_digits)
    except UsageError as error:
        raise CheckpointError(f"{path.name}: {error}") from error


# Meta -----------------------------------------------------------------------------------------------------------------


def is_meta(tree: object, file: InputFile) -> bool:
    """Whether the tensors of a weight file have Meta's names."""
    return any(names.plain(name).endswith("layers.0.attention_norm.weight") for name in state_dict(tree, file))


def open_meta(paths: Sequence[Path], pool: Pool) -> Checkpoint:
    """A release of Meta: model-parallel shards consolidated.NN.pth in order, and params.json beside them."""
    folder = paths[0].parent
    params = _beside(paths[0], "params.json")
    shards = []
    for path in paths:
        shards.append(_single(path, pool, names.meta_names))
    old = LLAMA_1 in shards[0].tensors
    config = _meta_config(params, shards, LLAMA_1_CONTEXT if old else meta.CONTEXT)
    found = [shard.select(tensor_shapes(config), lambda name: name) for shard in shards]
    tensors = {
        name: merge(name, shape, [views[name] for views in found], "params.json")
        for name, shape in tensor_shapes(config).items()
    }
    warnings = [note for shard in shards for note in shard.notes]
    warnings += [
        f"params.json: {quote(key)} is not known and was ignored" for key in sorted(params.keys() - meta.KNOWN)
    ]
    if config.norm_eps == 1e-6 and config.vocab_size == 32000 and not old:
        warnings.append(
            "params.json says norm_eps 1e-06, as the first downloads of LLaMA 2 7B did by mistake; if this is LLaMA 2, "
            "correct it to 1e-05 (github.com/meta-llama/llama/issues/771)"
        )
    return _checkpoint("meta", folder, config, tensors, pool, warnings)


def _meta_config(params: Mapping[str, object], shards: Sequence[Shard], context: int) -> ModelConfig:
    """params.json, and the number of rows of the embedding, which it leaves open."""
    embedding = shards[0].tensors.get("tok_embeddings.weight")
    if not isinstance(embedding, View) or len(embedding.shape) != 2:
        like = names.resembling("tok_embeddings.weight", (name for name in shards[0].tensors if "embed" in name))
        raise CheckpointError(
            f"{shards[0].source} has no matrix 'tok_embeddings.weight'{f' (there is {quote(like)})' if like else ''}; "
            "it is no checkpoint of Meta's LLaMA 2, which is what params.json belongs to"
        )
    rows = embedding.shape[0]
    if embedding.shape[1] == params.get("dim"):
        rows *= len(shards)  # split over the vocabulary
    try:
        config = meta.from_meta(params, vocab_size=rows, max_seq_len=context)
    except UsageError as error:
        raise CheckpointError(f"params.json: {error}") from error
    return config


# llama2.c -------------------------------------------------------------------------------------------------------------


def is_llama2c(tree: object) -> bool:
    """Whether an object tree is a training checkpoint of llama2.c: the sizes stand beside the weights."""
    return isinstance(tree, dict) and "model_args" in tree and "model" in tree


def open_llama2c(tree: object, file: InputFile, pool: Pool) -> Checkpoint:
    """A training checkpoint of llama2.c (see is_llama2c); what its optimizer keeps is not looked at."""
    parts = [tree.get(key) for key in ("model_args", "model")] if isinstance(tree, dict) else []
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{file.name}: 'model' and 'model_args' must be dicts; it is damaged: download it again")
    try:
        config = meta.from_llama2c(tree["model_args"])
    except UsageError as error:
        raise CheckpointError(f"{file.name}: model_args: {error}") from error
    shard = Shard.of(file.name, [state_dict(tree, file)], names.meta_names)
    found = shard.select(tensor_shapes(config), lambda name: name)
    tensors = {name: merge(name, shape, [found[name]], "model_args") for name, shape in tensor_shapes(config).items()}
    return _checkpoint("llama2.c", file.path.parent, config, tensors, pool, shard.notes)


# Hugging Face ---------------------------------------------------------------------------------------------------------


BIASES = {"attention_bias": "self_attn", "mlp_bias": "mlp"}
"""Switch in config.json -> the part of a layer that has biases; they are accepted where all of them are zero."""


def open_hugging_face(weights: Path, pool: Pool) -> Checkpoint:
    """A Hugging Face folder: `weights` is its only weight file or the index of several, config.json lies beside it."""
    said = _beside(weights, "config.json")
    tie = said.get("tie_word_embeddings")
    if tie is not None and type(tie) is not bool:
        raise CheckpointError("config.json: tie_word_embeddings is neither true nor false; the file is damaged")
    biased = [key for key in BIASES if said.get(key) is True]
    warnings: list[str] = []
    unbiased = {key: said[key] for key in said if key not in biased}
    config = _hugging_face_config(unbiased, weights.parent, warnings.append)
    several = INDEX.fullmatch(weights.name)
    shard = _indexed(weights, pool, bool(tie)) if several else _single(weights, pool, names.hugging_face_names)
    zero = [key for key in biased if shard.has_bias(BIASES[key])]  # or refused by name, with the tensors
    if zero != biased:
        _hugging_face_config({key: said[key] for key in said if key not in zero}, weights.parent)  # refuses the others
    wanted = tensor_shapes(config)
    if tie:
        _tie(shard.tensors, wanted)
    found = shard.select(wanted, hugging_face_name)
    tensors = {name: merge(name, shape, [found[name]], "config.json") for name, shape in wanted.items()}
    for name, tensor in tensors.items():
        if kind_of(name) in (KINDS["wq"], KINDS["wk"]):
            tensors[name] = Tensor(name, tensor.shape, tensor.parts, neox_head_dim=config.head_dim)
    if tie and "output" in tensors and not equal(tensors["output"], tensors["tok_embeddings"]):
        raise CheckpointError(
            f"{shard.source}: 'lm_head.weight' differs from 'model.embed_tokens.weight', but config.json says "
            "tie_word_embeddings; correct the one that is wrong"
        )
    return _checkpoint("hugging-face", weights.parent, config, tensors, pool, [*warnings, *shard.notes], tied=bool(tie))


def _hugging_face_config(
    said: Mapping[str, object], folder: Path, warn: Callable[[str], None] = lambda text: None
) -> ModelConfig:
    """config.json, and the token ids of generation_config.json where there is one."""
    vocab_size, generation = said.get("vocab_size"), folder / hugging_face.GENERATION_CONFIG
    try:
        own = hugging_face.usable_ids(said, hugging_face.CONFIG, vocab_size, warn)
        other = read_json(generation) if os.path.exists(generation) else {}
        ids = hugging_face.usable_ids(other, hugging_face.GENERATION_CONFIG, vocab_size, warn)
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    try:
        return hugging_face.from_hugging_face({**said, "bos_token_id": None, "eos_token_id": None, **own}, ids)
    except UsageError as error:
        raise CheckpointError(f"config.json: {hugging_face.in_own_words(str(error))}") from error


def _tie(tensors: dict[str, object], wanted: dict[str, tuple[int, ...]]) -> None:
    """Tied weights are one tensor under either name, and perhaps under both."""
    if "lm_head.weight" not in tensors:
        del wanted["output"]
    elif "model.embed_tokens.weight" not in tensors:
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"]


def _single(path: Path, pool: Pool, rename: Rename) -> Shard:
    file = InputFile(path, pool)
    return Shard.of(file.name, [state_dict(read_tree(file), file)], rename)


def _indexed(index: Path, pool: Pool, tied: bool) -> Shard:
    """Several files as one. The index says which files; where in them a tensor lies, they say themselves."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(_plain(file) for file in weight_map.values()):
        raise CheckpointError(
            f"{index.name}: weight_map must give each tensor a file name without a folder; the file is damaged: "
            "download it again"
        )
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_FILES:
        raise CheckpointError(
            f"{index.name}: weight_map names {len(files):,} files, but at most {MAX_FILES:,} are read"
        )
    needed = {name: file for name, file in weight_map.items() if not _may_be_absent(name, tied)}
    found, needed_files = [], set(needed.values())
    for name in files:
        if not os.path.exists(index.parent / name):
            if name not in needed_files:
                continue
            raise CheckpointError(
                f"{name} cannot be read: it is missing, though {index.name} names it; download it, or give the weight "
                "file that is meant"
            )
        file = InputFile(index.parent / name, pool)
        found.append(state_dict(read_tree(file), file))
    shard = Shard.of(index.name, found, names.hugging_face_names)
    known, _ = names.hugging_face_names({names.plain(name) for name in needed})
    for name, file in needed.items():
        if known[names.plain(name)] not in shard.tensors:
            raise CheckpointError(f"{file}: tensor {quote(name)} is missing, though {index.name} says it is there")
    return shard


def _may_be_absent(name: str, tied: bool) -> bool:
    """Whether an index may name a tensor that no file has: a buffer, or one of two names for tied weights."""
    short = names.plain(name)
    buffer = names.DERIVED.fullmatch(short) or names.MASK.fullmatch(short)
    return bool(buffer) or (tied and short.endswith(("lm_head.weight", "embed_tokens.weight")))


def _plain(name: object) -> bool:
    """A file name that cannot lead out of its folder (a link that lies in the folder is the user's own)."""
    return isinstance(name, str) and name.isascii() and re.fullmatch(r"[\w.-]+", name) is not None and name[0] != "."


# All ------------------------------------------------------------------------------------------------------------------


def _beside(weights: Path, name: str) -> dict[str, object]:
    path = weights.parent / name
    if not os.path.exists(path):
        raise CheckpointError(
            f"{name} is missing beside {weights.name}; download it too: it says the sizes of the model"
        )
    return read_json(path)


def _checkpoint(
    layout: str,
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    pool: Pool,
    warnings: Sequence[str] = (),
    tied: bool = False,
) -> Checkpoint:
    """Two names for the same elements of one storage are one tensor, whatever the config says."""
    if "output" in tensors and (tied or tensors["output"].parts == tensors["tok_embeddings"].parts):
        tied = True
        del tensors["output"]
    return Checkpoint(
        layout=layout, folder=folder, config=config, tensors=tensors, tied=tied, warnings=tuple(warnings), pool=pool
    )
