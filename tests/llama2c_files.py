"""Files of llama2.c in every version, and its tokenizer.bin, written as its export.py and tokenizer.py do."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
from helpers import TINY, random_weights

from npllama.config import ModelConfig

KINDS_0 = ["tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm"]
KINDS_1 = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]


def in_order(weights: dict[str, np.ndarray], kinds: list[str]) -> list[np.ndarray]:
    return [w for kind in kinds for name, w in weights.items() if name.rpartition(".")[2] == kind]


def sizes(c: ModelConfig) -> tuple[int, ...]:
    return c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len


def version_0(c: ModelConfig, weights: dict[str, np.ndarray]) -> bytes:
    tied = "output" not in weights
    head = struct.pack("<7i", *sizes(c)[:5], c.vocab_size if tied else -c.vocab_size, c.max_seq_len)
    tables = bytes(c.max_seq_len * c.head_dim * 4)
    body = b"".join(w.tobytes() for w in in_order(weights, KINDS_0))
    return head + body + tables + (b"" if tied else weights["output"].tobytes())


def header(c: ModelConfig, version: int, tied: int, group: int | None = None) -> bytes:
    head = b"24ka" + struct.pack("<i7iB", version, *sizes(c), tied)
    return (head + (b"" if group is None else struct.pack("<i", group))).ljust(256, b"\0")


def version_1(c: ModelConfig, weights: dict[str, np.ndarray]) -> bytes:
    kinds = [*KINDS_1, *(["output"] if "output" in weights else [])]
    return header(c, 1, "output" not in weights) + b"".join(w.tobytes() for w in in_order(weights, kinds))


def version_2(c: ModelConfig, weights: dict[str, np.ndarray], group: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """The file, and the weights that it stands for."""
    rounded = dict(weights)
    parts = {name: w.tobytes() for name, w in weights.items()}
    for name, w in weights.items():
        if w.ndim == 2:
            groups = w.reshape(-1, group)
            scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
            codes = np.round(groups / scale).astype(np.int8)
            parts[name] = codes.tobytes() + scale.astype("<f4").tobytes()
            rounded[name] = (codes * scale).reshape(w.shape)
    kinds = [*KINDS_1, *(["output"] if "output" in weights else [])]
    body = b"".join(parts[name] for kind in kinds for name in weights if name.rpartition(".")[2] == kind)
    return header(c, 2, "output" not in weights, group) + body, rounded


def vocabulary(n: int, **changes: bytes) -> bytes:
    """A tokenizer.bin of n pieces; `changes` by number, as p7=b"...", replace a piece."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    pieces += [" é".encode(), *(f"x{i}".encode() for i in range(n))]
    pieces = [changes.get(f"p{i}", piece) for i, piece in enumerate(pieces[:n])]
    return struct.pack("<i", 7) + b"".join(struct.pack("<fi", -i, len(p)) + p for i, p in enumerate(pieces))


def write_llama2c_bin(folder: Path, version: int = 0, seed: int = 0, tied: bool = True) -> None:
    """Write a folder with model.bin and tokenizer.bin."""
    config = TINY if version < 2 else dataclasses.replace(TINY, hidden_dim=48, vocab_size=304)
    weights = random_weights(config, seed, tied)
    data = version_2(config, weights, 24)[0] if version == 2 else (version_0, version_1)[version](config, weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    (folder / "tokenizer.bin").write_bytes(vocabulary(config.vocab_size))
