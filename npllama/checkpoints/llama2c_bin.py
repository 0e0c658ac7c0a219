"""Files that llama2.c's run.c and runq.c read: float32 weights (versions 0 and 1), 8-bit weights (2), a tokenizer.

    version 0: seven i32 sizes | tensors | tables of rotary positions     vocabulary < 0: output is not tok_embeddings
    version 1: "24ka" | i32 version | seven i32 | u8 tied | to byte 256 | tensors
    version 2: the same, i32 group size after tied; each matrix is i8 codes, then f32 scales, one for each group

The sizes are dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocabulary, context. They give the size of the file, which
must be just that. Norms come without an epsilon and positions without a base: 1e-5 and 10000, as run.c has them.
Source: karpathy/llama2.c, export.py and run.c.
"""

from __future__ import annotations

import math
import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npllama.checkpoints.checkpoint import Checkpoint
from npllama.checkpoints.configs.rope_keys import DEFAULT_THETA
from npllama.checkpoints.files import InputFile, Pool, read_whole
from npllama.checkpoints.tensors import Storage, Tensor, View, as_one_axis
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, UsageError, quote
from npllama.system.values import whole
from npllama.weights import tensor_names, tensor_shapes

MAGIC = b"24ka"
HEADER = 256  # bytes, of versions 1 and 2
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
NORM_EPS = 1e-5
PIECE = 1 << 17  # codes are read and decoded in pieces of this many, whose numbers stay in the L2 cache
MAX_GROUP = 1 << 16

ATTENTION, FEED_FORWARD = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
ORDER_0 = ("tok_embeddings", "attention_norm", *ATTENTION, "ffn_norm", *FEED_FORWARD, "norm")
ORDER_1 = ("attention_norm", "ffn_norm", "norm", "tok_embeddings", *ATTENTION, *FEED_FORWARD)
"""Kinds as they follow each other in version 0, and in the later ones."""


@dataclass(frozen=True)
class GroupView(View):
    """A matrix of 8-bit codes whose groups, running on over its rows, have a float32 scale each; gives float32."""

    group: int

    def fill(self, out: np.ndarray, start: int) -> None:
        """Decode rows `start` to `start + len(out)` into `out`, C-contiguous; memory beside it is a few MB."""
        flat = as_one_axis(out)
        first = start * self.shape[1]
        for at in range(0, flat.size, PIECE):
            low, high = first + at, first + min(at + PIECE, flat.size)
            codes = np.empty(high - low, np.int8)
            self.storage.file.read_into(self.storage.start + low, codes)
            groups = np.arange(low // self.group, -(-high // self.group))
            scales = np.empty(len(groups), "<f4")
            self.storage.file.read_into(self.storage.start + self.storage.numel + 4 * int(groups[0]), scales)
            each = np.repeat(scales.astype(np.float32), self.group)[low - int(groups[0]) * self.group :]
            with np.errstate(invalid="ignore", over="ignore"):
                flat[at : at + high - low] = codes * each[: high - low]


def open_llama2c_bin(path: Path, pool: Pool) -> Checkpoint:
    """A file of llama2.c, with the tokenizer.bin beside it; CheckpointError unless it has all that it says."""
    file = InputFile(path, pool)
    version, sizes, tied, group = _header(file)
    try:
        config = ModelConfig(**sizes, head_dim=_head_dim(sizes), norm_eps=NORM_EPS, rope_theta=DEFAULT_THETA)  # type: ignore[arg-type]
    except UsageError as error:
        raise CheckpointError(f"{file.name}: {error}") from error
    views, end = _views(file, version, config, tied, group)
    if end != file.size:
        raise CheckpointError(
            f"{file.name} has {file.size:,} bytes, but what its header says takes {end:,}; it is damaged or "
            "incomplete: download it again"
        )
    return Checkpoint(
        layout="llama2.c-bin",
        folder=path.parent,
        config=config,
        tensors={name: Tensor(name, view.shape, (view,)) for name, view in views.items()},
        tied=tied,
        warnings=(),
        pool=pool,
        vocabulary=_vocabulary(path.parent, config.vocab_size),
    )


def _header(file: InputFile) -> tuple[int, dict[str, int], bool, int]:
    """Version, sizes, whether output is the embedding, and the group size (0 but for version 2)."""
    head = file.read(0, min(file.size, HEADER))
    if not head.startswith(MAGIC):
        if len(head) < 28:
            raise CheckpointError(f"{file.name} has {file.size} bytes, which is no file of llama2.c; download it again")
        sizes = dict(zip(SIZES, struct.unpack_from("<7i", head), strict=True))
        tied = sizes["vocab_size"] > 0
        return 0, {**sizes, "vocab_size": abs(sizes["vocab_size"])}, tied, 0
    if len(head) < HEADER:
        raise CheckpointError(f"{file.name} ends inside its header of {HEADER} bytes; download it again")
    version, *numbers, tied, group = struct.unpack_from("<i7iBi", head, 4)
    if version not in (1, 2):
        raise CheckpointError(f"{file.name} is of version {version} of llama2.c's files, but 0, 1 or 2 is needed")
    if tied not in (0, 1):
        raise CheckpointError(f"{file.name}: its header says neither tied nor untied output; download it again")
    if version == 1:
        return 1, dict(zip(SIZES, numbers, strict=True)), bool(tied), 0
    try:
        whole("the group size", group, 1, MAX_GROUP)
    except UsageError as error:
        raise CheckpointError(f"{file.name}: {error}") from error
    return 2, dict(zip(SIZES, numbers, strict=True)), bool(tied), group


def _head_dim(sizes: dict[str, int]) -> int:
    dim, n_heads = sizes["dim"], sizes["n_heads"]
    if n_heads < 1 or dim % n_heads:
        raise UsageError(f"the width {dim} is no multiple of the {n_heads} heads; the file is damaged or another one")
    return dim // n_heads


def _views(file: InputFile, version: int, config: ModelConfig, tied: bool, group: int) -> tuple[dict[str, View], int]:
    """Where each tensor lies, and where the file ends: kind after kind, and of each kind layer after layer."""
    shapes = tensor_shapes(config)
    at = HEADER if version else 4 * len(SIZES)
    views: dict[str, View] = {}
    for kind in ORDER_1 if version else ORDER_0:
        for name in tensor_names(kind, config.n_layers):
            views[name], at = _view(file, name, shapes[name], at, group)
    if version == 0:
        at += config.max_seq_len * config.head_dim * 4  # cosines and sines, which follow from the config
    if not tied:
        views["output"], at = _view(file, "output", shapes["output"], at, group)
    return views, at


def _view(file: InputFile, name: str, shape: tuple[int, ...], at: int, group: int) -> tuple[View, int]:
    """A tensor at a byte, and the byte after it."""
    numel = math.prod(shape)
    strides = (shape[1], 1) if len(shape) == 2 else (1,)
    if group and len(shape) == 2:
        if numel % group:
            raise CheckpointError(
                f"{file.name}: {quote(name)} has {numel:,} numbers, which are no whole groups of {group}; it is damaged"
            )
        return GroupView(Storage(file, "f32", 1, at, numel), 0, shape, strides, group), at + numel + 4 * numel // group
    return View(Storage(file, "f32", 4, at, numel, sys.byteorder == "big"), 0, shape, strides), at + 4 * numel


# tokenizer.bin --------------------------------------------------------------------------------------------------------

MAX_TOKENIZER = 64 << 20  # bytes
MAX_PIECE = 1 << 16  # bytes
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # of SentencePiece and of GGUF files
SPECIAL = {0: ("<unk>", UNKNOWN), 1: ("<s>", CONTROL), 2: ("</s>", CONTROL)}


def _vocabulary(folder: Path, vocab_size: int) -> dict[str, object] | None:
    """The tokenizer beside the weights: tok512.bin for 512 pieces, or tokenizer.bin."""
    for name in (f"tok{vocab_size}.bin", "tokenizer.bin"):
        if os.path.exists(folder / name):
            return read_tokenizer_bin(folder / name, vocab_size)
    return None


def read_tokenizer_bin(path: Path, vocab_size: int) -> dict[str, object]:
    """A SentencePiece vocabulary as llama2.c stores it, by the keys of Checkpoint.vocabulary.

        i32 longest piece | f32 score, i32 length, bytes | ...                one for each id

    Spaces stand for the mark U+2581. Raises CheckpointError unless it has `vocab_size` pieces and no more bytes.
    Source: karpathy/llama2.c, tokenizer.py.
    """
    tokens, scores = _pieces(path, read_whole(path, MAX_TOKENIZER), vocab_size)
    types = [BYTE if BYTE_PIECE.fullmatch(token) else NORMAL for token in tokens]
    for i, (token, kind) in SPECIAL.items():
        if i < vocab_size:
            tokens[i], types[i] = token, kind
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def _pieces(path: Path, data: bytes, n: int) -> tuple[list[str], list[float]]:
    """Texts and scores of n pieces, which the file must end with."""
    tokens: list[str] = []
    scores: list[float] = []
    at = 4
    for i in range(n):
        if at + 8 > len(data):
            raise _damaged(path, f"it ends before piece {i:,} of {n:,}")
        score, size = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= size <= min(MAX_PIECE, len(data) - at):
            raise _damaged(path, f"piece {i:,} of {size:,} bytes is announced")
        if not math.isfinite(score):
            raise _damaged(path, f"the score of piece {i:,} is {score}")
        try:
            tokens.append(data[at : at + size].decode().replace(" ", "\u2581"))
        except UnicodeDecodeError as error:
            raise _damaged(path, f"piece {i:,} is not UTF-8") from error
        scores.append(score)
        at += size
    if at != len(data):
        raise _damaged(path, f"{len(data) - at:,} bytes follow its {n:,} pieces")
    return tokens, scores


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {what}; it does not belong to these weights, or it is damaged")
