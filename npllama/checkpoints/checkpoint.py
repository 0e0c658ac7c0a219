"""What every layout becomes: a config, and the weights of the model under Meta's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from npllama.checkpoints import names
from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.opcodes import Opaque
from npllama.checkpoints.tensors import Tensor, View
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, quote

COMPARED_ROWS = 256  # rows at a time, when two tensors should be equal


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint of any layout; a context manager.

    `tensors` has Meta's names without ".weight". `tied`: output is tok_embeddings, and absent from `tensors`.
    `folder` is where a tokenizer is to be looked for; `warnings` are sentences for the user. `vocabulary`: a tokenizer
    that comes with the weights, by the keys of GGUF files without "tokenizer.ggml.": model, tokens, scores, token_type,
    merges, pre, bos_token_id, add_bos_token, ...; and chat_template.
    """

    layout: str
    folder: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tied: bool
    warnings: tuple[str, ...]
    pool: Pool
    vocabulary: Mapping[str, object] | None = None

    def close(self) -> None:
        """Close its files."""
        self.pool.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Shard:
    """The tensors that one file (or one set of files that belong together) calls by name."""

    source: str
    tensors: Mapping[str, object]

    def select(self, wanted: Iterable[str], rename: Callable[[str], str]) -> dict[str, View]:
        """The tensors of the names in `wanted` (Meta's); CheckpointError unless there are these and no others."""
        foreign = {f"{rename(name)}.weight": name for name in wanted}
        missing = [name for name in foreign if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.source}: {len(missing)} of {len(foreign)} tensors are missing, first {quote(missing[0])}; "
                "weights and config do not belong together, or a file is incomplete: download both again"
            )
        extra = [name for name in self.tensors if name not in foreign and not names.DERIVED.fullmatch(name)]
        if extra:
            what = "biases are not supported" if extra[0].endswith(".bias") else "no LLaMA 2 of this config has it"
            raise CheckpointError(
                f"{self.source}: tensor {quote(extra[0])} (and {len(extra) - 1} more) has no place: {what}; "
                "use weights and config that belong together"
            )
        return {name: self._weight(called) for called, name in foreign.items()}

    def _weight(self, called: str) -> View:
        view = self.tensors[called]
        if not isinstance(view, View):
            what = view.what if isinstance(view, Opaque) else f"a {type(view).__name__}"
            raise CheckpointError(
                f"{self.source}: {quote(called)} is {quote(what)}, but a tensor of f32, f16, bf16 or f64 is needed; "
                "use a checkpoint of plain weights"
            )
        view.check_weight(called)
        return view


def merge(name: str, shape: tuple[int, ...], parts: Sequence[View], config: str) -> Tensor:
    """One weight from its shards, of which each holds an equal share; CheckpointError when shapes or formats differ."""
    n = len(parts)
    axis = 1 if names.kind(name) in names.SPLIT_COLUMNS else 0
    if name == "tok_embeddings" and parts[0].shape[1:] == shape[1:]:
        axis = 0  # some releases split the vocabulary instead
    share = tuple(size // n if i == axis and len(shape) > 1 else size for i, size in enumerate(shape))
    whole = len(shape) == 1 or share[axis] * n == shape[axis]
    for part in parts:
        if part.shape != share or not whole:
            shards = f" in each of {n} shards" if n > 1 else ""
            raise CheckpointError(
                f"{part.storage.file.name}: tensor {quote(name)} has shape {_shape(part)}, but {config} needs "
                f"{list(share)}{shards}; {_advice(part.shape, shape, n, config)}"
            )
        if part.dtype != parts[0].dtype:
            raise CheckpointError(
                f"{part.storage.file.name}: tensor {quote(name)} is {part.dtype}, but {parts[0].dtype} in the first "
                "shard; the shards do not belong together: download all again"
            )
    if len(shape) == 2:
        return Tensor(name, shape, tuple(parts), axis)
    return _replicated(name, shape, parts)


def _advice(part: tuple[int, ...], whole: tuple[int, ...], n: int, config: str) -> str:
    """What to do about a part of the wrong shape: perhaps it is one of more shards than the n that are there."""
    for axis in range(len(part) if config == "params.json" and len(part) == len(whole) else 0):
        of = whole[axis] // max(part[axis], 1)
        if of > n and tuple(size * of if i == axis else size for i, size in enumerate(part)) == whole:
            return f"it may be one of {of} shards, of which {n} are here: download all of them"
    return "weights and config do not belong together: download both again"


def _replicated(name: str, shape: tuple[int, ...], parts: Sequence[View]) -> Tensor:
    """A vector of which each shard has a copy."""
    first = Tensor(name, shape, (parts[0],))
    for part in parts[1:]:
        if not equal(first, Tensor(name, shape, (part,))):
            raise CheckpointError(
                f"{part.storage.file.name}: {quote(name)} differs from the first shard's, but each shard has a "
                "copy of it; the shards do not belong together: download all again"
            )
    return first


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if a.parts == b.parts:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    starts = range(0, a.shape[0], COMPARED_ROWS)
    ends = (min(start + COMPARED_ROWS, a.shape[0]) for start in starts)
    return all(
        np.array_equal(a.rows(start, end).view(np.uint8), b.rows(start, end).view(np.uint8))
        for start, end in zip(starts, ends, strict=True)
    )


def _shape(view: View) -> str:
    return str(list(view.shape))


def state_dict(tree: object, file: InputFile) -> dict[str, object]:
    """The tensors of a torch.save file by name, without the wrappers and prefixes of trainers; CheckpointError.

    torch.compile puts "_orig_mod." before every name, DistributedDataParallel "module."; trainers put the dict itself
    under "model", "state_dict" or "module".
    """
    for key in ("model", "state_dict", "module"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not tree or not all(type(name) is str for name in tree):
        raise CheckpointError(f"{file.name} holds no dict of tensors; save the model's state_dict")
    if tree.keys() >= {"state", "param_groups"}:
        raise CheckpointError(f"{file.name} is the state of an optimizer; give the file with the model's weights")
    found: dict[str, object] = {}
    for name, value in tree.items():
        short = name
        while short.startswith(("_orig_mod.", "module.")):
            short = short.removeprefix("_orig_mod.").removeprefix("module.")
        if short in found:
            raise CheckpointError(f"{file.name}: tensor {quote(short)} stands there twice; save one model alone")
        found[short] = value
    return found
