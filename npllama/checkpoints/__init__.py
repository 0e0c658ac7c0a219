"""Checkpoints of others as names and arrays. `open_checkpoint` finds out which layout a path holds.

Nothing here trusts a file: it may be damaged or made to do harm. Nothing in it is executed, sizes are checked before
memory is taken, and what is not understood is refused by name with CheckpointError.

Files, in the order in which to read them:

    layouts.py      Meta's releases, Hugging Face folders, training checkpoints of llama2.c
    checkpoint.py   what every layout becomes: a config, and weights under Meta's names; one weight from its shards
    configs/        the numbers of a model in the words of others
    names.py        what stands around the names of tensors in people's files
    shard.py        tensors of one or more files under the names of a layout, none missing and none left
    tensors.py      where the numbers of a tensor lie, read block by block; Hugging Face's RoPE pairs
    files.py        weight files: opened within bounds, read in pieces; which format the first bytes show
    safetensors.py  safetensors files
    headers.py      the header of a safetensors file, read member by member in bounded memory
    pytorch/        files of torch.save
    gguf/           GGUF files of llama.cpp
    llama2c_bin.py  files that llama2.c's run.c reads

A new kind of checkpoint is a function like `layouts.open_llama2c`, which returns a Checkpoint, and a line in
`_open_folder` and `_open_file` here, which recognise it. Its config is a function like `from_llama2c` in
configs/meta.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from npllama.checkpoints.checkpoint import Checkpoint
from npllama.checkpoints.files import InputFile, Pool, sniff
from npllama.checkpoints.gguf.model import GGUF_PART, open_gguf
from npllama.checkpoints.layouts import (
    HF_SHARD,
    HF_WEIGHTS,
    INDEX,
    META_SHARD,
    META_WHOLE,
    is_llama2c,
    is_meta,
    open_hugging_face,
    open_llama2c,
    open_meta,
    read_json,
    read_tree,
)
from npllama.checkpoints.llama2c_bin import open_llama2c_bin
from npllama.checkpoints.tensors import Tensor
from npllama.errors import CheckpointError, quote

__all__ = ["Checkpoint", "Tensor", "open_checkpoint", "read_json"]

NOT_WEIGHTS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pt", "training_args.bin")
ADAPTER = re.compile(r"(adapters?(_model)?|pytorch_lora_weights)\.(safetensors|bin|pt|npz)|adapter_config\.json")
LONE_PART = re.compile(r".*-00001-of-00001\.(safetensors|bin)")
WEIGHTS = re.compile(r".*\.(safetensors|bin|pth|pt|ckpt|gguf|h5|msgpack)")
MAX_FOLDERS = 64  # looked into, to say where a checkpoint may be


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
    files = _listed(folder)
    meta = [name for name in files if META_SHARD.fullmatch(name)]
    hugging_face = [name for name in HF_WEIGHTS if name in files]
    whole = [META_WHOLE] if META_WHOLE in files else []
    gguf = _gguf_files(files)
    llama2c = [name for name in files if name.endswith(".pt") and name not in NOT_WEIGHTS]
    if "ckpt.pt" in files:
        llama2c = ["ckpt.pt"]
    elif meta or hugging_face or gguf or len(llama2c) > 1:
        llama2c = []  # files of a trainer beside the weights
    kinds = [found[0] for found in (meta, hugging_face, llama2c) if found]
    kinds = kinds or whole or gguf or _llama2c_bin_files(folder, files, pool)
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder.name or folder} holds more than one checkpoint ({', '.join(kinds)}); give the file that is meant"
        )
    if not kinds:
        raise _nothing(folder, files)
    others = [name for name in (*hugging_face[1:], *whole, *gguf) if name != kinds[0]]

    def read() -> Checkpoint:
        if meta:
            return open_meta(_complete(folder, meta), pool)
        if hugging_face:
            return open_hugging_face(folder / hugging_face[0], pool)
        return open_meta([folder / META_WHOLE], pool) if whole else _open_file(folder / kinds[0], pool)

    return _taken(folder, files, [kinds[0], *others], read)


def _gguf_files(files: list[str]) -> list[str]:
    """GGUF files; of one in parts the first that is there."""
    found: dict[str, str] = {}
    for name in files:
        part = GGUF_PART.fullmatch(name)
        if name.endswith(".gguf"):
            found.setdefault(f"{part[1]}-of-{part[3]}" if part else name, name)
    return list(found.values())


def _llama2c_bin_files(folder: Path, files: list[str], pool: Pool) -> list[str]:
    """Files of llama2.c by their content: half the world's files are called something.bin."""
    names = [name for name in files if name.endswith(".bin") and not (HF_SHARD.fullmatch(name) or name in NOT_WEIGHTS)]
    found = []
    for name in names:
        try:
            kind = sniff(InputFile(folder / name, pool))
        except CheckpointError:
            continue
        if kind == "llama2.c":
            found.append(name)
    return found


def _taken(folder: Path, files: list[str], found: list[str], read: Callable[[], Checkpoint]) -> Checkpoint:
    """The first of the weight files that were found; of the others is said that they are not read."""
    taken, others = found[0], ", ".join(name for name in found[1:] if not LONE_PART.fullmatch(name))
    try:
        checkpoint = read()
    except CheckpointError as error:
        if not others:
            raise
        raise CheckpointError(f"{error} (beside {taken} lies {others}: give that file if it is meant)") from error
    notes = [f"{taken} is read; {others} beside it is not"] if others else []
    if adapter := next((name for name in reversed(files) if ADAPTER.fullmatch(name)), None):
        notes.append(
            f"{taken} is read as it is; the LoRA adapter beside it ({adapter}) is not: merge it first if meant"
        )
    return dataclasses.replace(checkpoint, warnings=(*notes, *checkpoint.warnings))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error.strerror}; check its permissions") from error


def _open_file(path: Path, pool: Pool) -> Checkpoint:
    if ADAPTER.fullmatch(path.name) and os.path.exists(path):
        raise CheckpointError(f"{path.name} is of a LoRA adapter alone; merge it into its model first, and give that")
    if path.suffix == ".json" and os.path.exists(path):
        return open_hugging_face(path, pool) if INDEX.fullmatch(path.name) else _open_folder(path.parent, pool)
    if META_SHARD.fullmatch(path.name):
        names = sorted(os.listdir(path.parent)) if os.path.exists(path) else []
        shards = [name for name in names if META_SHARD.fullmatch(name)]
        return open_meta(_complete(path.parent, shards or [path.name]), pool)
    if HF_SHARD.fullmatch(path.name):
        index = path.parent / _index_of(path.name)
        if os.path.exists(index):
            return open_hugging_face(index, pool)
        if not LONE_PART.fullmatch(path.name):
            raise CheckpointError(
                f"{index.name} is missing beside {path.name}, which is one part of several; download it too"
            )
    file = InputFile(path, pool)
    kind = sniff(file)
    if kind == "gguf":
        return open_gguf(path, pool)
    if kind == "llama2.c":
        return open_llama2c_bin(path, pool)
    tree = read_tree(file)
    if is_llama2c(tree):
        return open_llama2c(tree, file, pool)
    params_alone = os.path.exists(path.parent / "params.json") and not os.path.exists(path.parent / "config.json")
    return open_meta([path], pool) if params_alone or is_meta(tree, file) else open_hugging_face(path, pool)


def _index_of(part: str) -> str:
    """ "model.fp16-00001-of-00002.safetensors" -> "model.safetensors.index.fp16.json"."""
    return re.sub(r"(\w+?)(\.[\w-]+)?-\d{5}-of-\d{5}\.(\w+)", r"\1.\3.index\2.json", part)


def _complete(folder: Path, shards: list[str]) -> list[Path]:
    """Meta's shards are numbered from 00 without a gap."""
    for i, name in enumerate(shards):
        if name != f"consolidated.{i:02d}.pth":
            raise CheckpointError(f"consolidated.{i:02d}.pth is missing beside {name}; download all shards")
    return [folder / name for name in shards]


def _nothing(folder: Path, files: list[str]) -> CheckpointError:
    """Why a folder holds no checkpoint, as far as the names in it show."""
    parts = [name for name in files if HF_SHARD.fullmatch(name)]
    if parts:
        return CheckpointError(f"the index of {parts[0]} (.index.json) is missing in {folder.name}; download it too")
    if any(ADAPTER.fullmatch(name) for name in files):
        return CheckpointError(f"{folder.name} holds a LoRA adapter alone; merge it into its model first")
    if "zero_to_fp32.py" in files:
        return CheckpointError(
            f"{folder.name} holds a checkpoint that DeepSpeed has split; join it with its zero_to_fp32.py"
        )
    if any(name.endswith(".distcp") for name in files):
        return CheckpointError(
            f"{folder.name} holds a checkpoint that FSDP has split; join it with `accelerate merge-weights`"
        )
    shown = ", ".join(quote(name) for name in files[:5]) or "nothing"
    inside = [name for name in files[:MAX_FOLDERS] if _looks_like_a_checkpoint(folder / name)]
    where = f"; its folder {quote(inside[0])} holds one: give that" if inside else ""
    other = [name for name in files if WEIGHTS.fullmatch(name) and name not in NOT_WEIGHTS]
    if other and not inside:
        where = f"; if it is {quote(other[0])}, give that file"
    return CheckpointError(
        f"{folder.name or folder} holds no checkpoint ({shown}{', ...' if len(files) > 5 else ''}); "
        f"consolidated.00.pth, model.safetensors, pytorch_model.bin, a .gguf file or ckpt.pt is needed{where}"
    )


def _looks_like_a_checkpoint(folder: Path) -> bool:
    try:
        names = os.listdir(folder)
    except OSError:  # a file, or a folder that may not be read
        return False
    usual = ("consolidated.00.pth", META_WHOLE, "ckpt.pt", *HF_WEIGHTS)
    return any(name in usual or name.endswith(".gguf") for name in names)
