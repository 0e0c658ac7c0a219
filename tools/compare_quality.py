"""What rounding costs in npllama and in llama.cpp: the same weights, the same text, each format of both.

    pip install llama-cpp-python gguf
    python tools/compare_quality.py MODEL -f TEXT [-c 256] [-t 2] [--json FILE]

MODEL is a model directory of npllama in f32, f16 or bf16. Its weights become q8 and q4 by npllama's own quantizer, and
Q8_0, Q4_0 and Q4_K_M by llama.cpp's, from a GGUF file of the same numbers in float32. Every row is compared with the
unrounded weights in the same program, in the windows of `npllama perplexity`. Both programs keep keys and values in
float32 and llama.cpp goes without flash attention, which would round too: what is measured is the rounding of weights,
and of the activations that are multiplied with them.

Bits per weight are of all matrices together, embedding and output included, without norms. llama.cpp replaces a K
format where rows are not a multiple of 256 long; the column of formats says what each file holds.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

from bench_peers import silence_llama_cpp, version  # noqa: E402
from gguf_files import quantize_with_llama_cpp, write_for_ids  # noqa: E402

import npllama  # noqa: E402
from npllama.inference import Llama  # noqa: E402
from npllama.measure.quality import log_softmax, windows  # noqa: E402
from npllama.numbers import ArraySpec, widen  # noqa: E402
from npllama.store.export import quantize_model  # noqa: E402
from npllama.store.opening import OpenModel, open_model  # noqa: E402
from npllama.weights import KINDS, tensor_names  # noqa: E402

NPLLAMA = ("q8", "q4")
LLAMA_CPP = ("Q8_0", "Q4_0", "Q4_K_M")
F32_CACHE = 0  # ggml's number of float32, for keys and values

Logits = Callable[[list[int]], np.ndarray]
"""The logits after each of the ids, (T, V) float32."""


class Candidate(NamedTuple):
    """A model in one program and format; candidates of a program are compared with the first one of it."""

    program: str
    format: str
    bits_per_weight: float
    matrices: dict[str, int]
    logits: Logits


class Tally:
    """What one candidate predicted: a loss for each id, and at each place the distance from a reference."""

    def __init__(self) -> None:
        self.loss: list[np.ndarray] = []
        self.kl: list[np.ndarray] = []
        self.same: list[np.ndarray] = []

    def add(self, p: np.ndarray, r: np.ndarray, targets: np.ndarray) -> None:
        """Count a window: log probabilities of the candidate and of its reference, (T, V), and what came, (T,)."""
        self.loss.append(-p[np.arange(len(targets)), targets])
        self.kl.append((np.exp(r) * (r - p)).sum(axis=-1))
        self.same.append(p.argmax(axis=-1) == r.argmax(axis=-1))

    def figures(self) -> dict[str, float]:
        """Perplexity, KL divergence with its standard error, and top-1 agreement (see npllama/quality.py)."""
        kl = np.concatenate(self.kl)
        return {
            "perplexity": math.exp(np.concatenate(self.loss).mean()),
            "kl_divergence": float(kl.mean()),
            "kl_error": float(kl.std()) / math.sqrt(len(kl)),
            "top_1_agreement": float(np.concatenate(self.same).mean()),
        }


def main() -> None:
    """Measure what the arguments ask for, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model directory in f32, f16 or bf16")
    parser.add_argument("-f", "--file", type=Path, required=True, help="the text, in UTF-8")
    parser.add_argument("-c", "--ctx-size", type=int, default=256, help="ids in a window (default 256)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    silence_llama_cpp()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        options = {"threads": args.threads, "context": args.ctx_size}
        reference = stack.enter_context(npllama.load(args.model, **options))
        candidates = [
            *npllama_candidates(args.model, reference, options, Path(scratch), stack),
            *llama_cpp_candidates(args.model, options, Path(scratch), stack),
        ]
        text = args.file.read_text(encoding="utf-8")
        report = compare(candidates, list(windows(reference, text, args.ctx_size)))
    report["about"] |= {"model": args.model.name, "text": args.file.name, **about()}
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def about() -> dict[str, Any]:
    """What the figures depend on besides model and text."""
    packages = ("npllama", "numpy", "llama-cpp-python")
    return {"date": datetime.date.today().isoformat(), "versions": {name: version(name) for name in packages}}


def compare(candidates: list[Candidate], texts: list[list[int]]) -> dict[str, Any]:
    """Feed every window to every candidate; one entry each, and how far apart the programs are without rounding."""
    tallies = [Tally() for _ in candidates]
    apart = 0.0
    for window in texts:
        targets = np.array(window[1:])
        references: dict[str, np.ndarray] = {}
        unrounded: list[np.ndarray] = []
        for candidate, tally in zip(candidates, tallies, strict=True):
            logits = candidate.logits(window)[:-1]
            p = log_softmax(logits)
            if candidate.program not in references:
                references[candidate.program] = p
                unrounded.append(logits)
            tally.add(p, references[candidate.program], targets)
        apart = max([apart, *(float(np.abs(other - unrounded[0]).max()) for other in unrounded[1:])])
    entries = [{**candidate._asdict(), **tally.figures()} for candidate, tally in zip(candidates, tallies, strict=True)]
    for entry in entries:
        del entry["logits"]
    n_tokens = sum(len(window) - 1 for window in texts)
    return {"about": {"n_tokens": n_tokens, "n_ctx": len(texts[0]), "logits_apart": apart}, "results": entries}


# npllama: the given model, and what its own quantizer makes of it.


def npllama_candidates(
    model: Path, reference: Llama, options: dict[str, Any], scratch: Path, stack: ExitStack
) -> Iterator[Candidate]:
    """The reference, then the quantized formats."""
    yield npllama_candidate(reference, reference.manifest["tensors"]["wq"]["format"])
    for number_format in NPLLAMA:
        quantize_model(model, scratch / number_format, number_format)
        llama = stack.enter_context(npllama.load(scratch / number_format, **options))
        yield npllama_candidate(llama, number_format)


def npllama_candidate(llama: Llama, name: str) -> Candidate:
    """An open model, with what its manifest says about sizes."""
    n_bytes, n_weights = 0, 0
    matrices: collections.Counter[str] = collections.Counter()
    for kind, tensor in llama.manifest["tensors"].items():
        if not kind.endswith("norm"):
            arrays = tensor["arrays"].values()
            n_bytes += sum(ArraySpec(array["dtype"], tuple(array["shape"])).size_bytes for array in arrays)
            n_weights += math.prod(tensor["shape"])
            matrices[tensor["format"]] += len(tensor_names(kind, llama.config.n_layers))
    return Candidate("npllama", name, 8 * n_bytes / n_weights, dict(matrices), llama.logits)


# llama.cpp: a GGUF file of the same numbers, and what its quantizer makes of that.


def llama_cpp_candidates(model: Path, options: dict[str, Any], scratch: Path, stack: ExitStack) -> Iterator[Candidate]:
    """Float32, then the quantized formats."""
    source = scratch / "F32.gguf"
    with open_model(model) as opened:
        write_for_ids(source, opened.config, float32_tensors(opened))
    yield llama_cpp_candidate(source, options, stack)
    for name in LLAMA_CPP:
        path = scratch / f"{name}.gguf"
        quantize_with_llama_cpp(source, path, name)
        yield llama_cpp_candidate(path, options, stack)


def float32_tensors(opened: OpenModel) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor that a model directory stores, under Meta's name and in float32."""
    for kind in opened.manifest["tensors"]:
        values = widen(getattr(opened.weights, kind))
        layers = values if KINDS[kind].in_layers else [values]
        yield from zip(tensor_names(kind, opened.config.n_layers), layers, strict=True)


def llama_cpp_candidate(path: Path, options: dict[str, Any], stack: ExitStack) -> Candidate:
    """A GGUF file, with what it says about sizes."""
    import gguf

    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2]
    matrices = collections.Counter(tensor.tensor_type.name for tensor in tensors)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    opened = stack.enter_context(LlamaCpp(path, options["threads"], options["context"]))
    return Candidate("llama.cpp", path.stem, bits, dict(matrices), opened.logits)


class LlamaCpp:
    """llama.cpp through its C interface, with logits at every position."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp could not open {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = F32_CACHE
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to half precision
        self._state = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits after each of the ids, with nothing before them."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for t, one in enumerate(ids):
            batch.token[t], batch.pos[t], batch.logits[t] = one, t, 1
            batch.n_seq_id[t], batch.seq_id[t][0] = 1, 0
        self._c.llama_memory_clear(self._c.llama_get_memory(self._state), True)
        if self._c.llama_decode(self._state, batch):
            sys.exit("llama.cpp could not decode")
        found = np.ctypeslib.as_array(self._c.llama_get_logits(self._state), (len(ids), self._n_vocab))
        return found.copy()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._state)
        self._c.llama_model_free(self._model)


# Output.


def table(report: dict[str, Any]) -> str:
    """The results as a table of Markdown, with what they depend on."""
    about = report["about"]
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    lines = [
        f"{about['date']}, {about['model']} on {about['text']}: {about['n_tokens']} predictions in windows of "
        f"{about['n_ctx']} ids; {versions}.",
        f"Without rounding, logits of the two programs differ by at most {about['logits_apart']:.1e}.",
        "",
        "| program | format | bits per weight | perplexity | change | KL divergence | top-1 | matrices |",
        "|---|---|---|---|---|---|---|---|",
    ]
    unrounded: dict[str, float] = {}
    for one in report["results"]:
        cells = [one["program"], one["format"], f"{one['bits_per_weight']:.2f}", f"{one['perplexity']:.4f}"]
        if one["program"] in unrounded:
            change = one["perplexity"] / unrounded[one["program"]] - 1
            cells += [f"{100 * change:+.2f} %", f"{one['kl_divergence']:.5f} +/- {one['kl_error']:.5f}"]
            cells.append(f"{100 * one['top_1_agreement']:.2f} %")
        else:
            unrounded[one["program"]] = one["perplexity"]
            cells += ["", "", ""]
        cells.append(", ".join(f"{n} {name}" for name, n in sorted(one["matrices"].items())))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except npllama.NpllamaError as error:
        sys.exit(str(error))
