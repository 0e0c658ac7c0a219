"""Blocks of GGUF files give the numbers of the package gguf, to the bit, and those of the formulas written out."""

from __future__ import annotations

import struct

import gguf_files
import numpy as np
import pytest
from gguf_files import HALVES

from npllama.checkpoints.gguf.blocks import BLOCK_TYPES, BlockType

TYPES = list(BLOCK_TYPES.values())
WORDS = {"Q5_0": (2, 4), "Q5_1": (4, 4), "IQ4_XS": (2, 2)}
"""Where an integer of several bytes stands, and how many."""


def random_blocks(kind: BlockType, n: int, seed: int) -> np.ndarray:
    """Blocks of random bits with ordinary scales: (n, size) uint8, little-endian."""
    return gguf_files.random_blocks(kind, n, np.random.default_rng(seed))


@pytest.mark.parametrize("number", BLOCK_TYPES, ids=[kind.name for kind in TYPES])
def test_blocks_of_random_bits_are_those_of_the_package_gguf(number: int) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the package gguf")
    kind = BLOCK_TYPES[number]
    assert gguf.GGMLQuantizationType(number).name == kind.name
    assert gguf.GGML_QUANT_SIZES[number] == (kind.elements, kind.size)
    blocks = random_blocks(kind, 501, seed=number)
    needed = gguf.dequantize(blocks, gguf.GGMLQuantizationType(number))
    found = kind.decode(blocks)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), needed.view(np.uint32))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_big_endian_blocks_are_the_same_numbers(kind: BlockType) -> None:
    blocks = random_blocks(kind, 40, seed=3)
    swapped = blocks.copy()
    for at, size in [*((at, 2) for at in HALVES[kind.name]), WORDS.get(kind.name, (0, 0))]:
        swapped[:, at : at + size] = blocks[:, at : at + size][:, ::-1]
    np.testing.assert_array_equal(kind.decode(swapped, ">"), kind.decode(blocks))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_scales_that_are_not_finite_give_no_warning(kind: BlockType) -> None:
    blocks = random_blocks(kind, 4, seed=4)
    for at in HALVES[kind.name]:
        blocks[:, at : at + 2] = np.array([[np.inf], [-np.inf], [np.nan], [np.inf]], "<f2").view(np.uint8)
    assert not np.isfinite(kind.decode(blocks)).all()


def test_no_blocks_give_no_numbers() -> None:
    for kind in TYPES:
        assert kind.decode(np.empty((0, kind.size), np.uint8)).shape == (0, kind.elements)


def named(name: str) -> BlockType:
    return next(kind for kind in TYPES if kind.name == name)


def test_a_block_of_q4_0_holds_its_second_half_in_the_high_nibbles() -> None:
    block = struct.pack("<e16B", 0.5, *(j | (15 - j) << 4 for j in range(16)))
    (found,) = named("Q4_0").decode(np.frombuffer(block, np.uint8)[None])
    np.testing.assert_array_equal(found, [0.5 * (j - 8) for j in [*range(16), *range(15, -1, -1)]])


def test_a_block_of_q6_k_is_its_formula_element_by_element() -> None:
    (block,) = random_blocks(named("Q6_K"), 1, seed=6)
    ql, qh, sc = block[:128].tolist(), block[128:192].tolist(), block[192:208].view(np.int8)
    d = np.float32(block[208:].view("<f2")[0])
    needed = []
    for e in range(256):
        half, g, l = e // 128, e % 128 // 32, e % 32
        low = ql[64 * half + 32 * (g % 2) + l] >> 4 * (g // 2) & 15
        q = (low | (qh[32 * half + l] >> 2 * g & 3) << 4) - 32
        needed.append(d * np.float32(sc[8 * half + 2 * g + l // 16]) * np.float32(q))
    np.testing.assert_array_equal(named("Q6_K").decode(block[None])[0], np.array(needed, np.float32))
