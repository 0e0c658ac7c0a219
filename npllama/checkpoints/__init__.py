"""Foreign checkpoints as names and arrays: which layout a path holds is found out, not asked."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from npllama.checkpoints.checkpoint import Checkpoint
from npllama.checkpoints.files import InputFile, Pool
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
from npllama.checkpoints.tensors import Tensor
from npllama.errors import CheckpointError, quote

__all__ = ["Checkpoint", "Tensor", "open_checkpoint", "read_json"]

NOT_WEIGHTS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pt", "training_args.bin")
ADAPTER = re.compile(r"(adapters?(_model)?|pytorch_lora_weights)\.(safetensors|bin|pt|npz)|adapter_config\.json")
LONE_PART = re.compile(r".*-00001-of-00001\.(safetensors|bin)")
WEIGHTS = re.compile(r".*\.(safetensors|bin|pth|pt|ckpt|gguf|h5|msgpack)")
MOST_FOLDERS = 64  # looked into, to say where a checkpoint may be


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
    llama2c = [name for name in files if name.endswith(".pt") and name not in NOT_WEIGHTS]
    if "ckpt.pt" in files:
        llama2c = ["ckpt.pt"]
    elif meta or hugging_face or len(llama2c) > 1:
        llama2c = []  # files of a trainer beside the weights
    kinds = [found[0] for found in (meta, hugging_face, llama2c) if found]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder.name or folder} holds more than one checkpoint ({', '.join(kinds)}); give the file that is meant"
        )
    whole = [META_WHOLE] if META_WHOLE in files else []
    if meta:
        return _taken(folder, files, [meta[0], *whole], lambda: open_meta(_complete(folder, meta), pool))
    if hugging_face:
        weights = folder / hugging_face[0]
        return _taken(folder, files, [*hugging_face, *whole], lambda: open_hugging_face(weights, pool))
    if whole:
        return _taken(folder, files, whole, lambda: open_meta([folder / META_WHOLE], pool))
    if llama2c:
        return _taken(folder, files, llama2c, lambda: _open_file(folder / llama2c[0], pool))
    raise _nothing(folder, files)


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
    inside = [name for name in files[:MOST_FOLDERS] if _looks_like_a_checkpoint(folder / name)]
    where = f"; its folder {quote(inside[0])} holds one: give that" if inside else ""
    other = [name for name in files if WEIGHTS.fullmatch(name) and name not in NOT_WEIGHTS]
    if other and not inside:
        where = f"; if it is {quote(other[0])}, give that file"
    return CheckpointError(
        f"{folder.name or folder} holds no checkpoint ({shown}{', ...' if len(files) > 5 else ''}); "
        f"consolidated.00.pth, model.safetensors, pytorch_model.bin or ckpt.pt is needed{where}"
    )


def _looks_like_a_checkpoint(folder: Path) -> bool:
    if not os.path.isdir(folder):
        return False
    names = ("consolidated.00.pth", META_WHOLE, "ckpt.pt", *HF_WEIGHTS)
    return any(os.path.exists(folder / name) for name in names)
