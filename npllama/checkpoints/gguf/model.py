"""GGUF files of llama.cpp as checkpoints: the model's config, weights and vocabulary from one file or several parts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npllama.checkpoints.checkpoint import Checkpoint, merge
from npllama.checkpoints.configs import rope_keys
from npllama.checkpoints.configs.family import refuse_architecture
from npllama.checkpoints.configs.meta import LLAMA_3_CONTEXTS, LLAMA_3_VOCABULARY
from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.gguf.reader import BlockView, GgufFile, Numbers, read_gguf
from npllama.checkpoints.shard import Shard
from npllama.checkpoints.tensors import Tensor, View
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, UsageError, quote
from npllama.system.values import get, need, show
from npllama.weights import gguf_name, tensor_shapes

GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAX_PARTS = 1024
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
BLOCK_LAYOUT = 2  # general.quantization_version of the layouts that blocks.py reads

READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length"),
    *("attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout", "expert_used_count", "rope.scaling.finetuned"}
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.layer_norm_epsilon": (),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}
"""Keys of other architectures below "llama." -> the values that change nothing."""

DEFAULT_IDS = {"gpt2": 11}
"""Begin and end of text of a vocabulary that does not say them. Source: llama.cpp, llama-vocab.cpp."""
ADDED = (3, 4)  # control tokens, and those that a user defined
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = {
    *(
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<EOT>",
    ),
    *("\u2581<EOT>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
}
"""Tokens that end a text or a turn by their name, if not ordinary ones. Source: llama.cpp, llama-vocab.cpp."""


def open_gguf(path: Path, pool: Pool) -> Checkpoint:
    """A GGUF file, or all parts of one of which `path` is any; CheckpointError for what is not a LLaMA."""
    parts = _parts(path, pool)
    first = parts[0]
    try:
        return _open(parts, pool)
    except UsageError as error:
        raise CheckpointError(f"{first.file.name}: {error}") from error


def _open(parts: Sequence[GgufFile], pool: Pool) -> Checkpoint:
    first, metadata = parts[0], parts[0].metadata
    _check_kind(metadata)
    tensors: dict[str, object] = {name: view for part in parts for name, view in part.tensors.items()}
    tables = {name: _table(name, tensors.pop(name)) for name in ROPE_TABLES if name in tensors}
    if any(isinstance(view, BlockView) for view in tensors.values()):
        layout = metadata.get("general.quantization_version", BLOCK_LAYOUT)
        if layout != BLOCK_LAYOUT:
            raise UsageError(
                f"general.quantization_version is {show(layout)}, but 2 is needed; quantize the model again"
            )
    said = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    vocabulary = vocabulary_of(metadata)
    config = _config(said, _rows(first, tensors), tables, vocabulary or {})
    shapes = tensor_shapes(config)
    if tied := "output.weight" not in tensors:
        del shapes["output"]
    shard = Shard(first.file.name, tensors, (), [])
    found = shard.select(shapes, gguf_name)
    return Checkpoint(
        layout="gguf",
        folder=first.file.path.parent,
        config=config,
        tensors={name: merge(name, shape, [found[name]], "its metadata") for name, shape in shapes.items()},
        tied=tied,
        warnings=(*_warnings(said, config), *shard.notes),
        pool=pool,
        vocabulary=vocabulary,
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def _parts(path: Path, pool: Pool) -> list[GgufFile]:
    """One file, or the parts of a split one in order; each says its number, and the first all of the metadata."""
    named = GGUF_PART.fullmatch(path.name)
    given = read_gguf(InputFile(path, pool))
    count = given.metadata.get("split.count", 1)
    if count in (0, 1):
        return [given]
    if named is None or type(count) is not int or not 1 < count <= MAX_PARTS or count != int(named[3]):
        raise CheckpointError(
            f"{path.name} is a part of {show(count)} according to its metadata; give it the name that it had, "
            "NAME-00001-of-0000N.gguf"
        )
    parts = []
    for i in range(count):
        place = path.parent / f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf"
        if not os.path.exists(place):
            raise CheckpointError(f"{place.name} is missing beside {path.name}; download all parts")
        part = given if place.name == path.name else read_gguf(InputFile(place, pool))
        if (part.metadata.get("split.count"), part.metadata.get("split.no")) != (count, i):
            raise CheckpointError(f"{place.name} is another part than its name says; download all parts again")
        parts.append(part)
    n_tensors = sum(len(part.tensors) for part in parts)
    unique = len({name for part in parts for name in part.tensors})
    announced = parts[0].metadata.get("split.tensors.count", n_tensors)
    if unique != n_tensors or n_tensors != announced:
        raise CheckpointError(
            f"{parts[0].file.name} and its other parts have {unique:,} tensors, but {show(announced)} are announced; "
            "they do not belong together: download all again"
        )
    return parts


# Metadata -------------------------------------------------------------------------------------------------------------


def _check_kind(metadata: Mapping[str, object]) -> None:
    """UsageError unless this is a language model of the architecture."""
    kind = get(metadata, "general.type", "model")
    if kind != "model":
        raise UsageError(f"general.type is {show(kind)}, but 'model' is needed; give the file of the model itself")
    refuse_architecture("general.architecture", metadata.get("general.architecture"), ("llama",))


def _config(
    said: Mapping[str, object], rows: int, tables: Mapping[str, tuple[float, ...]], vocabulary: Mapping[str, object]
) -> ModelConfig:
    """The config of a file: `said` are the keys below "llama.", `rows` those of the embedding."""
    for key, neutral in NEUTRAL.items():
        if key in said and neutral and said[key] not in neutral:
            raise UsageError(f"llama.{key} is {show(said[key])}, which is not supported; use a checkpoint of a LLaMA")
    dim, n_heads, context = (need(said, key) for key in ("embedding_length", "attention.head_count", "context_length"))
    tokens = vocabulary.get("tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise UsageError(
            f"the vocabulary has {len(tokens):,} tokens, but token_embd.weight {rows:,} rows; download the file again"
        )
    ids = DEFAULT_IDS.get(str(vocabulary.get("model")))
    head_dim = _head_dim(said, dim, n_heads)
    short, long = (tables.get(name) for name in ROPE_TABLES[1:])
    rope = {key.removeprefix("rope."): value for key, value in said.items() if key.startswith("rope.")}
    return ModelConfig(
        dim=dim,
        n_layers=need(said, "block_count"),
        n_heads=n_heads,
        n_kv_heads=get(said, "attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=need(said, "feed_forward_length"),
        vocab_size=rows,
        norm_eps=need(said, "attention.layer_norm_rms_epsilon"),
        rope_theta=get(said, "rope.freq_base", rope_keys.DEFAULT_THETA),
        max_seq_len=context,
        bos_token_id=get(vocabulary, "bos_token_id", ids or 1),
        eos_token_ids=_ends(vocabulary, ids or 2),
        rope_scaling=rope_keys.from_gguf(rope, context, tables.get(ROPE_TABLES[0]), short, long),
        sliding_window=_window(said),
    )


def _ends(vocabulary: Mapping[str, Any], default: int) -> tuple[int, ...]:
    """Ids that end a text: those of the keys, the first one first, and control tokens that are known by their name."""
    keyed = [vocabulary[key] for key in END_KEYS if key in vocabulary] or [default]
    tokens, types = vocabulary.get("tokens", ()), vocabulary.get("token_type", ())
    named = [
        i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind in ADDED and token in END_TEXTS
    ]
    return tuple(dict.fromkeys([*keyed, *named]))


def _head_dim(said: Mapping[str, object], dim: object, n_heads: object) -> int:
    """Elements of a head, which keys, values and rotary positions must share."""
    if type(dim) is not int or type(n_heads) is not int or n_heads < 1:
        raise UsageError(f"a width of {show(dim)} and {show(n_heads)} heads are impossible; download the file again")
    found = get(said, "attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(said, key, found) != found:
            raise UsageError(
                f"llama.{key} is {show(said[key])}, but heads have {show(found)} elements: not supported; use a "
                "checkpoint of a LLaMA"
            )
    return found


def _window(said: Mapping[str, object]) -> int | None:
    """A sliding window, which today's files of Mistral 7B do not mention: llama.cpp runs it without."""
    window = get(said, "attention.sliding_window", 0)
    if type(window) is not int:
        raise UsageError(f"llama.attention.sliding_window is {show(window)}, but a whole number is needed")
    return window or None


def _rows(file: GgufFile, tensors: Mapping[str, object]) -> int:
    embedding = tensors.get("token_embd.weight")
    if not isinstance(embedding, View) or len(embedding.shape) != 2:
        what = "no tensors: it is a vocabulary alone" if not tensors else "no matrix 'token_embd.weight'"
        raise CheckpointError(f"{file.file.name} has {what}; give the file of a whole model")
    return embedding.shape[0]


def _table(name: str, view: object) -> tuple[float, ...]:
    if not isinstance(view, View) or len(view.shape) != 1 or view.dtype != "f32":
        raise UsageError(f"{name} is no vector of float32 numbers; the file is damaged: download it again")
    return tuple(Tensor(name, view.shape, (view,)).rows(0, view.shape[0]).tolist())


def _warnings(said: Mapping[str, object], config: ModelConfig) -> list[str]:
    known = {*READ, *WITHOUT_EFFECT, *NEUTRAL, *(f"rope.scaling.{name}" for name in rope_keys.NEUTRAL)}
    found = [f"{quote('llama.' + key)} is not known and was ignored" for key in sorted(said.keys() - known)]
    long = config.max_seq_len > LLAMA_3_CONTEXTS[False]
    if config.vocab_size == LLAMA_3_VOCABULARY and long and config.rope_scaling is None:
        found.append(
            "the file has no rope_freqs.weight, as the first conversions of Llama 3.1: beyond 8,192 tokens its text "
            "degrades; a newer file of the model has it"
        )
    return found


# Vocabulary -----------------------------------------------------------------------------------------------------------

PREFIX = "tokenizer.ggml."


def vocabulary_of(metadata: Mapping[str, object]) -> dict[str, object] | None:
    """The tokenizer that a file carries, lists as Python has them; None where there is none.

    Keys are those of the file without "tokenizer.ggml.", and chat_template. An id that is no token's is left out where
    no text needs it, and refused where it is the unknown token's, or that of a beginning or an end. UsageError.
    """
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    if "tokens" not in found:
        return None
    if "tokenizer.chat_template" in metadata:
        found["chat_template"] = metadata["tokenizer.chat_template"]
    n = len(_texts(found, "tokens"))
    if "merges" in found:
        _texts(found, "merges")
    for name, kinds, what in (("scores", "f", "floating-point"), ("token_type", "iu", "whole")):
        if name in found:
            values = found[name]
            if not isinstance(values, Numbers) or values.array.dtype.kind not in kinds or len(values.array) != n:
                raise UsageError(f"{PREFIX}{name} is no array of {n:,} {what} numbers; download the file again")
            found[name] = values.array.tolist()
    for key in [key for key in found if key.endswith("_token_id")]:
        token = found[key]
        if type(token) is int and 0 <= token < n:
            continue
        if key in (*END_KEYS, "bos_token_id", "unknown_token_id"):
            raise UsageError(f"{PREFIX}{key} is {show(token)}, but a whole number from 0 to {n - 1:,} is needed")
        del found[key]
    return found


def _texts(found: Mapping[str, object], key: str) -> list[str]:
    texts = found[key]
    if not isinstance(texts, list):
        raise UsageError(f"{PREFIX}{key} is no list of texts; the file is damaged: download it again")
    return texts
