"""SHA-256 of logits of the demo model, compiled: the table that shows whether a change of code changed a bit.

    python tools/hash_logits.py            compare with tests/logits_sha256.json
    python tools/hash_logits.py --write    write it anew; say why in the log of measurements

Quantized weights add integers and round in a fixed order, so the table is the same on every CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from npllama.execution.engine import Engine
from npllama.inference import DEMO
from npllama.store.export import quantize_model
from npllama.store.opening import open_model

TABLE = Path(__file__).resolve().parent.parent / "tests" / "logits_sha256.json"
WEIGHTS = ("q8", "q6", "q4")
CACHES = ("f32", "f16", "q8")
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


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def weights_hash(folder: Path) -> str:
    """One digest of all weights of a model directory, so that a change of rounding is told from one of kernels."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.npy")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def hashes_of(model: Path, kv_dtype: str, threads: int) -> dict[str, str]:
    """The digest of each case for one model directory and one number format of the cache."""
    with open_model(model) as opened:
        engine = Engine(opened, "numba", threads=threads, kv_dtype=kv_dtype)
        found = {case: sha256(compute(engine)) for case, compute in CASES.items()}
        engine.close()
    return found


def write_demo(folder: Path, dtype: str) -> Path:
    """The demo model in a quantized number format, below `folder`."""
    quantize_model(DEMO, folder / dtype, dtype)
    return folder / dtype


def table() -> dict[str, dict[str, str]]:
    """The whole table: digests of weights, then of logits by "weights, cache"."""
    found: dict[str, dict[str, str]] = {"weights": {}}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in WEIGHTS:
            model = write_demo(Path(folder), dtype)
            found["weights"][dtype] = weights_hash(model)
            for kv_dtype in CACHES:
                found[f"{dtype}, {kv_dtype}"] = hashes_of(model, kv_dtype, threads=1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table anew")
    found = table()
    if parser.parse_args().write:
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    kept = json.loads(TABLE.read_text())
    changed = [f"{part}: {case}" for part in kept for case in kept[part] if found[part].get(case) != kept[part][case]]
    print("\n".join(changed) or "no bit changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
