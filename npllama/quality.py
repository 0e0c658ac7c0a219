"""How well does a model predict a text, and how far is it from the model it was made from?

The text is cut into windows of n ids, each of them BOS and the next n - 1 ids of the text; windows do not overlap, and
every id of the text is predicted once, from those before it in its window. With p the model and r the reference:

    perplexity        exp(mean over ids of -log p(id))
    KL divergence     mean over places of sum_v r(v) (log r(v) - log p(v)), in nats
    top-1 agreement   share of places where both find the same id most probable
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from npllama.errors import UsageError
from npllama.inference import Llama


@dataclass(frozen=True)
class Quality:
    """What was measured, over n_tokens predictions in windows of n_ctx; None where there was no reference."""

    n_tokens: int
    n_ctx: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top_1_agreement: float | None = None


def quality(llama: Llama, text: str, n_ctx: int = 256, reference: Llama | None = None) -> Quality:
    """Measure a model on a text, and against a reference model of the same vocabulary.

    perplexity_error is its standard error. Raises UsageError for a text too short for one window, or for models whose
    vocabularies differ.
    """
    if reference is not None and reference.config.vocab_size != llama.config.vocab_size:
        raise UsageError(
            f"the models have vocabularies of {llama.config.vocab_size} and {reference.config.vocab_size} ids; "
            f"the reference must be the same model in another number format."
        )
    own, other, kl, same = [], [], [], []
    for window in windows(llama, text, n_ctx):
        targets = np.array(window[1:])
        p = log_softmax(llama.logits(window)[:-1])
        own.append(-p[np.arange(len(targets)), targets])
        if reference is not None:
            r = log_softmax(reference.logits(window)[:-1])
            other.append(-r[np.arange(len(targets)), targets])
            kl.append((np.exp(r) * (r - p)).sum(axis=-1))
            same.append(p.argmax(axis=-1) == r.argmax(axis=-1))
    loss = np.concatenate(own)
    perplexity = math.exp(loss.mean())
    return Quality(
        n_tokens=len(loss),
        n_ctx=n_ctx,
        perplexity=perplexity,
        perplexity_error=perplexity * float(loss.std()) / math.sqrt(len(loss)),
        reference_perplexity=math.exp(np.concatenate(other).mean()) if other else None,
        kl_divergence=float(np.concatenate(kl).mean()) if kl else None,
        top_1_agreement=float(np.concatenate(same).mean()) if same else None,
    )


def windows(llama: Llama, text: str, n_ctx: int) -> Iterator[list[int]]:
    """BOS and the next n_ctx - 1 ids of the text, again and again; a rest that does not fill a window is left out."""
    ids = llama.tokenizer.encode(text, bos=False, eos=False)
    if not 2 <= n_ctx <= llama.context:
        raise UsageError(f"windows of {n_ctx} ids: 2 to {llama.context}, the model's context, are possible.")
    step = n_ctx - 1
    if len(ids) < step:
        raise UsageError(f"the text has {len(ids)} ids, one window needs {step}; give a longer text or a smaller -c.")
    for start in range(0, len(ids) - step + 1, step):
        yield [llama.tokenizer.bos_id, *ids[start : start + step]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, in float64: differences of 1e-4 between models must not drown."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
