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

from npllama.checkpoints import Checkpoint, open_checkpoint
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, ModelError, UsageError, quote
from npllama.format_version import FIRST_READER, NEEDS, version_of
from npllama.options import SamplingOptions
from npllama.quant import BF16, ROWS, Weight, bf16_bits, f16_bits, quantize, widen
from npllama.staging import check_target, staged
from npllama.text_rules import text_rules
from npllama.tokenizer import Tokenizer
from npllama.weights import (
    FORMAT,
    GROUPED,
    MANIFEST,
    MOST_PADDING_ROWS,
    NORMS,
    STORED,
    TOKENIZER,
    ArraySpec,
    OpenModel,
    Progress,
    array_file,
    array_specs,
    is_model_file,
    kind_shapes,
    npy_header,
    open_model,
    sha256_hex,
    vocabulary_fits,
)

BLOCK_BYTES = 4 << 20
"""Rows are read in blocks of this many bytes: large enough for the disk's speed, small beside any matrix."""

SLACK_BYTES = 1 << 20
"""Room for headers, manifest and directory when free space is compared with what is needed."""

IN_LAYERS = {
    **{kind: f"layers.{{}}.attention.{kind}" for kind in ("wq", "wk", "wv", "wo")},
    **{kind: f"layers.{{}}.feed_forward.{kind}" for kind in ("w1", "w2", "w3")},
    **{kind: f"layers.{{}}.{kind}" for kind in ("attention_norm", "ffn_norm")},
}
"""Kinds that each layer has one of, and Meta's name for it in a checkpoint."""

NUMBERS = {"f32": ("float32", 0x7F800000), "f16": ("float16", 0x7C00), "bf16": ("bfloat16", 0x7F80)}
"""Number format -> its name, and the bits of its exponent: all set in infinity and NaN, and only there."""


class Rows(Protocol):
    """What the exporter asks of a tensor: shape, number format, and rows start .. stop-1."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def rows(self, start: int, stop: int) -> np.ndarray: ...


class Source(Protocol):
    """What the exporter asks of a checkpoint."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def folder(self) -> Path: ...
    @property
    def tied(self) -> bool: ...
    @property
    def tensors(self) -> Mapping[str, Rows]: ...


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

    dtype "f32", "f16", "bf16", "q8", "q6" or "q4" of the matrices (the output of a q4 model is q6), None for the
    checkpoint's own (float32 where its matrices differ or are float64); norms are always float32. tokenizer: a
    SentencePiece file, None to look in the checkpoint's folder and its parent. force: replace a model directory.
    progress gets (bytes done, bytes in all, tensor), note one-line remarks. The same checkpoint gives the same bytes.
    Raises CheckpointError for what cannot be read or stored, ModelError for an `out` that cannot be made, UsageError
    for a dtype that does not exist.
    """
    if dtype is not None and dtype not in STORED:
        raise UsageError(f"dtype {quote(dtype)} is not known; choose one of {', '.join(STORED)}.")
    target = Path(os.path.realpath(out))
    check_target(target, force, is_model_file)  # before gigabytes are read; once more when it is made
    say = note or (lambda text: None)
    with open_checkpoint(checkpoint) as source:
        for warning in source.warnings:
            say(warning)
        tokenizer_file = find_tokenizer(source, tokenizer)
        say(f"tokenizer: {tokenizer_file}")
        rules = text_rules(source.folder, Tokenizer(tokenizer_file))
        for remark in rules.remarks:
            say(remark)
        config = replace(source.config, add_bos_token=rules.add_bos_token, add_eos_token=rules.add_eos_token)
        number_format = dtype or own_format(source)
        source = replace(source, config=config)
        return write_model(source, target, number_format, tokenizer_file, force, progress, rules.sampling)


def quantize_model(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model directory `out` from another one, whose matrices are f32, f16 or bf16, in "q8", "q6" or "q4".

    The result is the same as an export of the checkpoint with this dtype, up to what the first export rounded.
    Raises ModelError for a model that cannot be read or is quantized already, UsageError for another dtype.
    """
    if dtype not in GROUPED:
        raise UsageError(f"dtype {quote(dtype)} is not a quantized format; choose one of {', '.join(GROUPED)}.")
    target = Path(os.path.realpath(out))
    check_target(target, force, is_model_file)
    with open_model(model) as opened:
        source = OpenedSource(opened)
        return write_model(source, target, dtype, opened.tokenizer_path, force, progress, opened.sampling)


class _Rows(NamedTuple):
    """One matrix or norm of a model directory, with what the exporter asks of a checkpoint's tensor."""

    stored: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1 as they are stored: a view of the map."""
        return self.stored[start:stop]


class OpenedSource:
    """An open model directory with what the exporter asks of a checkpoint."""

    def __init__(self, opened: OpenModel) -> None:
        self.config, self.folder = opened.config, opened.path
        tensors = opened.manifest["tensors"]
        self.tied = "output" not in tensors
        self.tensors: dict[str, _Rows] = {}
        for kind, tensor in tensors.items():
            if tensor["format"] in GROUPED:
                raise ModelError(
                    f"{opened.path}: {kind} is {tensor['format']} already, and rounding twice loses more; "
                    f"quantize the f32, f16 or bf16 model, or export the checkpoint again."
                )
            self._add(kind, getattr(opened.weights, kind), tensor["format"])

    def _add(self, kind: str, w: Weight, number_format: str) -> None:
        stored = w if isinstance(w, np.ndarray) else w[0]
        stored = stored.view(np.float16) if number_format == "f16" else stored
        if kind not in IN_LAYERS:
            self.tensors[kind] = _Rows(stored, number_format)
            return
        for l in range(self.config.n_layers):
            self.tensors[IN_LAYERS[kind].format(l)] = _Rows(stored[l], number_format)


def own_format(source: Checkpoint) -> str:
    """The number format that loses nothing of a checkpoint's matrices: their own where it is one, else float32.

    float64 becomes float32 too: nothing computes in it. Norms have no say, as they are float32 in any case.
    """
    found = {tensor.dtype for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    return found.pop() if len(found) == 1 and found <= set(STORED) else "f32"


def find_tokenizer(source: Checkpoint, asked: str | os.PathLike[str] | None) -> Path:
    """The tokenizer that was asked for, else tokenizer.model in the checkpoint's folder, else in its parent.

    Raises CheckpointError when there is none, or when it does not have the checkpoint's vocabulary.
    """
    folder = source.folder
    parent = Path(os.path.realpath(folder)).parent
    places = [Path(asked)] if asked is not None else [folder / TOKENIZER, parent / TOKENIZER]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = " and ".join(str(place) for place in places)
        raise CheckpointError(
            f"{folder}: has no tokenizer (looked for {looked}); its SentencePiece file is needed: name it with "
            f"--tokenizer FILE."
        )
    pieces, rows = Tokenizer(path).n_pieces, source.config.vocab_size
    if not vocabulary_fits(pieces, rows):
        raise CheckpointError(
            f"{path}: has {pieces:,} pieces, but the checkpoint's vocabulary has {rows:,}, which may be at most "
            f"{MOST_PADDING_ROWS} more; name the tokenizer that belongs to it with --tokenizer FILE."
        )
    return path


def write_model(
    source: Source,
    out: Path,
    number_format: str,
    tokenizer_file: Path,
    force: bool,
    progress: Progress | None,
    sampling: SamplingOptions | None = None,
) -> dict[str, Any]:
    """Fill a new directory, let the loader open it, and make it `out`."""
    shapes = kind_shapes(source.config)
    if source.tied:
        del shapes["output"]
    formats = {kind: format_of(kind, number_format, source.tied) for kind in shapes}
    total = sum(spec.size_bytes for kind in shapes for spec in array_specs(formats[kind], shapes[kind]).values())
    with staged(out, force, is_model_file) as folder:
        _check_space(out, total)
        meter = _Meter(total, progress)
        tensors = {k: _write_kind(source, folder, k, formats[k], shapes[k], meter) for k in shapes}
        manifest = build_manifest(source.config, _copy_tokenizer(tokenizer_file, folder / TOKENIZER), tensors, sampling)
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
        _write_file(folder / MANIFEST, text.encode("ascii"))
        with open_model(folder) as result:
            Tokenizer(result.tokenizer_path)
    return manifest


def build_manifest(
    config: ModelConfig, tokenizer: dict[str, Any], tensors: dict[str, Any], sampling: SamplingOptions | None
) -> dict[str, Any]:
    """The manifest, of the lowest format version that has what it says (see format_version.py)."""
    manifest = {"format": FORMAT, "config": config.to_json(), "tokenizer": tokenizer, "tensors": tensors}
    if sampling is not None:
        manifest["sampling"] = sampling.to_json()
    version = version_of([*manifest, *manifest["config"]])
    return {**manifest, "version": version, **({NEEDS: FIRST_READER[version]} if version > 1 else {})}


def _check_space(out: Path, needed: int) -> None:
    """Better refused now than after ten minutes of writing."""
    free = shutil.disk_usage(out.parent).free
    if free < needed + SLACK_BYTES:
        raise ModelError(
            f"{out}: no space left on device: the model needs {needed + SLACK_BYTES:,} bytes, {free:,} are free in "
            f"{out.parent}; make room, choose another OUT, or a smaller --dtype."
        )


def format_of(kind: str, number_format: str, tied: bool) -> str:
    """The number format of one kind of weight in a model of a number format.

    Norms are float32 in every model. The output of a q4 model, where an error reaches every token, is q6: it takes away
    a third of the KL divergence. The embedding is q6 only where it is the output as well (tied): alone, a twentieth.
    """
    if kind in NORMS:
        return "f32"
    output = "tok_embeddings" if tied else "output"
    return "q6" if number_format == "q4" and kind == output else number_format


class _Meter:
    """Counts what is written and tells who wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def advance(self, size: int, name: str) -> None:
        self.done += size
        if self._progress:
            self._progress(self.done, self.total, name)


def _write_kind(
    source: Source, folder: Path, kind: str, number_format: str, shape: tuple[int, ...], meter: _Meter
) -> dict[str, Any]:
    """Write the files of one kind of weight; returns its entry for the manifest."""
    specs = array_specs(number_format, shape)
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(_ArrayFile(folder / array_file(kind, part, number_format), spec))
            for part, spec in specs.items()
        }
        for name, row, block, dtype in _blocks(source, kind):
            for part, stored in encode(number_format, block, dtype, f"{source.folder}: {name}", row).items():
                files[part].write(stored)
                meter.advance(stored.nbytes, name)
    return {"format": number_format, "shape": list(shape), "arrays": {part: f.record() for part, f in files.items()}}


def _blocks(source: Source, kind: str) -> Iterator[tuple[str, int, np.ndarray, str]]:
    """All rows of one kind, layer after layer: tensor, first row, rows, and how their numbers are to be read."""
    n_layers = source.config.n_layers
    names = [IN_LAYERS[kind].format(l) for l in range(n_layers)] if kind in IN_LAYERS else [kind]
    for name in names:
        tensor = source.tensors[name]
        rows, row_bytes = tensor.shape[0], math.prod(tensor.shape[1:]) * 4
        step = max(1, BLOCK_BYTES // row_bytes // ROWS) * ROWS  # whole blocks of the quantized formats
        for start in range(0, rows, step):
            yield name, start, tensor.rows(start, min(start + step, rows)), tensor.dtype


def encode(number_format: str, block: np.ndarray, dtype: str, name: str, first_row: int) -> dict[str, np.ndarray]:
    """Rows of a tensor -> the arrays that store them. Rounds to nearest, half to even; float64 by way of float32.

    Raises CheckpointError, naming tensor, index and value, for a number that is not finite in the format.
    """
    if number_format in GROUPED:
        return _quantized(number_format, block, dtype, name, first_row)
    if dtype == number_format:
        stored = block.view(np.uint16) if dtype == "f16" else block
    else:
        wide = _float32(block, dtype)
        stored = f16_bits(wide) if number_format == "f16" else bf16_bits(wide) if number_format == "bf16" else wide
    bits = stored.view(np.uint32) if number_format == "f32" else stored
    exponent = bits.dtype.type(NUMBERS[number_format][1])
    if (bits & exponent).max() == exponent:
        _refuse(number_format, block, dtype, name, first_row, np.flatnonzero((bits & exponent) == exponent)[0])
    (part,) = STORED[number_format]
    return {part: stored}


def _float32(block: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return widen(BF16(block)) if dtype == "bf16" else block.astype(np.float32, copy=False)


def _quantized(number_format: str, block: np.ndarray, dtype: str, name: str, first_row: int) -> dict[str, np.ndarray]:
    """Rows of a tensor -> codes, scales and factors; the rows begin at a whole block."""
    wide = _float32(block, dtype)
    if not np.isfinite(wide).all():
        _refuse("f32", block, dtype, name, first_row, int(np.flatnonzero(~np.isfinite(wide))[0]))
    try:
        found = quantize(wide, number_format)
    except UsageError as error:
        raise CheckpointError(f"{name}, rows from {first_row}: {error}") from error
    return {"codes": found.codes, "scales": found.scales, "factors": found.factors}


def _refuse(number_format: str, block: np.ndarray, dtype: str, name: str, first_row: int, at: int) -> None:
    index = [int(i) for i in np.unravel_index(at, block.shape)]
    index[0] += first_row
    found = block.reshape(-1)[at : at + 1]
    value = float(widen(BF16(found))[0]) if dtype == "bf16" else float(found[0])
    if not math.isfinite(value):
        raise CheckpointError(
            f"{name}{index} is {value}, and a weight must be a finite number; the checkpoint is damaged: get it again."
        )
    largest = {"f32": "3.4e38", "f16": "65,504", "bf16": "3.4e38"}[number_format]
    raise CheckpointError(
        f"{name}{index} is {value}, which {NUMBERS[number_format][0]} cannot hold (its largest number is {largest}); "
        f"choose a --dtype with a wider range, bf16 or f32."
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
                os.fsync(self._file.fileno())
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
        os.fsync(file.fileno())


def _copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy the tokenizer; returns its entry for the manifest."""
    size = Tokenizer(source).n_pieces
    data = source.read_bytes()
    _write_file(target, data)
    return {"file": TOKENIZER, "size": size, "sha256": sha256_hex(data)}
