"""How well does a model predict a text, and how far is it from the model it was made from?

The text is cut into windows of n - 1 ids that do not overlap, the last one taking what is left, and BOS is put before
each. Every id of the text is predicted exactly once, from BOS and the ids before it in its window. Where the model puts
no BOS in front of a text, each window begins with the last id of the one before, and the first id of the text is not
predicted. Hugging Face's guide calls this a stride of one window; llama.cpp scores the second half of each window only,
and leaves the rest out.
With p the model and r the reference:

    perplexity        exp(mean over ids of -log p(id))
    KL divergence     mean over ids of sum_v r(v) (log r(v) - log p(v)), in nats
    top-1 agreement   share of ids where both find the same id most probable
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from npllama.errors import ModelError, UsageError
from npllama.execution.drawing.top_k import check_finite
from npllama.generation.chunks import feed
from npllama.generation.sampling.logprobs import log_softmax
from npllama.generation.scoring.jobs import windows as cut_windows
from npllama.inference import Llama

BLOCK_BYTES = 8 << 20
"""Largest float64 array of log probabilities: logits are looked at in blocks of rows, of which a few are alive."""


@dataclass(frozen=True)
class Quality:
    """What was measured, over n_tokens predictions in windows of n_ctx; None where there was no reference.

    perplexity_error is None for a single prediction, which says nothing about its own spread. All numbers are finite.
    """

    n_tokens: int
    n_ctx: int
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top_1_agreement: float | None = None


def quality(llama: Llama, text: str, n_ctx: int = 256, reference: Llama | None = None) -> Quality:
    """Measure a model on a text, and against a reference model of the same tokenizer.

    perplexity_error is its standard error. Raises UsageError for a text without ids, or for models that do not share
    their ids; ModelError for logits or a perplexity that are not finite.
    """
    if reference is not None:
        _check_same_ids(llama, reference, text)
    rows = _rows_in_block(llama, reference)
    found = [part for window in windows(llama, text, n_ctx) for part in _measured(llama, reference, window, rows)]
    losses = np.concatenate([part.losses for part in found])
    perplexity, error = _perplexity(losses)
    if reference is None:
        return Quality(len(losses), n_ctx, perplexity, error)
    return Quality(
        n_tokens=len(losses),
        n_ctx=n_ctx,
        perplexity=perplexity,
        perplexity_error=error,
        reference_perplexity=_perplexity(np.concatenate([part.reference_losses for part in found]))[0],
        kl_divergence=float(np.concatenate([part.kl for part in found]).mean()),
        top_1_agreement=float(np.concatenate([part.same for part in found]).mean()),
    )


def windows(llama: Llama, text: str, n_ctx: int) -> Iterator[list[int]]:
    """BOS (or the last id before) and the next n_ctx - 1 ids of the text, again and again; at last what is left."""
    ids = llama.tokenizer.encode(text, bos=False, eos=False)
    if not 2 <= n_ctx <= llama.context:
        raise UsageError(f"windows of {n_ctx} ids: 2 to {llama.context}, the model's context, are possible.")
    if not ids:
        raise UsageError("the text is empty, at least one id is needed; give a text.")
    bos = llama.tokenizer.bos_id if begins_with_bos(llama) else None
    if len(ids) == 1 and bos is None:
        raise UsageError("the text has one id and no BOS in front, so there is none to predict; give a longer text.")
    yield from cut_windows(ids, n_ctx, bos)


def begins_with_bos(llama: Llama) -> bool:
    """Whether windows begin with BOS: where the model puts it in front of a text."""
    return llama.config.add_bos_token and llama.tokenizer.bos_id is not None


def _check_same_ids(llama: Llama, reference: Llama, text: str) -> None:
    if reference.config.vocab_size != llama.config.vocab_size:
        raise UsageError(
            f"the models have vocabularies of {llama.config.vocab_size} and {reference.config.vocab_size} ids; "
            f"the reference must be the same model in another number format."
        )
    if reference.tokenizer.encode(text) != llama.tokenizer.encode(text):
        raise UsageError(
            "the models' tokenizers cut the text into different ids; the reference must be the same model in another "
            "number format."
        )


def _rows_in_block(llama: Llama, reference: Llama | None) -> int:
    """Rows of logits to look at together: a power of two, as the chunks are in which either model reads a prompt."""
    affordable = max(1, BLOCK_BYTES // (8 * llama.config.vocab_size))
    chunk = llama.chunk if reference is None else min(llama.chunk, reference.chunk)
    return min(chunk, 1 << (affordable.bit_length() - 1))


def _blocks(llama: Llama, window: list[int], rows: int) -> Iterator[np.ndarray]:
    """The logits of all ids of a window but the last, which predicts nothing in it, `rows` at a time: (rows, V)."""
    start = 0
    for logits in feed(llama.engine, llama.new_cache(), window, llama.chunk, every=True):
        wanted = min(len(logits), len(window) - 1 - start)
        start += len(logits)
        for row in range(0, wanted, rows):
            block = logits[row : min(row + rows, wanted)]
            check_finite(block)
            yield block


class _Measured(NamedTuple):
    """What some rows of a window give, each (rows,): the losses of both models, the divergence, the agreement."""

    losses: np.ndarray
    reference_losses: np.ndarray
    kl: np.ndarray
    same: np.ndarray


NOTHING = np.empty(0)


def _measured(llama: Llama, reference: Llama | None, window: list[int], rows: int) -> Iterator[_Measured]:
    """Measure one window, block by block: the arrays that are as wide as the vocabulary stay small."""
    targets = [np.array(window[1 + at : 1 + at + rows]) for at in range(0, len(window) - 1, rows)]
    if reference is None:
        for ids, logits in zip(targets, _blocks(llama, window, rows), strict=True):
            yield _Measured(_losses(log_softmax(logits), ids), NOTHING, NOTHING, NOTHING)
        return
    both = _blocks(llama, window, rows), _blocks(reference, window, rows)
    for ids, logits, others in zip(targets, *both, strict=True):
        p, r = log_softmax(logits), log_softmax(others)
        kl = (np.exp(r) * (r - p)).sum(axis=-1)
        yield _Measured(_losses(p, ids), _losses(r, ids), kl, p.argmax(axis=-1) == r.argmax(axis=-1))


def _losses(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """-log p of one id in each row."""
    return -p[np.arange(len(ids)), ids]


def _perplexity(losses: np.ndarray) -> tuple[float, float | None]:
    """exp of the mean loss, and its standard error."""
    loss = float(losses.mean())
    try:
        perplexity = math.exp(loss)
        error = perplexity * float(losses.std()) / math.sqrt(len(losses))
    except OverflowError:
        error = math.inf
    if not math.isfinite(error):
        raise ModelError(
            f"the mean loss is {loss:.6g} nats for each id, and its exponential, the perplexity, is beyond the largest "
            f"number: the weights are damaged, or the tokenizer is another model's; check them, or export again."
        )
    return perplexity, error if len(losses) > 1 else None
