"""How likely texts are: the probabilities of given ids, options compared, and hidden states as embeddings.

All of it goes through the scheduler, in company with whatever else runs, and keeps no logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass

import numpy as np

from npllama.errors import UsageError, quote
from npllama.execution.drawing.top_k import check_finite
from npllama.generation.jobs import Job
from npllama.generation.sampling.logprobs import log_softmax

NORMALIZATIONS = ("none", "tokens", "bytes")
POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class Score:
    """The natural logarithm of a continuation's probability, and of each of its ids' in turn.

    is_greedy: whether each id is the most probable one where it stands.
    """

    logprob: float
    tokens: list[int]
    logprobs: list[float]
    is_greedy: bool


@dataclass(frozen=True)
class Ranked:
    """An option, which of those given it is, its score, and the number that ranks it: the higher the better."""

    option: str | Ids[int]
    index: int
    score: Score
    value: float


class ScoreJob(Job):
    """The log probabilities of the ids from number `first` on, each given all before it. The last is not fed."""

    def __init__(self, ids: list[int], first: int, window: int, n_sink: int = 0) -> None:
        super().__init__(ids[:-1], window, n_sink)
        self.received = first - 1
        self._all, self._first = ids, first
        self._logprobs: list[float] = []
        self._greedy = True

    def receive(self, positions: Ids[int], logits: np.ndarray) -> None:
        check_finite(logits)
        for p, row in zip(positions, logits, strict=True):
            token = self._all[p + 1]
            self._logprobs.append(float(log_softmax(row)[token]))
            self._greedy = self._greedy and int(row.argmax()) == token
        self.received += len(positions)
        self.done = self.received == len(self.ids)

    @property
    def score(self) -> Score:
        return Score(float(np.sum(self._logprobs)), self._all[self._first :], list(self._logprobs), self._greedy)


class PrefixJob(Job):
    """A beginning that others, its followers, share: it is read once."""

    def __init__(self, ids: list[int], window: int) -> None:
        super().__init__(ids, window)
        self.received = len(ids) - 1

    def receive(self, positions: Ids[int], logits: np.ndarray) -> None:
        self.done = True


class EmbedJob(Job):
    """The final hidden states of a text, normalised as the output sees them: the last one, or the mean of all."""

    hidden = True

    def __init__(self, ids: list[int], window: int, pooling: str) -> None:
        super().__init__(ids, window)
        self.received = len(ids) - 1 if pooling == "last" else 0
        self._count = len(ids) - self.received
        self._sum = 0.0

    def receive(self, positions: Ids[int], logits: np.ndarray) -> None:
        check_finite(logits)
        self._sum = self._sum + logits.sum(axis=0, dtype=np.float64)
        self.received += len(positions)
        self.done = self.received == len(self.ids)

    def embedding(self, normalize: bool) -> np.ndarray:
        """The vector (D,) float32; of length 1 if asked."""
        mean = np.asarray(self._sum) / self._count
        if normalize:
            mean /= np.linalg.norm(mean) or 1.0
        found: np.ndarray = mean.astype(np.float32)
        return found


def option_jobs(texts: list[list[int]], n_prompt: list[int], window: int) -> tuple[list[Job], list[ScoreJob]]:
    """Jobs that score several continuations of one prompt, whose common beginning is read once: all, and the scores.

    texts: prompt and continuation; n_prompt: how many ids of each are not scored.
    """
    scores = [ScoreJob(ids, first, window) for ids, first in zip(texts, n_prompt, strict=True)]
    if len(scores) == 1 or len(set(n_prompt)) > 1 or _common(texts) < n_prompt[0]:
        return [*scores], scores
    prefix = PrefixJob(texts[0][: n_prompt[0]], window)
    prefix.followers.extend(scores)
    return [prefix, *scores], scores


def _common(texts: list[list[int]]) -> int:
    """How many ids all texts begin with."""
    n = 0
    for column in zip(*texts, strict=False):
        if len(set(column)) > 1:
            break
        n += 1
    return n


def ranked(options: Ids[str | Ids[int]], scores: list[Score], normalize: str) -> list[Ranked]:
    """The options, the most probable first; among equals in the order given. normalize: see `NORMALIZATIONS`.

    "tokens" divides log probabilities by the number of ids, "bytes" by that of the option's bytes in UTF-8.
    """
    found = []
    for index, (option, score) in enumerate(zip(options, scores, strict=True)):
        length = 1
        if normalize == "tokens":
            length = len(score.tokens)
        elif normalize == "bytes":
            length = len(option.encode("utf-8", "surrogatepass")) if isinstance(option, str) else 0
        if length == 0:
            raise UsageError('normalize="bytes" needs options of text, not of ids; use "tokens".')
        found.append(Ranked(option, index, score, score.logprob / length))
    return sorted(found, key=lambda one: -one.value)


def checked_choice(name: str, value: object, known: Ids[str]) -> str:
    """One of the words known, or UsageError."""
    if value not in known:
        raise UsageError(f"{name}={quote(value)} is not known; it needs one of {', '.join(known)}.")
    return str(value)


def windows(ids: list[int], n_ctx: int, bos: int | None) -> Iterator[list[int]]:
    """BOS (or the last id before) and the next n_ctx - 1 ids of a text, again and again; at last what is left."""
    step = n_ctx - 1
    if bos is not None:
        yield from ([bos, *ids[start : start + step]] for start in range(0, len(ids), step))
        return
    yield from (ids[start : start + n_ctx] for start in range(0, len(ids) - 1, step))
