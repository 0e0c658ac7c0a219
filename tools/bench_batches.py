"""Many texts at once, measured: rates, Python's share, stalls by prompts, prefixes, guesses.

    python tools/bench_batches.py MODEL [--tests rows,rates,share,stall,prefix,guesses,peer] [--texts 1,8,32]
                                        [-n 64] [-r 3] [--gguf FILE]

MODEL: a model directory, for example of random weights (npllama.measure.random_model); FILE: of the same shape, for
llama.cpp (tools/bench_peers.py makes both). Whatever is compared is measured
in turn in the same run, so that what else the machine does hurts both; medians are printed. Each test is a function
here, and says what it measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import npllama  # noqa: E402
from npllama import cache as kv  # noqa: E402
from npllama.cache import BLOCK_SLOTS, n_blocks  # noqa: E402
from npllama.generation.completion import Completion  # noqa: E402
from npllama.generation.jobs import Job  # noqa: E402
from npllama.inference import Llama  # noqa: E402
from npllama.options import BASIC  # noqa: E402
from npllama.system.machine import default_threads  # noqa: E402

CONTEXT = 3072
REST_S = 0.1
"""Threads of the program before still spin for a while."""


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tests", default="rows,rates,share,stall,prefix,guesses")
    parser.add_argument("--texts", default="1,8,32", help="how many at once, for rates")
    parser.add_argument("-n", type=int, default=64, help="ids of each text")
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--gguf", help="a file of the same shape for llama.cpp: adds the test peer")
    parser.add_argument("--serve-llama-cpp", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_llama_cpp:
        serve_llama_cpp(Path(args.model), args.serve_llama_cpp, args.n)
        return
    args.texts = [int(n) for n in args.texts.split(",")]
    with npllama.load(args.model, "numba", context=CONTEXT, parallel=max(args.texts), speculation=False) as llm:
        for name in args.tests.split(","):
            TESTS[name](llm, args)


def random_ids(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 32000, n).tolist()
    return ids


def in_turn(rounds: int, *measure: Callable[[], float]) -> list[list[float]]:
    """What functions give, called in turn after a first round that warms up: a list for each."""
    found = [[one() for one in measure] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*found[1:], strict=True)]


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """The median and the spread of a over b, pair by pair."""
    each = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})"


def rows(llm: Llama, args: argparse.Namespace) -> None:
    """Calls of 1, 2, 4 and 8 rows of as many sequences at depth 64, with the logits of all: cost over one row's."""
    counts, depth = (1, 2, 4, 8), 64
    cache, ids = llm.engine.new_cache(max(counts), depth + 1), random_ids(depth)
    for sequence in range(max(counts)):
        llm.engine.forward(cache, ids, range(depth), [sequence] * depth, [depth - 1])

    def call(n: int) -> float:
        started = time.perf_counter()
        for _ in range(5):
            llm.engine.forward(cache, ids[:n], [depth] * n, range(n), range(n))
        return (time.perf_counter() - started) / 5

    one, *more = in_turn(5 * args.rounds, *(lambda n=n: call(n) for n in counts))  # type: ignore[misc]
    said = ", ".join(f"{n} rows {ratio(each, one)}" for n, each in zip(counts[1:], more, strict=True))
    print(f"one row {1e3 * statistics.median(one):.2f} ms; {said}", flush=True)


def rates(llm: Llama, args: argparse.Namespace) -> None:
    """Ids per second of generate([...]), beside bare calls of the engine of as many rows, with the logits of all.

    Both use memory that was touched before: on some virtual machines the first touch costs as much as a token.
    """
    pool = llm.runtime.scheduler.pool
    blocks = (args.rounds + 1) * sum(args.texts) * (n_blocks(8 + args.n) + 1)
    for array in kv.arrays(pool.cache):
        array[:, :, : min(blocks, pool.capacity) * BLOCK_SLOTS] = 0
    for n_texts in args.texts:
        prompts = [random_ids(8, seed) for seed in range(n_texts)]

        def served(prompts: list[list[int]] = prompts) -> float:
            started = time.perf_counter()
            found = llm.generate(prompts, args.n)
            return sum(len(r.tokens) for r in found) / (time.perf_counter() - started)

        def bare(n_texts: int = n_texts, prompts: list[list[int]] = prompts) -> float:
            cache = llm.engine.new_cache(n_texts, 8 + args.n)
            rows = range(n_texts)
            ids = [i for prompt in prompts for i in prompt]
            each = [n for n in rows for _ in range(8)]
            started = time.perf_counter()
            llm.engine.forward(cache, ids, [*range(8)] * n_texts, each, range(7, 8 * n_texts, 8))
            for p in range(8, 8 + args.n - 1):
                llm.engine.forward(cache, ids[:n_texts], [p] * n_texts, rows, rows)
            return n_texts * args.n / (time.perf_counter() - started)

        a, b = in_turn(args.rounds, served, bare)
        print(f"{n_texts:3} texts: {statistics.median(a):8.1f} ids/s, of bare calls {ratio(a, b)}", flush=True)


def peer(llm: Llama, args: argparse.Namespace) -> None:
    """Ids per second of generate([...]), beside llama.cpp decoding batches of as many, without sampling."""
    for n_texts in args.texts:
        prompts = [random_ids(8, seed) for seed in range(n_texts)]
        command = [sys.executable, __file__, args.gguf, "--serve-llama-cpp", str(n_texts), "-n", str(args.n)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            ask, answers = child.stdin, child.stdout
            assert ask is not None
            assert answers is not None

            def served(prompts: list[list[int]] = prompts) -> float:
                time.sleep(REST_S)
                started = time.perf_counter()
                found = llm.generate(prompts, args.n, ignore_eos=True)
                return sum(len(r.tokens) for r in found) / (time.perf_counter() - started)

            def theirs(ask: IO[str] = ask, answers: IO[str] = answers) -> float:
                time.sleep(REST_S)
                ask.write("\n")
                ask.flush()
                return float(answers.readline())

            a, b = in_turn(args.rounds, served, theirs)
            ask.close()
        ours, other = statistics.median(a), statistics.median(b)
        print(f"{n_texts:3} texts: {ours:8.1f} ids/s, llama.cpp {other:8.1f}: {ratio(a, b)}", flush=True)


def serve_llama_cpp(path: Path, n_texts: int, n: int) -> None:
    """The child's side: for each line that comes, the rate of so many sequences of 8 ids and n more."""
    import llama_cpp
    from bench_peers import silence_llama_cpp

    silence_llama_cpp()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = n_texts * (8 + n), n_texts, max(512, 8 * n_texts)
    params.n_threads = params.n_threads_batch = default_threads()[0]
    state = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(8 * n_texts, 0, 1)

    def decode(positions: Sequence[int]) -> None:
        rows = [(p, s) for s in range(n_texts) for p in positions]
        for i, (p, s) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = 3 + (7 * p + s) % 30000, p, 1, s
            batch.logits[i] = p == positions[-1]
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(state, batch):
            sys.exit("llama.cpp could not decode")
        llama_cpp.llama_get_logits(state)

    for _ in sys.stdin:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
        started = time.perf_counter()
        decode(range(8))
        for p in range(8, 8 + n - 1):
            decode([p])
        print(n_texts * n / (time.perf_counter() - started), flush=True)


def share(llm: Llama, args: argparse.Namespace) -> None:
    """Python's share of a step with 8 texts: its time less that of the compiled calls in it. The median step's."""
    compiled = llm.engine.compiled
    assert compiled is not None
    inside = [0.0]

    def timed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(*arguments: object) -> np.ndarray:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                inside[0] += time.perf_counter() - started

        return call

    compiled.function, steps = timed(compiled.function), compiled._make_steps()
    if steps is not None:
        timed_steps = timed(steps)
        compiled._make_steps = lambda: timed_steps
    search = timed(compiled._make_top_k())
    compiled._make_top_k = lambda: search
    scheduler = llm.runtime.scheduler
    jobs = begin(llm, [random_ids(8, seed) for seed in range(8)], 8 * args.n)
    found: list[tuple[float, float]] = []
    while sum(job.n_written for job in jobs) < 48 * args.n:
        inside[0], started, before = 0.0, time.perf_counter(), jobs[0].n_written
        scheduler.step()
        n_steps = max(1, jobs[0].n_written - before)
        found.append(((time.perf_counter() - started) / n_steps, inside[0] / n_steps))
    end(llm, jobs)
    whole = statistics.median(whole for whole, _ in found[2:])
    python = statistics.median(whole - calls for whole, calls in found[2:])
    print(f"a step of 8 texts: {1e6 * whole:.0f} us, {1e6 * python:.0f} us of it Python's: {python / whole:.3f}")


def begin(llm: Llama, prompts: Iterable[list[int]], n: int, **options: object) -> list[Completion]:
    """Completions under way, which somebody has to drive."""
    jobs = [one_completion(llm, prompt, n, i) for i, prompt in enumerate(prompts)]
    for job in jobs:
        llm.runtime.scheduler.add(job)
    return jobs


def one_completion(
    llm: Llama, prompt: list[int], n: int, index: int = 0, kind: type[Completion] = Completion
) -> Completion:
    """A completion as generate makes it."""
    request = npllama.generation.requests.new_request(
        *(n, dict.fromkeys(BASIC), ("default", None), 1, None, False, None, None, False)
    )
    job = kind(llm._model, prompt, request, n, llm.runtime.window, 0, index)
    job._sampler.ends.clear()
    job.begin()
    return job


def end(llm: Llama, jobs: Iterable[Job]) -> None:
    for job in jobs:
        llm.runtime.scheduler.cancel(job)


def stall(llm: Llama, args: argparse.Namespace) -> None:
    """What a prompt of 512 ids does to 7 texts that are written: their steps, and its first id beside it alone."""
    scheduler, prompt_ids = llm.runtime.scheduler, 512
    alone, beside, slower, base = [], [], [], []
    for seed in range(args.rounds + 1):
        (job,) = begin(llm, [random_ids(prompt_ids, 1000 + seed)], 1)
        started = time.perf_counter()
        scheduler.drive(job, lambda job=job: job.done)  # type: ignore[misc]
        alone.append(time.perf_counter() - started)
        writers = begin(llm, [random_ids(8, 8 * seed + i) for i in range(7)], 2000)
        steps = [step_s(llm) for _ in range(25)][5:]
        (job,) = begin(llm, [random_ids(prompt_ids, 2000 + seed)], 1)
        started, with_prompt = time.perf_counter(), []
        while not job.done:
            with_prompt.append(step_s(llm))
        beside.append(time.perf_counter() - started)
        end(llm, writers)
        base.append(statistics.median(steps))
        slower.append(float(np.percentile(with_prompt, 95)))
    print(
        f"a step of 7 texts {1e3 * statistics.median(base[1:]):.1f} ms; while a prompt of {prompt_ids} is read, the "
        f"95th percentile {1e3 * statistics.median(slower[1:]):.1f} ms: {ratio(slower[1:], base[1:])}; first id after "
        f"{statistics.median(beside[1:]):.3f} s, alone {statistics.median(alone[1:]):.3f} s: "
        f"{ratio(beside[1:], alone[1:])}",
        flush=True,
    )


def step_s(llm: Llama) -> float:
    started = time.perf_counter()
    llm.runtime.scheduler.step()
    return time.perf_counter() - started


def prefix(llm: Llama, args: argparse.Namespace) -> None:
    """Seconds to the first id of 2,048 ids that were seen and 8 that were not; what 8 completions of 1,000 ids feed."""
    first, second = [], []
    for seed in range(args.rounds):
        ids = random_ids(2048, 100 + seed)
        for found, prompt in ((first, ids), (second, [*ids, *random_ids(8, seed)])):
            started = time.perf_counter()
            llm.generate(prompt, 1)
            found.append(time.perf_counter() - started)
    print(f"first id of 2,048: {statistics.median(first):.3f} s, of the same and 8 more {ratio(second, first)}")
    fed = [0]
    forward = llm.engine.forward

    def counted(cache: object, tokens: Sequence[int], *rest: object) -> np.ndarray:
        fed[0] += len(tokens)
        return forward(cache, tokens, *rest)  # type: ignore[arg-type]

    llm.engine.forward = counted  # type: ignore[assignment,method-assign]
    llm.generate(random_ids(1000, 999), 4, n=8)
    llm.engine.forward = forward  # type: ignore[method-assign]
    print(f"8 completions of 4 ids after 1,000: {fed[0]} ids were fed", flush=True)


class Scripted(Completion):
    """A completion whose ids are known before: everything is computed, and these come."""

    script: Sequence[int] = ()

    def take(self, ids: Iterable[int | None]) -> None:
        n = self.n_written
        super().take(self.script[n : n + len(list(ids))])

    def ahead(self, most: int) -> None:
        """Each id comes from the script: none is fed that was drawn."""


def guesses(llm: Llama, args: argparse.Namespace) -> None:
    """What guesses gain in a text of which 80 % repeats its prompt, beside perfect ones; and in ordinary text."""
    prompt, n = random_ids(400), 4 * args.n
    rng, script = np.random.default_rng(5), list[int]()
    while len(script) < n:
        n_copied = int(rng.integers(24, 72))
        start = int(rng.integers(0, len(prompt) - n_copied))
        script += [*prompt[start : start + n_copied], *rng.integers(3, 32000, n_copied // 4).tolist()]
    words = llm.tokenizer.encode((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), False, False)
    for name, before, text in (("80 % repeats", prompt, script[:n]), ("prose", words[:50], words[50 : 50 + 2 * n])):
        with_s, without_s = in_turn(
            args.rounds,
            lambda b=before, t=text: scripted_s(llm, b, t, True),
            lambda b=before, t=text: scripted_s(llm, b, t, False),
        )
        print(f"{name}: {ratio(without_s, with_s)} times as fast with guesses")
    seconds = llm.runtime.scheduler._pace.seconds
    costs = row_costs(llm, 16, args.rounds)
    best = max(range(16), key=lambda k: 1 / (0.2 + 0.8 * costs[k] / (1 + k)))
    print("cost of rows over one: " + " ".join(f"{k}:{c:.2f}" for k, c in enumerate(costs, 1)))
    print("as the scheduler sees it: " + " ".join(f"{k}:{seconds(k) / seconds(1):.2f}" for k in range(1, 17)))
    print(
        f"perfect guesses of the 80 %: {1 / (0.2 + 0.8 * costs[best] / (1 + best)):.2f}, {best} at a time", flush=True
    )


def scripted_s(llm: Llama, prompt: list[int], script: list[int], speculation: bool) -> float:
    """Seconds for writing a script after a prompt that was read before."""
    model = llm._model
    llm._model = dataclasses.replace(model, speculation=speculation)
    job = one_completion(llm, prompt, len(script), kind=Scripted)
    llm._model = model
    assert isinstance(job, Scripted)
    job.script = script
    scheduler = llm.runtime.scheduler
    scheduler.add(job)
    scheduler.drive(job, lambda: job.n_written > 0)
    started = time.perf_counter()
    scheduler.drive(job, lambda: job.done)
    return time.perf_counter() - started


def row_costs(llm: Llama, most: int, rounds: int) -> list[float]:
    """What calls of 1, 2, ... rows of one text cost beside one row's, with the logits of all, after 400 ids."""
    cache, ids = llm.engine.new_cache(1, 512), random_ids(400)
    llm.engine.forward(cache, ids, range(400), [0] * 400, [399])

    def call(k: int) -> float:
        started = time.perf_counter()
        llm.engine.forward(cache, ids[:k], range(400, 400 + k), [0] * k, range(k))
        return time.perf_counter() - started

    each = in_turn(5 * rounds, *(lambda k=k: call(k) for k in range(1, most + 1)))  # type: ignore[misc]
    return [statistics.median(some) / statistics.median(each[0]) for some in each]


TESTS = {
    "rows": rows,
    "rates": rates,
    "share": share,
    "stall": stall,
    "prefix": prefix,
    "guesses": guesses,
    "peer": peer,
}

if __name__ == "__main__":
    main()
