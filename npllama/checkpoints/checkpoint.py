"""What every layout becomes: a config, and the weights of the model under Meta's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npllama.checkpoints.files import Pool
from npllama.checkpoints.shard import equal
from npllama.checkpoints.tensors import Tensor, View
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, quote
from npllama.system.closing import Closing
from npllama.weights import kind_of


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Closing):
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


def merge(name: str, shape: tuple[int, ...], parts: Sequence[View], config: str) -> Tensor:
    """One weight from its shards, of which each holds an equal share; CheckpointError when shapes or formats differ."""
    n = len(parts)
    axis = 1 if kind_of(name).split_columns else 0
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


def _shape(view: View) -> str:
    return str(list(view.shape))
