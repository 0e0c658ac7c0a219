"""The engine: chooses NumPy or compiled execution once, and runs model.forward on validated batches."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import time
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npllama import cache as kv
from npllama import model, ops, rope
from npllama.cache import KVCache
from npllama.errors import ModelError, UsageError, quote, whole_number
from npllama.execution import process
from npllama.execution.abandon import MIN_HEARD_ROWS, Call
from npllama.execution.cache_checks import check_fits, check_rows
from npllama.execution.compiled import Compiled
from npllama.execution.compiled_code import compiled_exists
from npllama.execution.drawing.plan import NOT_DRAWN, Plan
from npllama.execution.drawing.top_k import top_k
from npllama.execution.prefetching import tuning
from npllama.execution.threads import COMPILED, Turn, UnavailableError, using
from npllama.numbers import format_of
from npllama.store.opening import OpenModel
from npllama.system import machine
from npllama.system.interrupts import Interruptible
from npllama.weights import Weights, kind_shapes

SMALL_MODEL_BYTES = 20_000_000
UNKNOWN_CACHE_BYTES = 32 << 20  # of a CPU that does not say how large its last cache is
TABULATED = 8192  # positions whose angles are kept; of later ones they are computed in each call
MAX_POSITIONS = 1 << 40  # angles of positions are float64 and stay exact far beyond it
MAX_THREADS = 4096
BACKENDS = ("auto", "numpy", "numba")
# NumPy copies what is broadcast into a buffer wherever several rows fit into it, which takes longer than to multiply
# them: for this many numbers, instead of 8192, in calls of many tokens. Those of few convert much, and keep the buffer.
BUFFER_OF_MANY, MANY_TOKENS = 512, 8
FEW_ROWS = 64  # up to so many numbers are looked at faster one by one


def say_nothing(message: str) -> None:
    """The default reporter."""


class Engine:
    """One model ready to compute. Threads may call it at the same time: calls take turns.

    backend "auto" | "numpy" | "numba"; threads None: as many as are worth it; kv_dtype "f32" | "f16" | "q8": how its
    caches keep keys and values; context None: the model's own, some kinds of rope scaling depend on it. report gets
    one-line messages.
    Raises UsageError for values that cannot be honoured, ModelError when memory does not suffice.
    """

    def __init__(
        self,
        opened: OpenModel,
        backend: str = "auto",
        threads: int | None = None,
        report: Callable[[str], None] = say_nothing,
        kv_dtype: str = "f32",
        context: int | None = None,
    ) -> None:
        self.config = opened.config
        self.kv_dtype = kv.checked_kv_dtype(kv_dtype)
        self._opened = opened
        self._weights: Weights | None = opened.weights
        self._report = report
        c = self.config
        self._numbers = model.Numbers(c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, float(c.norm_eps))
        self.frequencies = rope.frequencies(c.rope_scaling, c.head_dim, c.rope_theta, context or c.max_seq_len)
        self._table = ops.rotation(np.arange(min(c.max_seq_len, TABULATED)), *self.frequencies)
        self.backend = choose_backend(backend, opened, report, self.kv_dtype)
        self.threads = _checked_threads(threads)
        self.compiled: Compiled | None = None
        self._compiled_hidden: Compiled | None = None
        self._identity: np.ndarray | None = None
        self._fitting: KVCache | None = None  # the cache that was found to fit last
        self.import_s = self.compile_s = 0.0
        if self.backend == "numba":
            self._prepare_numba(threads, optional=backend == "auto" and not os.environ.get("NPLLAMA_BACKEND"))
        self._lock = Turn() if self.compiled is None else COMPILED
        if self.compiled is not None:
            self._settle_prefetching(self.compiled)
        self._releases: list[Callable[[], None]] = []
        self._release_later(process.hold_freed_memory())
        if self.compiled is None:
            self._hold_blas_threads(threads is not None)
            self._prepare_numpy()

    def _release_later(self, release: Callable[[], None]) -> None:
        """Put something back when this engine is closed, or is gone without that."""
        self._releases.append(release)
        weakref.finalize(self, release).atexit = False

    def _hold_blas_threads(self, threads_asked: bool) -> None:
        """NumPy's products are threaded by its BLAS; what the user set for it stands."""
        own_setting = any(name in os.environ for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
        if own_setting and not threads_asked:
            return
        release = process.hold_blas_threads(self.threads)
        if release is not None:
            self._release_later(release)
        elif threads_asked:
            raise UsageError(
                f"threads={self.threads} cannot be honoured by this NumPy, whose BLAS offers no way to set it; "
                f"leave threads out, or set the BLAS's own variable (VECLIB_MAXIMUM_THREADS, ...) before the start."
            )

    def _prepare_numpy(self) -> None:
        """Widen narrow weights once where memory allows; but for the embedding, of which a call needs few rows."""
        weights, shapes = self._opened.weights, kind_shapes(self.config)
        factors = {kind: w for kind, w in weights._asdict().items() if kind != "tok_embeddings"}
        needed = sum(4 * math.prod(shapes[kind]) for kind, w in factors.items() if not isinstance(w, np.ndarray))
        if needed and needed <= machine.free_memory() // 2:
            if needed > SMALL_MODEL_BYTES:
                self._report(f"widening the weights to float32 in memory ({needed / 1e6:,.0f} MB)")
            wide: dict[str, Any] = {kind: format_of(w).for_products(w) for kind, w in factors.items()}
            self._weights = weights._replace(**wide)
        elif needed:
            self._report(
                "weights stay narrow, each layer is widened in each call: float32 would take half of the free memory"
            )

    def _prepare_numba(self, threads: int | None, optional: bool) -> None:
        """Compile model.forward for this model's number formats; or, if `optional`, stay with NumPy."""
        try:
            arguments = self._arguments(self.new_cache(1, 1), *(np.zeros(1, np.int64) for _ in range(4)))
            self.compiled = Compiled(*self._compiled_for(arguments, threads and self.threads))
        except UnavailableError as error:
            if not optional:
                raise
            self.backend = "numpy"
            self._report(f"using NumPy: {error}")
            return
        self.threads = self.compiled.n_threads
        self.import_s, self.compile_s = self.compiled.import_s, self.compiled.compile_s
        if self._opened.size_bytes < machine.free_memory() // 2:  # else reading ahead evicts what was read
            self._opened.prefetch()

    def _settle_prefetching(self, compiled: Compiled) -> None:
        """Prefetch as was measured on this machine, or is measured now: with layers that no cache holds."""
        caches, size = machine.cache_bytes() or [UNKNOWN_CACHE_BYTES], self._opened.size_bytes
        n_layers = self.config.n_layers
        n = min(n_layers, math.ceil(tuning.CACHES * caches[-1] * n_layers / size))

        @functools.cache  # made when something is measured
        def arguments() -> tuple[Any, ...]:
            every = self._arguments(self.new_cache(1, 1), *(np.zeros(1, np.int64) for _ in range(4)))
            return *every[:-1], self._numbers._replace(n_layers=n)

        def call_s() -> float:
            some = arguments()
            started = time.perf_counter()
            compiled.forward(self.threads, some)
            return time.perf_counter() - started

        with self._lock:
            large = size > tuning.CACHES * caches[-1]
            compiled.settle_prefetching(tuning.kinds_of(self._opened.weights), call_s if large else None)

    @property
    def weights(self) -> Weights:
        """The weights as they are computed with. Raises UsageError once the engine is closed."""
        if self._weights is None:
            raise UsageError("this model is closed; load it again.")
        return self._weights

    @property
    def cache_bytes_per_position(self) -> int:
        """Bytes of keys and values that one position adds to the cache."""
        c = self.config
        return kv.size_bytes(c.n_layers, c.n_kv_heads, 1, c.head_dim, self.kv_dtype)

    def reader(self) -> Callable[[np.ndarray], object]:
        """A function that reads (n,) float32 once through with this engine's threads: the yardstick of `bench`."""
        compiled = self.compiled
        if compiled is None:
            return lambda data: data.reshape(-1, 4096) @ np.ones(4096, np.float32)
        return functools.partial(compiled.read, self.threads)

    def kernels_per_op(self) -> dict[str, Callable[..., np.ndarray]]:
        """Every step of ops.py compiled on its own. Raises UsageError for the NumPy execution, which has no kernels."""
        if self.compiled is None:
            raise UsageError("the NumPy execution has no kernels to look at; it needs numba, and backend numba.")
        return self.compiled.kernels_per_op()

    def run_stepwise(
        self, forward: Callable[..., np.ndarray], cache: KVCache, tokens: np.ndarray, pos: np.ndarray
    ) -> np.ndarray:
        """Feed tokens of sequence 0 to a forward made by `stepwise`; logits of the last (1, V)."""
        batch = [np.ascontiguousarray(a, np.int64) for a in (tokens, pos, np.zeros(len(pos)), [len(pos) - 1])]
        threads = contextlib.nullcontext() if self.compiled is None else using(self.threads)
        with self._lock, threads:
            seqs, stops = self._begin_writing(cache, *batch)
            logits = forward(*self._arguments(cache, *batch))
            cache.length[seqs] = stops
            return logits

    def new_cache(self, n_seqs: int, n_slots: int, window: int = 0, n_sink: int = 0) -> KVCache:
        """An empty KV cache for this model, with blocks for n_slots positions of every sequence.

        Raises ModelError, with the arithmetic, when memory does not suffice.
        """
        c = self.config
        self._check_memory(n_seqs, kv.n_blocks(n_slots))
        return kv.allocate(c.n_layers, n_seqs, c.n_kv_heads, n_slots, c.head_dim, window, n_sink, self.kv_dtype)

    def new_pool(self, blocks: int, n_seqs: int, n_entries: int) -> KVCache:
        """An empty pool of so many blocks, for n_seqs sequences with tables of so many entries.

        Raises ModelError, with the arithmetic, when memory does not suffice.
        """
        c = self.config
        self._check_memory(1, blocks)
        return kv.allocate_pool(c.n_layers, c.n_kv_heads, c.head_dim, blocks, n_seqs, n_entries, self.kv_dtype)

    def _check_memory(self, n_seqs: int, blocks: int) -> None:
        c, n_slots = self.config, blocks * kv.BLOCK_SLOTS
        needed, free = n_seqs * n_slots * self.cache_bytes_per_position, machine.free_memory()
        if needed > free:
            narrower = "" if self.kv_dtype == "q8" else ", or for kv_dtype q8"
            raise ModelError(
                f"a KV cache for {n_slots} positions needs {needed / 1e6:,.0f} MB ({c.n_layers} layers x {n_seqs} "
                f"sequences x {n_slots} slots x {c.n_kv_heads} heads x 2 x {kv.row_bytes(c.head_dim, self.kv_dtype)} "
                f"bytes in {self.kv_dtype}), {free / 1e6:,.0f} MB are free; ask for a smaller context{narrower}."
            )

    def forward(
        self,
        cache: KVCache,
        tokens: Sequence[int] | np.ndarray,
        pos: Sequence[int] | np.ndarray,
        seq: Sequence[int] | np.ndarray,
        out: Sequence[int] | np.ndarray,
        hidden: bool = False,
        call: Call | None = None,
    ) -> np.ndarray:
        """Logits of the rows in `out`: (R, V) float32. Writes the cache, and counts the positions as written.

        hidden: the final hidden states (R, D) instead, as the output would see them.
        tokens, pos, seq (T,), out (R,): see model.Batch. Compiled kernels do not check bounds, so everything
        that addresses memory is checked here; a violation is a UsageError. call: by which another thread may abandon
        it where it is compiled, which is an AbandonedError.
        """
        batch = [np.array(a, np.int64, ndmin=1) for a in (tokens, pos, seq, out)]
        with self._lock:
            seqs, stops = self._begin_writing(cache, *batch)
            arguments = self._arguments(cache, *batch)
            with Interruptible():
                if hidden:
                    logits = self._hidden_states(arguments, call)
                elif self.compiled is None:
                    logits = _forward_in_numpy(*arguments)
                else:
                    logits = self._compiled_call(self.compiled, arguments, call)
            cache.length[seqs] = stops
            return logits

    def run_steps(
        self, cache: KVCache, tokens: Sequence[int], pos: Sequence[int], seq: Sequence[int], plan: Plan
    ) -> list[list[int]]:
        """The ids that a plan draws: of each step that was gone, those of all texts. Writes the cache as `forward`.

        tokens, pos, seq: one row of each text, as for `forward`. No step was gone where that gains nothing.
        """
        compiled, (n, R) = self.compiled, plan.numbers.shape
        if compiled is None or not compiled.goes_ahead:
            return []
        batch = [np.array(a, np.int64, ndmin=1) for a in (tokens, pos, seq, range(R))]
        with self._lock:
            self._check(cache, *batch)
            first, seqs = batch[1].copy(), batch[2]
            check_rows(cache, seqs, first, first + (n - 1))
            cache.length[seqs] = first
            every = (first + np.arange(n)[:, None]).reshape(-1)
            rotation = self._rotation(cache, every, np.tile(seqs, n))
            arguments = model.Batch(*batch), rotation, self.weights, cache, self._numbers
            with Interruptible():
                if not compiled.run_steps(self.threads, arguments, plan):
                    return []
            n_gone = int((plan.drawn[:, 0] != NOT_DRAWN).sum())
            cache.length[seqs] = first + n_gone
        found: list[list[int]] = plan.drawn[:n_gone].tolist()
        return found

    def _compiled_call(self, compiled: Compiled, arguments: tuple[Any, ...], call: Call | None) -> np.ndarray:
        n_rows = len(arguments[0].tokens)
        if call is None and n_rows < MIN_HEARD_ROWS:  # over before anybody could abandon it
            return compiled.forward(self.threads, arguments)
        return (call or Call()).run(functools.partial(compiled.forward, self.threads, arguments), n_rows)

    def _hidden_states(self, arguments: tuple[Any, ...], call: Call | None) -> np.ndarray:
        """model.forward with an identity in the place of the output weights: a product with it changes no bit."""
        if self._identity is None:
            self._identity = np.eye(self.config.dim, dtype=np.float32)
            self._identity.setflags(write=False)  # as mapped weights are: the type of compiled arguments
        batch, rotation, weights, *rest = arguments
        arguments = batch, rotation, weights._replace(output=self._identity), *rest
        if self.compiled is None:
            return _forward_in_numpy(*arguments)
        if isinstance(weights.output, np.ndarray):
            return self._compiled_call(self.compiled, arguments, call)
        if self._compiled_hidden is None:  # other types of arguments: another compilation, when it is first needed
            self._compiled_hidden = Compiled(*self._compiled_for(arguments, self.threads))
        return self._compiled_call(self._compiled_hidden, arguments, call)

    def _compiled_for(self, arguments: tuple[Any, ...], n_threads: int | None) -> tuple[Any, ...]:
        return self._opened.size_bytes, self.kv_dtype, arguments, n_threads, self._report

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        """The ids of the k largest logits of a row, or of each of several: see top_k.top_k."""
        if self.compiled is None:
            return top_k(logits, k)
        if logits.ndim == 1:
            return self.compiled.top_k(logits, k)
        with self._lock:
            return self.compiled.top_k_rows(self.threads, logits, k)

    def most_drawn(self, n_ids: int) -> int:
        """The largest k of `draw` and of the steps of a plan, of so many ids; 0 where ids are not drawn compiled."""
        return 0 if self.compiled is None else self.compiled.most_kept(n_ids)

    def draw(
        self, logits: np.ndarray, k: int, chances: tuple[float, float, float], numbers: Sequence[float]
    ) -> list[int] | None:
        """An id of each row, drawn by compiled code: see Compiled.draw. None where there is none for it."""
        if self.compiled is None:
            return None
        turn = self._lock if len(logits) >= self.compiled.threaded_rows else contextlib.nullcontext()
        with turn:
            return self.compiled.draw(self.threads, logits, k, chances, numbers)

    def _begin_writing(
        self, cache: KVCache, tokens: np.ndarray, pos: np.ndarray, seq: np.ndarray, out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check a batch. The sequences, and how many positions of each count as written once the call has ended."""
        firsts = self._check(cache, tokens, pos, seq, out)
        if firsts is None:
            seqs, first, last = seq, pos, pos
        else:
            seqs, first, last = seq[firsts], pos[firsts], pos[np.append(firsts[1:], len(pos)) - 1]
        check_rows(cache, seqs, first, last)
        cache.length[seqs] = first
        return seqs, last + 1

    def _arguments(
        self, cache: KVCache, tokens: np.ndarray, pos: np.ndarray, seq: np.ndarray, out: np.ndarray
    ) -> tuple[Any, ...]:
        """The arguments of model.forward: always of the same types, so that one compiled signature serves."""
        batch = model.Batch(tokens, pos, seq, out)
        return batch, self._rotation(cache, pos, seq), self.weights, cache, self._numbers

    def _rotation(self, cache: KVCache, pos: np.ndarray, seq: np.ndarray) -> model.Rotation:
        """Cosines and sines of the batch's positions, and of the nearer ones from which the sinks are seen."""
        cos, sin = self._angles(pos)
        if not np.count_nonzero(cache.n_sink):
            return model.Rotation(cos, sin, cos, sin)
        return model.Rotation(cos, sin, *self._angles(np.minimum(pos, cache.n_sink[seq] + cache.window[seq] - 1)))

    def _angles(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(pos) == 1 and pos[0] < len(self._table[0]):  # without a copy, in the usual case
            p = int(pos[0])
            return self._table[0][p : p + 1], self._table[1][p : p + 1]
        if len(pos) and pos.max() < len(self._table[0]):
            return self._table[0][pos], self._table[1][pos]
        return ops.rotation(pos, *self.frequencies)

    def _check(
        self, cache: KVCache, tokens: np.ndarray, pos: np.ndarray, seq: np.ndarray, out: np.ndarray
    ) -> np.ndarray | None:
        """The rows with which sequences begin, None for all; UsageError for a batch or a cache that is none."""
        c = self.config
        if cache is None or cache is not self._fitting:
            check_fits(cache, c.n_layers, c.n_kv_heads, c.head_dim, self.kv_dtype)
            self._fitting = cache
        T = len(tokens)
        if T == 0 or pos.shape != (T,) or seq.shape != (T,) or tokens.ndim != 1 or out.ndim != 1:
            raise UsageError(
                f"a batch needs equally many tokens, pos and seq, at least one; got {T}, {pos.shape}, {seq.shape}."
            )
        _check_range("token ids", tokens, self.config.vocab_size)
        _check_range("positions", pos, MAX_POSITIONS)
        _check_range("seq", seq, cache.table.shape[0])
        if len(out):
            _check_range("out", out, T)
        if T <= FEW_ROWS and len(set(seq.tolist())) == T:  # the usual case when texts are written
            return None
        same = seq[1:] == seq[:-1]
        firsts = np.append(0, 1 + np.flatnonzero(~same))
        if not (pos[1:][same] == pos[:-1][same] + 1).all() or len(set(seq[firsts].tolist())) != len(firsts):
            raise UsageError("the rows of a sequence must stand together, their positions ascending by one.")
        return firsts

    def close(self) -> None:
        """Let go of the weights, and put back what was changed in the process. Waits for a call that is under way."""
        with self._lock:
            if self._weights is not None and self.compiled is not None:
                self.compiled.close(self.threads)
            self._weights = None
            for release in self._releases:
                release()


def _forward_in_numpy(*arguments: Any) -> np.ndarray:
    """model.forward without NumPy's warnings: numbers that are not finite are refused where an id is sampled."""
    before = np.getbufsize()
    with np.errstate(all="ignore"):
        try:
            if len(arguments[0].tokens) >= MANY_TOKENS:
                np.setbufsize(BUFFER_OF_MANY)
            return model.forward(*arguments)
        finally:
            np.setbufsize(before)


def stepwise(steps: dict[str, Callable[..., np.ndarray]]) -> Callable[..., np.ndarray]:
    """model.forward, uncompiled, with other functions in place of the steps named: the same source, step by step."""
    scope = {**vars(model), **steps}
    for name in ("attention", "feed_forward", "forward"):
        scope[name] = types.FunctionType(getattr(model, name).__code__, scope, name)
    forward: Callable[..., np.ndarray] = scope["forward"]
    return forward


def _check_range(what: str, numbers: np.ndarray, end: int) -> None:
    """Raise UsageError unless all numbers are 0 to end - 1."""
    few = numbers.tolist() if len(numbers) <= FEW_ROWS else (numbers.min(), numbers.max())
    least, most = min(few), max(few)
    if least < 0 or most >= end:
        raise UsageError(f"{what} must be 0 to {end - 1}; got {least} to {most}.")


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return machine.default_threads()[0]
    n_threads = whole_number(threads, 1, MAX_THREADS)
    if n_threads is None:
        raise UsageError(f"threads={quote(threads)} is not a number of threads; it needs 1 to {MAX_THREADS}.")
    return n_threads


def choose_backend(asked: str, opened: OpenModel, report: Callable[[str], None], kv_dtype: str = "f32") -> str:
    """The execution to use: "numpy" or "numba". An explicit backend wins; NPLLAMA_BACKEND decides what "auto" means.

    Left to itself, auto is compiled where numba is installed, but NumPy for a small model that nothing is compiled for.
    """
    source = "backend"
    if asked == "auto" and os.environ.get("NPLLAMA_BACKEND"):
        asked, source = os.environ["NPLLAMA_BACKEND"], "NPLLAMA_BACKEND"
    if asked not in BACKENDS:
        raise UsageError(f"{source}={asked!r} is not known; it needs one of {', '.join(BACKENDS)}.")
    installed = importlib.util.find_spec("numba") is not None
    if asked == "numba" and not installed:
        raise UsageError(f"{source}=numba needs the package numba, which is not installed; install it or use numpy.")
    if asked != "auto":
        return asked
    if not installed:
        return "numpy"
    if opened.size_bytes < SMALL_MODEL_BYTES and not compiled_exists(opened.weights, kv_dtype):
        report("a small model that nothing is compiled for yet: using NumPy; --backend numba compiles it")
        return "numpy"
    return "numba"
