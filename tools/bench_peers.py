"""The same shapes and number formats in npllama, llama.cpp and torch, in turn in one run; prints ratios.

    pip install llama-cpp-python gguf torch
    python tools/bench_peers.py [--shapes 15m,110m,1b] [--formats q4,q8,f16,f32] [--prompts 128,512] [-n 32] [-r 5]
                                [--kv-dtype f32|f16] [--json FILE] [--readme README.md]
                                [--ik-llama-bench PROGRAM] [--features avx2 --llama-cpp FOLDER]
                                [--scratch FOLDER]

Each program runs in a process of its own, because settings of OpenMP and of BLAS are per process, and all of them stay
open while they are measured in turn: what else the machine does then hurts all of them. Random weights; q4 stands
against Q4_0 and q8 against Q8_0 as llama.cpp's own quantizer makes them; torch takes part in f32 and bf16. Ratios are
npllama's rate over the other's, of each round; their median and spread are printed. --readme writes the table into a
README, and draws its chart (speed_chart.py).

--ik-llama-bench adds ik_llama.cpp: PROGRAM is its llama-bench, which repacks weights (-rtr 1) and is started anew for
each measurement. --features avx2 keeps all programs to AVX2, FMA and F16C; FOLDER is then a llama-cpp-python that was
built so, which is checked:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" pip install \\
        --no-binary llama-cpp-python --no-deps --target FOLDER llama-cpp-python
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

from gguf_files import quantize_with_llama_cpp, write_for_ids  # noqa: E402
from markers import write_between  # noqa: E402
from peer_processes import Child, IkLlamaBench, Program, refuse_more_features  # noqa: E402
from speed_chart import CHART, chart, test_of  # noqa: E402

from npllama.config import ModelConfig  # noqa: E402
from npllama.inference import DEMO  # noqa: E402
from npllama.measure.random_model import RandomCheckpoint, shape_config, write_random_model  # noqa: E402

LLAMA_CPP = {"f32": "F32", "f16": "F16", "q8": "Q8_0", "q4": "Q4_0"}
TORCH = {"f32": "f32", "bf16": "bf16"}
REST_S, MIN_S = 0.1, 0.4
"""Seconds of rest before a measurement, and how long it lasts at least: a short test is repeated."""

KV_TYPES = {"f32": 0, "f16": 1}  # llama.cpp's numbers of the cache's formats; its own default is f16, npllama's f32
MARKERS = ("<!-- speed: begin -->", "<!-- speed: end -->")
MARKERS_OF = {"": MARKERS, "avx2": ("<!-- speed-avx2: begin -->", "<!-- speed-avx2: end -->")}
"""Where the table stands, by the features that programs are kept to."""

Step = Callable[[int, int], None]
"""Feeds n tokens that begin at a position, and waits for the logits of the last."""
Served = tuple[Step, Step, Callable[[int], None]]
"""How a program reads n tokens from a position on, generates n there, and forgets all but the first ones."""


def main() -> None:
    """Measure what the arguments ask for, print the table, write JSON, README and its chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="15m,110m,1b")
    parser.add_argument("--formats", default="q4,q8,f16,f32")
    parser.add_argument("--prompts", default="128,512")
    parser.add_argument("-n", "--n-gen", type=int, default=32)
    parser.add_argument("-d", "--depths", default="0", help="depths for the generation tests")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--kv-dtype", choices=KV_TYPES, help="of all programs' caches (default: each program's own)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--peers", default="llama.cpp,torch")
    parser.add_argument("--ik-llama-bench", type=Path, metavar="PROGRAM", help="ik_llama.cpp's llama-bench")
    parser.add_argument("--features", choices=["avx2"], default="", help="keep all programs to these")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="a llama-cpp-python kept to --features")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "npllama-peers")
    parser.add_argument(
        "--serve", nargs=5, metavar=("PROGRAM", "MODEL", "THREADS", "CONTEXT", "KV"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], Path(args.serve[1]), int(args.serve[2]), int(args.serve[3]), args.serve[4])
        return
    check(args)
    report = {"about": about(args), "results": list(results(args))}
    text = table(report)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.readme:
        write_between(MARKERS_OF[args.features], args.readme, text)
        if not args.features:
            CHART.write_text(chart(report), encoding="utf-8")


def check(args: argparse.Namespace) -> None:
    """End with one line where the arguments cannot be honoured."""
    if args.features and "llama.cpp" in args.peers.split(",") and not args.llama_cpp:
        sys.exit(f"--features {args.features}: llama.cpp chooses when it is built; give such a build by --llama-cpp.")
    if args.ik_llama_bench and not args.ik_llama_bench.is_file():
        sys.exit(f"--ik-llama-bench {args.ik_llama_bench}: no such program; build the target llama-bench and name it.")
    if args.ik_llama_bench and args.depths != "0":
        sys.exit("--ik-llama-bench: its llama-bench generates at depth 0 only; leave --depths out.")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    packages = ("numpy", "numba", "llama-cpp-python", "torch")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": args.threads,
        "repetitions": args.repetitions,
        "kv_dtype": args.kv_dtype or "each program's own",
        **({"features": args.features} if args.features else {}),
        "versions": {name: version(name) for name in packages},
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One entry for each shape, format and test: rates of every program, ratios against each peer."""
    prompts = [int(p) for p in args.prompts.split(",") if int(p)]
    depths = [int(d) for d in args.depths.split(",")]
    tests = [(p, 0, 0) for p in prompts] + [(0, args.n_gen, d) for d in depths if args.n_gen]
    context = max(sum(test) for test in tests) + 8
    args.scratch.mkdir(parents=True, exist_ok=True)
    for shape in args.shapes.split(","):
        for number_format in args.formats.split(","):
            programs: dict[str, Program] = {
                name: Child(name, path, args.threads, context, args.kv_dtype or "", args.features, args.llama_cpp)
                for name, path in models(shape, number_format, args.peers.split(","), args.scratch)
            }
            if args.ik_llama_bench and number_format in LLAMA_CPP:
                gguf = gguf_file(shape, number_format, args.scratch)
                programs["ik_llama.cpp"] = IkLlamaBench(args.ik_llama_bench, gguf, args.threads, args.kv_dtype)
            try:
                for test in tests:
                    yield measured(shape, number_format, test, programs, args.repetitions)
            finally:
                for child in programs.values():
                    child.close()


def measured(
    shape: str, number_format: str, test: tuple[int, int, int], programs: dict[str, Program], repetitions: int
) -> dict[str, Any]:
    """Rates of one test in every program, measured in turn."""
    n_prompt, n_gen, depth = test
    rates: dict[str, list[float]] = {name: [] for name in programs}
    for repetition in range(-1, repetitions):
        for name, child in programs.items():
            seconds = child.measure(*test)
            if repetition >= 0:
                rates[name].append((n_prompt + n_gen) / seconds)
    entry: dict[str, Any] = {
        "shape": shape,
        "format": number_format,
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": depth,
        "tokens_per_second": {name: round(statistics.median(found), 2) for name, found in rates.items()},
        "ratio": {},
        "ratio_spread": {},
    }
    for name in programs:
        if name != "npllama":
            ratios = [mine / other for mine, other in zip(rates["npllama"], rates[name], strict=True)]
            entry["ratio"][name] = round(statistics.median(ratios), 3)
            entry["ratio_spread"][name] = [round(min(ratios), 3), round(max(ratios), 3)]
    print(json.dumps(entry), file=sys.stderr, flush=True)
    return entry


# Models: the same random weights for each program, made once and kept in the scratch folder.


def models(shape: str, number_format: str, peers: list[str], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Program -> the file or folder with its weights."""
    mine = scratch / f"{shape}-{number_format}"
    if not mine.exists():
        write_random_model(mine, shape_config(shape), number_format, DEMO / "tokenizer.model")
    yield "npllama", mine
    if "llama.cpp" in peers and number_format in LLAMA_CPP:
        yield "llama.cpp", gguf_file(shape, number_format, scratch)
    if "torch" in peers and number_format in TORCH:
        yield "torch", mine


def gguf_file(shape: str, number_format: str, scratch: Path) -> Path:
    """The GGUF file of a shape in a format; quantized ones are made by llama.cpp from the float32 file."""
    path = scratch / f"{shape}-{LLAMA_CPP[number_format]}.gguf"
    if path.exists():
        return path
    if number_format not in ("q8", "q4"):
        config = shape_config(shape)
        drawn = RandomCheckpoint(config).tensors
        tensors = ((name, stored(tensor.rows(0, tensor.shape[0]), number_format)) for name, tensor in drawn.items())
        write_for_ids(path, config, tensors)
        return path
    quantize_with_llama_cpp(gguf_file(shape, "f32", scratch), path, LLAMA_CPP[number_format])
    return path


def stored(rows: np.ndarray, number_format: str) -> np.ndarray:
    """Float32 numbers in the float format of a file; norms stay what they are."""
    return rows.astype(np.float16) if rows.ndim == 2 and number_format == "f16" else rows


# Programs: a child process opens the model (peer_processes.Child), then measures what it is told on its standard input.


def serve(program: str, model: Path, threads: int, context: int, kv_dtype: str) -> None:
    """The child's side."""
    answers, sys.stdout = sys.stdout, sys.stderr
    read, generate, forget = {"npllama": open_npllama, "llama.cpp": open_llama_cpp, "torch": open_torch}[program](
        model, threads, context, kv_dtype
    )
    print("ready", file=answers, flush=True)
    at_depth = -1
    for line in sys.stdin:
        n_prompt, n_gen, depth = map(int, line.split())
        if depth != at_depth:
            forget(0)
            if depth:
                read(0, depth)
            at_depth = depth
        time.sleep(REST_S)  # threads of the program before still spin for a while
        spent, runs = 0.0, -1
        while runs < 1 or spent < MIN_S:
            forget(depth)
            started = time.perf_counter()
            if n_prompt:
                read(depth, n_prompt)
            generate(depth + n_prompt, n_gen)
            spent += time.perf_counter() - started if runs >= 0 else 0.0  # the first one warms up
            runs += 1
        print(spent / runs, file=answers, flush=True)


def random_ids(n: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(3, 32000, n).tolist()
    return ids


def one_by_one(step: Step) -> Step:
    """Generating by a program that reads one id after the other."""

    def generate(start: int, n: int) -> None:
        for position in range(start, start + n):
            step(position, 1)

    return generate


def open_npllama(model: Path, threads: int, context: int, kv_dtype: str) -> Served:
    """npllama as users open it; prompts in its own chunks, ids in steps as `generate` goes."""
    import npllama
    from npllama.measure.bench import Bench

    llama = npllama.load(model, backend="numba", threads=threads, context=context, kv_dtype=kv_dtype or "f32")
    cache, bench = llama.new_cache(), Bench(llama)

    def read(start: int, n: int) -> None:
        bench.read(cache, start, n)

    def generate(start: int, n: int) -> None:
        bench.generate(cache, start, start + n)

    return read, generate, lambda kept: None


def silence_llama_cpp() -> None:
    """Stop llama.cpp from writing to stderr."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    silence_llama_cpp.quiet = quiet  # type: ignore[attr-defined] # the callback must live as long as the program


def open_llama_cpp(model: Path, threads: int, context: int, kv_dtype: str) -> Served:
    """llama.cpp through its C interface; prompts in its usual batches of 512."""
    import llama_cpp

    silence_llama_cpp()
    refuse_more_features(llama_cpp.llama_print_system_info().decode())
    opened = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
    params.n_threads = params.n_threads_batch = threads
    if kv_dtype:
        params.type_k = params.type_v = KV_TYPES[kv_dtype]
    state = llama_cpp.llama_init_from_model(opened, params)
    ids = random_ids(context)

    def step(start: int, n: int) -> None:
        for first in range(start, start + n, 512):
            part = ids[first : min(first + 512, start + n)]
            tokens = (ctypes.c_int32 * len(part))(*part)
            if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(tokens, len(part))):
                sys.exit("llama.cpp could not decode")
        llama_cpp.llama_get_logits(state)

    def forget(kept: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(state), 0, kept, -1)

    return step, one_by_one(step), forget


def torch_weights(model: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and weights of a model directory in float32 or bfloat16, as tensors."""
    import torch

    from npllama.numbers.bf16 import BF16
    from npllama.store.opening import open_model

    opened = open_model(model)
    w = {}
    for kind, weight in opened.weights._asdict().items():
        if isinstance(weight, BF16):
            w[kind] = torch.from_numpy(weight.bits.view(np.int16).copy()).view(torch.bfloat16)
        else:
            w[kind] = torch.from_numpy(weight.copy())
    return opened.config, w


def torch_rotation(c: ModelConfig, context: int) -> Any:
    """RoPE's angles as complex numbers of length 1: (context, head_dim / 2)."""
    import torch

    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def open_torch(model: Path, threads: int, context: int, kv_dtype: str) -> Served:
    """LLaMA 2 in torch as one would write it: matrix products, scaled_dot_product_attention, a static cache.

    The cache has the number format of the weights: kv_dtype is npllama's and llama.cpp's.
    """
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    c, w = torch_weights(model)
    dtype = w["wq"].dtype
    rotation = torch_rotation(c, context)
    keys = torch.zeros(c.n_layers, c.n_kv_heads, context, c.head_dim, dtype=dtype)
    values = torch.zeros_like(keys)
    ids = torch.tensor(random_ids(context))

    def norm(x: Any, gain: Any) -> Any:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + c.norm_eps) * gain).to(dtype)

    def rotate(x: Any, start: int) -> Any:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation[start : start + x.shape[0], None]).flatten(2).to(dtype)

    def step(start: int, n: int) -> None:
        x = w["tok_embeddings"][ids[start : start + n]]
        stop = start + n
        mask = torch.ones(n, stop, dtype=torch.bool).tril(start) if n > 1 else None
        for l in range(c.n_layers):
            h = norm(x, w["attention_norm"][l])
            q = rotate((h @ w["wq"][l].T).view(n, c.n_heads, c.head_dim), start)
            keys[l, :, start:stop] = rotate((h @ w["wk"][l].T).view(n, c.n_kv_heads, c.head_dim), start).transpose(0, 1)
            values[l, :, start:stop] = (h @ w["wv"][l].T).view(n, c.n_kv_heads, c.head_dim).transpose(0, 1)
            k, v = keys[l, :, :stop], values[l, :, :stop]
            y = functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
            )
            x = x + y[0].transpose(0, 1).reshape(n, -1) @ w["wo"][l].T
            h = norm(x, w["ffn_norm"][l])
            x = x + (functional.silu(h @ w["w1"][l].T) * (h @ w["w3"][l].T)) @ w["w2"][l].T
        _ = norm(x[-1:], w["norm"]) @ w["output"].T

    return step, one_by_one(step), lambda kept: None


# Output.


def table(report: dict[str, Any]) -> str:
    """The results as a table of Markdown, with what they depend on: a row for each shape, format and peer."""
    about, results = report["about"], report["results"]
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    kept = f", all programs kept to {about['features'].upper()}" if "features" in about else ""
    tests = list(dict.fromkeys(test_of(one) for one in results))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in results:
        for peer, ratio in one["ratio"].items():
            low, high = one["ratio_spread"][peer]
            cell = f"{one['tokens_per_second']['npllama']:,.0f}, **{ratio:.2f}** ({low:.2f} to {high:.2f})"
            rows.setdefault((one["shape"], one["format"], peer), {})[test_of(one)] = cell
    return "\n".join(
        [
            f"{about['date']}, {about['cpu']}{kept}, {about['threads']} threads; "
            f"medians of {about['repetitions']} runs in turn; {versions}.",
            "",
            "| shape | format | beside | " + " | ".join(tests) + " |",
            "|---|---|---|" + "---|" * len(tests),
            *(
                "| " + " | ".join([*row, *(cells.get(test, "") for test in tests)]) + " |"
                for row, cells in rows.items()
            ),
        ]
    )


if __name__ == "__main__":
    main()
