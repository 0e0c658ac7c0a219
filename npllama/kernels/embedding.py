"""ops.embed for q8, q6 and q4: one row out of the block in which it stands, interleaved with others."""

from __future__ import annotations

import numpy as np
from numba import njit

from npllama.kernels.flags import INNER
from npllama.kernels.simd import bf16_to_f32
from npllama.numbers.blocks import BLOCK_ROWS, GROUP, SCALES
from npllama.numbers.q4 import Q4_CODEBOOK
from npllama.numbers.q6 import NIBBLE_BYTES, Q6_LOWEST

LEVELS = np.array(Q4_CODEBOOK, np.float32)


@njit(**INNER)
def level_q8(codes, b, g, r, k):
    """The integer that row r of block b has in column k of group g."""
    return np.float32(codes[b, g, k // 4 * 4 * BLOCK_ROWS + r * 4 + k % 4])


@njit(**INNER)
def level_q6(codes, b, g, r, k):
    """The integer that row r of block b has in column k of group g."""
    pair = np.int64(codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4])
    tops = np.int64(codes[b, g, NIBBLE_BYTES + k // 16 * 4 * BLOCK_ROWS + r * 4 + k % 4])
    low, top = pair >> (k // 4 % 2 * 4) & 15, tops >> (k // 4 % 4 * 2) & 3
    return np.float32((low | top << 4) + Q6_LOWEST)


@njit(**INNER)
def level_q4(codes, b, g, r, k):
    """The integer that row r of block b has in column k of group g."""
    pair = codes[b, g, k // 8 * 4 * BLOCK_ROWS + r * 4 + k % 4]
    shift = 4 if k % 8 >= 4 else 0  # two expressions of unlike integers would be unified to a float
    return LEVELS[(pair >> shift) & 15]


def make_grouped_embed(level):
    """ops.embed for a format whose levels `level` reads."""

    @njit(**INNER)
    def embed(table, tokens):
        T, D = tokens.shape[0], table.columns
        x = np.empty((T, D), np.float32)
        for t in range(T):
            b, r = tokens[t] // BLOCK_ROWS, tokens[t] % BLOCK_ROWS
            factor = bf16_to_f32(table.factors[b, r])
            for g in range(table.scales.shape[1]):
                scale = SCALES[table.scales[b, g, r]]
                for k in range(min(GROUP, D - g * GROUP)):
                    x[t, g * GROUP + k] = level(table.codes, b, g, r, k) * scale * factor
        return x

    return embed


embed_q8, embed_q6, embed_q4 = make_grouped_embed(level_q8), make_grouped_embed(level_q6), make_grouped_embed(level_q4)
