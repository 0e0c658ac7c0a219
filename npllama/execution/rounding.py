"""The compiled search for scales, for numbers/rounding.py, which imports this by name where numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npllama.execution import compiled_code, threads
from npllama.numbers.blocks import GROUP
from npllama.numbers.rounding import Codebook, Nearest, Search

NAMES = ("round-best", "round-stored")


def is_kept() -> bool:
    """Whether compiled code for it is kept, for this or another CPU. Does not import numba."""
    return all(compiled_code.is_kept(compiled_code.named(name)) for name in NAMES)


def compiled_search() -> Search:
    """The search, compiled or loaded. Raises threads.UnavailableError."""
    said: list[str] = []
    with threads.COMPILING:
        threads.start_numba(said.append)
        from npllama.execution.disk_cache import open_caches
        from npllama.execution.kernels import compile as compiler

        cache_of = open_caches(said.append)
        best, stored = (cache_of(compiled_code.named(name)) for name in NAMES)
        return CompiledSearch(*compiler.compile_rounding(best, stored))


class CompiledSearch:
    """What numbers.rounding asks for: the same bytes as its own functions."""

    def __init__(self, best: Callable[..., None], stored: Callable[..., None]) -> None:
        self._best, self._stored = best, stored

    def best_scales(self, w: np.ndarray, grid: Codebook, rule: Nearest) -> np.ndarray:
        """rounding.best_scales."""
        found = np.empty(len(w), np.float32)
        self._best(np.ascontiguousarray(w), np.array(grid.targets, np.float32), *_arguments(rule), found)
        return found

    def with_stored_scales(
        self, w: np.ndarray, wanted: np.ndarray, factors: np.ndarray, rule: Nearest
    ) -> tuple[np.ndarray, np.ndarray]:
        """rounding.with_stored_scales; levels are int8."""
        codes, levels = np.empty(len(w), np.uint8), np.empty((len(w), GROUP), np.int8)
        self._stored(np.ascontiguousarray(w), wanted, factors, *_arguments(rule), codes, levels)
        return codes, levels


def _arguments(rule: Nearest) -> tuple[Any, ...]:
    table = np.array(rule.table, np.float32)
    at = np.flatnonzero(np.diff(table))
    return np.float32(rule.low), np.float32(rule.high), np.array([at + 1, np.diff(table)[at]], np.float32)
