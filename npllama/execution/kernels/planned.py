"""Several steps in one call: model.forward, each time fed what was drawn from its logits before.

model.forward and the search for the largest logits are compiled on their own, and called by names that stand for where
they begin in this process.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from npllama.execution.drawing.plan import NOT_DRAWN
from npllama.execution.kernels.flags import INNER, SERIAL
from npllama.execution.kernels.numba_internals import call_by_name
from npllama.execution.kernels.simd import load_scalar, store_scalar
from npllama.model import Rotation

TOP_K = "npllama_top_k"
LOWEST = float(np.finfo(np.float32).min)


@intrinsic
def top_k(typingctx, logits, ids, cuts, chances, numbers, drawn):
    """kernels.top_k.top_k."""

    def generate(context, builder, signature, args):
        return call_by_name(context, builder, TOP_K, signature, args)

    return types.boolean(logits, ids, cuts, chances, numbers, drawn), generate


@njit(**INNER)
def draw(logits, plan, drawn, step):
    """The ids of a step, as sampling.basic.draw_rows draws them from its logits (R, V), which are changed.

    Returns whether they could be drawn: all logits are finite, and no id is one that must not come.
    """
    finite = True
    for c in range(plan.added.shape[0]):
        row = logits[load_scalar(plan.texts, c)]
        before = np.float64(load_scalar(row, load_scalar(plan.ids, c)))
        finite = finite and np.isfinite(before)
        store_scalar(row, load_scalar(plan.ids, c), np.float32(max(before + load_scalar(plan.added, c), LOWEST)))
    if not (finite and top_k(logits, plan.best, plan.cuts, plan.chances, plan.numbers[step], drawn)):
        return False
    for c in range(plan.added.shape[0]):
        r = load_scalar(plan.texts, c)
        finite = finite and np.float64(load_scalar(logits[r], load_scalar(drawn, r))) > LOWEST
    return finite


def make_run(name):
    """The function that goes several steps with the model.forward of this name."""

    @intrinsic
    def forward(typingctx, batch, rotation, weights, cache, config):
        logits = types.Array(types.float32, 2, "C")

        def generate(context, builder, signature, args):
            return call_by_name(context, builder, name, signature, args)

        return logits(batch, rotation, weights, cache, config), generate

    @njit(**SERIAL)
    def run(batch, rotation, weights, cache, config, plan):
        """Go the steps of a plan: see drawing.plan.Plan.

        rotation has the positions of all steps, one after the other; batch one row of each text. Its tokens and
        positions change with each step.
        """
        n, T = plan.numbers.shape[0], batch.tokens.shape[0]
        for step in range(n):
            a, b = step * T, (step + 1) * T
            some = Rotation(rotation.cos[a:b], rotation.sin[a:b], rotation.sink_cos[a:b], rotation.sink_sin[a:b])
            logits = forward(batch, some, weights, cache, config)
            drawn = plan.drawn[step]
            if not draw(logits, plan, drawn, step):
                store_scalar(drawn, 0, NOT_DRAWN)
                return
            ended = False
            for t in range(T):
                token = load_scalar(drawn, t)
                for e in range(plan.ends.shape[0]):
                    ended = ended or token == load_scalar(plan.ends, e)
                store_scalar(batch.tokens, t, token)
                store_scalar(batch.pos, t, load_scalar(batch.pos, t) + 1)
            if ended:
                return

    return run
