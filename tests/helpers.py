"""Small checkpoints and tokenizers written byte by byte, so that tests need neither torch nor files of others."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tiny_sentencepiece import BYTES, NORMAL, USUAL, written

from npllama.config import ModelConfig
from npllama.numbers import FORMATS, named
from npllama.numbers.bf16 import bf16_bits
from npllama.store.export import quantize_model
from npllama.version import version_of

TINY = ModelConfig(
    dim=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=4,
    hidden_dim=44,
    vocab_size=300,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=64,
)
"""Grouped heads (6 over 2) and a feed-forward width that is no multiple of 8, let alone of 32."""

SAFETENSORS_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "f64": "F64"}


def random_weights(config: ModelConfig, seed: int, tied: bool = False) -> dict[str, np.ndarray]:
    """Weights of a random model, float32, by Meta's names without ".weight"; sized so that logits are ordinary."""
    c, rng = config, np.random.default_rng(seed)
    D, F, HE, GE = c.dim, c.hidden_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices = {"attention.wq": (HE, D), "attention.wk": (GE, D), "attention.wv": (GE, D), "attention.wo": (D, HE)}
    matrices |= {"feed_forward.w1": (F, D), "feed_forward.w2": (D, F), "feed_forward.w3": (F, D)}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (c.vocab_size, D)}
    for l in range(c.n_layers):
        shapes |= {f"layers.{l}.{name}": shape for name, shape in matrices.items()}
        shapes |= {f"layers.{l}.attention_norm": (D,), f"layers.{l}.ffn_norm": (D,)}
    shapes |= {"norm": (D,)} if tied else {"norm": (D,), "output": (c.vocab_size, D)}
    return {name: _draw(rng, shape).astype("<f4") for name, shape in shapes.items()}


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape) / np.sqrt(shape[-1]) if len(shape) == 2 else rng.uniform(0.5, 1.5, shape)


def write_safetensors_checkpoint(
    folder: Path,
    config: ModelConfig = TINY,
    seed: int = 0,
    dtype: str = "f32",
    tied: bool = False,
    weights: dict[str, np.ndarray] | None = None,
    dtypes: dict[str, str] | None = None,
    tokenizer: bool = True,
) -> dict[str, np.ndarray]:
    """Write a Hugging Face folder (config.json, model.safetensors, tokenizer.model if asked); returns its weights.

    dtype "f32", "f16", "bf16" or "f64" of all tensors, `dtypes` that of some. The rows of q and k stand in Hugging
    Face's order. The weights returned have Meta's names and order, float32 before rounding to the dtype.
    """
    weights = random_weights(config, seed, tied) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config, tied)))
    tensors = {}
    for name, w in weights.items():
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.rpartition(".")[2])
        rows = w if heads is None else halves_from_pairs(w, heads)
        tensors[hugging_face_name(name)] = (rows, (dtypes or {}).get(name, dtype))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    if tokenizer:
        write_tokenizer(folder / "tokenizer.model", config.vocab_size)
    return weights


def write_model_directory(
    folder: Path,
    config: ModelConfig = TINY,
    seed: int = 0,
    dtype: str = "f32",
    tied: bool = False,
    n_pieces: int | None = None,
    weights: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a model directory with np.save, not with the exporter; returns its weights by Meta's names, float32.

    n_pieces of the tokenizer: by default as many as there are rows of the embedding.
    """
    weights = random_weights(config, seed, tied) if weights is None else weights
    n_pieces = config.vocab_size if n_pieces is None else n_pieces
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer.model", n_pieces)
    digest = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    tokenizer = {"file": "tokenizer.model", "size": n_pieces, "sha256": digest}
    tensors = {kind: _save_kind(folder, kind, w, dtype) for kind, w in stacked(weights, config.n_layers).items()}
    manifest = {
        "format": "npllama",
        "version": version_of(config.to_json()),
        "config": config.to_json(),
        "tokenizer": tokenizer,
        "tensors": tensors,
    }
    (folder / "npllama.json").write_text(json.dumps(manifest))
    return weights


def write_any_model(folder: Path, dtype: str, config: ModelConfig = TINY) -> None:
    """A tiny random model directory in any number format; the quantized ones are made of float32 by the exporter."""
    if not FORMATS[dtype].quantized:
        write_model_directory(folder, config, dtype=dtype)
        return
    write_model_directory(folder.with_name(f"{folder.name}-f32"), config)
    quantize_model(folder.with_name(f"{folder.name}-f32"), folder, dtype)


def quantize(w: np.ndarray, number_format: str) -> Any:
    """float32 (..., N, K) as the NamedTuple of a quantized format."""
    found = named(number_format, quantized_only=True)
    return found.assemble(found.encode(w, "f32"), w.shape)


def as_mapped(w: Any) -> Any:
    """A weight whose arrays nobody may write, as mapped files are: the types that models' kernels are compiled for."""
    if not isinstance(w, np.ndarray):
        return type(w)(*(as_mapped(part) if isinstance(part, np.ndarray) else part for part in w))
    view = w.view()
    view.flags.writeable = False
    return view


def stacked(weights: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Weights by Meta's names -> by kind, layers stacked."""
    in_layers = {name.rpartition(".")[2]: name for name in weights if name.startswith("layers.0.")}
    kinds = {kind: weights[kind] for kind in weights if not kind.startswith("layers.")}
    for kind, name in in_layers.items():
        kinds[kind] = np.stack([weights[name.replace("layers.0.", f"layers.{l}.")] for l in range(n_layers)])
    return kinds


def _save_kind(folder: Path, kind: str, w: np.ndarray, dtype: str) -> dict[str, object]:
    number_format = "f32" if "norm" in kind else dtype
    stored = as_dtype(w, number_format)
    np.save(folder / f"{kind}.npy", stored)
    digest = hashlib.sha256((folder / f"{kind}.npy").read_bytes()).hexdigest()
    record = {"file": f"{kind}.npy", "dtype": stored.dtype.str, "shape": list(w.shape), "sha256": digest}
    arrays = {"values" if number_format == "f32" else "bits": record}
    return {"format": number_format, "shape": list(w.shape), "arrays": arrays}


def hugging_face_config(config: ModelConfig, tied: bool) -> dict[str, object]:
    c = config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_seq_len,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_ids),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }


HUGGING_FACE_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}


def hugging_face_name(name: str) -> str:
    """ "layers.0.attention.wq" -> "model.layers.0.self_attn.q_proj.weight"."""
    if name.startswith("layers."):
        _, l, rest = name.split(".", 2)
        return f"model.layers.{l}.{HUGGING_FACE_NAMES[rest]}.weight"
    return f"{HUGGING_FACE_NAMES[name]}.weight"


def halves_from_pairs(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of q or k from Meta's order (pairs adjacent) to Hugging Face's (first half, second half of each head)."""
    rows, columns = w.shape
    return w.reshape(n_heads, rows // n_heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def safetensors_bytes(tensors: dict[str, tuple[np.ndarray, str]]) -> bytes:
    """A safetensors file: (values, dtype) by name. Source: the format's own description, huggingface/safetensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, (values, dtype) in tensors.items():
        data = as_dtype(values, dtype).tobytes()
        end = offset + len(data)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(values.shape), "data_offsets": [offset, end]}
        parts.append(data)
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as they are stored under a dtype's name (bfloat16 as its bits)."""
    if dtype == "bf16":
        return bf16_bits(values)
    with np.errstate(over="ignore"):
        return values.astype({"f32": "<f4", "f16": "<f2", "f64": "<f8"}[dtype])


def write_tokenizer(path: Path, n_pieces: int) -> None:
    """Write a SentencePiece model of n_pieces (260 or more): control pieces, 256 bytes, single characters."""
    letters = "\u2581" + "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789.,!?'-"
    pieces = [*USUAL, *BYTES, *((letter, NORMAL) for letter in letters)][:n_pieces]
    pieces += [(chr(0x4E00 + i), NORMAL) for i in range(n_pieces - len(pieces))]
    path.write_bytes(written(pieces))
