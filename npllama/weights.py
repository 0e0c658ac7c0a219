"""Open a model directory: which files make up a model, and are they all exactly what they must be?

    npllama.json      the manifest: config, number format of every weight, file/shape/dtype/sha256 of every array
    tokenizer.model   SentencePiece
    *.npy             one file per kind of weight, its layers stacked (or one per part, where a format has parts)

Nothing of the arrays is read on opening: each file is mapped, so a model opens at once whatever its size, and several
processes share one copy in memory. What is read is checked: the manifest, each array's header and size, the tokenizer's
hash. The hashes of the arrays are checked on request, because that reads everything.

Axes: L layers, D model width, H query heads, G key/value heads, E head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from npllama import signatures, strict_json
from npllama.config import ModelConfig
from npllama.errors import ModelError, UsageError, quote
from npllama.quant import BF16, F16, GROUP, Q4, Q6, Q8, ROWS, Coded, Weight

FORMAT = "npllama"
VERSION = 1
MANIFEST = "npllama.json"
TOKENIZER = "tokenizer.model"

LARGEST_TOKENIZER = 32 << 20
LARGEST_NPY_HEADER = 10_000
NPY_ALIGNMENT = 64
CHUNK_BYTES = 4 << 20

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being worked on)."""


class Weights(NamedTuple):
    """All weights of a model, layers stacked; matrices (rows, columns) = (outputs, inputs) in any number format.

    tok_embeddings (V, D), attention_norm (L, D) float32, wq (L, H*E, D), wk and wv (L, G*E, D), wo (L, D, H*E),
    ffn_norm (L, D) float32, w1 (L, F, D), w2 (L, D, F), w3 (L, F, D), norm (D,) float32, output (V, D).
    A tied output is the same object as tok_embeddings.
    """

    tok_embeddings: Weight
    attention_norm: np.ndarray
    wq: Weight
    wk: Weight
    wv: Weight
    wo: Weight
    ffn_norm: np.ndarray
    w1: Weight
    w2: Weight
    w3: Weight
    norm: np.ndarray
    output: Weight


NORMS = ("attention_norm", "ffn_norm", "norm")
"""The kinds that are float32 in every model: a few thousand numbers that scale everything."""


class ArraySpec(NamedTuple):
    """What one .npy file must hold: dtype as NumPy writes it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype[2:])


def kind_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every kind of weight, in the order of Weights."""
    c = config
    L, D, F, V = c.n_layers, c.dim, c.hidden_dim, c.vocab_size
    HE, GE = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        "tok_embeddings": (V, D),
        "attention_norm": (L, D),
        "wq": (L, HE, D),
        "wk": (L, GE, D),
        "wv": (L, GE, D),
        "wo": (L, D, HE),
        "ffn_norm": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "norm": (D,),
        "output": (V, D),
    }


STORED = {
    "f32": {"values": "<f4"},
    "f16": {"bits": "<f2"},
    "bf16": {"bits": "<u2"},
    "q8": {"codes": "|i1", "scales": "|u1", "factors": "<u2"},
    "q6": {"codes": "|u1", "scales": "|u1", "factors": "<u2"},
    "q4": {"codes": "|u1", "scales": "|u1", "factors": "<u2"},
}
"""Number format -> its arrays and their dtype in the file."""

GROUPED: dict[str, type[Coded]] = {"q8": Q8, "q6": Q6, "q4": Q4}
"""The formats whose numbers stand in blocks of rows and groups of columns (see quant.py)."""

CODE_BITS = {"q8": 8, "q6": 6, "q4": 4}


def array_specs(number_format: str, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
    """The arrays that store a weight of this shape in a number format."""
    if number_format not in GROUPED:
        return {part: ArraySpec(dtype, shape) for part, dtype in STORED[number_format].items()}
    blocks, groups = (*shape[:-2], -(-shape[-2] // ROWS)), -(-shape[-1] // GROUP)
    shapes = {
        "codes": (*blocks, groups, ROWS * GROUP * CODE_BITS[number_format] // 8),
        "scales": (*blocks, groups, ROWS),
        "factors": (*blocks, ROWS),
    }
    return {part: ArraySpec(dtype, shapes[part]) for part, dtype in STORED[number_format].items()}


def assemble(number_format: str, arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> Weight:
    """Arrays as they are stored -> the weight as kernels take it (16-bit numbers as uint16); no copy."""
    if number_format in GROUPED:
        return GROUPED[number_format](arrays["codes"], arrays["scales"], arrays["factors"], shape[-2], shape[-1])
    if number_format == "f16":
        return F16(arrays["bits"].view(np.uint16))
    if number_format == "bf16":
        return BF16(arrays["bits"])
    return arrays["values"]


def array_file(kind: str, part: str, number_format: str) -> str:
    """The name of the file that holds one array of a weight."""
    return f"{kind}.npy" if len(STORED[number_format]) == 1 else f"{kind}.{part}.npy"


def is_model_file(name: str) -> bool:
    """Whether a file of this name is part of a model directory."""
    return name in (MANIFEST, TOKENIZER) or (name.endswith(".npy") and name.split(".")[0] in Weights._fields)


def vocabulary_fits(pieces: int, vocab_size: int) -> bool:
    """Whether a tokenizer of so many pieces serves an embedding table of vocab_size rows.

    Every piece needs a row. Rows beyond the last piece are padding, which no text reaches, and may be any number: a
    table is rounded up to what suits the hardware, or leaves room for tokens to come.
    """
    return 0 < pieces <= vocab_size


class OpenModel:
    """A model directory that has been checked and mapped. Also a context manager.

    The maps live as long as arrays taken from `weights` do: unmapping under an array in use would end the process.
    So whoever closes a model must let go of its arrays too; `close` drops the ones held here.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], config: ModelConfig) -> None:
        self.path = path
        self.manifest = manifest
        self.config = config
        self.tokenizer_path = path / TOKENIZER
        self.size_bytes = sum(spec.size_bytes for _, spec, _ in _arrays(manifest))
        self._weights: Weights | None = _map_weights(path, manifest)

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
                mapped = _map_of(array)
                if mapped is not None and hasattr(mapped, "madvise"):
                    mapped.madvise(mmap.MADV_WILLNEED)

    def close(self) -> None:
        """Let go of the weights; their maps are freed with the last array that refers to them."""
        self._weights = None

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_model(path: str | os.PathLike[str]) -> OpenModel:
    """Open a model directory: check everything but the arrays' contents, and map the arrays read-only.

    Opens at most one file for each array, writes nothing, and takes milliseconds whatever the size. Raises ModelError,
    naming the file, for anything that is missing, malformed or does not fit together.
    """
    folder = Path(path)
    _check_is_model_directory(folder)
    manifest = _read_manifest(folder)
    config = _checked_config(folder, manifest)
    _check_tensors(folder, manifest["tensors"], config)
    _check_tokenizer(folder, manifest["tokenizer"], config)
    return OpenModel(folder, manifest, config)


def check_hashes(path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Read every array of a model directory and compare its sha256 with the manifest's; memory use is a few MB.

    Raises ModelError that names the files whose contents changed since the export.
    """
    with open_model(path) as model:
        total = sum(os.path.getsize(model.path / name) for name, _, _ in _arrays(model.manifest))
        done, damaged = 0, []
        for name, _, expected in _arrays(model.manifest):
            digest = hashlib.sha256()
            with _open_regular(model.path / name) as file:
                while chunk := _read(file, CHUNK_BYTES, name):
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


def sha256_hex(data: bytes) -> str:
    """The SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def npy_header(spec: ArraySpec) -> bytes:
    """The bytes before the numbers of a .npy file, version 1.0, padded so that the numbers start at a multiple of 64.

    Source: NumPy's documentation, numpy.lib.format.
    """
    text = _npy_dict(spec)
    padding = -(10 + len(text) + 1) % NPY_ALIGNMENT
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + padding + 1) + text + b" " * padding + b"\n"


def _npy_dict(spec: ArraySpec) -> bytes:
    """The one spelling, NumPy's own, of the dictionary for an array in C order."""
    return f"{{'descr': {spec.dtype!r}, 'fortran_order': False, 'shape': {spec.shape!r}, }}".encode("ascii")


def _arrays(manifest: dict[str, Any]) -> Iterator[tuple[str, ArraySpec, str]]:
    """File name, what it must hold, and sha256 of every array of a checked manifest."""
    for tensor in manifest["tensors"].values():
        for record in tensor["arrays"].values():
            yield record["file"], ArraySpec(record["dtype"], tuple(record["shape"])), record["sha256"]


# ---------------------------------------------------------------- files


def _open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe or device, which could block or never end, is refused."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise ModelError(_unreadable(path, error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path}: is not a regular file, which every file of a model directory must be; {AGAIN}")
    return os.fdopen(descriptor, "rb", buffering=0)


AGAIN = "export the checkpoint again."


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    """What to say about a file that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: is missing, and a model directory needs it; {AGAIN}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{path}: cannot be read ({reason}), and a model needs every one of its files; check its permissions."


def _read(file: BinaryIO, size: int, name: str) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file."""
    try:
        parts = [file.read(size)]
        while parts[-1] and sum(map(len, parts)) < size:
            parts.append(file.read(size - sum(map(len, parts))))
    except OSError as error:
        raise ModelError(_unreadable(Path(name), error)) from error
    return b"".join(parts)


def _read_small(path: Path, largest: int) -> bytes:
    """A whole file that has no business being larger than `largest` bytes."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ModelError(f"{path}: has {size:,} bytes, at most {largest:,} are accepted; {AGAIN}")
        return _read(file, size, path.name)


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
        raise ModelError(_unreadable(folder / MANIFEST, error)) from error
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
    """npllama.json as strict JSON: an object of exactly the five keys of this version."""
    path = folder / MANIFEST
    try:
        manifest = strict_json.parse_object(_read_small(path, strict_json.MAX_BYTES))
    except UsageError as error:
        raise ModelError(f"{path}: {error}; {AGAIN}") from error
    if manifest.get("format") != FORMAT:
        raise ModelError(
            f"{path}: has format {quote(manifest.get('format'))}, a model directory says {quote(FORMAT)}; {AGAIN}"
        )
    if type(manifest.get("version")) is not int or manifest["version"] != VERSION:
        raise ModelError(
            f"{path}: has version {quote(manifest.get('version'))}, this npllama reads version {VERSION}; "
            f"export the checkpoint again with it, or install the npllama that wrote it."
        )
    _check_keys(path, "the manifest", manifest, {"format", "version", "config", "tokenizer", "tensors"})
    return manifest


def _check_keys(path: Path, where: str, found: Any, needed: set[str]) -> None:
    """An object with exactly these keys; anything else in it would be silently ignored."""
    if not isinstance(found, dict):
        raise ModelError(f"{path}: {where} is {quote(found)}, an object is needed; {AGAIN}")
    if missing := sorted(needed - set(found)):
        raise ModelError(f"{path}: {where} has no {quote(missing[0])}, which is needed; {AGAIN}")
    if unknown := sorted(set(found) - needed):
        raise ModelError(f"{path}: {where} has {quote(unknown[0])}, which this version does not know; {AGAIN}")


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
        allowed = ("f32",) if kind in NORMS else tuple(STORED)
        if not isinstance(number_format, str) or number_format not in allowed:
            raise ModelError(
                f"{path}: tensor {kind} has number format {quote(number_format)}, "
                f"needed is one of {' '.join(allowed)}; {AGAIN}"
            )
        _require(path, f"shape of tensor {kind}", tensor["shape"], list(shapes[kind]))
        _check_arrays(path, kind, tensor["arrays"], number_format, shapes[kind])


def _check_arrays(path: Path, kind: str, arrays: Any, number_format: str, shape: tuple[int, ...]) -> None:
    specs = array_specs(number_format, shape)
    _check_keys(path, f"tensor {kind}, arrays", arrays, set(specs))
    for part, spec in specs.items():
        where, record = f"tensor {kind}, array {part}", arrays[part]
        _check_keys(path, where, record, {"file", "dtype", "shape", "sha256"})
        _require(path, f"{where}: file", record["file"], array_file(kind, part, number_format))
        _require(path, f"{where}: dtype", record["dtype"], spec.dtype)
        _require(path, f"{where}: shape", record["shape"], list(spec.shape))
        _check_sha256(path, where, record["sha256"])


def _check_tokenizer(folder: Path, tokenizer: Any, config: ModelConfig) -> None:
    """The tokenizer is the one that was exported: a damaged one often still loads, and then means other words."""
    path = folder / MANIFEST
    _check_keys(path, "tokenizer", tokenizer, {"file", "size", "sha256"})
    _require(path, "tokenizer: file", tokenizer["file"], TOKENIZER)
    _check_sha256(path, "the tokenizer", tokenizer["sha256"])
    size = tokenizer["size"]
    if type(size) is not int or not vocabulary_fits(size, config.vocab_size):
        raise ModelError(
            f"{path}: tokenizer: size is {quote(size)}, but vocab_size of the config is {config.vocab_size}; "
            f"a number from 1 to that is needed, because every piece has a row of its own: {AGAIN}"
        )
    data = _read_small(folder / TOKENIZER, LARGEST_TOKENIZER)
    if sha256_hex(data) != tokenizer["sha256"]:
        if what := signatures.pointer_or_page(data[: signatures.HEAD]):
            raise ModelError(f"{folder / TOKENIZER}: is {what}; the tokenizer that was exported is needed.")
        raise ModelError(
            f"{folder / TOKENIZER}: is not the tokenizer that was exported (sha256 differs from {MANIFEST}); {AGAIN}"
        )


# ---------------------------------------------------------------- the arrays


def _map_weights(folder: Path, manifest: dict[str, Any]) -> Weights:
    found: dict[str, Any] = {}
    for kind, tensor in manifest["tensors"].items():
        arrays = {
            part: _map_array(folder / record["file"], ArraySpec(record["dtype"], tuple(record["shape"])))
            for part, record in tensor["arrays"].items()
        }
        found[kind] = assemble(tensor["format"], arrays, tuple(tensor["shape"]))
    found.setdefault("output", found["tok_embeddings"])
    return Weights(**found)


def _map_array(path: Path, spec: ArraySpec) -> np.ndarray:
    """Map one .npy file read-only, once header and size are exactly what they must be.

    Why exactly: a file cut short would end the process when its missing part is touched, and longer or differently
    laid out contents are not what was exported.
    """
    with _open_regular(path) as file:
        offset = _check_npy_header(path, file, spec)
        size, needed = os.fstat(file.fileno()).st_size, offset + spec.size_bytes
        if size != needed:
            raise ModelError(
                f"{path}: has {size:,} bytes, shape {spec.shape} of {spec.dtype} needs exactly {needed:,}; {AGAIN}"
            )
        try:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be mapped into memory ({error}); {size:,} bytes are needed.") from error
    return np.frombuffer(mapped, np.dtype(spec.dtype), math.prod(spec.shape), offset).reshape(spec.shape)


def _map_of(array: np.ndarray) -> mmap.mmap | None:
    """The memory map that an array lies in; None for an empty array, which has none."""
    base: Any = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def _check_npy_header(path: Path, file: BinaryIO, spec: ArraySpec) -> int:
    """Where the numbers start. The header is not parsed but compared: there is one right spelling of it."""
    start = _read(file, 12, path.name)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\x00", b"\x02\x00") or len(start) < 12:
        what = signatures.pointer_or_page(start + _read(file, signatures.HEAD, path.name))
        found = f"is {what}" if what else f"begins with {quote(start[:8].decode('latin-1'))}"
        raise ModelError(f"{path}: {found}, a .npy file (version 1.0, 2.0) is needed; {AGAIN}")
    begin = 10 if start[6] == 1 else 12
    length = int.from_bytes(start[8:begin], "little")
    if length > LARGEST_NPY_HEADER or (begin + length) % NPY_ALIGNMENT:
        raise ModelError(
            f"{path}: has a header of {length:,} bytes, needed are at most {LARGEST_NPY_HEADER:,} and an end at a "
            f"multiple of {NPY_ALIGNMENT}; {AGAIN}"
        )
    header = start[begin:] + _read(file, length - len(start[begin:]), path.name)
    needed = _npy_dict(spec)
    if len(header) != length or not header.endswith(b"\n") or header.rstrip(b"\n").rstrip(b" ") != needed:
        found = header.rstrip(b" \n").decode("latin-1")
        raise ModelError(f"{path}: its header is {quote(found)}, needed is {quote(needed.decode())}; {AGAIN}")
    return begin + length
