"""A saved session on disk: a directory that is there whole or not at all, and says what it belongs to.

    session.json   the model it belongs to, seed, window, sinks; a sha256 of every block of every array, and of the rest
    tokens.npy     the ids
    k.npy, v.npy   keys and values (R, L, G, E) in the number format of the cache (q8: .codes and .scales)

Row by row they are what a query behind the last position sees, position by position: with a window the sinks' blocks
and the last ones, and of the last block what is written. The last id's own are left out: it is read again for its
logits. So the sizes of all files follow from the number of ids, the window and the model. Arrays are mapped, and a
block is held against its sha256 when it is read.

Axes: R rows kept, L layers, G key/value heads, E head size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npllama import cache as kv
from npllama.cache import BLOCK_SLOTS, NO_WINDOW
from npllama.config import ModelConfig
from npllama.errors import ModelError, UsageError, quote
from npllama.generation.pool import seen_blocks
from npllama.generation.requests import POLICIES
from npllama.generation.sampling.basic import SEEDS
from npllama.numbers import ArraySpec
from npllama.store.npy import Whole, map_array, npy_header, read_small
from npllama.store.staging import staged, sync_file, target_path
from npllama.system import strict_json
from npllama.system.values import number, show, whole

FORMAT, VERSION = "npllama-session", 1
MANIFEST, TOKENS = "session.json", "tokens.npy"
MAX_MANIFEST_BYTES = 32 << 20
MAX_TOKENS = 1 << 24
MAX_DIGITS = 20  # of a seed
SESSION = Whole("a saved session", "save the session again.")
MIROSTAT = "mirostat"
"""The key that only a session has that was written with mirostat."""
CHECK = "check"
"""The key of the sha256 over all else in the manifest."""
_FILE = re.compile(r"[kv](\.(codes|scales))?\.npy")


@dataclass(frozen=True)
class Header:
    """What a session is bound to, and what it goes on with. model: all that keys and values depend on beside these.

    mirostat: behind how many ids it has left which mu; None where it was not used.
    """

    model: dict[str, Any]
    seed: int
    n_forks: int
    context_policy: str
    n_keep: int
    window: int
    n_sink: int
    mirostat: tuple[int, float] | None = None

    def kept(self, n_ids: int) -> list[tuple[int, int]]:
        """The blocks that are kept of a text of n ids, and how many rows of each."""
        n = max(0, n_ids - 1)
        return [(c, min(BLOCK_SLOTS, n - c * BLOCK_SLOTS)) for c in seen_blocks(n, self.window, self.n_sink)]


def array_specs(config: ModelConfig, kv_dtype: str, n_rows: int) -> dict[str, ArraySpec]:
    """The files of keys and values, in the order of cache.arrays, and what each must hold."""
    L, G, E = config.n_layers, config.n_kv_heads, config.head_dim
    pool = kv.allocate_pool(L, G, E, 0, 1, 1, kv_dtype)
    parts = [stored._fields if kv_dtype == "q8" else ("",) for stored in (pool.k, pool.v)]  # type: ignore[union-attr]
    names = [
        f"{name}.{part}.npy" if part else f"{name}.npy" for name, own in zip("kv", parts, strict=True) for part in own
    ]
    arrays = kv.arrays(pool)
    return {
        name: ArraySpec(a.dtype.newbyteorder("<").str, (n_rows, L, G, a.shape[3]))
        for name, a in zip(names, arrays, strict=True)
    }


def is_session_file(name: str) -> bool:
    """Whether a file of this name is part of a saved session."""
    return name in (MANIFEST, TOKENS) or _FILE.fullmatch(name) is not None


# ---------------------------------------------------------------- writing


def write_session(
    path: str | os.PathLike[str],
    header: Header,
    ids: list[int],
    specs: Mapping[str, ArraySpec],
    blocks: Iterable[list[np.ndarray]],
) -> None:
    """Write a session, or replace one. blocks: for each of header.kept the rows (rows, L, G, ...) of each array.

    Raises ModelError where the path cannot be written, or holds what is no session.
    """
    if len(ids) > MAX_TOKENS:
        raise UsageError(f"the session has {len(ids):,} ids, at most {MAX_TOKENS:,} are saved; rewind it first.")
    out = target_path(path)
    _check_replaceable(out)
    with staged(out, force=True, is_ours=is_session_file, seal=MANIFEST) as folder:
        sums: dict[str, Any] = {name: [] for name in specs}
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / name, "xb")) for name in specs}
            for name, spec in specs.items():
                files[name].write(npy_header(spec))
            for arrays in blocks:
                for name, rows in zip(specs, arrays, strict=True):
                    data = np.ascontiguousarray(rows, specs[name].dtype).reshape(-1).view(np.uint8).data
                    files[name].write(data)
                    sums[name].append(hashlib.sha256(data).hexdigest())
            for file in files.values():
                file.flush()
                sync_file(file.fileno())
        tokens = np.asarray(ids, "<i4")
        _write_file(folder / TOKENS, npy_header(ArraySpec("<i4", tokens.shape)) + tokens.tobytes())
        sums[TOKENS] = hashlib.sha256(tokens.tobytes()).hexdigest()
        _write_file(folder / MANIFEST, json.dumps(_manifest(header, len(ids), sums), indent=1).encode())


def _check_replaceable(out: Path) -> None:
    """Raise ModelError where there is something else than a session, or an empty directory."""
    try:
        if os.path.lexists(out):
            foreign = [name for name in sorted(os.listdir(out)) if not is_session_file(name)]
            if foreign:
                raise ModelError(
                    f"{out}: holds {quote(foreign[0])}, and a session replaces nothing but a saved session; choose "
                    f"another path."
                )
    except OSError as error:
        raise ModelError(
            f"{out}: is no saved session ({error.strerror or error}), and a session replaces nothing else; choose "
            f"another path."
        ) from error


def _manifest(header: Header, n_ids: int, sums: dict[str, Any]) -> dict[str, Any]:
    window = None if header.window == NO_WINDOW else header.window
    manifest = {"format": FORMAT, "version": VERSION, **vars(header), "window": window, "n_tokens": n_ids}
    if header.mirostat is None:
        del manifest[MIROSTAT]
    manifest["sha256"] = sums
    return {**manifest, CHECK: check_of(manifest)}


def check_of(manifest: Mapping[str, object]) -> str:
    """The sha256 over all of a manifest but itself."""
    rest = {key: value for key, value in manifest.items() if key != CHECK}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_file(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())


# ---------------------------------------------------------------- reading


class Saved:
    """A saved session that was checked and mapped. Its blocks are looked at when they are read."""

    def __init__(
        self, folder: Path, header: Header, ids: list[int], arrays: dict[str, Any], sums: dict[str, Any]
    ) -> None:
        self.folder, self.header, self.ids = folder, header, ids
        self._arrays, self._sums = arrays, sums
        self._kept = header.kept(len(ids))
        ends = np.cumsum([0, *(n for _, n in self._kept)]).tolist()
        self._place = {c: (i, ends[i], ends[i + 1]) for i, (c, _) in enumerate(self._kept)}

    @property
    def n_positions(self) -> int:
        """Positions that are written."""
        return max(0, len(self.ids) - 1)

    def has(self, blocks: Iterable[int]) -> bool:
        """Whether it has kept these blocks."""
        return all(c in self._place for c in blocks)

    def read(self, c: int) -> list[np.ndarray]:
        """Block c: the rows (rows, L, G, ...) of each array. Raises ModelError where they are not what was saved."""
        i, first, end = self._place[c]
        found = []
        for name, array in self._arrays.items():
            rows = np.array(array[first:end])  # a copy: what is checked is what is used
            if hashlib.sha256(rows.reshape(-1).view(np.uint8).data).hexdigest() != self._sums[name][i]:
                at = c * BLOCK_SLOTS
                raise ModelError(
                    f"{self.folder / name}: positions {at} to {at + end - first - 1} are not what was saved (sha256 "
                    f"differs from {MANIFEST}); {SESSION.again}"
                )
            found.append(rows)
        return found


def read_session(path: str | os.PathLike[str], config: ModelConfig, model: dict[str, Any]) -> Saved:
    """Open a saved session and check all of it but its keys and values.

    Raises ModelError for what is no session, damaged, or of another model than `model` says.
    """
    folder = Path(path)
    manifest = _read_manifest(folder / MANIFEST)
    try:
        header, n_ids = _header(manifest)
    except UsageError as error:
        raise ModelError(f"{folder / MANIFEST}: {error}; {SESSION.again}") from error
    _check_model(folder, header.model, model)
    kept = header.kept(n_ids)
    specs = array_specs(config, model["kv_dtype"], sum(n for _, n in kept))
    sums = _checked_sums(folder / MANIFEST, manifest["sha256"], specs, len(kept))
    refused: list[OSError | ValueError] = []  # where files are not mapped they are read: nothing to say about that
    tokens = map_array(folder / TOKENS, ArraySpec("<i4", (n_ids,)), refused, SESSION)
    if hashlib.sha256(tokens.view(np.uint8).data).hexdigest() != sums[TOKENS]:
        raise ModelError(f"{folder / TOKENS}: is not what was saved (sha256 differs from {MANIFEST}); {SESSION.again}")
    if n_ids and not (tokens.min() >= 0 and tokens.max() < config.vocab_size):
        raise ModelError(
            f"{folder / TOKENS}: has ids from {tokens.min()} to {tokens.max()}, 0 to {config.vocab_size - 1} are "
            f"needed; {SESSION.again}"
        )
    arrays = {name: map_array(folder / name, spec, refused, SESSION) for name, spec in specs.items()}
    return Saved(folder, header, tokens.tolist(), arrays, sums)


def _read_manifest(path: Path) -> dict[str, Any]:
    """session.json as strict JSON, whole: its sha256 over itself is right."""
    try:
        manifest = strict_json.parse_object(
            read_small(path, MAX_MANIFEST_BYTES, SESSION), MAX_MANIFEST_BYTES, max_digits=MAX_DIGITS
        )
    except UsageError as error:
        raise ModelError(f"{path}: {error}; {SESSION.again}") from error
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ModelError(
            f"{path}: has format {quote(manifest.get('format'))}, version {quote(manifest.get('version'))}; a session "
            f"of version {VERSION} says {quote(FORMAT)}: {SESSION.again}"
        )
    if manifest.get(CHECK) != check_of(manifest):
        raise ModelError(f"{path}: is not what was saved (its sha256 over itself differs); {SESSION.again}")
    return manifest


def _header(manifest: dict[str, Any]) -> tuple[Header, int]:
    """The header and the number of ids. Raises UsageError."""
    needed = {"format", "version", *Header.__dataclass_fields__, "n_tokens", "sha256", CHECK}
    if wrong := sorted((needed - {MIROSTAT}).symmetric_difference(manifest.keys() - {MIROSTAT})):
        raise UsageError(f"{quote(wrong[0])} is missing, or is not known")
    policy, window = manifest["context_policy"], manifest["window"]
    if policy not in POLICIES or not isinstance(manifest["model"], dict):
        raise UsageError(f"context_policy is {quote(policy)}, model {show(manifest['model'])}; neither can be")
    n_ids = whole("n_tokens", manifest["n_tokens"], 0, MAX_TOKENS)
    header = Header(
        model=manifest["model"],
        seed=whole("seed", manifest["seed"], 0, SEEDS - 1),
        n_forks=whole("n_forks", manifest["n_forks"], 0, 1 << 62),
        context_policy=policy,
        n_keep=whole("n_keep", manifest["n_keep"], 0, 1 << 31),
        window=NO_WINDOW if window is None else whole("window", window, 1, NO_WINDOW - 1),
        n_sink=whole("n_sink", manifest["n_sink"], 0, 1 << 31),
        mirostat=_mirostat(manifest.get(MIROSTAT), n_ids),
    )
    return header, n_ids


def _mirostat(found: Any, n_ids: int) -> tuple[int, float] | None:
    """Behind how many ids mirostat has left which mu. Raises UsageError."""
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2:
        raise UsageError(f"{MIROSTAT} is {show(found)}, but a number of ids and a number are needed")
    return whole(MIROSTAT, found[0], 0, n_ids), number(MIROSTAT, found[1], -math.inf, math.inf)


def _check_model(folder: Path, found: dict[str, Any], needed: dict[str, Any]) -> None:
    """Raise ModelError unless a session is of this model as it was loaded."""
    if found == needed:
        return
    if found.get("kv_dtype") != needed["kv_dtype"]:
        raise ModelError(
            f"{folder}: was saved with kv_dtype {quote(found.get('kv_dtype'))}, and this model keeps "
            f"{quote(needed['kv_dtype'])}; load the model with the same."
        )
    theirs, ours = found.get("config"), needed["config"]
    if theirs != ours:
        keys = [key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key]]
        key = keys[0] if keys else "config"
        value = theirs.get(key) if isinstance(theirs, dict) else theirs
        raise ModelError(
            f"{folder}: was saved with another model, whose {key} is {show(value)} and not {show(ours.get(key))}; open "
            f"the model that it was saved with."
        )
    what = "weights" if found.get("weights") != needed["weights"] else "RoPE frequencies"
    key = "weights" if what == "weights" else "rope"
    raise ModelError(
        f"{folder}: was saved with other {what} (sha256 {quote(str(found.get(key))[:16])}, here "
        f"{quote(needed[key][:16])}); open the model that it was saved with, with the same context."
    )


def _checked_sums(path: Path, sums: Any, specs: Mapping[str, ArraySpec], n_blocks: int) -> dict[str, Any]:
    """A sha256 for each block of each array, and one for the ids."""
    right = isinstance(sums, dict) and set(sums) == {*specs, TOKENS} and isinstance(sums[TOKENS], str)
    if not right or not all(
        isinstance(sums[name], list) and len(sums[name]) == n_blocks and all(isinstance(s, str) for s in sums[name])
        for name in specs
    ):
        raise ModelError(f"{path}: needed is one sha256 of each of {n_blocks} blocks of every array; {SESSION.again}")
    return dict(sums)
