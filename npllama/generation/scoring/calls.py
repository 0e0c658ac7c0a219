"""The calls of an open model that ask how likely texts are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npllama.config import ModelConfig
from npllama.errors import UsageError, checked_flag, quote, whole_number
from npllama.generation.chunks import Sight
from npllama.generation.jobs import Job
from npllama.generation.requests import POLICIES, Prompt, is_one
from npllama.generation.runtime import Runtime
from npllama.generation.scoring.jobs import (
    NORMALIZATIONS,
    POOLINGS,
    EmbedJob,
    Ranked,
    Score,
    ScoreJob,
    checked_choice,
    option_jobs,
    ranked,
    windows,
)
from npllama.text.protocol import Tokenizer


class Scores:
    """A part of Llama: scores, ranked options, embeddings, perplexity."""

    config: ModelConfig
    context: int
    runtime: Runtime
    tokenizer: Tokenizer

    def _ids(self, prompt: Prompt, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        raise NotImplementedError

    def _fitting(self, ids: list[int]) -> list[int]:
        raise NotImplementedError

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """How probable a continuation is after a prompt, id by id. Both text, or both ids.

        Text is cut into ids as a whole; what is scored begins with the first id that differs from the prompt's own, so
        an id that reaches across the boundary counts as the continuation's.
        """
        return self.score_many([(prompt, continuation)])[0]

    def score_many(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> list[Score]:
        """`score` of many pairs of prompt and continuation, in company, in order. Equal prompts are read once."""
        texts = [self._pair_ids(*pair) for pair in _pairs(pairs)]
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (ids, first) in enumerate(texts):
            alike.setdefault(tuple(ids[:first]), []).append(i)
        groups: list[list[Job]] = []
        found: dict[int, ScoreJob] = {}
        for members in alike.values():
            jobs, scores = option_jobs(
                [texts[i][0] for i in members], [texts[i][1] for i in members], self.runtime.window
            )
            groups.append(jobs)
            found |= zip(members, scores, strict=True)
        self.runtime.run(groups)
        return [found[i].score for i in range(len(texts))]

    def rank(self, prompt: Prompt, options: Sequence[Prompt], normalize: str = "none") -> list[Ranked]:
        """Options that may continue a prompt, the most probable first; the prompt is read once.

        normalize: "none", or divide log probabilities by the option's number of "tokens" or "bytes".
        """
        checked_choice("normalize", normalize, NORMALIZATIONS)
        if isinstance(options, str) or not isinstance(options, Sequence) or not len(options):
            raise UsageError("options: needs a list of at least one text, or list of ids.")
        pairs = [self._pair_ids(prompt, option) for option in options]
        jobs, scores = option_jobs([ids for ids, _ in pairs], [first for _, first in pairs], self.runtime.window)
        self.runtime.run([jobs] if jobs[0].followers else [[job] for job in jobs])
        return ranked(options, [job.score for job in scores], normalize)

    def choose(self, prompt: Prompt, options: Sequence[Prompt], normalize: str = "none") -> Ranked:
        """The most probable of some options: the first of `rank`."""
        return self.rank(prompt, options, normalize)[0]

    def embed(self, texts: Prompt | Sequence[Prompt], pooling: str = "mean", normalize: bool = True) -> np.ndarray:
        """Vectors for texts (N, D) float32, or (D,) for one: final hidden states, as the output sees them.

        pooling: their "mean" over all ids, BOS included, or that of the "last" id. normalize: to length 1.
        """
        checked_choice("pooling", pooling, POOLINGS)
        checked_flag("normalize", normalize)
        one = is_one(texts)
        prompts: list[Prompt] = [texts] if one else list(texts)  # type: ignore[list-item, arg-type]
        jobs = [EmbedJob(self._fitting(self._ids(p)), self.runtime.window, pooling) for p in prompts]
        self.runtime.run([[job] for job in jobs])
        vectors = [job.embedding(normalize) for job in jobs]
        return vectors[0] if one else np.array(vectors, np.float32).reshape(len(jobs), self.config.dim)

    def perplexity(self, text: Prompt, n_ctx: int | None = None, context_policy: str = "stop") -> float:
        """exp(mean of -log p) over all ids of a text, read in windows of n_ctx ids that each begin with BOS.

        n_ctx None: the context. Where the model puts no BOS before a text, a window begins with the last id of the one
        before, and the first id of the text is not predicted. context_policy "slide": the text is read as one, of which
        each id sees the last n_ctx, the first four of the text among them.
        """
        size = whole_number(self.context if n_ctx is None else n_ctx, 2, self.context)
        if size is None:
            raise UsageError(f"n_ctx={quote(n_ctx)}: needs 2 to {self.context} ids, the context.")
        ids = self.tokenizer.encode(text, False, False) if isinstance(text, str) else self._ids(text)
        bos = self.tokenizer.bos_id if self.config.add_bos_token and isinstance(text, str) else None
        if checked_choice("context_policy", context_policy, POLICIES) == "slide":
            seen = Sight.sliding(size, self.config.sliding_window, 0)
            jobs = [ScoreJob(whole, 1, *seen) for whole in windows(ids, len(ids) + 2, bos)]
        else:
            jobs = [ScoreJob(window, 1, self.runtime.window) for window in windows(ids, size, bos)]
        if not jobs:
            raise UsageError("the text has no id to predict; give a longer text.")
        self.runtime.run([[job] for job in jobs])
        return float(np.exp(-np.mean(np.concatenate([job.score.logprobs for job in jobs]))))

    def _pair_ids(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """The ids of a prompt and its continuation, and the number of the first that is scored."""
        if isinstance(prompt, str) and isinstance(continuation, str):
            before = self.tokenizer.encode(prompt, None, False)
            ids = self.tokenizer.encode(prompt + continuation, None, False)
            first = next(
                (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
            )
        elif isinstance(prompt, str) or isinstance(continuation, str):
            raise UsageError("prompt and continuation must both be text, or both lists of ids.")
        else:
            before = self._ids(prompt)
            ids, first = before + self._ids(continuation), len(before)
        if first == 0 or first >= len(ids):
            raise UsageError(
                "the continuation has no id of its own, or nothing stands before its first id; give a longer one, or a "
                "prompt."
            )
        self._fitting(ids[:-1])  # the last one is not read
        return ids, first


def _pairs(pairs: Sequence[tuple[Prompt, Prompt]]) -> list[tuple[Prompt, Prompt]]:
    """Pairs of prompt and continuation. Raises UsageError for what is none."""
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise UsageError(f"pairs is {quote(pairs)}; a list of (prompt, continuation) is needed.")
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UsageError(f"pairs[{i}] is {quote(pair)}; (prompt, continuation) is needed.")
    return list(pairs)
