"""SHA-256 of logits of the demo model: the table that shows whether a change of code changed a bit.

    python tools/hash_logits.py            compare with tests/logits_sha256.json
    python tools/hash_logits.py --write    write it anew; say why in the log of measurements

Quantized weights add integers and round in a fixed order, so their digests are the same on every CPU. Floats are added
in as many lanes as a vector register has, with fused multiply-add or without: their digests stand in a part for each.

Logits are compiled ones. The formats of GGUF files share one compiled model, because compiling takes long; each has
one of its own in NumPy, which gives the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from npllama.execution.engine import Engine
from npllama.execution.kernels.target import FMA, WIDTH
from npllama.inference import DEMO
from npllama.numbers import FORMATS, named
from npllama.numbers.ggml import GgmlFormat
from npllama.store.export import OpenedSource, write_model
from npllama.store.opening import open_model
from npllama.store.plan import Formats, asked_formats
from npllama.store.tokenizers import stored_in

TABLE = Path(__file__).resolve().parent.parent / "tests" / "logits_sha256.json"
FLOATS = ("f32", "f16", "bf16")
GGUF = tuple(name for name, own in FORMATS.items() if isinstance(own, GgmlFormat))
MIXED = "formats of GGUF"
IN_MIXED = {"tok_embeddings": "q8_0", "wq": "q4_0", "wk": "q4_1", "wv": "iq4_nl", "wo": "q5_0", "w1": "q5_1"}
"""The model of all six formats: those of its kinds of matrices, and q8_0 for others."""

COMPILED = (*FLOATS, "q8", "q6", "q4")
WEIGHTS = (*COMPILED, *GGUF, MIXED)
CACHES = ("f32", "f16", "q8")
SUMS = f"{WIDTH} lanes, {'fused' if FMA else 'rounded'} multiply-add"  # what the bits of floats depend on of a CPU
LENGTH = 150
BEYOND_THE_TABLE = 8_232  # tokens of a text whose last angles are not kept, but computed in each call


def feed(engine: Engine, pieces: list[tuple[int, int]], n_slots: int, last: int = 0, **seen: int) -> np.ndarray:
    """Logits of every token of one text, or of the last few, read in pieces [start, stop): (T, V)."""
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, pieces[-1][1])
    cache = engine.new_cache(1, n_slots, **seen)
    parts = [engine.forward(cache, ids[a:b], range(a, b), [0] * (b - a), range(b - a)) for a, b in pieces]
    return np.concatenate(parts)[-last:]


def side_by_side(engine: Engine) -> np.ndarray:
    """Logits of three sequences of different lengths in one call, then of one more token each: (T, V)."""
    lengths = (40, 7, 1)
    ids = np.random.default_rng(1).integers(0, engine.config.vocab_size, sum(lengths) + 3)
    cache = engine.new_cache(3, 64)
    pos = [p for n in lengths for p in range(n)]
    seq = [i for i, n in enumerate(lengths) for _ in range(n)]
    prompts = engine.forward(cache, ids[: len(pos)], pos, seq, range(len(pos)))
    return np.concatenate([prompts, engine.forward(cache, ids[len(pos) :], lengths, range(3), range(3))])


ONE_BY_ONE = [(t, t + 1) for t in range(LENGTH)]
LONG = [(t, min(t + 512, BEYOND_THE_TABLE - 1)) for t in range(0, BEYOND_THE_TABLE - 1, 512)]
LONG.append((BEYOND_THE_TABLE - 1, BEYOND_THE_TABLE))
CASES: dict[str, Callable[[Engine], np.ndarray]] = {
    "whole": lambda e: feed(e, [(0, LENGTH)], LENGTH),
    "in chunks": lambda e: feed(e, [(0, 1), (1, 6), (6, 140), *ONE_BY_ONE[140:]], LENGTH),
    "one by one": lambda e: feed(e, ONE_BY_ONE, LENGTH),
    "deep": lambda e: feed(e, [(0, 600), (600, 608), (608, 609)], 640),
    "beyond the table of angles": lambda e: feed(e, LONG, BEYOND_THE_TABLE, last=40, window=40),
    "window": lambda e: feed(e, [(0, 90), *ONE_BY_ONE[90:]], LENGTH, window=40),
    "window and sinks": lambda e: feed(e, [(0, 90), *ONE_BY_ONE[90:]], LENGTH, window=40, n_sink=4),
    "side by side": side_by_side,
}
A_FEW = ("whole", "in chunks")


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def weights_hash(folder: Path) -> str:
    """One digest of all weights of a model directory, so that a change of rounding is told from one of kernels."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.npy")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class Entry(NamedTuple):
    """A part of the table: formats of weights and of the cache, the execution, and what is computed."""

    dtype: str
    kv_dtype: str
    backend: str = "numba"
    cases: Sequence[str] = tuple(CASES)


def hashes_of(
    model: Path, entry: Entry, threads: int, backend: str | None = None, cases: Iterable[str] | None = None
) -> dict[str, str]:
    """The digest of each case of an entry, or of some, for one model directory, in its execution or another."""
    with open_model(model) as opened:
        engine = Engine(opened, backend or entry.backend, threads=threads, kv_dtype=entry.kv_dtype)
        found = {case: sha256(CASES[case](engine)) for case in cases or entry.cases}
        engine.close()
    return found


def formats_of(dtype: str, tied: bool) -> Formats:
    """The number format of each kind of weight in a model of the table."""
    if dtype != MIXED:
        return asked_formats(named(dtype), tied)
    own = {kind: named(name) for kind, name in IN_MIXED.items()}
    return {kind: own.get(kind, other) for kind, other in asked_formats(named("q8_0"), tied).items()}


def write_demo(folder: Path, dtype: str) -> Path:
    """The demo model in a number format, below `folder`."""
    with open_model(DEMO) as opened:
        source, tokenizer = OpenedSource(opened), stored_in(opened.path, opened.manifest)
        write_model(source, folder / dtype, formats_of(dtype, source.tied), tokenizer, False, None)
    return folder / dtype


def entries() -> dict[str, Entry]:
    """The parts of the table that this CPU can compute, by name."""
    quantized = [Entry(dtype, kv_dtype) for dtype in COMPILED if dtype not in FLOATS for kv_dtype in CACHES]
    of_files = [Entry(MIXED, "f16", cases=A_FEW), *(Entry(dtype, "f32", "numpy", A_FEW) for dtype in GGUF)]
    floats = {f"{dtype}, f32, {SUMS}": Entry(dtype, "f32") for dtype in FLOATS}
    return {**{f"{one.dtype}, {one.kv_dtype}": one for one in (*quantized, *of_files)}, **floats}


def table() -> dict[str, dict[str, str]]:
    """What this CPU can compute of the table: digests of weights, then of logits by "weights, cache"."""
    with tempfile.TemporaryDirectory() as folder:
        models = {dtype: write_demo(Path(folder), dtype) for dtype in WEIGHTS}
        logits = {name: hashes_of(models[entry.dtype], entry, threads=1) for name, entry in entries().items()}
        return {"weights": {dtype: weights_hash(model) for dtype, model in models.items()}, **logits}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write this CPU's part anew")
    found, kept = table(), json.loads(TABLE.read_text())
    if parser.parse_args().write:
        TABLE.write_text(json.dumps(kept | found, indent=1) + "\n")
        return 0
    changed = [
        f"{part}: {case}" for part in found for case in found[part] if kept.get(part, {}).get(case) != found[part][case]
    ]
    print("\n".join(changed) or "no bit changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
