"""Model directories of real shapes with random weights, to measure speed and memory with."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from npllama.checkpoints.configs.meta import feed_forward_width
from npllama.config import ModelConfig
from npllama.numbers import NumberFormat, named
from npllama.store.export import Progress, write_model
from npllama.store.plan import asked_formats
from npllama.store.tokenizers import stored_sentencepiece
from npllama.text.sentencepiece import SentencePieceTokenizer
from npllama.weights import tensor_shapes

VOCABULARY = 32000
SHAPES = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12},
    "1b": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32},
}
"""Feed-forward widths follow from Meta's rule: 768, 2048, 5632, 11008."""

DRAWN = (1 << 22) + 1_000_003  # numbers drawn once; tensors begin at different offsets in them


def shape_config(shape: str, max_seq_len: int = 8192) -> ModelConfig:
    """The config of one of SHAPES."""
    sizes = SHAPES[shape]
    dim = sizes["dim"]
    return ModelConfig(
        dim=dim,
        n_layers=sizes["n_layers"],
        n_heads=sizes["n_heads"],
        n_kv_heads=sizes["n_kv_heads"],
        head_dim=dim // sizes["n_heads"],
        hidden_dim=feed_forward_width(dim),
        vocab_size=VOCABULARY,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_seq_len=max_seq_len,
    )


class _Tensor(NamedTuple):
    """A matrix of variance 1/columns, or a norm of ones, in rows made on demand."""

    shape: tuple[int, ...]
    drawn: np.ndarray
    start: int
    dtype: str = "f32"
    source: str = "random weights"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1, float32."""
        if len(self.shape) == 1:
            return np.ones(stop - start, np.float32)
        columns = self.shape[1]
        at = np.arange(self.start + start * columns, self.start + stop * columns) % len(self.drawn)
        return (self.drawn[at] / np.float32(math.sqrt(columns))).reshape(stop - start, columns)

    def encoded(self, number_format: NumberFormat, start: int, stop: int) -> dict[str, np.ndarray]:
        """The same rows in a number format."""
        return number_format.encode(self.rows(start, stop), self.dtype)


class RandomCheckpoint:
    """What the exporter needs of a checkpoint, made of random numbers."""

    tied = False

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.folder = Path("random weights")
        drawn = np.random.default_rng(seed).standard_normal(DRAWN, dtype=np.float32)
        self.tensors: dict[str, _Tensor] = {}
        for name, shape in tensor_shapes(config).items():
            self.tensors[name] = _Tensor(shape, drawn, 7919 * len(self.tensors))


def write_random_model(
    out: Path, config: ModelConfig, dtype: str, tokenizer: Path, progress: Progress | None = None
) -> None:
    """Write a model directory of random weights; its tokenizer is a given one, filled up to the vocabulary's size."""
    filled = stored_sentencepiece(filled_tokenizer(tokenizer, config.vocab_size), config.vocab_size)
    source = RandomCheckpoint(config)
    write_model(source, out, asked_formats(named(dtype), source.tied), filled, False, progress)


def filled_tokenizer(path: Path, n_pieces: int) -> bytes:
    """A SentencePiece model with pieces added that no text reaches, up to n_pieces.

    A protobuf message may be continued: fields appended to it are further entries of its repeated field `pieces`.
    """
    missing = n_pieces - SentencePieceTokenizer(path).n_pieces
    return path.read_bytes() + b"".join(_piece(f"\ue000{i}") for i in range(missing))


def _piece(text: str) -> bytes:
    """Field 1 of ModelProto: {1: piece, 2: score}."""
    spelled = text.encode()
    body = bytes([0x0A, len(spelled)]) + spelled + b"\x15" + struct.pack("<f", -1e9)
    return bytes([0x0A, len(body)]) + body
