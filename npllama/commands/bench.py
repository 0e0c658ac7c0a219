"""Measure prompt and generation speed, as llama-bench does, beside the memory bandwidth of the same run."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npllama.commands.info import matrix_formats
from npllama.commands.terminal import (
    Notes,
    ProgressLine,
    add_backend,
    add_dtype,
    add_kv_dtype,
    add_model,
    load_model,
    model_of,
    number_formats,
    put,
    say,
    whole,
)
from npllama.errors import UsageError

if TYPE_CHECKING:
    from npllama.inference import Llama
    from npllama.measure.bench import Measurement

NAME = "bench"
SUMMARY = "measure prompt and generation speed"


def numbers(least: int) -> Any:
    """A type of argument: whole numbers separated by commas."""
    one = whole(least, 2**31)

    def parse(text: str) -> list[int]:
        return [one(part) for part in text.split(",")]

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama bench`."""
    add_model(parser, "a model directory or a checkpoint (default: the demo model)")
    add = parser.add_argument
    add("--shape", choices=("15m", "110m", "1b", "7b"), help="instead of a model: this shape with random weights")
    add_dtype(parser, number_formats, " for --shape: %(choices)s (default f32)")
    add(
        "-p", "--n-prompt", metavar="N,...", type=numbers(0), default=[512], help="prompt tokens (default 512; 0: none)"
    )
    add(
        "-n", "--n-gen", metavar="N,...", type=numbers(0), default=[128], help="generated tokens (default 128; 0: none)"
    )
    add("-d", "--n-depth", metavar="N,...", type=numbers(0), default=[0], help="tokens in the cache before (default 0)")
    add("-r", "--repetitions", metavar="N", type=whole(1, 10_000), default=5, help="repetitions (default 5)")
    add("-t", "--threads", metavar="N,...", type=numbers(1), help="threads (default: see npllama info)")
    add("-c", "--ctx-size", metavar="N", type=whole(1, 2**31), help="context in tokens (default: what the tests need)")
    add_kv_dtype(parser)
    add_backend(parser)
    add("--profile", action="store_true", help="also show the time of each step, one kernel at a time")
    add("--json", action="store_true", help="print a JSON list of measurements")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Open or make the model, run every test for every number of threads, print a table or JSON."""
    model = model_of(args)
    if args.shape is not None and model is not None:
        raise UsageError("a model and --shape were given; one of them is needed.")
    if args.json and args.profile:
        raise UsageError("--profile prints tables, which are no JSON; leave out --json or --profile.")
    if args.shape is None and args.dtype is not None:
        raise UsageError("--dtype goes with --shape; a model has its own number formats.")
    if args.shape is None:
        return _measure(args, notes, model, None)
    with tempfile.TemporaryDirectory(prefix="npllama-bench-") as folder:
        out = Path(folder) / f"{args.shape}-{args.dtype or 'f32'}"
        _make(out, args.shape, args.dtype or "f32")
        return _measure(args, notes, str(out), args.shape)


def _make(out: Path, shape: str, dtype: str) -> None:
    from npllama.inference import DEMO
    from npllama.measure.random_model import shape_config, write_random_model

    say(f"writing random weights of the {shape} shape as {dtype} ...")
    with ProgressLine("writing") as progress:
        write_random_model(out, shape_config(shape), dtype, DEMO / "tokenizer.model", progress)


def _measure(args: argparse.Namespace, notes: Notes, model: str | None, shape: str | None) -> int:
    found: list[Measurement] = []
    for threads in args.threads or [None]:
        found += _measure_with(args, notes, model, shape, threads)
        notes.show()
    if args.json:
        put(json.dumps([one.to_json() for one in found]) + "\n")
    return 0


def _measure_with(
    args: argparse.Namespace, notes: Notes, model: str | None, shape: str | None, threads: int | None
) -> list[Measurement]:
    started = time.perf_counter()
    from npllama.measure.bench import Start, measure
    from npllama.system.machine import peak_rss_mb

    import_s = time.perf_counter() - started
    tests = [(p, 0, d) for d in args.n_depth for p in args.n_prompt if p]
    tests += [(0, n, d) for d in args.n_depth for n in args.n_gen if n]
    if not tests:
        raise UsageError("nothing to measure: -p and -n are both 0.")
    context = args.ctx_size or max(p + n + d for p, n, d in tests)
    started = time.perf_counter()
    options = {"backend": args.backend, "threads": threads, "context": context, "kv_dtype": args.kv_dtype}
    with load_model(notes, model, **options) as llama:
        notes.show()
        load_s = time.perf_counter() - started - llama.engine.import_s - llama.engine.compile_s
        start = Start(
            import_s=import_s + llama.engine.import_s,
            compile_s=llama.engine.compile_s,
            load_s=load_s,
            shape=shape or _shape_of(llama),
            dtype="+".join(matrix_formats(llama.manifest)),
        )
        found: list[Measurement] = []
        for one in measure(llama, start, tests, args.repetitions, peak_rss_mb):
            if not args.json:
                put(_row(one, heading=not found))
            found.append(one)
        if not args.json:
            put(_footer(found[-1]))
        if args.profile:
            put(_profile(llama))
    return found


def _shape_of(llama: Llama) -> str:
    c = llama.config
    return f"D{c.dim} L{c.n_layers} H{c.n_heads} G{c.n_kv_heads} F{c.hidden_dim} V{c.vocab_size}"


def _row(one: Measurement, heading: bool) -> str:
    name = f"pp{one.n_prompt}" if one.n_prompt else f"tg{one.n_gen}"
    name += f" @ d{one.n_depth}" if one.n_depth else ""
    text = ""
    if heading:
        text += f"{one.shape}, {one.dtype}, {one.backend}, {one.n_threads} threads, cache {one.kv_dtype}\n"
        text += f"{'test':<14} {'tokens/s':>10} {'median':>10} {'spread':>8} {'GB/s':>7} {'of bandwidth':>13} "
        text += f"{'GFLOP/s':>9}\n"
    share = f"{100 * one.share_of_bandwidth:.0f} %" if one.n_gen else ""
    speed = f"{one.gb_per_s:.1f}" if one.n_gen else ""
    return text + (
        f"{name:<14} {one.avg_ts:>10.2f} {one.median_ts:>10.2f} {one.stddev_ts:>8.2f} {speed:>7} {share:>13} "
        f"{one.gflops:>9.1f}\n"
    )


def _footer(one: Measurement) -> str:
    return (
        f"read bandwidth {one.bandwidth_gb_per_s:.1f} GB/s · import {one.import_s:.2f} s · load {one.load_s:.2f} s · "
        f"compiled code {one.compile_s:.2f} s · first token after {one.ttft_s:.3f} s · "
        f"peak memory {one.peak_rss_mb:,.0f} MB\n"
    )


def _profile(llama: Llama) -> str:
    from npllama.measure.bench import profile

    text = ""
    for n_tokens in (1, 64):
        steps, whole_s = profile(llama, n_tokens)
        total = sum(seconds for _, seconds in steps)
        text += f"{n_tokens} tokens in one call: {1e3 * whole_s:.3f} ms whole; step by step, in ms\n"
        for name, seconds in steps:
            text += f"  {name:<14} {1e3 * seconds:>9.3f} {100 * seconds / whole_s:>6.1f} %\n"
        text += f"  {'gap':<14} {1e3 * (whole_s - total):>9.3f} {100 * (1 - total / whole_s):>6.1f} %\n"
    return text
