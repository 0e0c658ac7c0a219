"""What each number format costs: bits, the size of a 7B model, and how far the demo model is from its own weights.

    python tools/compare_formats.py [-n 500] [--json tools/formats.json] [--readme README.md]

The distance is measured in NumPy, on stories of the grammar that the model was not trained on: each stands alone, from
BOS to EOS, and every id behind BOS is predicted once. The reference is the demo model's own float16 weights.
Bits and sizes follow from the registry of number formats, for the matrices and norms of LLaMA 2 7B.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from compare_quality import Tally  # noqa: E402
from markers import write_between  # noqa: E402
from story_grammar import stories  # noqa: E402
from train_demo import HELD_OUT_SEED, N_STORIES, TRAIN_SEED  # noqa: E402

import npllama  # noqa: E402
from npllama.inference import DEMO, Llama  # noqa: E402
from npllama.measure.quality import log_softmax  # noqa: E402
from npllama.measure.random_model import shape_config  # noqa: E402
from npllama.numbers import FORMATS, NumberFormat  # noqa: E402
from npllama.store.export import OpenedSource, write_model  # noqa: E402
from npllama.store.opening import open_model  # noqa: E402
from npllama.store.plan import asked_formats, planned_bytes  # noqa: E402
from npllama.store.tokenizers import stored_in  # noqa: E402
from npllama.weights import kind_shapes  # noqa: E402

MARKERS = ("<!-- formats: begin -->", "<!-- formats: end -->")


def main() -> None:
    """Measure every registered format, print the table, write JSON and README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--n-stories", type=int, default=500, help="stories, before known ones are left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args()
    report = measure(held_out(args.n_stories))
    text = table(report)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.readme:
        write_between(MARKERS, args.readme, text)


def held_out(n: int) -> list[str]:
    """The first n stories of another seed than the training's, without those that are training stories all the same."""
    training = set(stories(TRAIN_SEED, 0, N_STORIES))
    return [text for text in stories(HELD_OUT_SEED, 0, n) if text not in training]


def measure(texts: list[str]) -> dict[str, Any]:
    """The distance of every format from the demo model's own weights, on these stories."""
    with npllama.load(DEMO, backend="numpy", threads=1) as llama:
        ids = [[llama.tokenizer.bos_id, *llama.tokenizer.encode(t, bos=False), llama.tokenizer.eos_id] for t in texts]
        references = [predicted(llama, story) for story in ids]
        n_weights = sum(math.prod(tensor["shape"]) for tensor in llama.manifest["tensors"].values())
    results = {}
    for name, number_format in FORMATS.items():
        with tempfile.TemporaryDirectory() as scratch, open_model(DEMO) as opened:
            folder = Path(scratch) / name
            tokenizer = stored_in(opened.path, opened.manifest)
            source = OpenedSource(opened)
            write_model(source, folder, asked_formats(number_format, source.tied), tokenizer, False, None)
            with npllama.load(folder, backend="numpy", threads=1) as llama:
                tally = Tally()
                for story, reference in zip(ids, references, strict=True):
                    tally.add(predicted(llama, story), reference, np.array(story[1:]))
                results[name] = tally.figures()
    about = {
        "date": datetime.date.today().isoformat(),
        "n_weights": n_weights,
        "n_stories": len(ids),
        "n_predictions": sum(len(story) - 1 for story in ids),
    }
    return {"about": about, "results": results}


def predicted(llama: Llama, story: list[int]) -> np.ndarray:
    """Log probabilities of what comes after each id of a story but the last: (T-1, V) float64."""
    return log_softmax(llama.logits(story[:-1]))


def size_of_7b(number_format: NumberFormat) -> tuple[int, float]:
    """Bytes of LLaMA 2 7B as `npllama export` stores it in a format, and bits per weight of it."""
    config = shape_config("7b")
    size = planned_bytes(config, asked_formats(number_format, tied=False))
    return size, 8 * size / sum(math.prod(shape) for shape in kind_shapes(config).values())


def table(report: dict[str, Any]) -> str:
    """The formats as a table of Markdown: sizes from the registry, distances as measured."""
    about, results = report["about"], report["results"]
    millions = about["n_weights"] / 1e6
    rows, largest_error = [], 0.0
    for name, found in results.items():
        size, bits = size_of_7b(FORMATS[name])
        kl = found["kl_divergence"]
        largest_error = max(largest_error, found["kl_error"] / kl if kl else 0.0)
        same = f"{found['top_1_agreement']:.1%}"
        rows.append(f"| {name} | {bits:.2f} | {size / 1e9:.1f} GB | {two_digits(kl)} | {same} |")
    return "\n".join(
        [
            "| format | bits per weight | a 7B model | KL divergence, nats | same most probable id |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Divergence and agreement: {about['date']}, the demo model ({millions:.1f} million weights in f16)",
            f"on {about['n_stories']} stories that it was not trained on, {about['n_predictions']:,} predictions; "
            f"standard errors of the divergence: up to {largest_error:.0%}.",
        ]
    )


def two_digits(x: float) -> str:
    """A number below 1 with two significant digits, written out."""
    return f"{x:.{1 - math.floor(math.log10(x))}f}" if x else "0"


if __name__ == "__main__":
    main()
