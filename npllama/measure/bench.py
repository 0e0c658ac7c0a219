"""How fast is this model on this machine? Prompt and generation speed beside the machine's own limit.

Decoding reads every weight once for each token, so its limit is the read bandwidth, measured here in the same run;
reading a prompt is arithmetic. Names of the figures are llama-bench's where it has them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from npllama.errors import ContextError
from npllama.execution.drawing.plan import greedy_plan
from npllama.execution.engine import Engine, stepwise
from npllama.generation.batching import steps_ahead
from npllama.generation.chunks import feed
from npllama.inference import Llama
from npllama.system.machine import free_memory
from npllama.weights import Weights, layer_products

BANDWIDTH_BYTES = 1 << 28  # several times a large cache; a quarter of the free memory where that is less
BETWEEN_S = 0.1  # how long tests run before the bandwidth is measured again, which empties the caches


@dataclass(frozen=True)
class Measurement:
    """One test: n_prompt tokens read, or n_gen generated, at a depth of n_depth tokens already in the cache.

    Rates in tokens per second: avg_ts, stddev_ts, samples_ts (one per repetition), median_ts. gb_per_s: weights and
    cache read per second of generation, in 10^9 bytes; share_of_bandwidth: of what this machine could read just before
    and after, which changes all the time on a shared machine; the median over repetitions.
    gflops: 10^9 operations of matrix products per second. ttft_s: seconds from the prompt to the first logits.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int
    avg_ts: float
    stddev_ts: float
    median_ts: float
    samples_ts: list[float]
    backend: str
    dtype: str
    kv_dtype: str
    shape: str
    gb_per_s: float
    bandwidth_gb_per_s: float
    share_of_bandwidth: float
    gflops: float
    ttft_s: float
    import_s: float
    compile_s: float
    load_s: float
    peak_rss_mb: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Start:
    """What getting ready took: seconds for imports, compiling (or loading compiled code) and opening the model."""

    import_s: float
    compile_s: float
    load_s: float
    shape: str
    dtype: str


def weight_bytes(weights: Weights) -> int:
    """Bytes of weights that generating one token reads: all matrices, of the embedding one row."""
    return sum(_size(w) for name, w in weights._asdict().items() if name != "tok_embeddings")


def _size(w: Any) -> int:
    arrays = [w] if isinstance(w, np.ndarray) else [part for part in w if isinstance(part, np.ndarray)]
    return sum(int(array.nbytes) for array in arrays)


def operations(llama: Llama, n_out: int, n: int) -> float:
    """Multiplications and additions of the matrix products for n tokens, n_out of which need logits."""
    c = llama.config
    return 2.0 * (n * layer_products(c) + n_out * c.dim * c.vocab_size)


class Yardstick:
    """How fast an engine's threads read memory: each call reads a large array once through. Bytes per second."""

    def __init__(self, engine: Engine) -> None:
        self._data = np.ones(min(BANDWIDTH_BYTES, free_memory() // 4) // 4, np.float32)
        self._read = engine.reader()
        self.nbytes = self._data.nbytes
        self()

    def __call__(self) -> float:
        return self._data.nbytes / _seconds(lambda: self._read(self._data))


def beside(seconds: Iterable[float], bandwidth: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """Each of the seconds that tests take, with the bandwidth: the mean of before and after, BETWEEN_S apart."""
    left, before = iter(seconds), bandwidth()
    while waiting := list(_lasting(left, BETWEEN_S)):
        after = bandwidth()
        yield from ((taken, (before + after) / 2) for taken in waiting)
        before = after


def _lasting(seconds: Iterator[float], least: float) -> Iterator[float]:
    """The next ones, until they are at least so much together."""
    total = 0.0
    for taken in seconds:
        yield taken
        total += taken
        if total >= least:
            return


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def profile(llama: Llama, n_tokens: int, repetitions: int = 20) -> tuple[list[tuple[str, float]], float]:
    """Seconds that each step of ops.py takes in one call of n_tokens, and seconds of the whole call.

    The same model.py runs uncompiled with each step's own kernel; medians over calls.
    """
    engine = llama.engine
    spent: dict[str, float] = {}

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = step(*arguments)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return run

    forward = stepwise({name: timed(name, step) for name, step in engine.kernels_per_op().items()})
    cache, pos = engine.new_cache(1, n_tokens), np.arange(n_tokens)
    ids = np.random.default_rng(0).integers(0, llama.config.vocab_size, n_tokens)
    samples = []
    for _ in range(repetitions + 1):
        spent.clear()
        engine.run_stepwise(forward, cache, ids, pos)
        samples.append(dict(spent))
    steps = [(name, statistics.median(sample[name] for sample in samples[1:])) for name in samples[0]]
    last = [n_tokens - 1]
    whole = [
        _seconds(lambda: engine.forward(cache, ids, pos, np.zeros(n_tokens), last)) for _ in range(repetitions + 1)
    ]
    return sorted(steps, key=lambda step: -step[1]), statistics.median(whole[1:])


class Bench:
    """Measures one open model again and again: `prompt` and `generation` give the rates of one test."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._ids = np.random.default_rng(0).integers(3, llama.config.vocab_size, llama.context).tolist()
        self._step_s = math.inf

    def read(self, cache: Any, start: int, n: int) -> None:
        """Feed n random tokens as a prompt is read."""
        for _ in feed(self._llama.engine, cache, self._ids[: start + n], self._llama.chunk, start):
            pass

    def seconds(self, n_prompt: int, n_gen: int, depth: int, repetitions: int) -> Iterator[float]:
        """Seconds of each repetition, after one that is not counted. Raises ContextError for what does not fit."""
        if depth + n_prompt + n_gen > self._llama.context:
            raise ContextError(
                f"a test of {depth} + {n_prompt} + {n_gen} tokens does not fit into the context of "
                f"{self._llama.context}; ask for fewer, or for a larger context (-c)."
            )
        cache = self._llama.new_cache()
        self.read(cache, 0, depth)
        self._once(cache, depth, n_prompt, n_gen)
        for _ in range(repetitions):
            # Writing the same positions again leaves the cache as it was: the depth is read once.
            yield _seconds(lambda: self._once(cache, depth, n_prompt, n_gen))

    def _once(self, cache: Any, depth: int, n_prompt: int, n_gen: int) -> None:
        self.read(cache, depth, n_prompt)
        self.generate(cache, depth + n_prompt, depth + n_prompt + n_gen)

    def generate(self, cache: Any, position: int, stop: int) -> None:
        """As `Llama.generate` goes: several steps in one call where the model is small, else one after the other."""
        engine, n_ids = self._llama.engine, self._llama.config.vocab_size
        while position < stop:
            one = cache, [self._ids[position]], [position], [0]
            n = min(stop - position, steps_ahead(self._step_s))
            gone = len(engine.run_steps(*one, greedy_plan(n, n_ids))) if n > 1 else 0
            if not gone:
                self._step_s = _seconds(functools.partial(engine.forward, *one, [0]))
            position += max(1, gone)


def measure(
    llama: Llama,
    start: Start,
    tests: Iterable[tuple[int, int, int]],
    repetitions: int,
    peak_rss_mb: Callable[[], float],
) -> Iterator[Measurement]:
    """Run tests of (n_prompt, n_gen, depth)."""
    bench = Bench(llama)
    peak_before = peak_rss_mb()
    bandwidth = Yardstick(llama.engine)
    for test in tests:
        n_prompt, n_gen, depth = test
        found = list(beside(bench.seconds(n_prompt, n_gen, depth, repetitions), bandwidth))
        first = (taken for taken, _ in found) if n_gen == 0 else bench.seconds(max(1, n_prompt), 0, depth, repetitions)
        ttft_s = statistics.median(first)
        peak = max(peak_before, peak_rss_mb() - bandwidth.nbytes / 1e6)  # the tests', not the yardstick's
        yield _measurement(llama, start, test, found, ttft_s, peak)


def _measurement(
    llama: Llama,
    start: Start,
    test: tuple[int, int, int],
    found: list[tuple[float, float]],
    ttft_s: float,
    peak_rss_mb: float,
) -> Measurement:
    """What a test has found: for each repetition its seconds, and the bandwidth beside it."""
    n_prompt, n_gen, depth = test
    n = n_prompt + n_gen
    rates = [n / taken for taken, _ in found]
    median = statistics.median(taken for taken, _ in found)
    weights_read = weight_bytes(llama.engine.weights)
    per_token = weights_read + (depth + n_prompt + n_gen / 2) * llama.engine.cache_bytes_per_position
    read = n_gen * per_token if n_prompt == 0 else 0.0
    outputs = n_gen + (1 if n_prompt else 0)
    return Measurement(
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=depth,
        n_threads=llama.engine.threads,
        avg_ts=statistics.mean(rates),
        stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        median_ts=n / median,
        samples_ts=rates,
        backend=llama.backend,
        kv_dtype=llama.engine.kv_dtype,
        gb_per_s=read / median / 1e9,
        bandwidth_gb_per_s=statistics.median(b for _, b in found) / 1e9,
        share_of_bandwidth=statistics.median(read / taken / b for taken, b in found),
        gflops=operations(llama, outputs, n) / median / 1e9,
        ttft_s=ttft_s,
        peak_rss_mb=peak_rss_mb,
        **asdict(start),
    )
