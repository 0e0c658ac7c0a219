"""Foreign checkpoints as names and arrays: which layout a path holds is found out, not asked."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path

from npllama.checkpoints.checkpoint import Checkpoint
from npllama.checkpoints.files import InputFile, Pool, sniff
from npllama.checkpoints.gguf_model import GGUF_PART, open_gguf
from npllama.checkpoints.layouts import (
    HF_SHARD,
    HF_WHOLE,
    INDEX,
    META_SHARD,
    is_llama2c,
    open_hugging_face,
    open_llama2c,
    open_meta,
    read_tree,
)
from npllama.checkpoints.llama2c_bin import open_llama2c_bin
from npllama.checkpoints.tensors import Tensor
from npllama.errors import CheckpointError, quote

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]

NOT_WEIGHTS = ("optimizer.pt", "scheduler.pt", "scaler.pt")
TOKENIZER_BIN = re.compile(r"tokenizer\.bin|tok\d+\.bin|.*_args\.bin|optimizer\.bin|scheduler\.bin")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint, a folder or one of its weight files; nothing of the weights is read yet.

    Raises CheckpointError for whatever is missing, damaged or not supported, naming the file and the reason.
    """
    given = Path(path)
    if "\0" in str(given):
        raise CheckpointError(f"the path {quote(str(given))} is impossible; give a folder or a file")
    with ExitStack() as stack:
        pool = Pool()
        stack.callback(pool.close)
        checkpoint = _open_folder(given, pool) if os.path.isdir(given) else _open_file(given, pool)
        stack.pop_all()
        return checkpoint


def _open_folder(folder: Path, pool: Pool) -> Checkpoint:
    try:
        files = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error.strerror}; check its permissions") from error
    meta = [folder / name for name in files if META_SHARD.fullmatch(name)]
    hugging_face = [folder / name for name in files if INDEX.fullmatch(name) or name in HF_WHOLE]
    llama2c = [folder / name for name in files if name.endswith(".pt") and name not in NOT_WEIGHTS]
    if "ckpt.pt" in files:
        llama2c = [folder / "ckpt.pt"]
    elif meta or hugging_face or len(llama2c) > 1:
        llama2c = []  # files of a trainer beside the weights
    gguf = [folder / name for name in _whole_gguf(files)]
    run_c: list[Path] = []
    if not (meta or hugging_face or llama2c or gguf):
        run_c = [folder / name for name in files if name.endswith(".bin") and not TOKENIZER_BIN.fullmatch(name)]
    kinds = [
        found[0].name for found in (meta, hugging_face, llama2c, gguf[:1], gguf[1:], run_c[:1], run_c[1:]) if found
    ]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder.name or folder} holds more than one checkpoint ({', '.join(kinds)}); give the file that is meant"
        )
    if meta:
        return open_meta(_complete(meta), pool)
    if hugging_face:
        return open_hugging_face(_preferred(hugging_face), pool)
    if one := llama2c or gguf or run_c:
        return _open_file(one[0], pool)
    raise _nothing(folder, files)


def _whole_gguf(files: list[str]) -> list[str]:
    """GGUF files by name; of one in parts the first that is there."""
    found: dict[str, str] = {}
    for name in files:
        part = GGUF_PART.fullmatch(name)
        if name.endswith(".gguf"):
            found.setdefault(f"{part[1]}-of-{part[3]}" if part else name, name)
    return list(found.values())


def _open_file(path: Path, pool: Pool) -> Checkpoint:
    if path.suffix == ".json" and os.path.exists(path):
        return open_hugging_face(path, pool) if INDEX.fullmatch(path.name) else _open_folder(path.parent, pool)
    if META_SHARD.fullmatch(path.name):
        names = sorted(os.listdir(path.parent)) if os.path.exists(path) else []
        shards = [path.parent / name for name in names if META_SHARD.fullmatch(name)]
        return open_meta(_complete(shards or [path]), pool)
    if HF_SHARD.fullmatch(path.name):
        index = re.sub(r"-\d{5}-of-\d{5}", "", path.name) + ".index.json"
        if not os.path.exists(path.parent / index):
            raise CheckpointError(
                f"{index} is missing beside {path.name}, which is one part of several; download it too"
            )
        return open_hugging_face(path.parent / index, pool)
    file = InputFile(path, pool)
    kind = sniff(file)
    if kind == "gguf":
        return open_gguf(path, pool)
    if kind == "llama2.c":
        return open_llama2c_bin(path, pool)
    tree = read_tree(file)
    if is_llama2c(tree):
        return open_llama2c(tree, file, pool)
    if os.path.exists(path.parent / "params.json") and not os.path.exists(path.parent / "config.json"):
        return open_meta([path], pool)
    return open_hugging_face(path, pool)


def _complete(shards: list[Path]) -> list[Path]:
    """Meta's shards are numbered from 00 without a gap."""
    for i, path in enumerate(shards):
        if path.name != f"consolidated.{i:02d}.pth":
            raise CheckpointError(f"consolidated.{i:02d}.pth is missing beside {path.name}; download all shards")
    return shards


def _preferred(weights: list[Path]) -> Path:
    """safetensors before .bin, an index before a single file."""
    return min(weights, key=lambda path: ("safetensors" not in path.name, not INDEX.fullmatch(path.name)))


def _nothing(folder: Path, files: list[str]) -> CheckpointError:
    parts = [name for name in files if HF_SHARD.fullmatch(name)]
    if parts:
        return CheckpointError(f"the index of {parts[0]} (.index.json) is missing in {folder.name}; download it too")
    if "adapter_config.json" in files:
        return CheckpointError(f"{folder.name} holds a LoRA adapter alone; merge it into its model first")
    shown = ", ".join(quote(name) for name in files[:5]) or "nothing"
    return CheckpointError(
        f"{folder.name or folder} holds no checkpoint ({shown}{', ...' if len(files) > 5 else ''}); "
        "consolidated.00.pth, model.safetensors, pytorch_model.bin, a .gguf file or ckpt.pt is needed"
    )
