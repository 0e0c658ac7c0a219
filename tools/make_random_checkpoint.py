"""Write a checkpoint of a real model's shape with random weights, to measure with: a Meta release, in little memory.

    python tools/make_random_checkpoint.py 7b FOLDER [--shards 2] [--dtype f16] [--seed 0]
    python tools/make_random_checkpoint.py 7b FOLDER --gguf Q4_0

Writes consolidated.NN.pth as torch.save does (a zip of a pickle and one entry for each tensor), params.json, and a
tokenizer.model of single characters. torch is not needed: the pickle holds nothing but names, sizes and places. With
--gguf, a model.gguf of random blocks, whose matrices have the types that llama.cpp gives them, and a tokenizer.model.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gguf_files import Drawn, File, Written, floats, gguf_name, metadata_of, without_vocabulary  # noqa: E402
from helpers import write_tokenizer  # noqa: E402

from npllama.checkpoints.configs.meta import from_meta  # noqa: E402
from npllama.checkpoints.gguf.blocks import BLOCK_TYPES  # noqa: E402
from npllama.config import ModelConfig  # noqa: E402
from npllama.numbers.bf16 import bf16_bits  # noqa: E402

SHAPES = {
    "15m": {"dim": 288, "n_layers": 6, "n_heads": 6},
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "1b": {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32},
}
"""Widths of the feed-forward networks follow from Meta's rule: 768, 2048, 5632, 11008."""

VOCABULARY = 32000
GGUF = {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K"}  # a kind of file, and the type of most of its matrices
STORAGES = {"f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage"}
SPLIT_COLUMNS = ("tok_embeddings", "attention.wo", "feed_forward.w2")  # model-parallel shards split these by columns
BLOCK = 1 << 21  # numbers drawn at a time


def main() -> None:
    """Write the checkpoint that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", choices=STORAGES, default="f16")
    parser.add_argument("--gguf", choices=GGUF, help="a GGUF file of this kind instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    params = {**SHAPES[args.shape], "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
    args.folder.mkdir(parents=True)
    (args.folder / "params.json").write_text(json.dumps(params))
    write_tokenizer(args.folder / "tokenizer.model", VOCABULARY)
    if args.gguf:
        write_gguf(args.folder / "model.gguf", from_meta(params, vocab_size=VOCABULARY), args.gguf, args.seed)
        return
    shapes = shard_shapes(from_meta(params, vocab_size=VOCABULARY), args.shards)
    for shard in range(args.shards):
        write_shard(args.folder / f"consolidated.{shard:02d}.pth", shapes, args.dtype, [args.seed, shard])


def shard_shapes(c: ModelConfig, n_shards: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor's share in one of n_shards files, by Meta's name."""
    D, F, HE, GE = c.dim, c.hidden_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    block: dict[str, tuple[int, ...]] = {"attention.wq": (HE, D), "attention.wk": (GE, D), "attention.wv": (GE, D)}
    block |= {"attention.wo": (D, HE), "feed_forward.w1": (F, D), "feed_forward.w2": (D, F), "feed_forward.w3": (F, D)}
    block |= {"attention_norm": (D,), "ffn_norm": (D,)}
    whole = {"tok_embeddings": (c.vocab_size, D), "norm": (D,), "output": (c.vocab_size, D)}
    whole |= {f"layers.{l}.{name}": shape for l in range(c.n_layers) for name, shape in block.items()}
    return {f"{name}.weight": _share(name, shape, n_shards) for name, shape in whole.items()}


def _share(name: str, shape: tuple[int, ...], n_shards: int) -> tuple[int, ...]:
    if len(shape) == 1:
        return shape
    rows, columns = shape
    return (rows, columns // n_shards) if name.endswith(SPLIT_COLUMNS) else (rows // n_shards, columns)


def write_gguf(path: Path, c: ModelConfig, kind: str, seed: int) -> None:
    """A GGUF file of random blocks, written as they are drawn."""
    numbers = {found.name: number for number, found in BLOCK_TYPES.items()}
    tensors = {}
    for i, (name, shape) in enumerate(shard_shapes(c, 1).items()):
        name = name.removesuffix(".weight")
        if len(shape) == 1:
            tensors[gguf_name(name)] = floats(np.ones(shape, np.float32))
        else:
            number = numbers[blocks_of(name, kind, c.n_layers)]
            drawn = Drawn(BLOCK_TYPES[number], math.prod(shape) // BLOCK_TYPES[number].elements, seed + i)
            tensors[gguf_name(name)] = Written(number, shape, drawn)
    with open(path, "xb") as file:
        file.writelines(File(without_vocabulary(metadata_of(c)), tensors).pieces())


def blocks_of(name: str, kind: str, n_layers: int) -> str:
    """The type that llama.cpp gives a matrix in a kind of file (llama-quant.cpp)."""
    if name == "output":
        return "Q8_0" if kind == "Q8_0" else "Q6_K"
    if kind == "Q4_K_M" and name.endswith(("attention.wv", "feed_forward.w2")):
        layer, eighth = int(name.split(".")[1]), n_layers // 8
        if layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
    return GGUF[kind]


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: list[int]) -> None:
    """One file of torch.save: `root/data.pkl`, then the numbers of tensor i in `root/data/i`."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickled(shapes, dtype))
        archive.writestr(f"{path.stem}/byteorder", "little")
        for i, shape in enumerate(shapes.values()):
            with archive.open(f"{path.stem}/data/{i}", "w", force_zip64=True) as entry:
                for block in random_numbers(shape, [*seed, i]):
                    entry.write(stored(block, dtype).data)
        archive.writestr(f"{path.stem}/version", "3\n")


def random_numbers(shape: tuple[int, ...], seed: list[int]) -> Iterator[np.ndarray]:
    """Blocks of a matrix of variance 1/columns (uniform: drawn faster than normal), or of a norm of ones."""
    left, generator = math.prod(shape), np.random.Generator(np.random.SFC64(seed))
    while left:
        n = min(left, BLOCK)
        left -= n
        if len(shape) == 1:
            yield np.ones(n, np.float32)
        else:
            yield (generator.random(n, dtype=np.float32) - np.float32(0.5)) * np.float32(math.sqrt(12 / shape[1]))


def stored(block: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> the bytes of a storage."""
    if dtype == "bf16":
        return bf16_bits(block).view(np.uint8)
    return block.astype("<f2" if dtype == "f16" else "<f4").view(np.uint8)


def pickled(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """The pickle (protocol 2) of a dict of tensors, in the opcodes that torch.save writes.

    Each is `_rebuild_tensor_v2((storage, kind, key, place, numel), offset, shape, strides, requires_grad, hooks)`.
    """
    out = b"\x80\x02}("
    for i, (name, shape) in enumerate(shapes.items()):
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        storage = [_text("storage"), b"ctorch\n" + STORAGES[dtype].encode() + b"\n", _text(str(i)), _text("cpu")]
        place = _tuple([*storage, _whole(math.prod(shape))]) + b"Q"
        hooks = b"ccollections\nOrderedDict\n)R"
        arguments = [place, _whole(0), _tuple(map(_whole, shape)), _tuple(map(_whole, strides)), b"\x89", hooks]
        out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(arguments) + b"R"
    return out + b"u."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _whole(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def _tuple(parts: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(parts) + b"t"


if __name__ == "__main__":
    main()
