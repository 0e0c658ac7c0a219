"""Probabilities by definition, for tests of sampling."""

from __future__ import annotations

import math

Left = dict[int, float]
"""Ids that are left, the best first where a step sorts, and their logits."""


def softmax(left: Left) -> Left:
    best = max(left.values())
    weights = {v: math.exp(l - best) for v, l in left.items()}
    total = math.fsum(weights.values())
    return {v: w / total for v, w in weights.items()}


def best_first(left: Left) -> list[int]:
    return sorted(left, key=lambda v: (-left[v], v))
