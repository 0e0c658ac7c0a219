"""Files of torch.save and checkpoint folders, written byte by byte: sound ones, and ones that torch never writes."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from helpers import (
    TINY,
    as_dtype,
    halves_from_pairs,
    hugging_face_config,
    hugging_face_name,
    random_weights,
    safetensors_bytes,
)

from npllama.config import ModelConfig

STORAGE_CLASSES = {"f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage", "f64": "DoubleStorage"}

SMALL = dataclasses.replace(TINY, hidden_dim=64, max_seq_len=4096)
"""As TINY, but with the feed-forward width that Meta's formula gives for multiple_of 4."""

PARAMS = {"dim": 24, "multiple_of": 4, "n_heads": 6, "n_kv_heads": 2, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1}
MODEL_ARGS = {**PARAMS, "vocab_size": 300, "max_seq_len": 64, "dropout": 0.0}

SPLIT_COLUMNS = ("tok_embeddings", "wo", "w2")


@dataclasses.dataclass(eq=False)
class Stored:
    """A tensor to be written; give the same `key` twice to share a storage."""

    data: bytes
    kind: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    key: str | None = None


def stored(values: np.ndarray, dtype: str = "f32", key: str | None = None) -> Stored:
    """An array as torch stores it, contiguous."""
    return Stored(as_dtype(values, dtype).tobytes(), dtype, values.shape, key=key)


class Pickler:
    """Writes an object tree in the opcodes of protocol 2; storages are collected on the way."""

    def __init__(self, legacy: bool = False) -> None:
        self.storages: dict[str, Stored] = {}
        self._legacy = legacy

    def dumps(self, value: object) -> bytes:
        return b"\x80\x02" + self._value(value) + b"."

    def _value(self, value: object) -> bytes:
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        if isinstance(value, bytes):
            return value  # opcodes as they are
        if isinstance(value, Stored):
            return self._tensor(value)
        inside = value.items() if isinstance(value, dict) else value
        assert isinstance(inside, Iterable)
        if isinstance(value, dict):
            return b"}(" + b"".join(self._value(k) + self._value(v) for k, v in inside) + b"u"
        parts = b"".join(self._value(part) for part in inside)
        return b"(" + parts + b"t" if isinstance(value, tuple) else b"](" + parts + b"e"

    def _tensor(self, tensor: Stored) -> bytes:
        key = tensor.key if tensor.key is not None else f"{len(self.storages)}"
        self.storages[key] = tensor
        numel = len(tensor.data) // {"f32": 4, "f16": 2, "bf16": 2, "f64": 8}[tensor.kind]
        strides = tensor.strides
        if strides is None:
            strides = tuple(int(np.prod(tensor.shape[i + 1 :])) for i in range(len(tensor.shape)))
        kind = f"ctorch\n{STORAGE_CLASSES[tensor.kind]}\n".encode()
        pid = ("storage", kind, key, "cpu", numel, *((None,) if self._legacy else ()))
        arguments = (self._value(pid) + b"Q", tensor.offset, tensor.shape, strides, False, {})
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + self._value(arguments) + b"R"


def torch_zip(
    tree: object, root: str = "archive", extra: dict[str, bytes] | None = None, edit: Callable[..., None] | None = None
) -> bytes:
    """A zip file of torch.save. `extra` replaces or adds entries; `edit` may change all entries at last."""
    pickler = Pickler()
    entries = {"data.pkl": pickler.dumps(tree), "byteorder": b"little"}
    entries |= {f"data/{key}": tensor.data for key, tensor in pickler.storages.items()}
    entries |= {"version": b"3\n", **(extra or {})}
    if edit:
        edit(entries)
    return zip_bytes([(f"{root}/{name}".encode(), data) for name, data in entries.items()])


def zip_bytes(entries: Iterable[tuple[bytes, bytes]], method: int = 0, zip64: bool = True) -> bytes:
    """A zip archive as torch writes it: stored, 64-byte alignment, sizes in the central directory alone."""
    out, central = bytearray(), bytearray()
    count = 0
    for name, data in entries:
        count += 1
        header = len(out)
        padding = b"FB" + struct.pack("<H", n := -(header + 34 + len(name)) % 64) + b"Z" * n
        out += struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0x0808, method, 0, 0, 0, 0, 0, len(name), len(padding))
        out += name + padding + data
        out += struct.pack("<IIII", 0x08074B50, 0, len(data), len(data))
        fields = (0x02014B50, 0, 0, 0x0808, method, 0, 0, 0, len(data), len(data), len(name), 0, 0, 0, 0, 0, header)
        central += struct.pack("<IHHHHHHIIIHHHHHII", *fields) + name
    offset, end = len(out), len(out) + len(central)
    out += central
    if zip64:
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0, 45, 0, 0, count, count, len(central), offset)
        out += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    return bytes(out + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(central), offset, 0))


def torch_legacy(tree: object) -> bytes:
    """A file of torch.save before 1.6."""
    pickler = Pickler(legacy=True)
    plain = Pickler()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    out = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e" + plain.dumps(1001) + plain.dumps(system)
    out += pickler.dumps(tree) + plain.dumps(list(pickler.storages))
    for tensor in pickler.storages.values():
        width = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8}[tensor.kind]
        out += struct.pack("<q", len(tensor.data) // width) + tensor.data
    return out


Save = Callable[[object], bytes]


def write_meta(
    folder: Path,
    dtype: str = "f32",
    shards: int = 1,
    seed: int = 0,
    save: Save = torch_zip,
    rows: int = SMALL.vocab_size,
    **params: object,
) -> dict[str, np.ndarray]:
    """Write a release of Meta in model-parallel shards; returns its weights, float32 before rounding."""
    weights = random_weights(dataclasses.replace(SMALL, vocab_size=rows), seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    for i in range(shards):
        tree = {f"{name}.weight": stored(_share(name, w, i, shards), dtype) for name, w in weights.items()}
        (folder / f"consolidated.{i:02d}.pth").write_bytes(save({**tree, "rope.freqs": stored(np.ones(2))}))
    return weights


def _share(name: str, w: np.ndarray, i: int, n: int) -> np.ndarray:
    if w.ndim == 1:
        return w
    axis = 1 if name.rpartition(".")[2] in SPLIT_COLUMNS else 0
    return np.split(w, n, axis=axis)[i]


def write_llama2c(
    folder: Path, seed: int = 0, tied: bool = True, prefix: str = "_orig_mod.", save: Save = torch_zip
) -> dict[str, np.ndarray]:
    """Write a training checkpoint of llama2.c, with what its trainer keeps beside the weights."""
    weights = random_weights(SMALL, seed, tied)
    folder.mkdir(parents=True, exist_ok=True)
    model = {f"{prefix}{name}.weight": stored(w, key=f"1{i}") for i, (name, w) in enumerate(weights.items())}
    if tied:
        model[f"{prefix}output.weight"] = model[f"{prefix}tok_embeddings.weight"]
    model[f"{prefix}freqs_cos"] = stored(np.ones((64, 2)), key="99")
    optimizer = {
        "state": {0: {"step": stored(np.ones(()), key="98")}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
    }
    tree = {"model": model, "optimizer": optimizer, "model_args": MODEL_ARGS, "iter_num": 3, "best_val_loss": 1e9}
    (folder / "ckpt.pt").write_bytes(save({**tree, "config": {"out_dir": "out", "compile": True}}))
    return weights


def hugging_face_tensors(weights: dict[str, np.ndarray], config: ModelConfig = SMALL) -> dict[str, np.ndarray]:
    """Weights by Meta's names and order -> by Hugging Face's."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    return {
        hugging_face_name(name): halves_from_pairs(w, heads[kind]) if (kind := name.rpartition(".")[2]) in heads else w
        for name, w in weights.items()
    }


def write_hugging_face(
    folder: Path,
    seed: int = 0,
    files: int = 1,
    suffix: str = "safetensors",
    dtype: str = "f32",
    tied: bool = False,
    **changes: object,
) -> dict[str, np.ndarray]:
    """Write a Hugging Face folder in any number of files; `changes` go into config.json (None takes a key out)."""
    weights = random_weights(SMALL, seed, tied)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**hugging_face_config(SMALL, tied), **changes}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    tensors = hugging_face_tensors(weights)
    base = "model" if suffix == "safetensors" else "pytorch_model"
    place: dict[str, str] = {}
    for i in range(files):
        part = {name: tensors[name] for name in list(tensors)[i::files]}
        name = f"{base}.{suffix}" if files == 1 else f"{base}-{i + 1:05d}-of-{files:05d}.{suffix}"
        place |= dict.fromkeys(part, name)
        if suffix == "safetensors":
            data = safetensors_bytes({key: (w, dtype) for key, w in part.items()})
        else:
            data = torch_zip({key: stored(w, dtype) for key, w in part.items()})
        (folder / name).write_bytes(data)
    if files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": place}
        (folder / f"{base}.{suffix}.index.json").write_text(json.dumps(index))
    return weights
