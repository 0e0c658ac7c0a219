"""Many texts at once, cancelled, failing, set aside and out of time at random: who survives has the text of a lone run.

    python tools/hammer_scheduler.py schedules [N] [BACKEND]     N random schedules of a tiny model, 1,000 if not given
    python tools/hammer_scheduler.py threads [SECONDS] [BACKEND] 16 threads that submit, cancel and time out, 600 s

Exit code 1 for a wrong text or a lost block, 2 for a thread that does not end, 3 for memory that grows.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import npllama
from npllama.config import ModelConfig
from npllama.generation.completion import Completion
from npllama.generation.pool import Pool
from npllama.generation.scheduler import Scheduler
from npllama.inference import DEMO, Llama
from npllama.measure.random_model import write_random_model
from npllama.text.sentencepiece import SentencePieceTokenizer

PROMPTS = 40
CONTEXT = 320
MAX_TOKENS = 20
N_THREADS = 16
MAX_GROWTH = 1.02
HANG_S = 120.0


class Texts:
    """Prompts with options, many of which begin alike, and the tokens that each leads to alone."""

    def __init__(self, llm: Llama, seed: int) -> None:
        rng = random.Random(seed)
        beginnings = [[rng.randrange(3, 260) for _ in range(CONTEXT)] for _ in range(3)]
        self.llm = llm
        self.prompts = []
        for _ in range(PROMPTS):
            n = rng.choice((1, 3, 10, 60, 64, 65, 130, 200, CONTEXT - MAX_TOKENS - 4))
            self.prompts.append(
                [*rng.choice(beginnings)[:n], *(rng.randrange(3, 260) for _ in range(rng.choice((1, 3))))]
            )
        self.options: list[dict[str, Any]] = [
            {"max_tokens": rng.randint(1, MAX_TOKENS), "seed": i, "temperature": rng.choice((0.0, 0.9))}
            | rng.choice(({}, {"repeat_penalty": 1.3}, {"context_policy": "slide"}, {"top_p": 0.5}))
            | rng.choice(({}, {"top_k": 3}))
            for i in range(PROMPTS)
        ]
        self.alone = [llm.generate(p, n=3, **o) for p, o in zip(self.prompts, self.options, strict=True)]

    def is_right(self, i: int, k: int, tokens: list[int]) -> bool:
        return bool(tokens == self.alone[i][k].tokens)

    def begins_right(self, i: int, k: int, tokens: list[int]) -> bool:
        """Of a text that ended early."""
        return bool(tokens == self.alone[i][k].tokens[: len(tokens)])


# ---------------------------------------------------------------- schedules


class Failing:
    """An engine of which some calls fail: those that hold a certain id, or now and then any."""

    def __init__(self, engine: Any, rng: random.Random, how_often: float) -> None:
        self._engine, self._rng, self._how_often = engine, rng, how_often

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, cache: Any, tokens: Any, *others: Any) -> np.ndarray:
        self._fail(tokens)
        found: np.ndarray = self._engine.forward(cache, tokens, *others)
        return found

    def run_steps(self, cache: Any, tokens: Any, *others: Any) -> list[list[int]]:
        self._fail(tokens)
        found: list[list[int]] = self._engine.run_steps(cache, tokens, *others)
        return found

    def _fail(self, tokens: Any) -> None:
        if 299 in tokens or self._rng.random() < self._how_often:
            raise MemoryError("on purpose") if self._rng.random() < 0.5 else npllama.ModelError("on purpose.")


def run_schedule(texts: Texts, seed: int) -> dict[str, int]:
    """One random schedule: how many texts were whole, ended early, failed. Raises AssertionError for what is wrong."""
    rng = random.Random(seed)
    llm, chunk = texts.llm, rng.choice((8, 32, 128))
    full = Scheduler.blocks_of(llm.runtime.window, 0, CONTEXT, chunk)
    pool = Pool(llm.engine, rng.choice((full, full + 1, full + 4, 4 * full)), llm.runtime.identity)
    engine = Failing(llm.engine, rng, rng.choice((0.0, 0.0, 0.02)))
    scheduler = Scheduler(engine, pool, rng.randint(1, 8), chunk)  # type: ignore[arg-type]
    jobs: list[tuple[int, int, Completion]] = []
    for _ in range(rng.randint(1, 12)):
        i, n = rng.randrange(PROMPTS), rng.choice((1, 1, 2, 3))
        prompt = texts.prompts[i] if rng.random() < 0.9 else [*texts.prompts[i][:-1], 299]
        group = completions(llm, prompt, {**texts.options[i], "n": n}, streamed=rng.random() < 0.3)
        jobs += [(i, k, job) for k, job in enumerate(group)]
    to_come = [job for _, k, job in jobs if k == 0]
    while not all(job.done for _, _, job in jobs):
        if to_come and rng.random() < 0.3:
            scheduler.add(to_come.pop())
        if rng.random() < 0.04:
            scheduler.cancel(rng.choice(jobs)[2])
        if rng.random() < 0.5:
            rng.choice(jobs)[2].pieces.clear()  # somebody has read them
        with scheduler._driving:
            scheduler.step()
            pool.check()
    assert_whole(scheduler)
    return count(texts, jobs)


def completions(llm: Llama, prompt: list[int], options: dict[str, Any], streamed: bool) -> list[Completion]:
    """The completions of one prompt, as generate makes them, not begun."""
    made: list[list[Completion]] = []

    def note(groups: Any) -> None:
        made.extend(groups)
        raise InterruptedError

    run, llm.runtime.run = llm.runtime.run, note  # type: ignore[method-assign]
    try:
        llm.generate(prompt, **options)
    except InterruptedError:
        pass
    finally:
        llm.runtime.run = run  # type: ignore[method-assign]
    for job in made[0]:
        job.streamed = streamed
    return made[0]


def assert_whole(scheduler: Scheduler) -> None:
    """Raise AssertionError unless every block is in the pool."""
    with scheduler._driving:
        scheduler._sweep()
        scheduler.pool.check()
        if scheduler.pool.available != scheduler.pool.capacity:
            raise AssertionError(f"{scheduler.pool.capacity - scheduler.pool.available} blocks are lost")


def count(texts: Texts, jobs: list[tuple[int, int, Completion]]) -> dict[str, int]:
    """What became of the texts; AssertionError for a wrong one."""
    counts = {"whole": 0, "early": 0, "failed": 0}
    for i, k, job in jobs:
        result = job.result
        early = result.finish_reason in ("cancelled", "time") or job.error is not None
        right = texts.begins_right if early else texts.is_right
        if not right(i, k, result.tokens):
            raise AssertionError(f"prompt {i}, completion {k}: {result.tokens}, not {texts.alone[i][k].tokens}")
        counts["failed" if job.error is not None else "early" if early else "whole"] += 1
    return counts


def schedules(texts: Texts, n: int) -> int:
    total: dict[str, int] = {}
    for seed in range(n):
        try:
            found = run_schedule(texts, seed)
        except AssertionError as error:
            print(f"schedule {seed}: {error}")
            return 1
        total = {name: total.get(name, 0) + found[name] for name in found}
    print(f"{n} schedules: {total}; no block lost, no wrong text")
    return 0


# ---------------------------------------------------------------- threads


class Worker:
    """Submits texts, and cancels them, stops waiting, drops them, streams them or lets them end, at random."""

    def __init__(self, texts: Texts, seed: int, stop: Callable[[], bool]) -> None:
        self.wrong: list[str] = []
        self.counts = {"whole": 0, "early": 0}
        self._texts, self._rng, self._stop = texts, random.Random(seed), stop
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            while not self._stop():
                self._once()
        except BaseException as error:
            self.wrong.append(repr(error))
            raise

    def _once(self) -> None:
        rng, llm = self._rng, self._texts.llm
        i = rng.randrange(PROMPTS)
        prompt, options = self._texts.prompts[i], dict(self._texts.options[i])
        way = rng.randrange(7)
        if way == 0:
            self._note(i, llm.generate(prompt, **options))
            return
        if way == 1:
            stream = llm.stream(prompt, **options)
            for _ in range(rng.randint(0, 5)):
                next(stream, None)
            stream.close()
            self._note(i, stream.result, early=True)
            return
        if way == 2:
            options["max_time_s"] = rng.uniform(0.001, 0.5)
        handle = llm.submit(prompt, **options)
        if way == 3:
            handle.cancel()
        if way == 4:
            for _ in zip(range(3), handle, strict=False):
                pass
            handle.cancel()
        if way == 5:
            try:
                handle.result(rng.uniform(0, 0.1))
            except TimeoutError:
                handle.cancel()
        self._note(i, handle.result(HANG_S))

    def _note(self, i: int, result: Any, early: bool = False) -> None:
        early = early or result.finish_reason in ("cancelled", "time")
        right = self._texts.begins_right if early else self._texts.is_right
        self.counts["early" if early else "whole"] += 1
        if not right(i, 0, result.tokens):
            self.wrong.append(f"prompt {i}: {result.tokens}, not {self._texts.alone[i][0].tokens}")


def resident_mb() -> float:
    """Memory of this process that is in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def hammer_threads(texts: Texts, seconds: float, n_threads: int = N_THREADS) -> int:
    """Exit code of so many seconds of threads."""
    end = time.monotonic() + seconds
    workers = [Worker(texts, seed, lambda: time.monotonic() >= end) for seed in range(n_threads)]
    for worker in workers:
        worker.thread.start()
    at_first, most = 0.0, 0.0
    course: list[float] = []
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 10))
        if end - time.monotonic() > seconds - min(60.0, seconds / 2):
            at_first = max(at_first, resident_mb())
        course.append(resident_mb())
        most = max(most, course[-1])
    for worker in workers:
        worker.thread.join(HANG_S)
    wrong = [text for worker in workers for text in worker.wrong]
    counts = {name: sum(worker.counts[name] for worker in workers) for name in ("whole", "early")}
    print(f"{n_threads} threads, {seconds:.0f} s: {counts}; wrong: {len(wrong)} {wrong[:3]}")
    print("memory, MB: " + " ".join(f"{mb:.1f}" for mb in course[:: max(1, len(course) // 20)]))
    print(f"memory after the first minute {at_first:.1f} MB, at most {most:.1f} MB: {most / at_first:.4f}")
    if any(worker.thread.is_alive() for worker in workers):
        faulthandler.dump_traceback(all_threads=True)
        return 2
    assert_whole(texts.llm.runtime.scheduler)
    return 1 if wrong else 3 if most > MAX_GROWTH * at_first else 0


def open_tiny(folder: Path, backend: str, context: int = CONTEXT) -> Llama:
    """A tiny random model in q8, whose texts are equal to the bit where it is compiled, with the demo's tokenizer."""
    tokenizer = DEMO / "tokenizer.model"
    n_ids = SentencePieceTokenizer(tokenizer).n_pieces
    sizes = {"dim": 24, "n_layers": 1, "n_heads": 6, "n_kv_heads": 2, "head_dim": 4, "hidden_dim": 44}
    config = ModelConfig(**sizes, vocab_size=n_ids, norm_eps=1e-5, rope_theta=1e4, max_seq_len=context)
    write_random_model(folder, config, "q8", tokenizer)
    return npllama.load(folder, backend)


def main() -> int:
    what, amount, backend = [*sys.argv[1:], *(None,) * 3][:3]
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder, open_tiny(Path(folder) / "model", backend or "numpy") as llm:
        texts = Texts(llm, 0)
        if what == "schedules":
            return schedules(texts, int(amount or 1000))
        return hammer_threads(texts, float(amount or 600))


if __name__ == "__main__":
    sys.exit(main())
