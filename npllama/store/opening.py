"""Open a model directory: which files make up a model, and are they all exactly what they must be?

    npllama.json      the manifest: config, number format of every weight, file/shape/dtype/sha256 of every array;
                      how it may grow is said in version.py
    tokenizer.*       the tokenizer, in one or several files (tokenizers.py)
    *.npy             one file per kind of weight, its layers stacked (or one per part, where a format has parts)

Nothing of the arrays is read on opening: each file is mapped, so a model opens at once whatever its size, and several
processes share one copy in memory. What is read is checked: the manifest, each array's header and size, the tokenizer's
hash. The hashes of the arrays are checked on request, because that reads everything.

Axes: L layers, D model width, H query heads, G key/value heads, E head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np

from npllama.config import ModelConfig
from npllama.errors import ModelError, UsageError, quote
from npllama.numbers import FORMATS, ArraySpec
from npllama.options import BASIC, SamplingOptions
from npllama.store import tokenizers
from npllama.store.npy import (
    AGAIN,
    map_array,
    open_array,
    open_regular,
    prefetch,
    read,
    read_small,
    reason,
    unreadable,
)
from npllama.store.tokenizers import MAX_TOKENIZER_BYTES, TOKENIZER, sha256_hex
from npllama.system import signatures, strict_json
from npllama.system.closing import Closing
from npllama.version import NEEDS, SINCE, VERSION, unknown_key, unknown_version
from npllama.weights import KINDS, Weights, kind_shapes

FORMAT = "npllama"
MANIFEST = "npllama.json"
CHUNK_BYTES = 4 << 20

log = logging.getLogger("npllama")

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being worked on)."""


def array_files(kind: str, parts: Iterable[str]) -> dict[str, str]:
    """The names of the files that hold the arrays of a weight: its kind's alone where there is one."""
    names = list(parts)
    return {part: f"{kind}.npy" if len(names) == 1 else f"{kind}.{part}.npy" for part in names}


def is_model_file(name: str) -> bool:
    """Whether a file of this name is part of a model directory."""
    return (
        name == MANIFEST
        or name in tokenizers.FILES
        or (name.endswith(".npy") and name.split(".")[0] in Weights._fields)
    )


def vocabulary_fits(pieces: int, vocab_size: int) -> bool:
    """Whether a tokenizer of so many pieces serves an embedding table of vocab_size rows.

    Every piece needs a row. Rows beyond the last piece are padding, which no text reaches, and may be any number: a
    table is rounded up to what suits the hardware, or leaves room for tokens to come.
    """
    return 0 < pieces <= vocab_size


class OpenModel(Closing):
    """A model directory that has been checked and mapped. Also a context manager.

    The maps live as long as arrays taken from `weights` do: unmapping under an array in use would end the process.
    So whoever closes a model must let go of its arrays too; `close` drops the ones held here.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], config: ModelConfig) -> None:
        self.path = path
        self.manifest = manifest
        self.config = config
        self.sampling = suggested_sampling(path / MANIFEST, manifest)
        self.chat_format: str | None = manifest.get("chat_format")
        self.size_bytes = size_bytes(manifest)
        self._weights: Weights | None = _map_weights(path, manifest)
        self._closing: list[Callable[[], object]] = []

    @property
    def weights(self) -> Weights:
        """The weights, read-only maps of the files. Raises UsageError once the model is closed."""
        if self._weights is None:
            raise UsageError(f"the model {self.path} is closed; open it again to use its weights.")
        return self._weights

    def prefetch(self) -> None:
        """Ask the system to read the files ahead, so that the first tokens do not wait for the disk bit by bit."""
        for w in self.weights:
            for array in [w] if isinstance(w, np.ndarray) else [part for part in w if isinstance(part, np.ndarray)]:
                prefetch(array)

    def close(self) -> None:
        """Let go of the weights; their maps are freed with the last array that refers to them."""
        self._weights = None
        while self._closing:
            self._closing.pop()()

    def on_close(self, release: Callable[[], object]) -> None:
        """Call this too when the model is closed."""
        self._closing.append(release)


def open_model(path: str | os.PathLike[str]) -> OpenModel:
    """Open a model directory: check everything but the arrays' contents, and map the arrays read-only.

    Opens at most one file for each array, writes nothing, and takes equally long whatever the size. Raises ModelError,
    naming the file, for anything that is missing, malformed or does not fit together.
    """
    folder = Path(path)
    return OpenModel(folder, *_checked(folder))


def check_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], ModelConfig]:
    """The manifest and config of a model directory, once all is checked that `open_model` checks. Maps nothing."""
    folder = Path(path)
    manifest, config = _checked(folder)
    for name, spec, _ in _arrays(manifest):
        with open_array(folder / name, spec):
            pass
    return manifest, config


def _checked(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Manifest and config, once everything but the arrays is what it must be."""
    _check_is_model_directory(folder)
    manifest = _read_manifest(folder)
    config = _checked_config(folder, manifest)
    _check_tensors(folder, manifest["tensors"], config)
    _check_tokenizer(folder, manifest["tokenizer"], config)
    return manifest, config


def check_hashes(path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Read every array of a model directory and compare its sha256 with the manifest's; memory use is a few MB.

    Raises ModelError that names the files whose contents changed since the export.
    """
    folder, (manifest, _) = Path(path), check_model(path)
    total = sum(os.path.getsize(folder / name) for name, _, _ in _arrays(manifest))
    done, damaged = 0, []
    for name, _, expected in _arrays(manifest):
        digest = hashlib.sha256()
        with open_regular(folder / name) as file:
            while chunk := read(file, CHUNK_BYTES, name):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total, name)
        if digest.hexdigest() != expected:
            damaged.append(name)
    if damaged:
        shown = ", ".join(damaged[:4]) + (f" and {len(damaged) - 4} more" if len(damaged) > 4 else "")
        raise ModelError(
            f"{path}: the contents of {shown} are not what was exported (sha256 differs from {MANIFEST}); "
            f"export the checkpoint again."
        )


def _arrays(manifest: dict[str, Any]) -> Iterator[tuple[str, ArraySpec, str]]:
    """File name, what it must hold, and sha256 of every array of a checked manifest."""
    for tensor in manifest["tensors"].values():
        for record in tensor["arrays"].values():
            yield record["file"], ArraySpec(record["dtype"], tuple(record["shape"])), record["sha256"]


def size_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of the numbers of all arrays of a checked manifest."""
    return sum(spec.size_bytes for _, spec, _ in _arrays(manifest))


# ---------------------------------------------------------------- the manifest


CHECKPOINT_SIGNS = ("params.json", "config.json", "*.pth", "*.pt", "*.safetensors", "pytorch_model*.bin")


def _check_is_model_directory(folder: Path) -> None:
    """Tell apart, for whoever gave the path, the things that are not a model directory."""
    try:
        mode = os.stat(folder).st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(
            f"{folder}: cannot be opened ({reason}); a model directory is needed: name one, or make one with "
            f"'npllama export CHECKPOINT OUT'."
        ) from error
    if not stat.S_ISDIR(mode):
        raise ModelError(
            f"{folder}: is a file, and a model is a directory that holds {MANIFEST}; make one with "
            f"'npllama export {folder} OUT' if this is a checkpoint."
        )
    try:
        os.lstat(folder / MANIFEST)
        return
    except FileNotFoundError:
        pass
    except OSError as error:  # a directory that may not be looked into
        raise ModelError(unreadable(folder / MANIFEST, error)) from error
    if any(any(folder.glob(sign)) for sign in CHECKPOINT_SIGNS):
        raise ModelError(
            f"{folder}: is a checkpoint, not a model directory (it holds no {MANIFEST}); convert it once with "
            f"'npllama export {folder} OUT', then use OUT."
        )
    raise ModelError(
        f"{folder}: holds no {MANIFEST}, so it is no model directory, or an export that did not finish; name another, "
        f"or make one with 'npllama export CHECKPOINT OUT'."
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """npllama.json as strict JSON: an object of the five keys of version 1, and those that came later."""
    path = folder / MANIFEST
    try:
        manifest = strict_json.parse_object(read_small(path, strict_json.MAX_BYTES))
    except UsageError as error:
        raise ModelError(f"{path}: {error}; {AGAIN}") from error
    if manifest.get("format") != FORMAT:
        raise ModelError(
            f"{path}: has format {quote(manifest.get('format'))}, a model directory says {quote(FORMAT)}; {AGAIN}"
        )
    version = manifest.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(f"{path}: {unknown_version(version, manifest.get(NEEDS))}")
    needed = {"format", "version", "config", "tokenizer", "tensors"}
    _check_keys(path, "the manifest", manifest, needed, {NEEDS, "sampling", "chat_format"})
    parts = [part for part in (manifest["config"], manifest["tokenizer"]) if isinstance(part, dict)]
    if early := [key for part in (manifest, *parts) for key in part if SINCE.get(key, 1) > version]:
        raise ModelError(
            f"{path}: has {quote(early[0])}, which needs version {SINCE[early[0]]}, but says version {version}; {AGAIN}"
        )
    if not isinstance(manifest.get("chat_format", ""), str):
        raise ModelError(f"{path}: chat_format is {quote(manifest['chat_format'])}, a name is needed; {AGAIN}")
    return manifest


def _check_keys(path: Path, where: str, found: Any, needed: set[str], optional: Set[str] = frozenset()) -> None:
    """An object with exactly these keys; anything else in it would be silently ignored."""
    if not isinstance(found, dict):
        raise ModelError(f"{path}: {where} is {quote(found)}, an object is needed; {AGAIN}")
    if missing := sorted(needed - set(found)):
        raise ModelError(f"{path}: {where} has no {quote(missing[0])}, which is needed; {AGAIN}")
    if unknown := sorted(set(found) - needed - optional):
        raise ModelError(
            f"{path}: {where} has {quote(unknown[0])}, which this version does not know: {unknown_key(unknown[0])}, or "
            f"{AGAIN}"
        )


def _require(path: Path, where: str, found: Any, needed: Any) -> None:
    if repr(found) != repr(needed):  # 24.0 == 24, and True == 1: neither is what export wrote
        raise ModelError(f"{path}: {where} is {quote(found)}, needed is {quote(needed)}; {AGAIN}")


def _check_sha256(path: Path, where: str, found: Any) -> None:
    if not isinstance(found, str) or not re.fullmatch(r"[0-9a-f]{64}", found):
        raise ModelError(f"{path}: sha256 of {where} is {quote(found)}, needed are 64 hexadecimal digits; {AGAIN}")


def _checked_config(folder: Path, manifest: dict[str, Any]) -> ModelConfig:
    path, values = folder / MANIFEST, manifest["config"]
    if not isinstance(values, dict):
        raise ModelError(f"{path}: config is {quote(values)}, an object is needed; {AGAIN}")
    try:
        return ModelConfig.from_json(values)
    except UsageError as error:
        raise ModelError(f"{path}: config: {error}; {AGAIN}") from error


def suggested_sampling(path: Path, manifest: dict[str, Any]) -> SamplingOptions | None:
    """How the checkpoint's makers sample from it; None where they do not say."""
    if "sampling" not in manifest:
        return None
    values = manifest["sampling"]
    _check_keys(path, "sampling", values, set(BASIC))
    try:
        return SamplingOptions(**values)
    except UsageError as error:
        raise ModelError(f"{path}: sampling: {error} {AGAIN.capitalize()}") from error


def _check_tensors(folder: Path, tensors: Any, config: ModelConfig) -> None:
    """Every kind of weight is there, in a known number format, with the shapes that the config asks for."""
    path, shapes = folder / MANIFEST, kind_shapes(config)
    needed = set(shapes)
    if isinstance(tensors, dict) and "output" not in tensors:
        needed.discard("output")  # tied: the embedding table serves as output
    _check_keys(path, "tensors", tensors, needed)
    for kind, tensor in tensors.items():
        _check_keys(path, f"tensor {kind}", tensor, {"format", "shape", "arrays"})
        number_format = tensor["format"]
        allowed = ("f32",) if KINDS[kind].is_norm else tuple(FORMATS)
        if not isinstance(number_format, str) or number_format not in allowed:
            raise ModelError(
                f"{path}: tensor {kind} has number format {quote(number_format)}, "
                f"needed is one of {' '.join(allowed)}; {AGAIN}"
            )
        _require(path, f"shape of tensor {kind}", tensor["shape"], list(shapes[kind]))
        _check_arrays(path, kind, tensor["arrays"], number_format, shapes[kind])


def _check_arrays(path: Path, kind: str, arrays: Any, number_format: str, shape: tuple[int, ...]) -> None:
    specs = FORMATS[number_format].arrays(shape)
    files = array_files(kind, specs)
    _check_keys(path, f"tensor {kind}, arrays", arrays, set(specs))
    for part, spec in specs.items():
        where, record = f"tensor {kind}, array {part}", arrays[part]
        _check_keys(path, where, record, {"file", "dtype", "shape", "sha256"})
        _require(path, f"{where}: file", record["file"], files[part])
        _require(path, f"{where}: dtype", record["dtype"], spec.dtype)
        _require(path, f"{where}: shape", record["shape"], list(spec.shape))
        _check_sha256(path, where, record["sha256"])


def _check_tokenizer(folder: Path, tokenizer: Any, config: ModelConfig) -> None:
    """The tokenizer is the one that was exported: a damaged one often still loads, and then means other words."""
    path = folder / MANIFEST
    if isinstance(tokenizer, dict) and "kind" in tokenizer:
        _check_files(path, tokenizer)
    else:
        _check_keys(path, "tokenizer", tokenizer, {"file", "size", "sha256"})
        _require(path, "tokenizer: file", tokenizer["file"], TOKENIZER)
        _check_sha256(path, "the tokenizer", tokenizer["sha256"])
    size = tokenizer["size"]
    if type(size) is not int or not vocabulary_fits(size, config.vocab_size):
        raise ModelError(
            f"{path}: tokenizer: size is {quote(size)}, but vocab_size of the config is {config.vocab_size}; "
            f"a number from 1 to that is needed, because every piece has a row of its own: {AGAIN}"
        )
    for name, sha256 in tokenizers.hashes(tokenizer).items():
        data = read_small(folder / name, MAX_TOKENIZER_BYTES)
        if sha256_hex(data) == sha256:
            continue
        if what := signatures.pointer_or_page(data[: signatures.HEAD]):
            raise ModelError(f"{folder / name}: is {what}; the tokenizer that was exported is needed.")
        raise ModelError(
            f"{folder / name}: is not the tokenizer that was exported (sha256 differs from {MANIFEST}); {AGAIN}"
        )


def _check_files(path: Path, tokenizer: dict[str, Any]) -> None:
    """The entry of a tokenizer whose kind is named: all of its files, each with a sha256."""
    _check_keys(path, "tokenizer", tokenizer, {"kind", "size", "sha256"})
    named = {kind: found for kind, found in tokenizers.KINDS.items() if kind != tokenizers.SENTENCEPIECE}
    kind = tokenizer["kind"]
    if not isinstance(kind, str) or kind not in named:
        raise ModelError(f"{path}: tokenizer: kind is {quote(kind)}, needed is one of {' '.join(named)}; {AGAIN}")
    _check_keys(path, "tokenizer: sha256", tokenizer["sha256"], set(named[kind].files))
    for name, sha256 in tokenizer["sha256"].items():
        _check_sha256(path, name, sha256)


# ---------------------------------------------------------------- the arrays


def _map_weights(folder: Path, manifest: dict[str, Any]) -> Weights:
    found: dict[str, Any] = {}
    refused: list[OSError | ValueError] = []  # one for each array that had to be read
    for kind, tensor in manifest["tensors"].items():
        arrays = {
            part: map_array(folder / record["file"], ArraySpec(record["dtype"], tuple(record["shape"])), refused)
            for part, record in tensor["arrays"].items()
        }
        found[kind] = FORMATS[tensor["format"]].assemble(arrays, tuple(tensor["shape"]))
    found.setdefault("output", found["tok_embeddings"])
    if refused:
        log.warning(
            f"{folder}: its file system maps no files into memory ({reason(refused[0])}), so the weights were read: "
            f"that takes time, and memory for each process; a copy on a local disk needs neither"
        )
    return Weights(**found)
