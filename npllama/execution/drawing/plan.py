"""What compiled code has to know to go several steps in one call, each fed what was drawn in the one before.

Between two steps of a small model Python takes as long as a tenth of a step, and the threads of the kernels wait.

Axes: R texts, n steps, C logits that are changed, Z ids that end a text, V ids of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NOT_DRAWN = -1
"""In the place of an id: the steps ended before."""


class Plan(NamedTuple):
    """The draws of n steps of R texts, one row each.

    cuts (R, 2) int64: how many of the first ids may come, and of these the k most probable; chances (R, 3) float64:
    top_p, min_p and temperature, above 0; numbers (n, R) float64 from [0, 1): what sampling.basic says of them.
    texts, ids (C,) int64: whose logits are changed, and which, by added (C,) float64, -inf for an id that must not
    come. ends (Z,) int64: ids that end a text, whichever: no step follows. best (R, K) int64: room for the k of every
    text. drawn (n, R) int64: the ids; the first step that cannot be drawn, and those behind it, begin with NOT_DRAWN.
    """

    cuts: np.ndarray
    chances: np.ndarray
    numbers: np.ndarray
    texts: np.ndarray
    ids: np.ndarray
    added: np.ndarray
    ends: np.ndarray
    best: np.ndarray
    drawn: np.ndarray


def empty_plan() -> Plan:
    """A plan without steps: of the types that every plan has."""
    some, none = np.empty((0, 2), np.int64), np.empty(0, np.int64)
    return Plan(some, np.empty((0, 3)), np.empty((0, 0)), none, none, np.empty(0), none, some, some)


def greedy_plan(n_steps: int, n_ids: int) -> Plan:
    """The next ids of one text, each the most probable of the first n_ids; nothing ends it."""
    none, some = np.empty(0, np.int64), np.empty((1, 1), np.int64)
    cuts, chances = np.array([[n_ids, 1]]), np.array([[0.0, 1.0, 1.0]])
    drawn = np.full((n_steps, 1), NOT_DRAWN)
    return Plan(cuts, chances, np.zeros((n_steps, 1)), none, none, np.empty(0), none, some, drawn)
