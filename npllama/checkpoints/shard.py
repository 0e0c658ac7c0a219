"""The tensors of one file, or of several that belong together, by the names that a layout gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from npllama.checkpoints import names
from npllama.checkpoints.files import InputFile
from npllama.checkpoints.pytorch.opcodes import Opaque
from npllama.checkpoints.tensors import Tensor, View
from npllama.errors import CheckpointError, quote

COMPARED_ROWS = 256  # rows at a time, when two tensors should be equal
COMPARED_NUMBERS = 1 << 16  # of a bias at a time

Rename = Callable[[Collection[str]], tuple[dict[str, str], str]]
"""Names as they stand in files -> names of the layout, and the prefix that was left out (names.meta_names ...)."""

CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "model_state", "net", "weights")
MAX_CONTAINERS = 4


@dataclass(frozen=True)
class Shard:
    """Tensors by the layout's names. `again`: names that stand in a second place too, and which tensor is there.

    `notes` are sentences for the user.
    """

    source: str
    tensors: dict[str, object]
    again: Sequence[tuple[str, object]]
    notes: list[str]

    @classmethod
    def of(cls, source: str, files: Iterable[Mapping[str, object]], rename: Rename) -> Shard:
        """The tensors of all files as one shard, without wrappers and prefixes in their names."""
        found: dict[str, object] = {}
        again: list[tuple[str, object]] = []
        for file in files:
            for name, tensor in file.items():
                short = names.plain(name)
                if short in found:
                    again.append((short, tensor))
                else:
                    found[short] = tensor
        known, prefix = rename(found)
        notes = [f"{source}: the names of its tensors begin with {quote(prefix)}, which was left out"] if prefix else []
        tensors: dict[str, object] = {}
        again = [(known[name], tensor) for name, tensor in again]
        for name, tensor in found.items():
            if known[name] in tensors:
                again.append((known[name], tensor))
            else:
                tensors[known[name]] = tensor
        return cls(source, tensors, again, notes)

    def has_bias(self, module: str) -> bool:
        """Whether a part of each layer ("self_attn") has a bias in any of its matrices."""
        return any(name.endswith(".bias") and f".{module}." in name for name in self.tensors)

    def select(self, wanted: Collection[str], rename: Callable[[str], str]) -> dict[str, View]:
        """The tensors of the names in `wanted` (Meta's); CheckpointError unless there are these and no others.

        Biases that are all zero change nothing: they are left out, and a note says so.
        """
        foreign = {f"{rename(name)}.weight": name for name in wanted}
        extra = [name for name in self.tensors if name not in foreign and not self._is_buffer(name)]
        missing = [name for name in foreign if name not in self.tensors]
        if kind := _other_kind(extra):
            raise CheckpointError(f"{self.source}: {kind}")
        if missing:
            like = names.resembling(missing[0], extra)
            raise CheckpointError(
                f"{self.source}: {len(missing)} of {len(foreign)} tensors are missing, first {quote(missing[0])}"
                f"{f' (there is {quote(like)})' if like else ''}; weights and config do not belong together, or a file "
                "is incomplete: download both again"
            )
        self._leave_out_biases(extra)
        self._compare_again(foreign)
        return {name: self._weight(called) for called, name in foreign.items()}

    def _is_buffer(self, name: str) -> bool:
        view = self.tensors[name]
        mask = isinstance(view, View) and len(view.shape) > 1 and names.MASK.fullmatch(name) is not None
        return mask or names.DERIVED.fullmatch(name) is not None

    def _leave_out_biases(self, extra: list[str]) -> None:
        """CheckpointError for a tensor that is no bias of zeros."""
        without_place = set(extra)
        for name, tensor in [(name, self.tensors[name]) for name in extra] + list(self.again):
            is_bias = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in self.tensors
            if name in without_place and not (is_bias and _is_zero(name, tensor)):
                what = "biases are not supported" if is_bias else "no LLaMA 2 of this config has it"
                raise CheckpointError(
                    f"{self.source}: tensor {quote(name)} (and {len(extra) - 1} more) has no place: {what}; "
                    "use weights and config that belong together"
                )
        if extra:
            self.notes.append(f"{self.source}: {len(extra)} biases are all zero and were left out")

    def _compare_again(self, foreign: Mapping[str, str]) -> None:
        for name, tensor in self.again:
            if name in foreign and not (isinstance(tensor, View) and _same(name, self._weight(name), tensor)):
                file = tensor.storage.file.name if isinstance(tensor, View) else self.source
                raise CheckpointError(
                    f"{file}: tensor {quote(name)} stands there twice or in another file too, with other numbers; "
                    "save one model alone, or download all files again"
                )

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


def _other_kind(extra: Sequence[str]) -> str | None:
    """What weights are by the names of their tensors, where they are not a whole model of plain numbers."""
    if any(names.ADAPTER.fullmatch(name) for name in extra):
        return "its tensors are those of a LoRA adapter; merge it into its model first (merge_and_unload of peft)"
    if name := next((name for name in extra if names.QUANTIZED.fullmatch(name)), None):
        return f"tensor {quote(name)} is part of quantized weights; use a checkpoint that is not quantized"
    return None


def _is_zero(name: str, view: object) -> bool:
    """Whether a tensor is a vector of zeros (or minus zeros)."""
    if not isinstance(view, View) or len(view.shape) != 1:
        return False
    view.check_weight(name)
    n = view.shape[0]
    tensor = Tensor("", view.shape, (view,))
    for start in range(0, n, COMPARED_NUMBERS):
        numbers = tensor.rows(start, min(start + COMPARED_NUMBERS, n))
        if np.any(numbers & 0x7FFF if view.dtype == "bf16" else numbers):
            return False
    return True


def _same(name: str, a: View, b: View) -> bool:
    b.check_weight(name)
    return bool(a.shape) and equal(Tensor(name, a.shape, (a,)), Tensor(name, b.shape, (b,)))


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


def state_dict(tree: object, file: InputFile) -> dict[str, object]:
    """The tensors of a weight file by name, without the dicts that trainers put around them; CheckpointError.

    Trainers put the state_dict under "model", "state_dict" and the like, some of them twice.
    """
    for _ in range(MAX_CONTAINERS):
        inner = [tree[key] for key in CONTAINERS if isinstance(tree.get(key), dict)] if isinstance(tree, dict) else []
        if not inner:
            break
        tree = inner[0]
    if not isinstance(tree, dict) or not tree or not all(type(name) is str for name in tree):
        raise CheckpointError(f"{file.name} holds no dict of tensors; save the model's state_dict")
    if tree.keys() >= {"state", "param_groups"}:
        raise CheckpointError(f"{file.name} is the state of an optimizer; give the file with the model's weights")
    return tree
