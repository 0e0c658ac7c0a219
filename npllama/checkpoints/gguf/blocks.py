"""Quantized blocks of GGUF files: the levels and scales in them, and the float32 numbers that they stand for.

A block is a run of 32 or 256 elements of one row: integer levels of a few bits, and the scales that groups of 16 or 32
of them share. Each reader takes blocks as bytes (n, size) uint8 and returns levels (n, groups, group), scales and
minimums (n, groups); a number is level * scale + minimum. All arithmetic is float32 in the order written, so the
result is the number that ggml defines, to the bit: where ggml subtracts an offset, minus the offset is added.

Letters: d the scale of a block and m its offset (both float16), q a level, sc the scale of a group.
Source: ggml, ggml-common.h (layouts) and ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from npllama.numbers.blocks import GROUP
from npllama.numbers.formats import Levels, LevelSet
from npllama.numbers.ggml import IQ4_LEVELS

Reader = Callable[[np.ndarray, str], Levels]

TWO_BITS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
EACH_BIT = np.arange(8, dtype=np.uint8)[:, None]
NIBBLES = np.array([[0], [4]], np.uint8)
IQ4_TABLE = np.array(IQ4_LEVELS, np.int8)


@dataclass(frozen=True)
class BlockType:
    """One number format of ggml: `size` bytes hold `elements` numbers, of which `group` share a scale.

    values: the levels that there are. minimums: whether groups have one.
    """

    name: str
    elements: int
    size: int
    read: Reader
    values: Sequence[int]
    group: int = 32
    minimums: bool = False

    @property
    def level_set(self) -> LevelSet | None:
        """What a number format must hold to keep such blocks; None for groups that are not those of npllama."""
        return LevelSet(frozenset(self.values), self.minimums) if self.group == GROUP else None

    def levels(self, blocks: np.ndarray, order: str = "<") -> Levels:
        """Blocks (n, size) uint8 -> levels and scales; `order` is that of numbers of several bytes.

        Scales that are not finite, which no quantizer writes, give numbers that are not finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            return self.read(blocks, order)

    def decode(self, blocks: np.ndarray, order: str = "<") -> np.ndarray:
        """The same as numbers, (n, elements) float32, new."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.read(blocks, order).widen().reshape(len(blocks), self.elements)


def _half(blocks: np.ndarray, at: int, order: str) -> np.ndarray:
    """The float16 at byte `at` of each block: (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(f"{order}f2").astype(np.float32)


def _low_then_high(qs: np.ndarray) -> np.ndarray:
    """Sixteen bytes -> 32 nibbles, the low ones first: (n, 16) -> (n, 32) uint8."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, at: int, order: str) -> np.ndarray:
    """The 32 bits of the number at byte `at`, the lowest first, worth 16 each: (n, 32) uint8."""
    four = blocks[:, at : at + 4] if order == "<" else blocks[:, at + 3 : at - 1 : -1]
    return np.unpackbits(four, axis=1, bitorder="little") << 4


def _signed(q: np.ndarray, zero: int) -> np.ndarray:
    """Levels that count from `zero`: uint8 -> int8."""
    return q.view(np.int8) - np.int8(zero)


def _one_group(q: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None = None) -> Levels:
    """Blocks of 32: levels (n, 32), scale and minimum (n, 1)."""
    return Levels(q.view(np.int8)[:, None, :], scale, minimum)


# Blocks of 32 ---------------------------------------------------------------------------------------------------------


def _q4_0(blocks: np.ndarray, order: str) -> Levels:
    """y = d * (q - 8)."""
    return _one_group(_signed(_low_then_high(blocks[:, 2:]), 8), _half(blocks, 0, order))


def _q4_1(blocks: np.ndarray, order: str) -> Levels:
    """y = d * q + m."""
    return _one_group(_low_then_high(blocks[:, 4:]), _half(blocks, 0, order), _half(blocks, 2, order))


def _q5_0(blocks: np.ndarray, order: str) -> Levels:
    """y = d * (q - 16); the fifth bit of q stands apart."""
    q = _low_then_high(blocks[:, 6:]) | _fifth_bits(blocks, 2, order)
    return _one_group(_signed(q, 16), _half(blocks, 0, order))


def _q5_1(blocks: np.ndarray, order: str) -> Levels:
    """y = d * q + m; the fifth bit of q stands apart."""
    q = _low_then_high(blocks[:, 8:]) | _fifth_bits(blocks, 4, order)
    return _one_group(q, _half(blocks, 0, order), _half(blocks, 2, order))


def _q8_0(blocks: np.ndarray, order: str) -> Levels:
    """y = d * q, q of 8 bits with a sign."""
    return _one_group(blocks[:, 2:], _half(blocks, 0, order))


def _iq4_nl(blocks: np.ndarray, order: str) -> Levels:
    """y = d * level[q]."""
    return _one_group(IQ4_TABLE[_low_then_high(blocks[:, 2:])], _half(blocks, 0, order))


# Blocks of 256 --------------------------------------------------------------------------------------------------------


def _q2_k(blocks: np.ndarray, order: str) -> Levels:
    """y = (d * sc) * q - m * least, for 16 groups of 16; sc and least share a byte."""
    n, scales = len(blocks), blocks[:, :16]
    q = blocks[:, 16:80].reshape(n, 2, 1, 32) >> TWO_BITS & 3  # (n, 2, 4, 32)
    scale = _half(blocks, 80, order) * (scales & 15).astype(np.float32)  # (n, 16)
    least = _half(blocks, 82, order) * (scales >> 4).astype(np.float32)
    return Levels(q.reshape(n, 16, 16).view(np.int8), scale, -least)


def _q3_k(blocks: np.ndarray, order: str) -> Levels:
    """y = (d * (sc - 32)) * (q - 4), for 16 groups of 16; the third bit of q and two bits of sc stand apart."""
    n, packed = len(blocks), blocks[:, 96:108]
    high = blocks[:, None, :32] >> EACH_BIT & 1  # (n, 8, 32)
    low = blocks[:, 32:96].reshape(n, 2, 1, 32) >> TWO_BITS & 3  # (n, 2, 4, 32)
    q = low.reshape(n, 8, 32) | high << 2
    upper = packed[:, None, 8:] >> TWO_BITS & 3  # (n, 4, 4)
    sc = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1) | upper.reshape(n, 16) << 4
    scale = _half(blocks, 108, order) * _signed(sc, 32).astype(np.float32)
    return Levels(_signed(q, 4).reshape(n, 16, 16), scale)


def _eight_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes -> scales and offsets of eight groups, of six bits each: 2 x (n, 8) float32."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    offsets = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return scales.astype(np.float32), offsets.astype(np.float32)


def _scaled_minus_offset(blocks: np.ndarray, q: np.ndarray, order: str) -> Levels:
    """y = (d * sc) * q - m * least, for 8 groups of 32: q (n, 8, 32)."""
    sc, least = _eight_scales(blocks[:, 4:16])
    scale, offset = _half(blocks, 0, order) * sc, _half(blocks, 2, order) * least  # (n, 8)
    return Levels(q.view(np.int8), scale, -offset)


def _q4_k(blocks: np.ndarray, order: str) -> Levels:
    """Two groups share 32 bytes: the low nibbles are of the first."""
    n = len(blocks)
    q = blocks[:, 16:].reshape(n, 4, 1, 32) >> NIBBLES & 15  # (n, 4, 2, 32)
    return _scaled_minus_offset(blocks, q.reshape(n, 8, 32), order)


def _q5_k(blocks: np.ndarray, order: str) -> Levels:
    """As Q4_K, with a fifth bit: byte l has those of element l of all eight groups."""
    n = len(blocks)
    q = blocks[:, 48:].reshape(n, 4, 1, 32) >> NIBBLES & 15
    fifth = (blocks[:, None, 16:48] >> EACH_BIT & 1) << 4  # (n, 8, 32)
    return _scaled_minus_offset(blocks, q.reshape(n, 8, 32) | fifth, order)


def _q6_k(blocks: np.ndarray, order: str) -> Levels:
    """y = (d * sc) * (q - 32), for 16 groups of 16; two bits of q stand apart."""
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64) >> NIBBLES & 15  # (n, 2, 2, 64)
    high = blocks[:, 128:192].reshape(n, 2, 1, 32) >> TWO_BITS & 3  # (n, 2, 4, 32)
    q = low.reshape(n, 2, 4, 32) | high << 4
    scale = _half(blocks, 208, order) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Levels(_signed(q, 32).reshape(n, 16, 16), scale)


def _iq4_xs(blocks: np.ndarray, order: str) -> Levels:
    """y = (d * (sc - 32)) * level[q], for 8 groups of 32; two bits of sc stand apart."""
    n = len(blocks)
    upper = np.ascontiguousarray(blocks[:, 2:4]).view(f"{order}u2")  # (n, 1)
    upper = (upper >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)  # (n, 8)
    lower = (blocks[:, 4:8, None] >> NIBBLES[:, 0] & 15).reshape(n, 8)
    scale = _half(blocks, 0, order) * _signed(lower | upper << 4, 32).astype(np.float32)
    q = blocks[:, 8:].reshape(n, 8, 1, 16) >> NIBBLES & 15  # (n, 8, 2, 16)
    return Levels(IQ4_TABLE[q].reshape(n, 8, 32), scale)


BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18, _q4_0, range(-8, 8)),
    3: BlockType("Q4_1", 32, 20, _q4_1, range(16), minimums=True),
    6: BlockType("Q5_0", 32, 22, _q5_0, range(-16, 16)),
    7: BlockType("Q5_1", 32, 24, _q5_1, range(32), minimums=True),
    8: BlockType("Q8_0", 32, 34, _q8_0, range(-128, 128)),
    10: BlockType("Q2_K", 256, 84, _q2_k, range(4), group=16, minimums=True),
    11: BlockType("Q3_K", 256, 110, _q3_k, range(-4, 4), group=16),
    12: BlockType("Q4_K", 256, 144, _q4_k, range(16), minimums=True),
    13: BlockType("Q5_K", 256, 176, _q5_k, range(32), minimums=True),
    14: BlockType("Q6_K", 256, 210, _q6_k, range(-32, 32), group=16),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl, IQ4_LEVELS),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs, IQ4_LEVELS),
}
"""ggml's number of a type -> how its blocks are read."""
