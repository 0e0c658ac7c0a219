"""Compare every step of sampling with llama.cpp's own, on random logits: what is left, and with which logits.

    python tools/compare_samplers.py FOLDER [N]

FOLDER: where libllama.so and the libraries that it needs lie (build/bin of llama.cpp, or lib of llama-cpp-python).
Signatures are those of llama.cpp's llama.h of November 2026.
"""

from __future__ import annotations

import ctypes as c
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from npllama.generation.sampling import chain  # noqa: E402
from npllama.generation.sampling.chain import Candidates, Situation  # noqa: E402
from npllama.options import OFF  # noqa: E402

TOLERANCE = 1e-3
Left = dict[int, float]


class TokenData(c.Structure):
    """llama_token_data."""

    _fields_ = (("id", c.c_int32), ("logit", c.c_float), ("p", c.c_float))


class TokenDataArray(c.Structure):
    """llama_token_data_array."""

    _fields_ = (("data", c.POINTER(TokenData)), ("size", c.c_size_t), ("selected", c.c_int64), ("sorted", c.c_bool))


def opened(folder: Path) -> c.CDLL:
    """llama.cpp's library."""
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
        c.CDLL(str(folder / name), mode=c.RTLD_GLOBAL)
    return c.CDLL(str(folder / "libllama.so"))


def theirs(lib: c.CDLL, name: str, arguments: Sequence[Any], logits: np.ndarray, history: Sequence[int]) -> Left:
    """What a sampler of llama.cpp leaves."""
    new = getattr(lib, f"llama_sampler_init_{name}")
    new.restype = c.c_void_p
    sampler = c.c_void_p(new(*arguments))
    for token in history:
        lib.llama_sampler_accept(sampler, c.c_int32(token))
    data = (TokenData * len(logits))(*[TokenData(i, float(l), 0.0) for i, l in enumerate(logits)])
    array = TokenDataArray(data, len(logits), -1, False)
    lib.llama_sampler_apply(sampler, c.byref(array))
    lib.llama_sampler_free(sampler)
    found = [array.data[i] for i in range(array.size)]
    return {one.id: one.logit for one in found if one.logit > -1e30}


def ours(
    step: Callable[[Candidates, Situation], Candidates], logits: np.ndarray, history: Sequence[int], **options: Any
) -> Left:
    """What a step leaves here."""
    chosen = dataclasses.replace(OFF, **options)
    at = Situation(chosen, history, lambda: 0.0, lambda v: False, lambda ids, most: min(most, len(ids)))
    left = step(Candidates(np.arange(len(logits)), logits.astype(np.float64)), at)
    return dict(zip(left.ids.tolist(), left.logits.tolist(), strict=True))


def cases(rng: np.random.Generator, n: int) -> dict[str, tuple[Sequence[Any], Any, dict[str, Any]]]:
    """For each sampler: the arguments of llama.cpp's, the step, its options."""
    f, i, one = c.c_float, c.c_int32, c.c_size_t(1)
    p, threshold, sigma, tau, repeat, base = (float(np.float32(x)) for x in rng.uniform(
        (0.05, 0.01, 0.2, 0.5, 0.5, 1.0), (0.99, 0.5, 2.0, 4.0, 2.0, 2.5)
    ))  # fmt: skip
    frequency, presence = (float(np.float32(x)) for x in rng.uniform(-1, 1, 2))
    k, last, allowed = int(rng.integers(1, n + 1)), int(rng.choice([4, 16, 64])), int(rng.integers(1, 4))
    penalties = {"repeat_penalty": repeat, "frequency_penalty": frequency, "presence_penalty": presence}
    dry = {"dry_multiplier": 0.75, "dry_base": base, "dry_allowed_length": allowed, "dry_penalty_last_n": last}

    def mirostat(left: Candidates, at: Situation) -> Candidates:
        return chain.unsurprising(left, 2 * at.options.mirostat_tau)

    penalised = (i(n), i(last), f(repeat), f(frequency), f(presence))
    return {
        "penalties": (penalised, chain.penalties, {**penalties, "repeat_last_n": last}),
        "dry": ((None, f(0.75), f(base), i(allowed), i(last), None, c.c_size_t(0)), chain.dry, dry),
        "top_n_sigma": ((f(sigma),), chain.top_n_sigma, {"top_n_sigma": sigma}),
        "top_k": ((i(k),), chain.top_k, {"top_k": k}),
        "typical": ((f(p), one), chain.typ_p, {"typical_p": p}),
        "top_p": ((f(p), one), chain.top_p, {"top_p": p}),
        "min_p": ((f(threshold), one), chain.min_p, {"min_p": threshold}),
        "xtc": (
            (f(1.0), f(threshold), one, c.c_uint32(1)),
            chain.xtc,
            {"xtc_probability": 1.0, "xtc_threshold": threshold},
        ),
        "mirostat_v2": ((c.c_uint32(1), f(tau), f(0.1)), mirostat, {"mirostat_tau": tau}),
    }


def main() -> None:
    lib, n_trials = opened(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 400
    rng, equal = np.random.default_rng(0), dict.fromkeys(cases(np.random.default_rng(0), 9), 0)
    for _ in range(n_trials):
        n = int(rng.integers(5, 60))
        logits = (rng.standard_normal(n) * rng.choice([0.5, 2, 5])).astype(np.float32)
        history = rng.integers(0, rng.integers(2, 6), int(rng.integers(0, 60))).tolist()
        for name, (arguments, step, options) in cases(rng, n).items():
            a, b = theirs(lib, name, arguments, logits, history), ours(step, logits, history, **options)
            equal[name] += a.keys() == b.keys() and all(abs(a[v] - b[v]) <= TOLERANCE * max(1, abs(a[v])) for v in a)
    for name, count in equal.items():
        print(f"{name:<12} {count} of {n_trials} as llama.cpp")


if __name__ == "__main__":
    main()
