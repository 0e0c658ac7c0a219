"""Compiled execution of one model: model.forward compiled or loaded, and run with threads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from npllama.errors import NpllamaError, quote
from npllama.execution import compiled_code, threads
from npllama.execution.affinity import ThreadAffinity
from npllama.execution.drawing import top_k as search
from npllama.execution.drawing.plan import Plan, empty_plan
from npllama.execution.kernels.flags import PLAIN
from npllama.execution.prefetching import tuning
from npllama.system import machine
from npllama.weights import Weights

MAX_KEPT = 64  # logits that the compiled search keeps in order as it goes; it would pay for a few hundred

MAX_AHEAD_BYTES = 400_000_000
"""Of a model whose steps are gone in groups: those of larger ones take so long that nothing is gained."""

T = TypeVar("T")
Report = Callable[[str], None]
_NO_CHANCES, _NO_NUMBERS, _NO_IDS = np.empty((0, 3)), np.empty(0), np.empty(0, np.int64)


@functools.lru_cache(maxsize=256)
def _rows(one: tuple[float, ...], n: int, dtype: type) -> np.ndarray:
    """The same numbers for each of n rows, as compiled code takes them: most texts have the same."""
    return np.array([one] * n, dtype)


class Compiled:
    """The kernels for one model's number formats. arguments: those of model.forward, whose types are compiled for;
    size_bytes: of the model.

    function: model.forward, compiled; import_s, compile_s: seconds. Raises threads.UnavailableError where nothing can
    be compiled, UsageError for more threads than Numba has, ModelError for number formats without kernels.
    """

    def __init__(
        self, size_bytes: int, kv_dtype: str, arguments: tuple[Any, ...], n_threads: int | None, report: Report
    ) -> None:
        started = time.perf_counter()
        with threads.COMPILING:
            threads.start_numba(report)
            self.n_threads = threads.numba_threads(n_threads, machine.default_threads()[0])
            try:
                from npllama.execution.kernels.numba_internals import collecting_less

                with threads.numba_threads_later(size_bytes), collecting_less():
                    self._compile(size_bytes, kv_dtype, arguments, started, report)
            except NpllamaError:
                raise
            except Exception as error:
                reason = quote(f"{type(error).__name__}: {error}".splitlines()[0])
                raise threads.UnavailableError(f"compiling failed ({reason}); use backend numpy.") from error

    def _compile(
        self, size_bytes: int, kv_dtype: str, arguments: tuple[Any, ...], started: float, report: Report
    ) -> None:
        import numba

        from npllama.execution.disk_cache import open_caches
        from npllama.execution.kernels import compile as compiler

        self.import_s = time.perf_counter() - started
        started = time.perf_counter()
        self._cache_of = cache_of = open_caches(report)
        weights: Weights = arguments[2]
        name = compiled_code.forward_name(weights, kv_dtype)
        cache = cache_of(name)
        if cache is None or not cache.exists:
            report(f"compiling kernels for {compiled_code.formats(weights)} (once; 10 to 20 s) ...")
        self.function = compiler.compile_forward(arguments, cache)

        self._affinity = ThreadAffinity(functools.partial(_compile_pin_threads, cache_of), numba.threading_layer)
        self._make_top_k = functools.cache(functools.partial(_compile_top_k, cache_of))
        types = compiler.types_of((*arguments, empty_plan()))
        steps_name = name.replace(compiled_code.FORWARD, compiled_code.STEPS)
        steps_cache, self.goes_ahead = cache_of(steps_name), size_bytes < MAX_AHEAD_BYTES
        self._make_steps = functools.cache(lambda: self._compile_steps(types, steps_cache, steps_name))
        self._block, self.threaded_rows = compiler.top_k.BLOCK_LOGITS, compiler.top_k.SERIAL_BELOW
        if (cache is None or not cache.loaded) and not PLAIN:  # plain twins are there to be compared
            self._affinity.prepare()  # rarely needed, but when it is the machine is busy
            self._make_top_k()
        if self.goes_ahead and (steps_cache is None or not steps_cache.exists) and not PLAIN:
            self._make_steps()
        self.compile_s = time.perf_counter() - started

    def _compile_steps(self, types: tuple[Any, ...], cache: Any, name: str) -> Callable[..., None] | None:
        """kernels.planned.run, compiled or loaded; None where there is no way to."""
        from npllama.execution.kernels import compile as compiler

        self._make_top_k()
        with threads.COMPILING:
            found: Callable[..., None] | None = compiler.compile_steps(self.function, name, types, cache)
        return found

    def forward(self, n_threads: int, arguments: tuple[Any, ...]) -> np.ndarray:
        """model.forward. Raises UsageError in a process that was forked from one that had computed."""
        return self._run(n_threads, self.function, arguments)

    def _run(self, n_threads: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        before = threads.use(n_threads)
        try:
            return self._affinity.run(n_threads, function, arguments)
        finally:
            threads.put_back(before, n_threads)

    def run_steps(self, n_threads: int, arguments: tuple[Any, ...], plan: Plan) -> bool:
        """Go the steps of a plan: see kernels.planned. False where this Numba has no way to."""
        run = self._make_steps()
        if run is None:
            return False
        self._run(n_threads, run, (*arguments, plan))
        return True

    def settle_prefetching(self, kinds: set[str], call_s: Callable[[], float] | None) -> None:
        """Prefetch as is best on this machine: see tuning.settle."""
        from npllama.execution.kernels import compile as compiler

        tuning.settle(tuning.machine_key(compiler.target(), self.n_threads), kinds, call_s)

    def most_kept(self, n_ids: int) -> int:
        """The largest k for which the compiled search pays."""
        return min(MAX_KEPT, n_ids // self._block)

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        """top_k.top_k of one row, compiled; for many candidates the search in NumPy."""
        if k > self.most_kept(len(logits)):
            return search.top_k(logits, k)
        ids = np.empty((1, k), np.int64)
        self._search(np.ascontiguousarray(logits)[None], ids)  # few rows: in this thread alone
        return ids[0]

    def top_k_rows(self, n_threads: int, logits: np.ndarray, k: int) -> np.ndarray:
        """The same of several rows, on all threads where there are many."""
        if k > self.most_kept(logits.shape[-1]):
            return search.top_k(logits, k)
        ids = np.empty((len(logits), k), np.int64)
        before = threads.use(n_threads)
        try:
            self._search(np.ascontiguousarray(logits), ids)
        finally:
            threads.put_back(before, n_threads)
        return ids

    def draw(
        self, n_threads: int, logits: np.ndarray, k: int, chances: tuple[float, float, float], numbers: Sequence[float]
    ) -> list[int] | None:
        """An id of each row (R, V), drawn as sampling.basic says: kernels.top_k.top_k. None where k is too large.

        chances: top_p, min_p and temperature, above 0; numbers: R from [0, 1).
        """
        if k > self.most_kept(logits.shape[1]):
            return None
        R = len(logits)
        ids, drawn = np.empty((R, k), np.int64), np.empty(R, np.int64)
        arguments = np.ascontiguousarray(logits), ids, _rows(chances, R, np.float64), np.array(numbers), drawn
        if self.threaded_rows > R:
            self._search(*arguments)
        else:
            before = threads.use(n_threads)
            try:
                self._search(*arguments)
            finally:
                threads.put_back(before, n_threads)
        found: list[int] = drawn.tolist()
        return found

    def _search(
        self,
        logits: np.ndarray,
        ids: np.ndarray,
        chances: np.ndarray = _NO_CHANCES,
        numbers: np.ndarray = _NO_NUMBERS,
        drawn: np.ndarray = _NO_IDS,
    ) -> None:
        """kernels.top_k.top_k. Raises ModelError for logits that are not finite."""
        cuts = _rows((logits.shape[1], ids.shape[1]), len(logits), np.int64)
        if not self._make_top_k()(logits, ids, cuts, chances, numbers, drawn):
            raise search.not_finite()

    def kernels_per_op(self) -> dict[str, Callable[..., Any]]:
        """Every step of ops.py compiled on its own, or loaded, when it is first called with such arguments."""
        from npllama.execution.disk_cache import kept_ops

        return kept_ops(self._cache_of)

    def read(self, n_threads: int, data: np.ndarray) -> object:
        """Read (n,) float32 once through, as fast as memory allows."""
        from npllama.execution.kernels.bandwidth import stream_memory

        with threads.using(n_threads):
            return stream_memory(data)

    def close(self, n_threads: int) -> None:
        """Let threads that were tied to CPUs run on all again: those of the Python thread that calls this."""
        if threads.survived() and self._affinity.apart:
            with threads.using(n_threads):
                self._affinity.release(n_threads)


def _compile_pin_threads(cache_of: Callable[[str], Any]) -> Callable[[np.ndarray], None]:
    """The kernel that ties threads to CPUs, compiled or loaded."""
    from npllama.execution.kernels import compile as compiler

    pin: Callable[[np.ndarray], None] = compiler.compile_pin_threads(cache_of(compiled_code.named("bind-threads")))
    return pin


def _compile_top_k(cache_of: Callable[[str], Any]) -> Callable[..., bool]:
    """The kernel that searches for the largest logits and draws, compiled or loaded."""
    from npllama.execution.kernels import compile as compiler

    with threads.COMPILING:
        found: Callable[..., bool] = compiler.compile_top_k(cache_of(compiled_code.named("top-k")))
    return found


def compiled_execution() -> dict[str, Any]:
    """What compiled code is made for, and what runs its threads; or why there is none. Imports numba."""
    said: list[str] = []
    try:
        threads.start_numba(said.append)
        import numba

        with threads.numba_threads_later():
            from npllama.execution.kernels import compile as compiler

            key = tuning.machine_key(compiler.target(), machine.default_threads()[0])
            return {
                "compiled_for": compiler.target().split("|")[1],
                "threading_layer": numba.threading_layer(),
                "prefetch": tuning.described(key),
            }
    except threads.UnavailableError as error:
        return {"compiled_execution": f"not available: {error}"}
