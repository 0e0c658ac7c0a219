"""What the numbers of GGUF's types lose in formats of npllama: the measurements behind OWN in store/plan.py.

    python tools/compare_gguf_types.py [MODEL] [-n 100]

The matrices of MODEL (the demo model by default) are quantized as a file of each type would have them, in levels and
in scales of a few bits. The numbers that they stand for are the reference; what an export without --dtype stores is
compared with it, and so are other formats: once as float32, so that nothing but weights is rounded, and once as it
computes, with 8-bit activations. The texts are held-out stories, in NumPy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from compare_formats import predicted  # noqa: E402
from compare_quality import Tally  # noqa: E402
from story_grammar import stories  # noqa: E402
from train_demo import HELD_OUT_SEED  # noqa: E402

import npllama  # noqa: E402
from npllama.checkpoints.gguf.blocks import BLOCK_TYPES  # noqa: E402
from npllama.inference import DEMO  # noqa: E402
from npllama.numbers import FORMATS, NumberFormat, widen  # noqa: E402
from npllama.numbers.blocks import GROUP  # noqa: E402
from npllama.numbers.formats import Levels, LevelSet  # noqa: E402
from npllama.store.export import OpenedSource, write_model  # noqa: E402
from npllama.store.opening import open_model  # noqa: E402
from npllama.store.plan import OWN  # noqa: E402
from npllama.store.tokenizers import stored_in  # noqa: E402
from npllama.weights import KINDS, tensor_names  # noqa: E402

CANDIDATES = ("q4", "iq4_nl", "q4_1", "q5_0", "q5_1", "q6", "q8")
"""Formats that are compared besides the one of plan.OWN, the smallest first."""

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}


class Tensor(NamedTuple):
    """A matrix of a type, or a norm, with what the exporter asks of a checkpoint's tensor."""

    numbers: np.ndarray
    levels: Levels | None
    level_set: LevelSet | None
    dtype: str = "f32"
    source: str = "a type of GGUF"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.numbers[start:stop]

    def encoded(self, own: NumberFormat, start: int, stop: int) -> dict[str, np.ndarray]:
        if self.levels is None or self.level_set is None or not own.holds(self.level_set):
            return own.encode(self.rows(start, stop), self.dtype)
        return own.lay_out(Levels(*(None if part is None else part[start:stop] for part in self.levels)))


def quantized(w: np.ndarray, name: str) -> Tensor:
    """A matrix in levels and scales of a type. Scales are fractions of a float16 for each row."""
    kind = TYPES[name]
    groups = w.reshape(len(w), -1, kind.group)
    low, high = min(kind.values), max(kind.values)
    least = np.minimum(groups.min(axis=-1), 0) if kind.minimums else np.zeros(groups.shape[:2], np.float32)
    if kind.minimums:
        scales = (groups.max(axis=-1) - least) / high
    else:
        outermost = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        scales = outermost / low
    bits = 7 if name == "Q6_K" else 4 if name == "Q2_K" else 6 if kind.minimums else 5  # beside a sign, if there is one
    scales, least = (in_fractions(part, bits) for part in (scales, least))
    values, nearest = np.sort(np.array(kind.values, np.float32)), np.where(scales, scales, 1)[..., None]
    borders = (values[1:] + values[:-1]) / 2
    levels = values[np.searchsorted(borders, (groups - least[..., None]) / nearest)].astype(np.int8)
    found = Levels(levels, scales, least if kind.minimums else None)
    return Tensor(found.widen().reshape(w.shape), found, kind.level_set if kind.group == GROUP else None)


def in_fractions(x: np.ndarray, bits: int) -> np.ndarray:
    """Each number of a row as a whole multiple of the float16 that makes the largest 2^bits - 1."""
    unit = (np.abs(x).max(axis=-1, keepdims=True) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    return np.rint(x / np.where(unit, unit, 1)) * unit


class Experiment:
    """A model, and the stories on which versions of it are compared."""

    def __init__(self, model: Path, n_stories: int, scratch: Path) -> None:
        self.model, self.scratch, self.n_written = model, scratch, 0
        with npllama.load(model, backend="numpy", threads=1) as llm:
            bos, eos, encode = llm.tokenizer.bos_id, llm.tokenizer.eos_id, llm.tokenizer.encode
            self.stories = [[bos, *encode(text, bos=False), eos] for text in stories(HELD_OUT_SEED, 0, n_stories)]

    def write(self, tensors: dict[str, Any], own: NumberFormat) -> Path:
        """A model directory of these tensors, all matrices in one format."""
        self.n_written += 1
        with open_model(self.model) as opened:
            source = OpenedSource(opened)
            source.tensors = tensors
            formats = {kind: FORMATS["f32"] if KINDS[kind].is_norm else own for kind in opened.manifest["tensors"]}
            tokenizer = stored_in(opened.path, opened.manifest)
            write_model(source, self.scratch / f"{self.n_written}", formats, tokenizer, False, None)
        return self.scratch / f"{self.n_written}"

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

    def run(self, name: str) -> None:
        """Print a line for each format that a type might be stored in, the chosen one first."""
        tensors = {
            tensor: quantized(w, name) if w.ndim == 2 else Tensor(w, None, None)
            for tensor, w in float32_tensors(self.model).items()
        }
        reference = self.predictions(self.write(tensors, FORMATS["f32"]))
        for own in (FORMATS[one] for one in dict.fromkeys([OWN.get(name, name.lower()), *CANDIDATES])):
            folder = self.write(tensors, own)
            wide = {tensor: Tensor(w, None, None) for tensor, w in float32_tensors(folder).items()}
            weights = self.distance(self.write(wide, FORMATS["f32"]), reference)
            both = self.distance(folder, reference)
            print(f"{name:6} in {own.name:6} ({own.bits_per_weight():.2f} bits): weights {weights:.1e}, ", end="")
            print(f"with activations {both:.1e}", flush=True)


def float32_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor that a model directory stores, as float32."""
    found = {}
    with open_model(folder) as opened:
        for kind in opened.manifest["tensors"]:
            values = widen(getattr(opened.weights, kind)).copy()
            layers = values if KINDS[kind].in_layers else [values]
            found |= dict(zip(tensor_names(kind, opened.config.n_layers), layers, strict=True))
    return found


def main() -> None:
    """Compare every type, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("-n", "--n-stories", type=int, default=100)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=[name for name in TYPES if name.endswith("_K")])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Experiment(args.model, args.n_stories, Path(scratch))
        for name in args.types:
            experiment.run(name)


if __name__ == "__main__":
    main()
