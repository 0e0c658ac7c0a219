"""GGUF files written byte by byte: sound ones in any byte order, and ones that no writer makes.

Also by the package gguf, for what other programs are to read, and quantized by llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from helpers import TINY, random_weights

from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.gguf.blocks import BLOCK_TYPES, BlockType
from npllama.checkpoints.gguf.reader import GgufFile, read_gguf
from npllama.config import ModelConfig
from npllama.numbers.bf16 import bf16_bits

CODES = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "u64": 10, "i64": 11, "f64": 12}
FORMATS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f"}
FORMATS |= {"bool": "B", "u64": "Q", "i64": "q", "f64": "d"}
PIECE_BLOCKS = 1 << 16
"""Random blocks that are drawn at a time."""
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}

Typed = tuple[str, object]
"""A value of metadata and its type: ("u32", 4), ("str", "llama"), ("[str]", [...]), ("[f32]", [...])."""


@dataclass
class Written:
    """One tensor: its ggml type, its shape as NumPy has it, its bytes."""

    kind: int
    shape: tuple[int, ...]
    data: bytes | Drawn


@dataclass
class Drawn:
    """Random blocks that are drawn when they are written: for files that are larger than memory should be."""

    type: BlockType
    n: int
    seed: int

    def __len__(self) -> int:
        return self.n * self.type.size

    def pieces(self) -> Iterator[bytes]:
        rng = np.random.Generator(np.random.SFC64(self.seed))
        for start in range(0, self.n, PIECE_BLOCKS):
            yield random_blocks(self.type, min(PIECE_BLOCKS, self.n - start), rng).tobytes()


@dataclass
class File:
    """A GGUF file to be; change what is to be wrong, then take `bytes`."""

    metadata: dict[str, Typed]
    tensors: dict[str, Written] = field(default_factory=dict)
    order: str = "<"
    version: int = 3
    alignment: int = 32
    n_tensors: int | None = None
    n_keys: int | None = None
    offsets: dict[str, int] = field(default_factory=dict)

    def number(self, kind: str, value: object) -> bytes:
        return struct.pack(self.order + FORMATS[kind], value)

    def string(self, text: str | bytes) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return self.number("u64", len(data)) + data

    def value(self, typed: Typed) -> bytes:
        kind, value = typed
        if kind == "str":
            return self.number("u32", 8) + self.string(value)
        if kind.startswith("["):
            inner = kind[1:-1]
            assert isinstance(value, Iterable)
            items = [self.string(v) if inner == "str" else self.number(inner, v) for v in value]
            code = 8 if inner == "str" else CODES[inner]
            return self.number("u32", 9) + self.number("u32", code) + self.number("u64", len(items)) + b"".join(items)
        if kind == "raw":
            return value
        return self.number("u32", CODES[kind]) + self.number(kind, value)

    def head(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.metadata) if self.n_keys is None else self.n_keys
        out = b"GGUF" + self.number("u32", self.version) + self.number("u64", n_tensors) + self.number("u64", n_keys)
        for key, typed in self.metadata.items():
            out += self.string(key) + self.value(typed)
        at = 0
        for name, tensor in self.tensors.items():
            out += self.string(name) + self.number("u32", len(tensor.shape))
            out += b"".join(self.number("u64", n) for n in reversed(tensor.shape))
            out += self.number("u32", tensor.kind) + self.number("u64", self.offsets.get(name, at))
            at += -(-len(tensor.data) // self.alignment) * self.alignment
        return out

    def pieces(self) -> Iterator[bytes]:
        """The file from its beginning on."""
        head = self.head()
        yield head
        written = len(head)
        for tensor in self.tensors.values():
            yield bytes(-written % self.alignment)
            written += -written % self.alignment + len(tensor.data)
            yield from tensor.data.pieces() if isinstance(tensor.data, Drawn) else (tensor.data,)
        yield bytes(-written % self.alignment if self.tensors else 0)

    def bytes(self) -> bytes:
        return b"".join(self.pieces())


def floats(values: np.ndarray, dtype: str = "f32", order: str = "<") -> Written:
    """Numbers in a format that is not quantized."""
    if dtype == "bf16":
        return Written(30, values.shape, bf16_bits(values).astype(f"{order}u2").tobytes())
    return Written(
        {"f32": 0, "f16": 1}[dtype],
        values.shape,
        values.astype({"f32": f"{order}f4", "f16": f"{order}f2"}[dtype]).tobytes(),
    )


def metadata_of(config: ModelConfig = TINY) -> dict[str, Typed]:
    """The metadata that llama.cpp's converter writes for a config, with a vocabulary of its size."""
    c, n = config, config.vocab_size
    letters = [chr(0x4E00 + i) for i in range(n - 259)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters][:n]
    return {
        "general.architecture": ("str", "llama"),
        "general.name": ("str", "tiny"),
        "llama.context_length": ("u32", c.max_seq_len),
        "llama.embedding_length": ("u32", c.dim),
        "llama.block_count": ("u32", c.n_layers),
        "llama.feed_forward_length": ("u32", c.hidden_dim),
        "llama.attention.head_count": ("u32", c.n_heads),
        "llama.attention.head_count_kv": ("u32", c.n_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": ("f32", c.norm_eps),
        "llama.rope.dimension_count": ("u32", c.head_dim),
        "llama.rope.freq_base": ("f32", c.rope_theta),
        "llama.vocab_size": ("u32", n),
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.pre": ("str", "default"),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.scores": ("[f32]", [-float(i) for i in range(n)]),
        "tokenizer.ggml.token_type": ("[i32]", [2, 3, 3, *[6] * 256, *[1] * n][:n]),
        "tokenizer.ggml.bos_token_id": ("u32", c.bos_token_id),
        "tokenizer.ggml.eos_token_id": ("u32", c.eos_token_ids[0]),
        "tokenizer.ggml.add_bos_token": ("bool", True),
    }


def gguf_name(name: str) -> str:
    """Meta's name without ".weight" -> the one in GGUF files."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[name]}.weight"


def file_of(
    config: ModelConfig = TINY, seed: int = 0, dtype: str = "f32", tied: bool = False, order: str = "<"
) -> tuple[File, dict[str, np.ndarray]]:
    """A GGUF file of a random model (norms float32), and its weights by Meta's names."""
    weights = random_weights(config, seed, tied)
    tensors = {gguf_name(name): floats(w, dtype if w.ndim == 2 else "f32", order) for name, w in weights.items()}
    return File(metadata_of(config), tensors, order), weights


def write_gguf(folder: Path, **options: Any) -> dict[str, np.ndarray]:
    """Write a folder that holds one GGUF file; returns its weights."""
    file, weights = file_of(**options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").write_bytes(file.bytes())
    return weights


def write_split(folder: Path, parts: int, **options: Any) -> dict[str, np.ndarray]:
    """Write a GGUF file in parts, as llama.cpp's gguf-split does."""
    file, weights = file_of(**options)
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(split(file, parts)):
        (folder / f"model-{i + 1:05d}-of-{parts:05d}.gguf").write_bytes(part.bytes())
    return weights


def split(file: File, parts: int) -> list[File]:
    """The parts of a file; the first has all of the metadata."""
    names = list(file.tensors)
    found = []
    for i in range(parts):
        own: Mapping[str, Typed] = {
            "split.no": ("u16", i),
            "split.count": ("u16", parts),
            "split.tensors.count": ("i32", len(names)),
        }
        share = names[math.ceil(i * len(names) / parts) : math.ceil((i + 1) * len(names) / parts)]
        metadata = {**(file.metadata if i == 0 else {}), **own}
        found.append(File(metadata, {name: file.tensors[name] for name in share}, file.order))
    return found


BLOCKY = dataclasses.replace(TINY, dim=256, hidden_dim=512, head_dim=64, n_heads=4, n_kv_heads=2)
"""Widths that are whole blocks of every type."""

HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Where the float16 numbers of a block stand."""


def random_blocks(kind: BlockType, n: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random bits with ordinary scales: (n, size) uint8, little-endian."""
    raw = rng.integers(0, 256, (n, kind.size), np.uint8)
    for at in HALVES[kind.name]:
        raw[:, at : at + 2] = rng.normal(0, 0.02, (n, 1)).astype("<f2").view(np.uint8)
    return raw


def blocks(number: int, shape: tuple[int, ...], seed: int) -> tuple[Written, np.ndarray]:
    """A tensor of random blocks, and the numbers that they stand for."""
    kind = BLOCK_TYPES[number]
    raw = random_blocks(kind, int(np.prod(shape)) // kind.elements, np.random.default_rng(seed))
    return Written(number, shape, raw.tobytes()), kind.decode(raw).reshape(shape)


def quantized(seed: int = 0) -> tuple[File, dict[str, np.ndarray]]:
    """A file whose matrices take turns in every type of blocks, and its numbers by name."""
    file, _ = file_of(BLOCKY, seed)
    needed = {}
    numbers = list(BLOCK_TYPES)
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 2:
            i = len(needed)
            file.tensors[name], needed[name] = blocks(numbers[i % len(numbers)], tensor.shape, seed + i)
    assert {tensor.kind for tensor in file.tensors.values()} == {0, *numbers}
    return file, needed


def write_quantized(folder: Path) -> None:
    """Write a folder with a GGUF file of every type of blocks, and no vocabulary, so that its tensors come early."""
    file, _ = quantized()
    file.metadata = {key: typed for key, typed in file.metadata.items() if not key.startswith("tokenizer.")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").write_bytes(file.bytes())


# Other programs -------------------------------------------------------------------------------------------------------

FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13}
FTYPES |= {"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}
"""llama.cpp's numbers of the kinds of quantized files; a kind gives matrices of one or more types of blocks."""


def write_with_package(
    path: Path, metadata: dict[str, Typed], tensors: Iterable[tuple[str, np.ndarray]], name: str | None = None
) -> None:
    """A file that the package gguf writes: tensors by Meta's names, in the float format that they have.

    name: a type of blocks that the package quantizes matrices to.
    """
    import gguf

    kind = None if name is None else gguf.GGMLQuantizationType[name]

    writer = gguf.GGUFWriter(str(path), "llama")
    add = {"u32": writer.add_uint32, "f32": writer.add_float32, "str": writer.add_string, "bool": writer.add_bool}
    for key, (form, value) in metadata.items():
        if key != "general.architecture":
            (writer.add_array if form.startswith("[") else add[form])(key, value)
    for tensor, w in tensors:
        if kind is None or w.ndim == 1:
            writer.add_tensor(gguf_name(tensor), w)
        else:
            writer.add_tensor(gguf_name(tensor), gguf.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_for_ids(path: Path, config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """A file that the package gguf writes for a model that is fed token ids: tensors by Meta's names."""
    write_with_package(path, without_vocabulary(metadata_of(config)), tensors)


def without_vocabulary(metadata: dict[str, Typed]) -> dict[str, Typed]:
    """Metadata of a file that is fed token ids, as llama.cpp reads it."""
    rest = {key: typed for key, typed in metadata.items() if not key.startswith("tokenizer.")}
    return {**rest, "tokenizer.ggml.model": ("str", "no_vocab")}


def quantize_with_llama_cpp(source: Path, path: Path, name: str, pure: bool = False) -> None:
    """A float32 file as a quantized one, of one of FTYPES. pure: every matrix in the one type, and not in a mix."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FTYPES[name], 2, pure
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def put(tmp_path: Path, file: File | bytes, name: str = "model.gguf") -> Path:
    (tmp_path / name).write_bytes(file if isinstance(file, bytes) else file.bytes())
    return tmp_path / name


def changed(tmp_path: Path, change: Callable[[File], object]) -> Path:
    """The path of a sound file of TINY after a change."""
    file, _ = file_of()
    change(file)
    return put(tmp_path, file)


def with_keys(tmp_path: Path, **changes: Typed | None) -> Path:
    """The path of a file whose metadata has changed; `__` stands for `.`, None takes a key out."""

    def change(file: File) -> None:
        named = {key.replace("__", "."): typed for key, typed in changes.items()}
        merged = {**file.metadata, **named}
        file.metadata = {key: typed for key, typed in merged.items() if typed is not None}

    return changed(tmp_path, change)


def header(path: Path) -> GgufFile:
    pool = Pool()
    try:
        return read_gguf(InputFile(path, pool))
    finally:
        pool.close()
