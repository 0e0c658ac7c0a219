"""Does this copy compute LLaMA? Every step of every layer in NumPy against its compiled kernel, on the user's weights.

The model runs step by step through the same model.py. Each step runs twice on the same inputs: in NumPy, and in its
kernel. NumPy's result goes on to the next step, so errors do not add up and every kernel is judged alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllama import ops
from npllama.execution.engine import Engine, stepwise
from npllama.weights import KINDS, Weights

# Largest error allowed, relative to the largest value of the step's result. A sum of K products in another order
# differs by about sqrt(K) * 6e-8; norm, attention and SwiGLU are float64 rounded to float32, where a last digit may
# differ; rotations round after each operation, and a table look-up is exact. The whole model is compared with its own
# kernels: equal to the bit where this was tried, a last digit is left to other compilers.
TOLERANCE = {
    "embed": 0.0,
    "rms_norm": 5e-7,
    "linear": 1e-5,
    "rope": 0.0,
    "rope_to_sinks": 0.0,
    "attend": 2e-7,
    "swiglu": 2e-7,
    "whole model": 1e-6,
}
PROMPT = 43  # tokens read at once: some in strips of codes for several tiles, some in one tile, some alone
FEW = 9  # then so many: too few for a strip
DECODED = 2  # then token by token


@dataclass
class StepCheck:
    """The largest error found of one step (of `linear`: with one kind of weight), and the layer it was found in."""

    step: str
    weight: str
    error: float = 0.0
    layer: int = -1
    calls: int = 0

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.step]

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def verify(engine: Engine, seed: int = 0) -> list[StepCheck]:
    """Run a few random tokens through the model and compare every step: a row for each step and kind of weight.

    engine: one with the compiled execution. Raises UsageError for an engine of the NumPy execution.
    """
    rows: dict[tuple[str, str], StepCheck] = {}
    names = weight_names(engine.weights)
    kernels = engine.kernels_per_op()
    n = min(PROMPT + FEW + DECODED, max(DECODED + 1, engine.config.max_seq_len))
    cache, twin = engine.new_cache(1, n), engine.new_cache(1, n)

    def record(step: str, found: np.ndarray, expected: np.ndarray, weight: str, layer: int) -> None:
        row = rows.setdefault((step, weight), StepCheck(step, weight))
        row.calls += 1
        error = largest_error(found, expected)
        if not error <= row.error:
            row.error, row.layer = error, layer

    def compared(step: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            expected = getattr(ops, step)(*arguments)
            found = kernels[step](*(twin if a is cache else a for a in arguments))
            if step == "linears":  # the products of `linear`, several at once
                for w, y, y_expected in zip(arguments[1], found, expected, strict=True):
                    record("linear", y, y_expected, *names[address(w)])
            elif step in ("linear", "rms_norm"):
                record(step, found, expected, *names[address(arguments[1])])
            else:
                record(step, found, expected, "", arguments[5] if step == "attend" else -1)
            return expected

        return run

    forward = stepwise({step: compared(step) for step in kernels})
    ids = np.random.default_rng(seed).integers(0, engine.config.vocab_size, n)
    starts = [0, *range(max(1, n - FEW - DECODED), n - DECODED, FEW), *range(n - DECODED, n), n]
    for start, stop in itertools.pairwise(starts):
        pos = np.arange(start, stop)
        engine.run_stepwise(forward, cache, ids[start:stop], pos)
    return list(rows.values())


def whole_model_error(engine: Engine, seed: int = 1) -> StepCheck:
    """The logits of a prompt: the model compiled whole against the same model step by step in its kernels.

    Not against NumPy, with which `verify` compares each kernel: what differs here is what compiling them together did.
    """
    n = min(PROMPT, engine.config.max_seq_len)
    ids = np.random.default_rng(seed).integers(0, engine.config.vocab_size, n)
    pos = np.arange(n)
    found = engine.forward(engine.new_cache(1, n), ids, pos, np.zeros(n), [n - 1])
    expected = engine.run_stepwise(stepwise(engine.kernels_per_op()), engine.new_cache(1, n), ids, pos)
    return StepCheck("whole model", "", largest_error(found, expected), calls=1)


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value; infinity where shapes, types or a NaN differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype or not np.isfinite(found).all():
        return float("inf")
    largest = float(np.abs(expected).max(initial=0.0))
    difference = float(np.abs(found - expected).max(initial=0.0))
    if not np.isfinite(largest):
        return float("inf")
    return difference / largest if largest else difference


def address(w: Any) -> int:
    """Where the numbers of a weight begin: the same for every view of the same layer."""
    array = w if isinstance(w, np.ndarray) else w[0]
    return int(array.__array_interface__["data"][0])


def weight_names(weights: Weights) -> dict[int, tuple[str, int]]:
    """Address -> kind of weight and layer (-1 for a weight that is not in a layer)."""
    return dict(_named(weights))


def _named(weights: Weights) -> Iterator[tuple[int, tuple[str, int]]]:
    for kind, w in weights._asdict().items():
        if not KINDS[kind].in_layers:
            yield address(w), (kind, -1)
            continue
        n_layers = (w if isinstance(w, np.ndarray) else w[0]).shape[0]
        for l in range(n_layers):
            yield address(ops.layer(w, l)), (kind, l)
