"""Draws of several ids of a text at once, before the first of them is known: what compiled steps are given.

That is possible where nothing but logits and random numbers decides: no penalty, no bad words, no form of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from npllama.execution.drawing.plan import NOT_DRAWN, Plan
from npllama.generation.sampling.basic import Draw, cut

GREEDY = 1, (1.0, 0.0, 1.0)
"""Top-k, and top_p, min_p and temperature, of which the most probable id comes."""


class Ahead(NamedTuple):
    """The draws of a text's next ids, alike but for their numbers. ends: ids that end the text."""

    draw: Draw
    numbers: Sequence[float]
    ends: Collection[int]


def plan_of(texts: Sequence[Ahead], n: int, most: Callable[[int], int]) -> Plan | None:
    """The next n draws of some texts; None where compiled code cannot draw them. most: top-k that it can, of n ids."""
    cuts, chances = [], []
    for draw, _, _ in texts:
        options, n_ids = draw.options, len(draw.allowed)
        k, numbers = GREEDY if options.temperature == 0 else (options.top_k, cut(options))
        if n_ids > draw.allowed.n_ids or not 0 < k <= min(most(n_ids), n_ids - 1):
            return None
        cuts.append((n_ids, k))
        chances.append(numbers)
    changed = [(r, one.draw.changes) for r, one in enumerate(texts) if one.draw.changes is not None]
    rows = [np.full(len(changes.ids), r, np.int64) for r, changes in changed]
    R = len(texts)
    return Plan(
        np.array(cuts, np.int64),
        np.array(chances, np.float64),
        np.array([one.numbers[:n] for one in texts], np.float64).T.copy(),
        np.concatenate([np.empty(0, np.int64), *rows]),
        np.concatenate([np.empty(0, np.int64), *(changes.ids for _, changes in changed)]),
        np.concatenate([np.empty(0), *(changes.added for _, changes in changed)]),
        np.array(sorted({i for one in texts for i in one.ends}), np.int64),
        np.empty((R, max(k for _, k in cuts)), np.int64),
        np.full((n, R), NOT_DRAWN, np.int64),
    )
