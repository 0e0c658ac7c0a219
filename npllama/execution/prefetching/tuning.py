"""Which prefetching is best here: measured once on each machine, with the model itself, and kept beside compiled code.

What the CPU's name tells is the beginning, and stays where nothing is faster by MIN_GAIN. A machine is its CPU, caches,
threads and quota: an image that was built elsewhere is measured where it runs. Nothing is measured for models that
caches hold, nor where the result cannot be kept.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from npllama.errors import UsageError, quote
from npllama.execution.compiled_code import write_whole
from npllama.execution.prefetching import ahead
from npllama.execution.prefetching.ahead import BYTES, HALVES, KINDS, MAX_AHEAD, NONE, PACKED, STYLES, Prefetch
from npllama.numbers import format_of
from npllama.numbers.formats import Weight
from npllama.system import machine
from npllama.weights import Weights

CANDIDATES = (NONE, *(Prefetch(style, ahead) for style in STYLES for ahead in (1024, 2048, 4096, 8192)))
BUDGET_S = 0.7
"""Seconds that measuring takes at most."""

MIN_ROUNDS, MAX_ROUNDS = 3, 25
"""How often each candidate is tried, all in turn; where time is too short for that, nothing is measured."""

MIN_GAIN = 1.02
"""How much faster another prefetching has to be than the one that the CPU's name tells."""

CACHES = 2
"""A model that is to be measured is larger than the last cache by this factor at least."""

NAME = "prefetch-"
LINE = 64


class Found(NamedTuple):
    """What was measured for a kind: how it is prefetched, how much faster that was, and when."""

    prefetch: Prefetch
    gain: float
    date: str


def asked() -> Prefetch | None:
    """What NPLLAMA_PREFETCH asks for: "none", "groups:BYTES" or "lines:BYTES". Raises UsageError for anything else."""
    text = os.environ.get("NPLLAMA_PREFETCH", "")
    found = _parsed(text) if text else None
    if text and found is None:
        raise UsageError(
            f"NPLLAMA_PREFETCH={quote(text)} is not understood; it needs none, groups:BYTES or lines:BYTES, "
            f"with {LINE} to {MAX_AHEAD} bytes."
        )
    return found


def _parsed(text: str) -> Prefetch | None:
    style, _, ahead = text.partition(":")
    if text == str(NONE):
        return NONE
    if style not in STYLES or not (ahead.isascii() and ahead.isdigit()) or not LINE <= int(ahead) <= MAX_AHEAD:
        return None
    return Prefetch(style, int(ahead))


def kinds_of(weights: Weights) -> set[str]:
    """The kinds of prefetching that the products of a model use."""
    matrices = (w for kind, w in weights._asdict().items() if kind != "tok_embeddings")
    return {kind for w in matrices if (kind := _kind_of(w)) is not None}


def _kind_of(w: Weight) -> str | None:
    bits = format_of(w).bits_per_weight()
    return PACKED if bits < 8 else BYTES if bits < 16 else HALVES if bits < 32 else None


def machine_key(target: str, n_threads: int) -> dict[str, str]:
    """What a measurement depends on. target: kernels.compile.target()."""
    return {
        "cpu": target,
        "caches": " ".join(map(str, machine.cache_bytes())),
        "threads": str(n_threads),
        "quota": str(machine.cpu_quota()),
    }


def kept_file(key: dict[str, str]) -> Path | None:
    """Where a machine's measurements are kept; None where nothing can be."""
    folder, _ = machine.compiled_code_directory()
    if folder is None:
        return None
    return folder / f"{NAME}{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


def read_kept(file: Path | None) -> dict[str, Found]:
    """The measurements in a file, by kind; none where there is no file, or something else."""
    try:
        kinds = json.loads(file.read_bytes())["kinds"] if file is not None else {}
        rows = [(k, _parsed(row["prefetch"]), float(row["gain"]), str(row["date"])) for k, row in kinds.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return {k: Found(prefetch, gain, date) for k, prefetch, gain, date in rows if k in KINDS and prefetch is not None}


def settle(key: dict[str, str], kinds: Iterable[str], call_s: Callable[[], float] | None) -> None:
    """Prefetch from now on as NPLLAMA_PREFETCH asks, as was measured on this machine, or as is measured now.

    kinds: those that are used; call_s: makes a call of the model and gives its seconds, None where it is not to be
    measured with.
    """
    if (forced := asked()) is not None:
        for kind in KINDS:
            ahead.use(kind, forced)
        return
    file = kept_file(key)
    kept = read_kept(file)
    for kind, found in kept.items():
        ahead.use(kind, found.prefetch)
    missing = sorted(set(kinds) - set(kept))
    if missing and call_s is not None and file is not None and os.access(file.parent, os.W_OK):
        new = measured(missing, call_s)
        if not new:
            return
        kept |= new
        rows = {kind: {**found._asdict(), "prefetch": str(found.prefetch)} for kind, found in kept.items()}
        with contextlib.suppress(OSError):  # a full disk: it is measured again
            write_whole(file, json.dumps({"machine": key, "kinds": rows}, indent=1).encode())


def measured(kinds: list[str], call_s: Callable[[], float]) -> dict[str, Found]:
    """The best prefetching for these kinds, which is used from then on; nothing where a call takes too long."""
    before = {kind: ahead.used(kind) for kind in kinds}
    candidates = [before, *(dict.fromkeys(kinds, candidate) for candidate in CANDIDATES)]
    best = before
    try:
        call_s()  # reads from the disk what was not read before
        rounds = min(MAX_ROUNDS, int(BUDGET_S / (call_s() * len(candidates))))
        if rounds < MIN_ROUNDS:
            return {}
        seconds: list[list[float]] = [[] for _ in candidates]
        for _ in range(rounds):
            for candidate, each in zip(candidates, seconds, strict=True):
                _use_all(candidate)
                each.append(call_s())
        medians = [statistics.median(each) for each in seconds]
        fastest = min(range(len(candidates)), key=medians.__getitem__)
        gain = medians[0] / medians[fastest]
        best, gain = (candidates[fastest], gain) if gain >= MIN_GAIN else (before, 1.0)
    finally:
        _use_all(best)
    today = datetime.date.today().isoformat()
    return {kind: Found(prefetch, round(gain, 3), today) for kind, prefetch in best.items()}


def _use_all(prefetches: dict[str, Prefetch]) -> None:
    for kind, prefetch in prefetches.items():
        ahead.use(kind, prefetch)


def described(key: dict[str, str]) -> dict[str, str]:
    """How each kind is prefetched on this machine, and how that is known, for people."""
    forced, kept = asked(), read_kept(kept_file(key))
    said = {}
    for kind in KINDS:
        found = kept.get(kind)
        if forced is not None:
            said[kind] = f"{forced} (NPLLAMA_PREFETCH)"
        elif found is None:
            said[kind] = f"{ahead.used(kind)} (by the CPU's name; measured when a large model is opened)"
        else:
            said[kind] = f"{found.prefetch} (measured {found.date}: {found.gain:.2f} times as fast as by the name)"
    return said
