"""What the numbers of GGUF's types lose in formats of npllama: the measurements behind OWN in store/plan.py.

    pip install llama-cpp-python gguf torch
    python tools/train_demo.py --out MODEL --dim 256 --hidden-dim 768 --stories 12000
    python tools/compare_gguf_types.py MODEL [--files Q2_K Q4_K_M ...] [-n 100]

llama.cpp quantizes MODEL, whose widths are multiples of 256: first with every matrix in one type of blocks, then to
the mixes that people have. The file's own numbers as float32 are the reference. For a type, formats are tried from the
smallest one on until the KL divergence is below the bound; for every file what an export without --dtype stores is
compared: once as float32, so that nothing but weights is rounded, and once as it computes, with 8-bit activations. The
texts are held-out stories, in NumPy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

from bench_peers import silence_llama_cpp  # noqa: E402
from compare_formats import predicted  # noqa: E402
from compare_quality import Tally, float32_tensors  # noqa: E402
from gguf_files import FTYPES, quantize_with_llama_cpp, write_for_ids  # noqa: E402
from story_grammar import stories  # noqa: E402
from train_demo import HELD_OUT_SEED  # noqa: E402

import npllama  # noqa: E402
from npllama.checkpoints import open_checkpoint  # noqa: E402
from npllama.numbers import FORMATS, NumberFormat  # noqa: E402
from npllama.store.export import Source, write_model  # noqa: E402
from npllama.store.opening import open_model  # noqa: E402
from npllama.store.plan import OWN, Formats, own_formats, title  # noqa: E402
from npllama.store.tokenizers import stored_in  # noqa: E402
from npllama.weights import KINDS  # noqa: E402

TYPES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q6_K": "Q6_K", "IQ4_XS": "IQ4_XS"}
"""Types that are not kept as they are, and a kind of file whose matrices llama.cpp makes of them."""

MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_XS")
BOUNDS = {2: 0.002, 3: 0.002, 4: 0.002, 5: 0.001, 6: 0.001}
"""The KL divergence in nats that is allowed, by the bits of a type."""


@dataclass
class Numbers:
    """A tensor in memory, with what the exporter asks of a checkpoint's."""

    numbers: np.ndarray
    dtype: str = "f32"
    source: str = "memory"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.numbers[start:stop]

    def encoded(self, own: NumberFormat, start: int, stop: int) -> dict[str, np.ndarray]:
        return own.encode(self.rows(start, stop), self.dtype)


@dataclass
class Wide:
    """The tensors of a model directory as float32, with what the exporter asks of a checkpoint."""

    config: Any
    folder: Path
    tied: bool
    tensors: Mapping[str, Numbers]


class Experiment:
    """A model, and the stories on which versions of it are compared."""

    def __init__(self, model: Path, n_stories: int, scratch: Path) -> None:
        self.scratch, self.n_written = scratch, 0
        with npllama.load(model, backend="numpy", threads=1) as llm:
            bos, eos, encode = llm.tokenizer.bos_id, llm.tokenizer.eos_id, llm.tokenizer.encode
            self.stories = [[bos, *encode(text, bos=False), eos] for text in stories(HELD_OUT_SEED, 0, n_stories)]
        with open_model(model) as opened:
            self.tokenizer = stored_in(opened.path, opened.manifest)
            write_for_ids(scratch / "F32.gguf", opened.config, float32_tensors(opened))

    def quantized(self, name: str, pure: bool) -> Path:
        """The model as llama.cpp quantizes it."""
        path = self.scratch / f"{name}{'-pure' * pure}.gguf"
        quantize_with_llama_cpp(self.scratch / "F32.gguf", path, name, pure)
        return path

    def write(self, source: Source, formats: Formats) -> Path:
        """A model directory of a checkpoint."""
        self.n_written += 1
        folder = self.scratch / f"{self.n_written}"
        write_model(source, folder, formats, self.tokenizer, False, None)
        return folder

    def as_float32(self, folder: Path) -> Path:
        """A model directory of the numbers that another one stands for."""
        with open_model(folder) as opened:
            tensors = {name: Numbers(w) for name, w in float32_tensors(opened)}
            formats = dict.fromkeys(opened.manifest["tensors"], FORMATS["f32"])
            return self.write(Wide(opened.config, folder, "output" not in formats, tensors), formats)

    def predictions(self, folder: Path) -> list[np.ndarray]:
        """What a model directory predicts after each id of the stories."""
        with npllama.load(folder, backend="numpy", threads=1) as llm:
            return [predicted(llm, story) for story in self.stories]

    def distance(self, folder: Path, reference: list[np.ndarray]) -> float:
        """Its KL divergence from a reference, in nats."""
        tally = Tally()
        for p, r, story in zip(self.predictions(folder), reference, self.stories, strict=True):
            tally.add(p, r, np.array(story[1:]))
        return tally.figures()["kl_divergence"]

    def type_of_blocks(self, name: str) -> None:
        """Print a line for each format that is too small for a type, then for the first that is not and for OWN's."""
        with open_checkpoint(self.quantized(TYPES[name], pure=True)) as source:
            stored = {tensor.stored_as for tensor in source.tensors.values() if len(tensor.shape) == 2}
            assert stored == {name}, stored
            kinds = own_formats(source)
            reference = self.predictions(self.write(source, everywhere(FORMATS["f32"], kinds)))
            bound, found = BOUNDS[int(name.strip("IQ")[0])], False
            for own in sorted((own for own in FORMATS.values() if own.quantized), key=NumberFormat.bits_per_weight):
                if found and own.name != OWN[name]:
                    continue
                folder = self.write(source, everywhere(own, kinds))
                weights = self.distance(self.as_float32(folder), reference)
                line = f"{name} in {own.name} ({own.bits_per_weight():.2f} bits): weights {weights:.1e}"
                if weights < bound or own.name == OWN[name]:
                    line += f", with activations {self.distance(folder, reference):.1e}"
                found = found or weights < bound
                print(f"{line}{' (bound kept)' if weights < bound else ''}", flush=True)
                if found and own.name == OWN[name]:
                    break

    def file(self, name: str) -> None:
        """Print what an export without --dtype makes of a file."""
        with open_checkpoint(self.quantized(name, pure=False)) as source:
            formats = own_formats(source)
            reference = self.predictions(self.write(source, everywhere(FORMATS["f32"], formats)))
            folder = self.write(source, formats)
            weights, both = self.distance(self.as_float32(folder), reference), self.distance(folder, reference)
            types = sorted({tensor.stored_as for tensor in source.tensors.values() if len(tensor.shape) == 2})
            line = f"file {name} ({', '.join(types)}) in {title(formats)}: weights {weights:.1e}, "
            print(f"{line}with activations {both:.1e}", flush=True)


def everywhere(own: NumberFormat, kinds: Iterable[str]) -> Formats:
    """All matrices in one format."""
    return {kind: FORMATS["f32"] if KINDS[kind].is_norm else own for kind in kinds}


def main() -> None:
    """Compare every type and every kind of file, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model directory in f32, f16 or bf16")
    parser.add_argument("-n", "--n-stories", type=int, default=100)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--files", nargs="*", choices=FTYPES, default=MIXES)
    args = parser.parse_args()
    silence_llama_cpp()
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Experiment(args.model, args.n_stories, Path(scratch))
        for name in args.types:
            experiment.type_of_blocks(name)
        for name in args.files:
            experiment.file(name)


if __name__ == "__main__":
    main()
