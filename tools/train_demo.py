"""Train the model that ships inside the package on stories that the project writes: how was npllama/demo made?

    python tools/train_demo.py                trains, exports to npllama/demo, prints the proofs (25 minutes of a core)
    python tools/train_demo.py --check DIR    prints the proofs of a model directory with the project's own engine
    python tools/train_demo.py --out OUT --work FOLDER --dim 256 --hidden-dim 768 --stories 12000
                                              trains a model of another size, to measure with: see --help

Everything of the demo is fixed by the constants below: the stories (story_grammar.py), the tokenizer, the initial
weights, the order of the batches. torch runs with deterministic algorithms on one thread, so that a second run on the
same processor with the same torch gives the same bytes; another processor may round differently, and then gives other
weights of the same quality.

The model is LLaMA 2 with grouped-query attention, written once more in torch because training needs gradients.
Axes: N stories of a batch, T tokens, D model width, H query heads, G key/value heads, E head size, F feed-forward
width, V vocabulary.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import story_grammar  # noqa: E402 - found through the line above

if TYPE_CHECKING:
    import torch

DEMO = ROOT / "npllama" / "demo"

TRAIN_SEED, HELD_OUT_SEED, WEIGHT_SEED = 1, 2, 3
Cycles = tuple[tuple[int, float], ...]
CYCLES: Cycles = ((40_000, 4e-3), (24_000, 2e-3))
"""(training stories, highest learning rate). The second cycle goes on from the first one's weights with fresh
optimizers: after it, names and things stay the same in most stories that had still mixed them up."""

N_STORIES = sum(n_stories for n_stories, _ in CYCLES)
"""Each story is seen once, so the model cannot learn one by heart."""

BATCH = 16
BUCKET = 4096
"""Stories are sorted by length within a bucket, so that a batch needs hardly any padding."""

LAST_SHARE, WARMUP, WEIGHT_DECAY, CLIP = 0.01, 100, 0.1, 1.0

MODEL = {
    "dim": 128,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 1024,
    "hidden_dim": 384,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "max_seq_len": 256,
}

N_SAMPLES, SAMPLE_SEED, N_PERPLEXITY = 100, 1, 500

BOS, EOS, IGNORED = 1, 2, -100


# ------------------------------------------------------------------------------------------------ text


def train_tokenizer(path: Path) -> None:
    """Train a SentencePiece BPE model with LLaMA's options (byte fallback, text as it is) on 20,000 stories."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=story_grammar.stories(TRAIN_SEED, 0, 20_000),
        model_writer=model,
        model_type="bpe",
        vocab_size=MODEL["vocab_size"],
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def batches(tokenizer: Any, first: int, last: int) -> Iterator[np.ndarray]:
    """Yield the stories `first` to `last` - 1 as (N, T) int64 batches of BOS + story + EOS, padded with IGNORED."""
    rng = np.random.Generator(np.random.PCG64(TRAIN_SEED + first))
    for start in range(first, last, BUCKET):
        texts = list(story_grammar.stories(TRAIN_SEED, start, min(start + BUCKET, last)))
        rows = sorted(([BOS, *ids, EOS] for ids in tokenizer.encode(texts)), key=len)
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        for i in rng.permutation(len(groups)):
            batch = np.full((len(groups[i]), len(groups[i][-1])), IGNORED)
            for n, row in enumerate(groups[i]):
                batch[n, : len(row)] = row
            yield batch


# ---------------------------------------------------------------------------------------- the model, for its gradients


def initial_weights() -> dict[str, torch.Tensor]:
    """Return normal weights by Meta's names: std 0.02, or 0.02 / sqrt(2 L) where a block adds to the residual."""
    import torch

    D, F, L = MODEL["dim"], MODEL["hidden_dim"], MODEL["n_layers"]
    GE = D // MODEL["n_heads"] * MODEL["n_kv_heads"]
    shapes = {"attention.wq": (D, D), "attention.wk": (GE, D), "attention.wv": (GE, D), "attention.wo": (D, D)}
    shapes |= {"feed_forward.w1": (F, D), "feed_forward.w2": (D, F), "feed_forward.w3": (F, D)}
    generator = torch.Generator().manual_seed(WEIGHT_SEED)
    weights = {"tok_embeddings.weight": torch.randn((MODEL["vocab_size"], D), generator=generator) * 0.02}
    for layer in range(L):
        for name, shape in shapes.items():
            std = 0.02 / math.sqrt(2 * L) if name.endswith(("wo", "w2")) else 0.02
            weights[f"layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * std
        for name in ("attention_norm", "ffn_norm"):
            weights[f"layers.{layer}.{name}.weight"] = torch.ones(D)
    weights["norm.weight"] = torch.ones(D)
    return {name: value.requires_grad_() for name, value in weights.items()}


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return gain * x / sqrt(mean_d(x^2) + eps)."""
    import torch

    return gain * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + MODEL["norm_eps"])


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Turn the adjacent pairs of x (N, T, heads, E) by position * 10000^(-2i/E), as Meta's model does."""
    import torch

    T, E = x.shape[1], x.shape[3]
    angle = torch.arange(T)[:, None, None] * 10000.0 ** (-torch.arange(0, E, 2) / E)  # (T, 1, E/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def attention(x: torch.Tensor, weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Grouped-query attention over one story per row; x and the result are (N, T, D)."""
    from torch.nn import functional

    wq, wk, wv, wo = (weights[f"layers.{layer}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo"))
    N, T, D = x.shape
    H, G = MODEL["n_heads"], MODEL["n_kv_heads"]
    q = rotate((x @ wq.T).view(N, T, H, -1))
    k = rotate((x @ wk.T).view(N, T, G, -1)).repeat_interleave(H // G, dim=2)
    v = (x @ wv.T).view(N, T, G, -1).repeat_interleave(H // G, dim=2)
    mixed = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    return mixed.transpose(1, 2).reshape(N, T, D) @ wo.T


def forward(tokens: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits (N, T, V) after each of the tokens (N, T); the output matrix is the embedding table (tied)."""
    from torch.nn import functional

    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(MODEL["n_layers"]):
        x = x + attention(rms_norm(x, weights[f"layers.{layer}.attention_norm.weight"]), weights, layer)
        w1, w2, w3 = (weights[f"layers.{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        y = rms_norm(x, weights[f"layers.{layer}.ffn_norm.weight"])
        x = x + (functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    return rms_norm(x, weights["norm.weight"]) @ weights["tok_embeddings.weight"].T


def learning_rate(step: int, n_steps: int, highest: float) -> float:
    """Rise linearly over WARMUP steps to the highest rate, then fall along a cosine to LAST_SHARE of it."""
    if step < WARMUP:
        return highest * (step + 1) / WARMUP
    share = (step - WARMUP) / max(1, n_steps - WARMUP)
    lowest = LAST_SHARE * highest
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizers(weights: dict[str, torch.Tensor]) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for embeddings and gains; one learning rate fits both.

    Source: Jordan et al. 2024, "Muon"; the scale that lets it share AdamW's rate: Liu et al. 2025, arXiv:2502.16982.
    """
    import torch

    inner = [value for name, value in weights.items() if name.startswith("layers.") and value.ndim == 2]
    outer = [value for name, value in weights.items() if not (name.startswith("layers.") and value.ndim == 2)]
    muon = torch.optim.Muon(inner, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0)]


def train(tokenizer: Any, cycles: Cycles) -> dict[str, torch.Tensor]:
    """Train from random weights through all cycles."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    weights = initial_weights()
    n_parameters = sum(value.numel() for value in weights.values())
    print(f"{n_parameters:,} parameters, torch {torch.__version__}, {torch.get_num_threads()} thread")
    first = 0
    for n_stories, highest in cycles:
        train_cycle(weights, tokenizer, first, first + n_stories, highest)
        first += n_stories
    return {name: value.detach() for name, value in weights.items()}


def train_cycle(weights: dict[str, torch.Tensor], tokenizer: Any, first: int, last: int, highest: float) -> None:
    """Minimise the mean cross-entropy of the next token over the stories `first` to `last` - 1, in place."""
    import torch
    from torch.nn import functional

    optimizers = make_optimizers(weights)
    n_steps = sum(math.ceil(min(BUCKET, last - start) / BATCH) for start in range(first, last, BUCKET))
    log = Log(n_steps)
    for step, batch in enumerate(batches(tokenizer, first, last)):
        rows = torch.from_numpy(batch)
        logits = forward(rows[:, :-1].clamp(min=0), weights)
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), CLIP)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps, highest)
            optimizer.step()
            optimizer.zero_grad()
        log.add(loss.item(), int((batch[:, 1:] != IGNORED).sum()))


class Log:
    """Prints the mean loss, the rate and the time of every hundred steps."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self._losses: list[float] = []
        self._n_tokens = 0
        self._started = time.monotonic()

    def add(self, loss: float, n_tokens: int) -> None:
        """Count one step."""
        self._losses.append(loss)
        self._n_tokens += n_tokens
        step = len(self._losses)
        if step % 100 == 0 or step == self.n_steps:
            seconds = time.monotonic() - self._started
            rate = f"{self._n_tokens / seconds:,.0f} tokens/s  {seconds:.0f} s"
            print(f"step {step}/{self.n_steps}  loss {np.mean(self._losses[-100:]):.4f}  {rate}", flush=True)


# ------------------------------------------------------------------------------------------------ the proofs


def check(folder: Path) -> bool:
    """Print ten samples and the proofs of a model directory, by the project's own engine; return whether all hold."""
    import npllama

    training = set(story_grammar.stories(TRAIN_SEED, 0, N_STORIES))
    with npllama.load(folder) as llm:
        samples = llm.generate([""] * N_SAMPLES, temperature=0.8, seed=SAMPLE_SEED)
        assert isinstance(samples, list)
        texts = [sample.text.strip() for sample in samples]
        for number, text in enumerate(texts[:10], 1):
            print(f"{number:2d}. {text}\n")
        held_out = [text for text in story_grammar.stories(HELD_OUT_SEED, 0, N_PERPLEXITY) if text not in training]
        seen = perplexity(llm, list(story_grammar.stories(TRAIN_SEED, 0, N_PERPLEXITY)))
        unseen = perplexity(llm, held_out)
    shared = story_grammar.shared_windows(texts)
    for i, j, window in shared:
        print(f"samples {i + 1} and {j + 1} share: {' '.join(window)}")
    n_ended = sum(sample.finish_reason == "stop" for sample in samples)
    n_known = sum(text in training for text in texts)
    n_windows = sum(len(story_grammar.skeleton_windows(text)) for text in texts)
    n_pairs = len({(i, j) for i, j, _ in shared})
    proofs = {
        f"{n_ended} of {N_SAMPLES} samples come to an end": n_ended == N_SAMPLES,
        f"{len(set(texts))} of {N_SAMPLES} samples differ": len(set(texts)) == N_SAMPLES,
        f"{n_known} of {N_SAMPLES} samples are one of the {len(training):,} training stories": n_known == 0,
        f"{n_pairs} pairs of samples share a sentence skeleton of {story_grammar.WINDOW} words; {n_windows} compared "
        f"in {sum(len(story_grammar.sentences(text)) for text in texts)} sentences": n_pairs == 0,
        f"perplexity per token: training {seen:.4f}, held out {unseen:.4f} ({unseen / seen - 1:+.1%})": unseen
        < 1.1 * seen,
    }
    for claim, holds in proofs.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    return all(proofs.values())


def perplexity(llm: Any, texts: list[str]) -> float:
    """Return exp of the mean cross-entropy per token of the texts, each from BOS to EOS."""
    losses = []
    for text in texts:
        ids = [BOS, *llm.tokenizer.encode(text, bos=False), EOS]
        logits = llm.logits(ids[:-1]).astype(np.float64)
        top = logits.max(axis=1)
        log_sums = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses.append(log_sums - logits[np.arange(len(ids) - 1), ids[1:]])
    return math.exp(np.concatenate(losses).mean())


# ------------------------------------------------------------------------------------------------ the command


def make(out: Path, work: Path, cycles: Cycles = CYCLES) -> None:
    """Train tokenizer and model, save them in `work` as a PyTorch checkpoint, and export it to `out`."""
    import torch

    from npllama.store.export import export

    work.mkdir(parents=True, exist_ok=True)
    train_tokenizer(work / "tokenizer.model")
    weights = train(sentencepiece.SentencePieceProcessor(model_file=str(work / "tokenizer.model")), cycles)
    torch.save(
        {"model": weights | {"output.weight": weights["tok_embeddings.weight"]}, "model_args": MODEL}, work / "ckpt.pt"
    )
    export(work / "ckpt.pt", out, dtype="f16", force=True)


def main(argv: list[str] | None = None) -> int:
    """Train, export and check; or only check."""
    parser = argparse.ArgumentParser(
        description="Train the demo model, export it, and print the proofs of its quality."
    )
    parser.add_argument("--out", type=Path, default=DEMO, help="the model directory to write (default: npllama/demo)")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder that keeps the PyTorch checkpoint and the tokenizer (default: a temporary one)",
    )
    parser.add_argument("--check", type=Path, metavar="DIR", help="only print the proofs of this model directory")
    parser.add_argument("--dim", type=int, default=MODEL["dim"], help="model width (default: %(default)s)")
    parser.add_argument("--hidden-dim", type=int, default=MODEL["hidden_dim"], help="feed-forward width (%(default)s)")
    parser.add_argument("--stories", type=int, help="train one cycle of so many stories (default: the demo's two)")
    args = parser.parse_args(argv)
    cycles = ((args.stories, CYCLES[0][1]),) if args.stories else CYCLES
    other = (args.dim, args.hidden_dim, cycles) != (MODEL["dim"], MODEL["hidden_dim"], CYCLES)
    if other and not args.check and args.out == DEMO:
        parser.error("--out is needed for a model that is not the demo")
    MODEL.update(dim=args.dim, hidden_dim=args.hidden_dim)
    if args.check is None:
        with tempfile.TemporaryDirectory() as folder:
            make(args.out, args.work or Path(folder), cycles)
    return 0 if check(args.check or args.out) else 1


if __name__ == "__main__":
    raise SystemExit(main())
