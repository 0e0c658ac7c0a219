"""The engine: chooses NumPy or compiled execution once, and runs model.forward on validated batches."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npllama import cache as kv
from npllama import machine, model, ops, rope, sampling
from npllama.cache import KVCache
from npllama.errors import ModelError, UsageError, quote, whole_number
from npllama.kernels.flags import PLAIN
from npllama.kinds import Weights, kind_shapes
from npllama.numbers import format_of
from npllama.places import Places
from npllama.version import __version__
from npllama.weights import OpenModel

SMALL_MODEL_BYTES = 20_000_000
TABULATED = 8192  # positions whose angles are kept; of later ones they are computed in each call
MOST_POSITIONS = 1 << 40  # angles of positions are float64 and stay exact far beyond it
MOST_THREADS = 4096
MOST_KEPT = 64  # logits that the compiled search keeps in order as it goes; it would pay for a few hundred
BACKENDS = ("auto", "numpy", "numba")
# Rounds that an idle OpenMP thread spins before it sleeps, by the size of the model in bytes. Never spinning is ten
# times slower on an idle machine, spinning forever three hundred times slower on a busy one. A small model's steps are
# so short that sleeping costs a sixth of its speed; a large one's wait so long for a thread that others keep from
# running that spinning costs more. Share of the idle speed that is left beside one busy process per core: 15M shape in
# q4 0.46 with 20,000 rounds, 0.40 with 4,000; 1.1B shape in q4 0.12 with 20,000, 0.30 with 4,000, 0.42 with 1,500.
SPIN_COUNTS = ((50_000_000, "20000"), (400_000_000, "4000"), (math.inf, "1500"))

# Part of the name of a file of plain kernels: they replace older plain ones, and not those in daily use.
TWINS = ".plain" if PLAIN else ""


# One compiled call at a time in this process: each uses all its threads, and Numba's simplest threading layer ends the
# process when two Python threads enter it.
_COMPILED = threading.Lock()
_threads_started = threading.Event()
_forked = False


def _after_fork() -> None:
    global _COMPILED, _forked
    _COMPILED = threading.Lock()
    _forked = _threads_started.is_set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
        self.backend = choose_backend(backend, opened, report, self.kv_dtype)
        self._lock = _COMPILED if self.backend == "numba" else threading.Lock()
        self.threads = _checked_threads(threads)
        self.largest: sampling.Search = sampling.largest
        self.import_s = self.compile_s = 0.0
        machine.keep_freed_memory()
        c = self.config
        self._numbers = model.Numbers(c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, float(c.norm_eps))
        self._frequencies = rope.frequencies(c.rope_scaling, c.head_dim, c.rope_theta, context or c.max_seq_len)
        self._table = ops.rotation(np.arange(min(c.max_seq_len, TABULATED)), *self._frequencies)
        if self.backend == "numpy":
            self._set_blas_threads(threads is not None)
            self._prepare_numpy()
        else:
            self._prepare_numba()

    def _set_blas_threads(self, threads_asked: bool) -> None:
        """NumPy's products are threaded by its BLAS; what the user set for it stands."""
        own_setting = any(name in os.environ for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
        if own_setting and not threads_asked:
            return
        if not set_blas_threads(self.threads) and threads_asked:
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
        self._forward: Callable[..., np.ndarray] = _forward_in_numpy

    def _prepare_numba(self) -> None:
        """Compile model.forward for this model's number formats, or take it from the disk cache."""
        started = time.perf_counter()
        import_numba(self._opened.size_bytes)
        import numba

        from npllama.kernels import compile as compiler

        self.import_s = time.perf_counter() - started
        most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined] # set when numba is imported
        if self.threads > most:
            raise UsageError(
                f"threads={self.threads} is more than the {most} that Numba was started with; "
                f"ask for fewer, or set NUMBA_NUM_THREADS before the start."
            )
        started = time.perf_counter()
        folder, why = machine.cache_directory()
        if folder is None:
            self._report(f"compiled code is not kept: {why}")
        file = None if folder is None else folder / cache_name(self._opened, self.kv_dtype)
        if not compiled_exists(self._opened, self.kv_dtype):
            self._report(f"compiling kernels for {formats(self._opened)} (once; 10 to 20 s) ...")
        arguments = self._arguments(self.new_cache(1, 1), *(np.zeros(1, np.int64) for _ in range(4)))
        compiled, loaded = compiler.compile_forward(arguments, file, self._report)

        def make_bind() -> Callable[[np.ndarray], None]:
            bind_file = None if folder is None else folder / f"bind-threads{TWINS}-{sources_hash()}"
            return compiler.compile_pin_threads(bind_file, self._report)

        @functools.cache
        def make_largest() -> Callable[[np.ndarray, np.ndarray], bool]:
            largest_file = None if folder is None else folder / f"largest-logits{TWINS}-{sources_hash()}"
            return compiler.compile_top_k(largest_file, self._report)

        places = Places(make_bind, numba.threading_layer)
        if not loaded:
            places.prepare()  # seldom needed, but when it is the machine is busy
            make_largest()
        self.compile_s = time.perf_counter() - started

        if opened_bytes_fit(self._opened):
            self._opened.prefetch()

        def forward(*arguments: Any) -> np.ndarray:
            if _forked:
                raise UsageError(
                    "this process was forked from one that had computed with compiled kernels, whose threads do not "
                    'survive a fork; start workers with multiprocessing\'s "spawn", or use backend "numpy".'
                )
            _threads_started.set()
            numba.set_num_threads(self.threads)  # per Python thread, so in every call
            return places.run(self.threads, compiled, arguments)

        def largest(logits: np.ndarray, k: int) -> np.ndarray:
            if k > min(MOST_KEPT, len(logits) // compiler.top_k.BLOCK_LOGITS):
                return sampling.largest(logits, k)
            ids = np.empty(k, np.int64)
            if not make_largest()(logits, ids):
                raise sampling.not_finite()
            return ids

        self._forward = forward
        self.largest = largest
        self.compiled = compiled

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
        return kv.size_bytes(c.n_layers, 1, c.n_kv_heads, 1, c.head_dim, self.kv_dtype)

    def reader(self) -> Callable[[np.ndarray], object]:
        """A function that reads (n,) float32 once through with this engine's threads: the yardstick of `bench`."""
        if self.backend == "numpy":
            return lambda data: data.reshape(-1, 4096) @ np.ones(4096, np.float32)
        import numba

        from npllama.kernels.bandwidth import stream_memory

        def reader(data: np.ndarray) -> object:
            numba.set_num_threads(self.threads)
            return stream_memory(data)

        return reader

    def single_kernels(self) -> dict[str, Callable[..., np.ndarray]]:
        """Every step of ops.py compiled on its own. Raises UsageError for the NumPy execution, which has no kernels."""
        if self.backend != "numba":
            raise UsageError("the NumPy execution has no kernels to look at; it needs numba, and backend numba.")
        from npllama.kernels import per_op

        return per_op.OPS

    def run_stepwise(
        self, forward: Callable[..., np.ndarray], cache: KVCache, tokens: np.ndarray, pos: np.ndarray
    ) -> np.ndarray:
        """Feed tokens of sequence 0 to a forward made by `stepwise`; logits of the last (1, V)."""
        batch = [np.ascontiguousarray(a, np.int64) for a in (tokens, pos, np.zeros(len(pos)), [len(pos) - 1])]
        self._check(cache, *batch)
        with self._lock:
            return forward(*self._arguments(cache, *batch))

    def new_cache(self, n_seqs: int, n_slots: int, window: int = 0, n_sink: int = 0) -> KVCache:
        """An empty KV cache for this model. Raises ModelError, with the arithmetic, when memory does not suffice."""
        c = self.config
        needed = kv.size_bytes(c.n_layers, n_seqs, c.n_kv_heads, n_slots, c.head_dim, self.kv_dtype)
        free = machine.free_memory()
        if needed > free:
            narrower = "" if self.kv_dtype == "q8" else ", or for kv_dtype q8"
            raise ModelError(
                f"a KV cache for {n_slots} positions needs {needed / 1e6:,.0f} MB ({c.n_layers} layers x {n_seqs} "
                f"sequences x {n_slots} slots x {c.n_kv_heads} heads x 2 x {kv.row_bytes(c.head_dim, self.kv_dtype)} "
                f"bytes in {self.kv_dtype}), {free / 1e6:,.0f} MB are free; ask for a smaller context{narrower}."
            )
        return kv.allocate(c.n_layers, n_seqs, c.n_kv_heads, n_slots, c.head_dim, window, n_sink, self.kv_dtype)

    def forward(
        self,
        cache: KVCache,
        tokens: Sequence[int] | np.ndarray,
        pos: Sequence[int] | np.ndarray,
        seq: Sequence[int] | np.ndarray,
        out: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """Logits of the rows in `out`: (R, V) float32. Writes the cache.

        tokens, pos, seq (T,), out (R,): see model.Batch. Compiled kernels do not check bounds, so everything
        that addresses memory is checked here; a violation is a UsageError.
        """
        batch = [np.ascontiguousarray(a, np.int64) for a in (tokens, pos, seq, out)]
        self._check(cache, *batch)
        with self._lock:
            return self._forward(*self._arguments(cache, *batch))

    def _arguments(
        self, cache: KVCache, tokens: np.ndarray, pos: np.ndarray, seq: np.ndarray, out: np.ndarray
    ) -> tuple[Any, ...]:
        """The arguments of model.forward: always of the same types, so that one compiled signature serves."""
        batch = model.Batch(tokens, pos, seq, out)
        return batch, self._rotation(cache, pos), self.weights, cache, self._numbers

    def _rotation(self, cache: KVCache, pos: np.ndarray) -> model.Rotation:
        """Cosines and sines of the batch's positions, and of the nearer ones from which the sinks are seen."""
        cos, sin = self._angles(pos)
        if not cache.n_sink:
            return model.Rotation(cos, sin, cos, sin)
        return model.Rotation(cos, sin, *self._angles(np.minimum(pos, cache.n_sink + cache.window - 1)))

    def _angles(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(pos) and pos.max() < len(self._table[0]):
            return self._table[0][pos], self._table[1][pos]
        return ops.rotation(pos, *self._frequencies)

    def _check(self, cache: KVCache, tokens: np.ndarray, pos: np.ndarray, seq: np.ndarray, out: np.ndarray) -> None:
        T = len(tokens)
        if T == 0 or pos.shape != (T,) or seq.shape != (T,) or tokens.ndim != 1 or out.ndim != 1:
            raise UsageError(
                f"a batch needs equally many tokens, pos and seq, at least one; got {T}, {pos.shape}, {seq.shape}."
            )
        _check_range("token ids", tokens, self.config.vocab_size)
        _check_range("positions", pos, MOST_POSITIONS)
        _check_range("seq", seq, cache.pos.shape[1])
        if len(out):
            _check_range("out", out, T)
        if T > 1:
            same = seq[1:] == seq[:-1]
            starts = seq[1:][~same]
            if not (pos[1:][same] == pos[:-1][same] + 1).all() or len(set(starts) | {seq[0]}) != len(starts) + 1:
                raise UsageError("the rows of a sequence must stand together, their positions ascending by one.")

    def close(self) -> None:
        """Let go of the weights. Waits for a call that is under way."""
        with self._lock:
            self._weights = None
            self._forward = _forward_in_numpy


def _forward_in_numpy(*arguments: Any) -> np.ndarray:
    """model.forward without NumPy's warnings: numbers that are not finite are refused where an id is sampled."""
    with np.errstate(all="ignore"):
        return model.forward(*arguments)


def opened_bytes_fit(opened: OpenModel) -> bool:
    """Whether a model's files fit into half of the free memory, so that reading them ahead evicts nothing."""
    return opened.size_bytes < machine.free_memory() // 2


def stepwise(steps: dict[str, Callable[..., np.ndarray]]) -> Callable[..., np.ndarray]:
    """model.forward, uncompiled, with other functions in place of the steps named: the same source, step by step."""
    scope = {**vars(model), **steps}
    for name in ("attention", "feed_forward", "forward"):
        scope[name] = types.FunctionType(getattr(model, name).__code__, scope, name)
    forward: Callable[..., np.ndarray] = scope["forward"]
    return forward


def _check_range(what: str, numbers: np.ndarray, end: int) -> None:
    """Raise UsageError unless all numbers are 0 to end - 1. One number, the usual case, is checked without NumPy."""
    least, most = (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers.min(), numbers.max())
    if least < 0 or most >= end:
        raise UsageError(f"{what} must be 0 to {end - 1}; got {least} to {most}.")


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return machine.default_threads()[0]
    n_threads = whole_number(threads)
    if n_threads is None or not 1 <= n_threads <= MOST_THREADS:
        raise UsageError(f"threads={quote(threads)} is not a number of threads; it needs 1 to {MOST_THREADS}.")
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
    if opened.size_bytes < SMALL_MODEL_BYTES and not compiled_exists(opened, kv_dtype):
        report("a small model that nothing is compiled for yet: using NumPy; --backend numba compiles it")
        return "numpy"
    return "numba"


def import_numba(model_bytes: int = 0) -> None:
    """Import numba with OpenMP told how to wait, which is read when the library loads. A user's own setting wins."""
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = next(rounds for size, rounds in SPIN_COUNTS if model_bytes < size)
    import numba  # noqa: F401


def compiled_execution() -> dict[str, str]:
    """What compiled code is made for, and what runs its threads. Imports numba."""
    import_numba()
    import numba

    from npllama.kernels import compile as compiler
    from npllama.kernels.numba_internals import launch_threads

    launch_threads()  # the layer is chosen here
    return {"compiled_for": compiler.target().split("|")[1], "threading_layer": numba.threading_layer()}


def formats(opened: OpenModel) -> str:
    """The number formats of a model's matrices, as part of a file name: the compiled code depends on them."""
    return "+".join(dict.fromkeys(format_of(w).name for w in opened.weights))


def cache_name(opened: OpenModel, kv_dtype: str = "f32") -> str:
    """Name of the file of compiled code, without the CPU's part: formats and a hash of all that the code depends on."""
    layout = hashlib.sha256(repr([format_of(w).name for w in opened.weights]).encode()).hexdigest()[:8]
    return f"forward-{formats(opened)}.{layout}.kv_{kv_dtype}{TWINS}-{sources_hash()}"


def compiled_exists(opened: OpenModel, kv_dtype: str = "f32") -> bool:
    """Whether compiled code for this model is kept, for this or another CPU. Writes nothing, does not import numba."""
    folder, _ = machine.cache_directory(make=False)
    return folder is not None and any(folder.glob(cache_name(opened, kv_dtype) + "-*"))


def sources_hash() -> str:
    """Hash of everything compiled code depends on but compiler.target: sources, versions, switches."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("numba", "llvmlite", "numpy"):
        try:
            digest.update(importlib.metadata.version(package).encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(b"none")
    digest.update(TWINS.encode())
    folder = Path(__file__).parent
    # A build without sources (frozen, or .pyc alone) changes with the version only.
    names = ("model.py", "ops.py", "cache.py", "kinds.py")
    parts = [*sorted((folder / "numbers").glob("*.py")), *sorted((folder / "kernels").glob("*.py"))]
    for path in [folder / name for name in names] + parts:
        digest.update(path.name.encode() + (path.read_bytes() if path.exists() else __version__.encode()))
    return digest.hexdigest()[:16]


def set_blas_threads(n: int) -> bool:
    """Tell the OpenBLAS inside NumPy's wheel how many threads to use; False where it is another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for library in folder.glob("*openblas*") if folder.is_dir() else ():
            handle = ctypes.CDLL(str(library))
            for name in (
                "scipy_openblas_set_num_threads64_",
                "scipy_openblas_set_num_threads",
                "openblas_set_num_threads64_",
            ):
                if hasattr(handle, name):
                    getattr(handle, name)(ctypes.c_int(n))
                    return True
    return False
