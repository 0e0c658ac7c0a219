"""Tiles of AVX2, four tokens at a time, whose sums stay in registers; those of unsigned codes in 16 bits.

The instructions that multiply are the narrow place: two a cycle. Four codes times four of a token are two products of
pairs in 16 bits (pmaddubsw) and one that widens them (pmaddwd). Eight products of codes less CENTER fit into 16 bits
again, 8 * 32 * 127 = 32,512 < 2^15; so sums of half a group, in which codes stand as they are, may wrap around when
they start from -CENTER times the token's codes: what is left is exact. 256 products then take 8 + 2 such
instructions instead of 8 + 4, and two for scales: 43 products a cycle instead of 37.

Products of signed codes fill 16 bits by pairs, so each is widened at once; they need the token's codes with the row's
signs, a fourth instruction, 27 a cycle in all. For many tokens both are widened to 16 bits beforehand, which leaves two
instructions (pmaddwd and an addition) for half as many products: 28 a cycle.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.amx import LEVELS_BYTES
from npllama.execution.kernels.flags import INLINE, INNER
from npllama.execution.kernels.int8_dot import (
    DOT,
    TOKEN_TILE,
    add_pairs,
    float32x16,
    hidden,
    int8x64,
    int32x16,
    multiply_pairs,
    multiply_signed_pairs,
    multiply_wide,
    store_tile,
)
from npllama.execution.kernels.llvm import (
    address,
    broadcast,
    concat,
    constant,
    f32,
    i8,
    i16,
    i32,
    pinned,
    shuffle,
)
from npllama.execution.kernels.prefetch import bytes_group, bytes_line
from npllama.execution.kernels.simd import noinline, pointer
from npllama.numbers.blocks import BLOCK_ROWS, GROUP

USED = DOT == "avx2"

TOKENS = 4
"""Tokens whose sums fill half the registers: two vectors of 8 rows for each."""

CENTER = 32
"""What is taken from unsigned codes, 0 to 64."""

STARTS = 3
"""What belongs to a group of a token, int32: where its sum starts, then where each half does, two int16 in each."""

row_codes, row_sums, half_sums = ir.VectorType(i8, 32), ir.VectorType(i32, 8), ir.VectorType(i16, 16)


@intrinsic
def store_starts(typingctx, codes, at, factor, starts, offset):
    """Write the STARTS of the group codes[at ...], the first its sum times a factor, to int32 starts[offset ...].

    Returns the sum.
    """

    def generate(context, builder, signature, args):
        codes, at, factor, starts, offset = args
        x = llvm.load(builder, address(context, builder, signature.args[0], codes, at), row_codes, 1)
        sums = multiply_pairs(builder, constant(row_codes, 1), x)
        for distance in (4, 2):  # within each half of the group, until its first two numbers are its sums
            sums = builder.add(sums, shuffle(builder, sums, sums, [i ^ distance for i in range(16)]))
        counts = add_pairs(builder, constant(row_sums, 0), sums)
        total = builder.add(llvm.lane(builder, counts, 0), llvm.lane(builder, counts, 4))
        less = builder.bitcast(builder.mul(sums, constant(sums.type, -CENTER)), row_sums)
        target = address(context, builder, signature.args[3], starts, offset)
        for i, start in enumerate(
            (builder.mul(total, factor), llvm.lane(builder, less, 0), llvm.lane(builder, less, 4))
        ):
            llvm.store(builder, start, llvm.gep(builder, target, i32, i), 4)
        return total

    return types.int32(codes, types.intp, types.int32, starts, types.intp), generate


def repeated(builder, pointer, vector):
    """The four bytes at a pointer, as often as they fit into a vector of this type."""
    four = llvm.load(builder, pointer, i32, 4)
    return builder.bitcast(broadcast(builder, four, row_sums.count), vector)


def load_rows(builder, levels, column):
    """The codes of four columns of a group: a vector for each 8 rows."""
    at = llvm.gep(builder, levels, i8, column * BLOCK_ROWS)
    return [llvm.load(builder, llvm.gep(builder, at, i8, 32 * r), row_codes, 1) for r in range(2)]


def codes_of(builder, x, m, column):
    """Four codes of token m from a column of the group on, for every row."""
    return repeated(builder, llvm.gep(builder, x, i8, m * GROUP + column), row_codes)


def start_of(builder, starts, m, i, vector):
    """Of token m's STARTS the i-th, in all lanes."""
    return repeated(builder, llvm.gep(builder, starts, i32, m * STARTS + i), vector)


def dot_unsigned(builder, levels, x, starts, n):
    """The products of a group with each of n tokens: for each token two vectors of 8 rows."""
    totals: list[list[ir.Value]] = [[]] * n
    for half in range(2):
        sums = [[start_of(builder, starts, m, 1 + half, half_sums)] * 2 for m in range(n)]
        for column in range(half * GROUP // 2, (half + 1) * GROUP // 2, 4):
            rows = load_rows(builder, levels, column)
            for m in range(n):
                four = codes_of(builder, x, m, column)
                new = [builder.add(s, multiply_pairs(builder, w, four)) for s, w in zip(sums[m], rows, strict=True)]
                sums[m] = [pinned(builder, s) for s in new]
        for m in range(n):
            before = totals[m] if half else [start_of(builder, starts, m, 0, row_sums)] * 2
            totals[m] = [pinned(builder, add_pairs(builder, b, s)) for b, s in zip(before, sums[m], strict=True)]
    return totals


def dot_signed(builder, levels, x, starts, n):
    """The same for signed codes, whose pairs of products fill 16 bits."""
    totals = [[constant(row_sums, 0)] * 2 for m in range(n)]
    for column in range(0, GROUP, 4):
        rows = load_rows(builder, levels, column)
        for m in range(n):
            four = codes_of(builder, x, m, column)
            pairs = [multiply_signed_pairs(builder, w, four) for w in rows]
            totals[m] = [pinned(builder, add_pairs(builder, t, p)) for t, p in zip(totals[m], pairs, strict=True)]
    return totals


def dot_wide(builder, levels, x, starts, n):
    """The same for codes of 16 bits on both sides."""
    totals: list[list[ir.Value]] = [[]] * n
    for column in range(0, GROUP, 2):
        rows = [pinned(builder, w) for w in load_rows(builder, levels, 2 * column)]
        for m in range(n):
            two = repeated(builder, llvm.gep(builder, x, i16, m * GROUP + column), half_sums)
            new = [multiply_wide(builder, builder.bitcast(w, half_sums), two) for w in rows]
            if column:
                new = [pinned(builder, builder.add(t, p)) for t, p in zip(totals[m], new, strict=True)]
            totals[m] = new
    return totals


def make_dot_levels(dot):
    """An operation: the products of a group, at a pointer, with the codes of TOKENS tokens from x's group `at` on."""

    @intrinsic
    def dot_levels(typingctx, levels, codes, starts, at):
        many = types.UniTuple(int32x16, TOKENS)

        def generate(context, builder, signature, args):
            levels, codes, starts, at = args
            x = address(context, builder, signature.args[1], codes, builder.mul(at, llvm.index(GROUP)))
            starts = address(context, builder, signature.args[2], starts, builder.mul(at, llvm.index(STARTS)))
            totals = dot(builder, levels, x, starts, TOKENS)
            result = ir.Constant(context.get_value_type(many), ir.Undefined)
            for m, parts in enumerate(totals):
                result = builder.insert_value(result, concat(builder, parts), m)
            return result

        return many(levels, codes, starts, types.intp), generate

    return dot_levels


_unsigned, _signed, _wide = (make_dot_levels(dot) for dot in (dot_unsigned, dot_signed, dot_wide))


@njit(**INLINE)
def dot_unsigned_levels(levels, x, at):
    return _unsigned(levels, x.codes, x.starts, at)


@njit(**INLINE)
def dot_signed_levels(levels, x, at):
    return _signed(levels, x.codes, x.starts, at)


@njit(**INLINE)
def dot_wide_levels(levels, x, at):
    return _wide(levels, x.wide, x.starts, at)


# ---------------------------------------------------------------- codes of 16 bits


@intrinsic
def widen_rows(typingctx, codes, begin, wide, at):
    """Write four columns of a group, int8 codes[begin ...], as twice two columns to int16 wide[at ...]."""

    def generate(context, builder, signature, args):
        codes, begin, wide, at = args
        source = address(context, builder, signature.args[0], codes, begin)
        target = address(context, builder, signature.args[2], wide, at)
        zero = constant(row_codes, 0)
        for r, rows in enumerate(load_rows(builder, llvm.cast(builder, source, i8), 0)):
            for half in range(2):  # each code in the upper byte of two, then shifted down
                lanes = [n for four in range(0, 32, 4) for j in (0, 1) for n in (32, four + 2 * half + j)]
                pairs = builder.bitcast(shuffle(builder, rows, zero, lanes), half_sums)
                place = llvm.gep(builder, target, i16, 32 * half + 16 * r)
                llvm.store(builder, builder.ashr(pairs, constant(half_sums, 8)), place, 2)
        return llvm.nothing(context)

    return types.void(codes, types.intp, wide, types.intp), generate


@intrinsic
def widen_group(typingctx, codes, wide, at):
    """Write the group of a token int8 codes[at ...] to int16 wide[at ...]."""

    def generate(context, builder, signature, args):
        codes, wide, at = args
        group = llvm.load(builder, address(context, builder, signature.args[0], codes, at), row_codes, 1)
        target = address(context, builder, signature.args[1], wide, at)
        llvm.store(builder, builder.sext(group, ir.VectorType(i16, GROUP)), target, 2)
        return llvm.nothing(context)

    return types.void(codes, wide, types.intp), generate


# ---------------------------------------------------------------- tiles


@intrinsic
def local_levels(typingctx):
    """Memory for the codes of a group, on the stack of the function that calls this."""

    def generate(context, builder, signature, args):
        return llvm.cast(builder, llvm.variable(builder, ir.ArrayType(int8x64.llvm, GROUP // 4)), i8)

    return types.CPointer(types.int8)(), generate


@intrinsic
def local_totals(typingctx):
    """Memory for the sums of two times TOKENS tokens, all 0, on the stack of the function that calls this."""

    def generate(context, builder, signature, args):
        many = ir.ArrayType(float32x16.llvm, 2 * TOKENS)
        return llvm.cast(builder, llvm.variable(builder, many, ir.Constant(many, None)), f32)

    return types.CPointer(types.float32)(), generate


@intrinsic
def rolled(typingctx, n):
    """n, as the bound of a loop whose body is large enough."""

    def generate(context, builder, signature, args):
        return hidden(builder, args[0])

    return types.int64(types.int64), generate


@intrinsic
def load_totals(typingctx, totals, first):
    """The sums of TOKENS tokens from `first` on."""
    many = types.UniTuple(float32x16, TOKENS)

    def generate(context, builder, signature, args):
        at = llvm.gep(builder, args[0], float32x16.llvm, args[1])
        return llvm.load(builder, at, context.get_value_type(many))

    return many(totals, types.intp), generate


@intrinsic
def store_totals(typingctx, totals, first, values):
    """Keep the sums of TOKENS tokens from `first` on."""

    def generate(context, builder, signature, args):
        llvm.store(builder, args[2], llvm.gep(builder, args[0], float32x16.llvm, args[1]))
        return llvm.nothing(context)

    return types.void(totals, types.intp, values), generate


@njit(**INLINE)
def as_they_are(codes, here, levels):
    """Codes that were unpacked before."""
    return pointer(codes, here)


def make_unpacked(unpack_group, group_bytes, prefetch_group):
    """Unpack the group codes[here ...] to `levels`."""

    @njit(**INLINE)
    def unpacked(codes, here, levels):
        prefetch_group(codes, here, group_bytes)
        unpack_group(codes, here, levels, 0)
        return levels

    return unpacked


@njit(**INLINE)
def bytes_as_they_are(codes, here, levels):
    """Codes of 8 bits, which need no unpacking."""
    bytes_group(codes, here, LEVELS_BYTES)
    for v in range(LEVELS_BYTES // 64):
        bytes_line(codes, here + v * 64)
    return pointer(codes, here)


def make_unpack_wide(levels_of, group_bytes):
    """A function (w, begin, stop): the codes of the blocks begin .. stop-1 in 16 bits, two columns after two."""

    @njit(**INNER)
    def unpack(w, begin, stop):
        noinline()
        G, local = w.n_groups, local_levels()
        n_groups = (stop - begin) * G
        levels = np.empty(n_groups * LEVELS_BYTES, np.int16)
        for group in range(n_groups):
            codes = levels_of(w.codes, (begin * G + group) * group_bytes, local)
            for column in range(0, LEVELS_BYTES, 64):
                widen_rows(codes, column, levels, group * LEVELS_BYTES + column)
        return levels

    return unpack


def make_narrow_tile(levels_of, group_bytes, dot_levels, M, scaling):
    """The tile of block b and the M tokens from `first` on, 4 or 8: see int8_linear.make_tile.

    levels_of(codes, here, levels): pointer to the codes of the group codes[here ...], a byte each; it may use `levels`.
    """
    load, add, finish = scaling.load, scaling.add, scaling.finish

    @njit(**INLINE)
    def tile(w, b, codes, begin, x, first, y):
        G, levels, totals = w.n_groups, local_levels(), local_totals()
        for g in range(G):
            group, at = levels_of(codes, begin + g * group_bytes, levels), first * G + g * M
            scales = load(w, b * G + g)
            for m in range(0, rolled(M), TOKENS):
                dots = dot_levels(group, x, at + m)
                total = add(load_totals(totals, m), dots, scales, x, at + m, TOKEN_TILE)
                store_totals(totals, m, total)
        N = w.rows
        for m in range(0, M, TOKENS):
            total = finish(load_totals(totals, m), w, b)
            store_tile(y, (first + m) * N + b * BLOCK_ROWS, N, total, x.n_tokens - first - m, N - b * BLOCK_ROWS)

    return tile
