"""Turn a checkpoint into a model directory, in little memory, whole or not at all.

One kind of weight after the other, layer after layer, block of rows after block: a block is read from the
checkpoint, rounded to the number format that was asked for, hashed and written. Memory is a few blocks, whatever the
model's size.
The directory becomes OUT by one rename, after the loader has opened it (see staging.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from npllama.checkpoints import open_checkpoint
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, ModelError
from npllama.numbers import FORMATS, ArraySpec, NumberFormat, UnstorableError, Weight, named
from npllama.numbers.formats import as_float32
from npllama.options import SamplingOptions
from npllama.store.find_tokenizer import find_tokenizer, with_ids
from npllama.store.npy import npy_header
from npllama.store.opening import (
    FORMAT,
    MANIFEST,
    OpenModel,
    Progress,
    array_files,
    check_model,
    is_model_file,
    open_model,
)
from npllama.store.plan import Formats, asked_formats, own_formats, planned_bytes
from npllama.store.staging import check_target, staged, sync_file, target_path
from npllama.store.text_rules import text_rules
from npllama.store.tokenizers import StoredTokenizer, open_tokenizer, stored_in
from npllama.version import FIRST_READER, NEEDS, version_of
from npllama.weights import KINDS, kind_shapes, tensor_names

BLOCK_BYTES = 4 << 20
"""Rows are read in blocks of this many bytes: large enough for the disk's speed, small beside any matrix."""

SLACK_BYTES = 1 << 20
"""Left free for headers, manifest and directory when free space is compared with what is needed."""


class SourceTensor(Protocol):
    """What the exporter asks of a tensor: file names, shape, number format, rows start .. stop-1, also encoded."""

    @property
    def source(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def rows(self, start: int, stop: int) -> np.ndarray: ...
    def encoded(self, number_format: NumberFormat, start: int, stop: int) -> dict[str, np.ndarray]: ...


class Source(Protocol):
    """What the exporter asks of a checkpoint."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def folder(self) -> Path: ...
    @property
    def tied(self) -> bool: ...
    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model directory `out` from a checkpoint; returns its manifest.

    dtype: a registered number format of the matrices (the output of a q4 model is q6), None for what the checkpoint's
    own become (see plan.py); norms are always float32. tokenizer: a file of any kind, or the folder of one; None to
    look inside the checkpoint, in its folder and its parent. force: replace a model directory. progress gets (bytes
    done, bytes in all, tensor), note one-line remarks. The same checkpoint gives the same bytes.
    Raises CheckpointError for what cannot be read or stored, ModelError for an `out` that cannot be made, UsageError
    for a dtype that does not exist.
    """
    asked = None if dtype is None else named(dtype)
    target = target_path(out)
    check_target(target, force, is_model_file)  # before gigabytes are read; once more when it is made
    say = note or (lambda text: None)
    with open_checkpoint(checkpoint) as source:
        for warning in source.warnings:
            say(warning)
        found = find_tokenizer(source, tokenizer)
        say(f"tokenizer: {found.title}")
        if padding := source.config.vocab_size - found.tokenizer.n_pieces:
            say(f"vocabulary: the last {padding:,} of {source.config.vocab_size:,} rows have no piece in the tokenizer")
        rules = text_rules(source.folder, found)
        for remark in rules.remarks:
            say(remark)
        config = with_ids(source.config, found, say)
        config = replace(config, add_bos_token=rules.add_bos_token, add_eos_token=rules.add_eos_token)
        formats = own_formats(source, say) if asked is None else asked_formats(asked, source.tied)
        source = replace(source, config=config)
        said = rules.sampling, rules.chat_format
        return write_model(source, target, formats, found.stored, force, progress, *said)


def quantize_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model directory `out` from another one, whose matrices are f32, f16 or bf16, in a quantized format.

    The result is the same as an export of the checkpoint with this dtype, up to what the first export rounded.
    Raises ModelError for a model that cannot be read or is quantized already, UsageError for another dtype.
    """
    number_format = named(dtype, quantized_only=True)
    target = target_path(out)
    check_target(target, force, is_model_file)
    with open_model(model) as opened:
        source = OpenedSource(opened)
        tokenizer = stored_in(opened.path, opened.manifest)
        formats = asked_formats(number_format, source.tied)
        said = opened.sampling, opened.chat_format
        return write_model(source, target, formats, tokenizer, force, progress, *said)


class _StoredTensor(NamedTuple):
    """One matrix or norm of a model directory, with what the exporter asks of a checkpoint's tensor."""

    stored: np.ndarray
    dtype: str
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1 as they are stored: a view of the map."""
        return self.stored[start:stop]

    def encoded(self, number_format: NumberFormat, start: int, stop: int) -> dict[str, np.ndarray]:
        """The same rows in another number format. UnstorableError."""
        return number_format.encode(self.rows(start, stop), self.dtype)


class OpenedSource:
    """An open model directory with what the exporter asks of a checkpoint."""

    def __init__(self, opened: OpenModel) -> None:
        self.config, self.folder = opened.config, opened.path
        tensors = opened.manifest["tensors"]
        self.tied = "output" not in tensors
        self.tensors: dict[str, _StoredTensor] = {}
        for kind, tensor in tensors.items():
            if FORMATS[tensor["format"]].quantized:
                raise ModelError(
                    f"{opened.path}: {kind} is {tensor['format']} already, and rounding twice loses more; "
                    f"quantize the f32, f16 or bf16 model, or export the checkpoint again."
                )
            file = ", ".join(record["file"] for record in tensor["arrays"].values())
            self._add(kind, getattr(opened.weights, kind), tensor["format"], file)

    def _add(self, kind: str, w: Weight, number_format: str, file: str) -> None:
        stored = w if isinstance(w, np.ndarray) else w[0]
        stored = stored.view(np.float16) if number_format == "f16" else stored
        names = tensor_names(kind, self.config.n_layers)
        layers = stored if KINDS[kind].in_layers else [stored]
        self.tensors |= {name: _StoredTensor(one, number_format, file) for name, one in zip(names, layers, strict=True)}


def write_model(
    source: Source,
    out: Path,
    formats: Formats,
    tokenizer: StoredTokenizer,
    force: bool,
    progress: Progress | None,
    sampling: SamplingOptions | None = None,
    chat_format: str | None = None,
) -> dict[str, Any]:
    """Fill a new directory, let the loader open it, and make it `out`."""
    total = planned_bytes(source.config, formats)
    with staged(out, force, is_model_file, MANIFEST) as folder:
        _check_space(out, total)
        meter = _Meter(total, progress)
        tensors = {kind: _write_kind(source, folder, kind, own, meter) for kind, own in formats.items()}
        for name, content in tokenizer.files.items():
            _write_file(folder / name, content)
        manifest = build_manifest(source.config, tokenizer.entry, tensors, sampling, chat_format)
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
        _write_file(folder / MANIFEST, text.encode("ascii"))
        open_tokenizer(folder, *check_model(folder))
    return manifest


def build_manifest(
    config: ModelConfig,
    tokenizer: dict[str, Any],
    tensors: dict[str, Any],
    sampling: SamplingOptions | None,
    chat_format: str | None,
) -> dict[str, Any]:
    """The manifest, of the lowest format version that has what it says (see version.py)."""
    manifest = {"format": FORMAT, "config": config.to_json(), "tokenizer": tokenizer, "tensors": tensors}
    if sampling is not None:
        manifest["sampling"] = sampling.to_json()
    if chat_format is not None:
        manifest["chat_format"] = chat_format
    version = version_of([*manifest, *manifest["config"], *tokenizer])
    return {**manifest, "version": version, **({NEEDS: FIRST_READER[version]} if version > 1 else {})}


def _check_space(out: Path, needed: int) -> None:
    """Better refused now than after ten minutes of writing. Some file systems say nothing, or 0: then writing tells."""
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError:
        return
    if 0 < free < needed + SLACK_BYTES:
        raise ModelError(
            f"{out}: no space left on device: the model needs {needed + SLACK_BYTES:,} bytes, {free:,} are free in "
            f"{out.parent}; make room, choose another OUT, or a smaller --dtype."
        )


class _Meter:
    """Counts what is written and tells who wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def advance(self, size: int, name: str) -> None:
        self.done += size
        if self._progress:
            self._progress(self.done, self.total, name)


def _write_kind(source: Source, folder: Path, kind: str, number_format: NumberFormat, meter: _Meter) -> dict[str, Any]:
    """Write the files of one kind of weight; returns its entry for the manifest."""
    shape = kind_shapes(source.config)[kind]
    specs = number_format.arrays(shape)
    names = array_files(kind, specs)
    with ExitStack() as stack:
        files = {part: stack.enter_context(_ArrayFile(folder / names[part], spec)) for part, spec in specs.items()}
        for name, start, stop in _blocks(source, kind, number_format):
            tensor = source.tensors[name]
            where = f"{source.folder}: {tensor.source}: {name}"
            for part, stored in encoded(tensor, number_format, start, stop, where).items():
                files[part].write(stored)
                meter.advance(stored.nbytes, name)
    arrays = {part: file.record() for part, file in files.items()}
    return {"format": number_format.name, "shape": list(shape), "arrays": arrays}


def _blocks(source: Source, kind: str, number_format: NumberFormat) -> Iterator[tuple[str, int, int]]:
    """All rows of one kind, layer after layer: tensor, first row, and the one behind the last."""
    together = number_format.block_rows
    for name in tensor_names(kind, source.config.n_layers):
        rows, *columns = source.tensors[name].shape
        step = max(1, BLOCK_BYTES // (math.prod(columns) * 4) // together) * together
        for start in range(0, rows, step):
            yield name, start, min(start + step, rows)


def encoded(
    tensor: SourceTensor, number_format: NumberFormat, start: int, stop: int, where: str
) -> dict[str, np.ndarray]:
    """Rows of a tensor -> the arrays that store them. Rounds to nearest, half to even; float64 by way of float32.

    Raises CheckpointError, naming tensor, index and value, for a number that the format cannot hold.
    """
    try:
        return tensor.encoded(number_format, start, stop)
    except UnstorableError as error:
        at = error.at
    block = tensor.rows(start, stop)
    index = [int(i) for i in np.unravel_index(at, block.shape)]
    found = block.reshape(-1)[at : at + 1]
    value = float(as_float32(found, tensor.dtype)[0]) if tensor.dtype == "bf16" else float(found[0])
    index[0] += start
    if not math.isfinite(value):
        raise CheckpointError(
            f"{where}{index} is {value}, and a weight must be a finite number; the checkpoint is damaged: get it again."
        )
    raise CheckpointError(
        f"{where}{index} is {value}, which {number_format.title} cannot hold (its largest number is "
        f"{number_format.largest}); choose a --dtype with a wider range, bf16 or f32."
    )


class _ArrayFile:
    """A .npy file written from the first byte to the last, hashed on the way, and on the disk when it is closed.

    By write() only: a full disk is then an error; on a writable map it would end the process.
    """

    def __init__(self, path: Path, spec: ArraySpec) -> None:
        self._path, self._spec = path, spec
        self._digest = hashlib.sha256()

    def __enter__(self) -> _ArrayFile:
        self._file = open(self._path, "xb", buffering=0)
        self._put(npy_header(self._spec))
        return self

    def write(self, rows: np.ndarray) -> None:
        """Append rows, whose dtype has the size of the file's."""
        self._put(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        _write_all(self._file, data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                sync_file(self._file.fileno())
        finally:
            self._file.close()

    def record(self) -> dict[str, Any]:
        """The file's entry for the manifest."""
        return {
            "file": self._path.name,
            "dtype": self._spec.dtype,
            "shape": list(self._spec.shape),
            "sha256": self._digest.hexdigest(),
        }


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """One write may take less than it was given: the disk is nearly full, or the block is beyond 2 GB."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _write_file(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns."""
    with open(path, "xb", buffering=0) as file:
        _write_all(file, data)
        sync_file(file.fileno())
