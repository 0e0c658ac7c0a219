"""The vector operations of quantized kernels, with names: 16 rows of a block side by side, one per lane.

A value of type `int8x64` is 16 rows times 4 columns of 8-bit codes; `int32x16` and `float32x16` have one number per
row. A tuple of them holds a vector for each of M tokens, and an operation on it does the same for each: codes that
were loaded and unpacked once serve all tokens. LLVM splits what is too wide for a CPU.

Only the dot product of four codes of a row with four of a token differs between CPUs. All its forms are exact, so all
give the same bits. Addresses are (array, offset) as in simd.py. Nothing is checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.flags import PLAIN
from npllama.execution.kernels.ir_math import widen_bf16, widen_f16
from npllama.execution.kernels.llvm import (
    address,
    broadcast,
    call,
    concat,
    constant,
    f32,
    i8,
    i16,
    i32,
    i64,
    shuffle,
    split,
)
from npllama.execution.kernels.simd import VectorType
from npllama.execution.kernels.target import ARM64, SHORT_LOOPS, has
from npllama.numbers.blocks import BLOCK_ROWS, GROUP

int8x64 = VectorType(i8, 4 * BLOCK_ROWS)
int32x16 = VectorType(i32, BLOCK_ROWS)
float32x16 = VectorType(f32, BLOCK_ROWS)

TOKEN_TILE = 8
"""Tokens whose quantized input stands together, group by group: see `token_pointer`."""

DOT = "vnni" if has("avx512vnni") else "avxvnni" if has("avxvnni") else "avx2" if has("avx2") else "plain"
"""Which form of the dot product is compiled."""

UNSIGNED_BIAS = 128 if DOT in ("vnni", "avxvnni") else 0
"""What signed codes of a row need added for these instructions, which take unsigned ones."""


# ---------------------------------------------------------------- parts of vectors


def in_parts(n):
    """Makes a function of vectors work on n parts of each: for instructions narrower than a vector."""

    def decorate(function):
        def on_parts(builder, *vectors):
            pieces = zip(*(split(builder, v, n) for v in vectors), strict=True)
            return concat(builder, [function(builder, *piece) for piece in pieces])

        return on_parts

    return decorate


def as_lanes(builder, a, element):
    """The bits of a vector as a vector of another element type."""
    return builder.bitcast(a, ir.VectorType(element, a.type.count * a.type.element.width // element.width))


def map_tokens(builder, function, many):
    """A tuple of M vectors, as LLVM sees it, with function(vector, m) of each."""
    for m in range(many.type.count):
        many = builder.insert_value(many, function(builder.extract_value(many, m), m), m)
    return many


# ---------------------------------------------------------------- the dot product


def dot_vnni(builder, total, w, x):
    """total + the four products of each lane, for unsigned w: one instruction."""
    name = f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}"
    return call(builder, name, total.type, total, as_lanes(builder, w, i32), as_lanes(builder, x, i32))


def multiply_pairs(builder, w, x):
    """w[2i] * x[2i] + w[2i+1] * x[2i+1] in 16 bits, for unsigned w whose products do not overflow them."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(i16, w.type.count // 2), w, x)


def multiply_wide(builder, w, x):
    """w[2i] * x[2i] + w[2i+1] * x[2i+1] in 32 bits, of 16-bit numbers."""
    return call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(i32, w.type.count // 2), w, x)


def add_pairs(builder, total, narrow):
    """total + the two 16-bit numbers of each lane."""
    return builder.add(total, multiply_wide(builder, narrow, constant(narrow.type, 1)))


@in_parts(2)
def dot_small_avx2(builder, total, low, low_x, high, high_x):
    """For unsigned codes up to 64: four products stay in 16 bits, 4 * 64 * 127 = 32,512 < 2^15."""
    narrow = builder.add(multiply_pairs(builder, low, low_x), multiply_pairs(builder, high, high_x))
    return add_pairs(builder, total, narrow)


def multiply_signed_pairs(builder, w, x):
    """The same for signed w: |w| times x with w's sign; two products stay in 16 bits, 2 * 127 * 127 < 2^15."""
    magnitude = call(builder, f"llvm.abs.v{w.type.count}i8", w.type, w, ir.Constant(ir.IntType(1), 0))
    return multiply_pairs(builder, magnitude, call(builder, "llvm.x86.avx2.psign.b", x.type, x, w))


@in_parts(2)
def dot_signed_avx2(builder, total, w, x):
    """For signed codes."""
    return add_pairs(builder, total, multiply_signed_pairs(builder, w, x))


def dot_plain(builder, total, w, x, signed):
    """The same from operations that every CPU has. A product of two 8-bit codes fits into 16 bits."""
    wide = ir.VectorType(i16, w.type.count)
    product = builder.mul((builder.sext if signed else builder.zext)(w, wide), builder.sext(x, wide))
    for _ in range(2):
        lanes = product.type.count
        product = builder.sext(product, ir.VectorType(i32, lanes)) if product.type.element == i16 else product
        even, odd = (shuffle(builder, product, product, range(i, lanes, 2)) for i in (0, 1))
        product = builder.add(even, odd)
    return builder.add(total, product)


def dot_small(builder, total, low, low_x, high, high_x):
    """total + low . low_x + high . high_x, for unsigned row codes up to 64."""
    if DOT == "avx2":
        return dot_small_avx2(builder, total, low, low_x, high, high_x)
    for w, x in ((low, low_x), (high, high_x)):
        total = dot_unsigned(builder, total, w, x)
    return total


def dot_unsigned(builder, total, w, x):
    """total + w . x for unsigned row codes, by a single instruction or by plain operations."""
    if DOT == "vnni":
        return dot_vnni(builder, total, w, x)
    if DOT == "avxvnni":
        return in_parts(2)(dot_vnni)(builder, total, w, x)
    return dot_plain(builder, total, w, x, signed=False)


def dot_signed(builder, total, w, x):
    """total + w . x for signed row codes; where UNSIGNED_BIAS is not 0: for w + UNSIGNED_BIAS."""
    if DOT == "avx2":
        return dot_signed_avx2(builder, total, w, x)
    if UNSIGNED_BIAS:
        return dot_unsigned(builder, total, w, x)
    return dot_plain(builder, total, w, x, signed=True)


# ---------------------------------------------------------------- codes of rows


@intrinsic
def load_codes(typingctx, array, offset):
    """16 rows times 4 columns of codes from array[offset] on."""

    def generate(context, builder, signature, args):
        return llvm.load(builder, address(context, builder, signature.args[0], *args), int8x64.llvm, 1)

    return int8x64(array, types.intp), generate


def make_lookup(codebook, signed=False):
    """Two operations on packed 4-bit codes: what the lower four bits of each byte stand for, and the upper four.

    Values are less the lowest one of the codebook, so unsigned; or they are themselves.
    """
    table = [value if signed else value - codebook[0] for value in codebook]

    def low(typingctx, packed):
        def generate(context, builder, signature, args):
            return _look_up(builder, table, builder.and_(args[0], constant(int8x64.llvm, 15)))

        return int8x64(int8x64), generate

    def high(typingctx, packed):
        def generate(context, builder, signature, args):
            pairs = as_lanes(builder, args[0], i16)  # x86 shifts no bytes
            shifted = as_lanes(builder, builder.lshr(pairs, constant(pairs.type, 4)), i8)
            return _look_up(builder, table, builder.and_(shifted, constant(int8x64.llvm, 15)))

        return int8x64(int8x64), generate

    return intrinsic(low), intrinsic(high)


def _look_up(builder, table, index):
    """The entry of a table of 16 numbers that each lane's index names."""
    if table == list(range(16)):
        return index
    if has("avx512bw"):
        return _look_up_with(builder, "llvm.x86.avx512.pshuf.b.512", table, index)
    if has("avx2"):
        return in_parts(2)(lambda b, i: _look_up_with(b, "llvm.x86.avx2.pshuf.b", table, i))(builder, index)
    if ARM64 and not PLAIN:
        return in_parts(4)(lambda b, i: _look_up_with(b, "llvm.aarch64.neon.tbl1.v16i8", table, i))(builder, index)
    value = constant(index.type, table[0])
    for i in range(1, len(table)):
        step = builder.select(
            builder.icmp_unsigned(">=", index, constant(index.type, i)),
            constant(index.type, table[i] - table[i - 1]),
            constant(index.type, 0),
        )
        value = builder.add(value, step)
    return value


def _look_up_with(builder, name, table, index):
    """By the instruction of this name, which looks up in a table of 16 bytes per 16 bytes of the index."""
    return call(builder, name, index.type, ir.Constant(index.type, table * (index.type.count // 16)), index)


@intrinsic(prefer_literal=True)
def unpack_6bit(typingctx, packed, tops, i):
    """Codes of six bits, 0 to 63: the lower (i even) or upper half of each byte, and above it bits 2 i and 2 i + 1."""
    i = i.literal_value

    def generate(context, builder, signature, args):
        packed, tops = (as_lanes(builder, a, i16) for a in args[:2])  # x86 shifts no bytes
        if i % 2:
            packed = builder.lshr(packed, constant(packed.type, 4))
        shift = builder.shl if i < 2 else builder.lshr
        tops = shift(tops, constant(tops.type, abs(4 - 2 * i)))
        low = builder.and_(as_lanes(builder, packed, i8), constant(int8x64.llvm, 15))
        return builder.or_(low, builder.and_(as_lanes(builder, tops, i8), constant(int8x64.llvm, 0x30)))

    return int8x64(int8x64, int8x64, types.literal(i)), generate


@intrinsic
def to_unsigned(typingctx, signed):
    """Signed codes as `dot4_signed` wants them: plus UNSIGNED_BIAS."""

    def generate(context, builder, signature, args):
        return builder.xor(args[0], constant(int8x64.llvm, UNSIGNED_BIAS)) if UNSIGNED_BIAS else args[0]

    return int8x64(int8x64), generate


@intrinsic(prefer_literal=True)
def store_levels(typingctx, array, offset, value, lowest):
    """Write codes plus the level that code 0 stands for to int8 array[offset] on."""

    def generate(context, builder, signature, args):
        array, offset, value, _ = args
        levels = builder.add(value, constant(int8x64.llvm, lowest.literal_value))
        llvm.store(builder, levels, address(context, builder, signature.args[0], array, offset), 1)
        return llvm.nothing(context)

    return types.void(array, types.intp, int8x64, lowest), generate


# ---------------------------------------------------------------- loops


def hidden(builder, n):
    """n, hidden from the compiler, so that it keeps a loop of so many rounds."""
    return builder.asm(ir.FunctionType(i64, [i64]), "", "=r,0", [n], side_effect=True)


@intrinsic
def opaque_count(typingctx, n):
    """n, hidden from the compiler where it is to keep a loop and not unroll it (SHORT_LOOPS)."""

    def generate(context, builder, signature, args):
        return hidden(builder, args[0]) if SHORT_LOOPS else args[0]

    return types.int64(types.int64), generate


# ---------------------------------------------------------------- tokens


def token_pointer(builder, pointer, element, m, tile_stride, size=1):
    """Pointer to what belongs to token m, from the one of token 0. Each token has `size` elements.

    The tokens of a tile stand together; the next tile begins tile_stride tokens later.
    """
    if m >= TOKEN_TILE:
        tiles = ir.Constant(i64, m // TOKEN_TILE * size)
        pointer = llvm.gep(builder, pointer, element, builder.mul(tile_stride, tiles))
    return llvm.gep(builder, pointer, element, m % TOKEN_TILE * size)


def token_codes(builder, pointer, m, tile_stride, column):
    """Four codes of token m from a column of the group on, repeated for every row."""
    start = token_pointer(builder, pointer, i8, m, tile_stride, GROUP)
    four = llvm.load(builder, llvm.gep(builder, start, i8, column), i32, 4)
    return as_lanes(builder, broadcast(builder, four, BLOCK_ROWS), i8)


@intrinsic
def dot8(typingctx, total, low, high, array, offset, tile_stride):
    """For each token: total + its 8 codes times 4 low and 4 high unsigned ones of each row. Token 0: array[offset]."""

    def generate(context, builder, signature, args):
        total, low, high, array, offset, tile_stride = args
        start = address(context, builder, signature.args[3], array, offset)

        def dot(total_m, m):
            x = [token_codes(builder, start, m, tile_stride, column) for column in (0, 4)]
            return dot_small(builder, total_m, low, x[0], high, x[1])

        return map_tokens(builder, dot, total)

    return total(total, int8x64, int8x64, array, types.intp, types.intp), generate


@intrinsic
def dot4_signed(typingctx, total, w, array, offset, tile_stride):
    """For each token: total + its 4 codes times those of w (see `to_unsigned`). Token 0: array[offset]."""

    def generate(context, builder, signature, args):
        total, w, array, offset, tile_stride = args
        start = address(context, builder, signature.args[2], array, offset)

        def dot(total_m, m):
            return dot_signed(builder, total_m, w, token_codes(builder, start, m, tile_stride, 0))

        return map_tokens(builder, dot, total)

    return total(total, int8x64, array, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def load_corrections(typingctx, array, offset, tile_stride, n_tokens):
    """For each token its int32 in every row, to which dot products are added. Token 0: array[offset]."""
    many = types.UniTuple(int32x16, n_tokens.literal_value)

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], *args[:2])

        def load(_, m):
            return broadcast(
                builder, llvm.load(builder, token_pointer(builder, start, i32, m, args[2]), i32), BLOCK_ROWS
            )

        return map_tokens(builder, load, ir.Constant(context.get_value_type(many), ir.Undefined))

    return many(array, types.intp, types.intp, n_tokens), generate


# ---------------------------------------------------------------- scales and sums


@intrinsic
def load_scales(typingctx, array, offset):
    """The 8-bit scales of 16 rows from array[offset] on, widened: see blocks.SCALES."""

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], *args)
        scales = llvm.load(builder, start, ir.VectorType(i8, BLOCK_ROWS), 1)
        signed = builder.sext(scales, ir.VectorType(i16, BLOCK_ROWS))
        bits = builder.and_(builder.shl(signed, constant(signed.type, 5)), constant(signed.type, 0x8FE0))
        return widen_f16(builder, bits)

    return float32x16(array, types.intp), generate


@intrinsic(prefer_literal=True)
def zeros(typingctx, n_tokens):
    """0 for each token and row."""
    many = types.UniTuple(float32x16, n_tokens.literal_value)

    def generate(context, builder, signature, args):
        return ir.Constant(context.get_value_type(many), None)

    return many(n_tokens), generate


def scaled(builder, dot, scale, x_scale):
    """dot * (scale * x_scale), rounded after each operation as in NumPy. x_scale: pointer to one float32."""
    both = builder.fmul(scale, broadcast(builder, llvm.load(builder, x_scale, f32), BLOCK_ROWS))
    return builder.fmul(builder.sitofp(dot, float32x16.llvm), both)


@intrinsic
def add_scaled(typingctx, total, dots, scale, array, offset, tile_stride):
    """For each token: total + its dot product * (scale * its own scale). Token 0's: array[offset]."""

    def generate(context, builder, signature, args):
        total, dots, scale, array, offset, tile_stride = args
        start = address(context, builder, signature.args[3], array, offset)

        def add(total_m, m):
            x_scale = token_pointer(builder, start, f32, m, tile_stride)
            return builder.fadd(total_m, scaled(builder, builder.extract_value(dots, m), scale, x_scale))

        return map_tokens(builder, add, total)

    return total(total, dots, float32x16, array, types.intp, types.intp), generate


@intrinsic
def scale_rows(typingctx, total, array, offset):
    """For each token: total times the bfloat16 of 16 rows from array[offset] on."""

    def generate(context, builder, signature, args):
        total, array, offset = args
        start = address(context, builder, signature.args[1], array, offset)
        rows = widen_bf16(builder, llvm.load(builder, start, ir.VectorType(i16, BLOCK_ROWS), 2))
        return map_tokens(builder, lambda total_m, m: builder.fmul(total_m, rows), total)

    return total(total, array, types.intp), generate


@intrinsic
def store_tile(typingctx, array, offset, stride, values, n_tokens, n_rows):
    """Write the first n_rows (or all) rows of the first n_tokens (or all) tokens m to array[offset + stride * m] on."""

    def generate(context, builder, signature, args):
        array, offset, stride, values, n_tokens, n_rows = args
        start = address(context, builder, signature.args[0], array, offset)
        buffer = llvm.variable(builder, float32x16.llvm)
        whole = builder.icmp_signed(">=", n_rows, ir.Constant(i64, BLOCK_ROWS))
        for m in range(values.type.count):
            index = ir.Constant(i64, m)
            value, row = builder.extract_value(values, m), llvm.gep(builder, start, f32, builder.mul(stride, index))
            with builder.if_then(builder.icmp_signed("<", index, n_tokens)):
                with builder.if_then(whole):
                    llvm.store(builder, value, row, 4)
                with builder.if_then(builder.not_(whole)):
                    llvm.store(builder, value, buffer)
                    llvm.copy(builder, row, buffer, n_rows, 4)
        return llvm.nothing(context)

    return types.void(array, types.intp, types.intp, values, types.intp, types.intp), generate


# ---------------------------------------------------------------- quantizing the input


def group_of(element):
    """A vector of as many numbers as a group has."""
    return ir.VectorType(element, GROUP)


@intrinsic
def abs_max(typingctx, array, offset):
    """max |x| of the group of float32 from array[offset] on; NaN if one is NaN."""

    def generate(context, builder, signature, args):
        bits = llvm.load(builder, address(context, builder, signature.args[0], *args), group_of(i32), 4)
        # As integers the magnitudes of floats stand in the same order, infinity and then NaN last.
        magnitude = builder.and_(bits, constant(bits.type, 0x7FFFFFFF))
        return builder.bitcast(call(builder, f"llvm.vector.reduce.smax.v{GROUP}i32", i32, magnitude), f32)

    return types.float32(array, types.intp), generate


@intrinsic
def round_group(typingctx, array, offset, factor, into, at):
    """Write the group from array[offset] on, times factor, rounded half to even, to int8 into[at ...]; its sum."""

    def generate(context, builder, signature, args):
        array, offset, factor, into, at = args
        x = llvm.load(builder, address(context, builder, signature.args[0], array, offset), group_of(f32), 4)
        scaled = builder.fmul(x, broadcast(builder, factor, GROUP))
        rounded = builder.fptosi(call(builder, f"llvm.rint.v{GROUP}f32", x.type, scaled), group_of(i32))
        target = address(context, builder, signature.args[3], into, at)
        llvm.store(builder, builder.trunc(rounded, group_of(i8)), target, 1)
        return call(builder, f"llvm.vector.reduce.add.v{GROUP}i32", i32, rounded)

    return types.int32(array, types.intp, types.float32, into, types.intp), generate
