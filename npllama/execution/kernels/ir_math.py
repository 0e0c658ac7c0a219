"""Arithmetic as LLVM IR: multiply-add, conversions of float16 and bfloat16, the exponential.

Each is a fixed sequence of operations, rounded after each: the same bits however a kernel is compiled.
"""

from __future__ import annotations

from llvmlite import ir

from npllama.execution.kernels.llvm import call, concat, constant, f16, f32, f64, i16, i32, i64, pinned, split
from npllama.execution.kernels.target import FMA, HAS_F16, WIDTH64, has


def multiply_add(builder, a, b, c):
    """a * b + c: rounded once where the CPU can, else twice."""
    if FMA:
        return call(builder, f"llvm.fma.v{a.type.count}{a.type.element.intrinsic_name}", a.type, a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


def lane_max(builder, a, b):
    """The larger of two vectors' numbers in each lane."""
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


def widen_bf16(builder, bits):
    """The float32 values of a vector of bfloat16 bits."""
    ints = ir.VectorType(i32, bits.type.count)
    wide = builder.shl(builder.zext(bits, ints), constant(ints, 16))
    return builder.bitcast(wide, ir.VectorType(f32, bits.type.count))


def widen_f16(builder, bits):
    """The float32 values of a vector of float16 bits."""
    lanes = bits.type.count
    if HAS_F16:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(f16, lanes)), ir.VectorType(f32, lanes))
    # Shifted into place the exponent is 112 too small: one exact multiplication puts it right, subnormals included.
    # Infinity and NaN (exponent 31) get the exponent of a float32's.
    ints, numbers = ir.VectorType(i32, lanes), ir.VectorType(f32, lanes)
    wide = builder.zext(bits, ints)
    magnitude = builder.shl(builder.and_(wide, constant(ints, 0x7FFF)), constant(ints, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, numbers), constant(numbers, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, constant(ints, 0x1F << 23))
    infinite = builder.or_(magnitude, constant(ints, 0xFF << 23))
    value = builder.select(special, infinite, builder.bitcast(scaled, ints))
    sign = builder.shl(builder.and_(wide, constant(ints, 0x8000)), constant(ints, 16))
    return builder.bitcast(builder.or_(value, sign), numbers)


def narrow_to_f16(builder, number):
    """The bits of the float16 nearest to a float32, half to even; beyond 65,504 infinity."""
    if HAS_F16:
        return builder.bitcast(builder.fptrunc(number, f16), i16)

    def c(bits):
        return ir.Constant(i32, bits)

    bits = builder.bitcast(number, i32)
    magnitude = builder.and_(bits, c(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, c(13)), c(1))
    # The exponent less 112, and 13 bits rounded off: a carry goes into the exponent, from the largest to infinity.
    normal = builder.lshr(builder.add(builder.sub(magnitude, c(112 << 23)), builder.add(odd, c(0xFFF))), c(13))
    # Below 2^-14: the addition to 0.5, whose last bit is worth 2^-24, rounds.
    half = ir.Constant(f32, 0.5)
    small = builder.sub(builder.bitcast(builder.fadd(builder.bitcast(magnitude, f32), half), i32), c(0x3F000000))
    special = builder.select(builder.icmp_unsigned(">", magnitude, c(0xFF << 23)), c(0x7E00), c(0x7C00))
    value = builder.select(builder.icmp_unsigned("<", magnitude, c(113 << 23)), small, normal)
    value = builder.select(builder.icmp_unsigned(">=", magnitude, c(143 << 23)), special, value)
    sign = builder.and_(builder.lshr(bits, c(16)), c(0x8000))
    return builder.trunc(builder.or_(value, sign), i16)


# e^r = 1 + r + r^2 (C0 + C1 r + ... + C8 r^8) for |r| <= log(2)/2: the polynomial that meets (e^r - 1 - r) / r^2 in the
# nine Chebyshev nodes of that interval. The whole function is within 1.4e-15 of its value.
EXP = (
    0.5,
    0.16666666666648303,
    0.041666666666651364,
    0.008333333353717156,
    0.0013888888905871347,
    0.0001984120875699232,
    2.4801536409064087e-05,
    2.7625102005388108e-06,
    2.761379555451986e-07,
)
LOG2_HIGH, LOG2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10  # their sum is log(2); n * LOG2_HIGH is exact
ROUND = 1.5 * 2.0**52  # adding it rounds to an integer, which then stands in the low bits


def exp(builder, x):
    """e^x = 2^n e^r of float64 with x = n log(2) + r: 0 below -708, infinite above 709, NaN for NaN."""
    return exp_of_each(builder, [x])[0]


def exp_of_each(builder, xs):
    """The same of several vectors, step by step: each is a chain of operations that wait for the one before."""
    numbers, ints = xs[0].type, ir.VectorType(i64, xs[0].type.count)

    def c(number):
        return constant(numbers, number)

    def each(step, *operands):
        found = (step(*some) for some in zip(*operands, strict=True))
        return [pinned(builder, value) for value in found] if len(xs) > 1 and has("avx2") else [*found]

    def fma(a, b, c):
        return multiply_add(builder, a, b, c)

    shifted = each(lambda x: fma(x, c(1.4426950408889634), c(ROUND)), xs)
    n = each(lambda s: builder.fsub(s, c(ROUND)), shifted)
    r = each(lambda n, x: fma(n, c(-LOG2_HIGH), x), n, xs)
    r = each(lambda n, r: fma(n, c(-LOG2_LOW), r), n, r)
    tail = [c(EXP[-1])] * len(xs)
    for coefficient in EXP[-2::-1]:
        tail = each(lambda t, r, k=coefficient: fma(t, r, c(k)), tail, r)
    tail = each(lambda t, r: builder.fadd(fma(builder.fmul(r, r), t, r), c(1.0)), tail, r)
    found = []
    for x, s, value in zip(xs, shifted, tail, strict=True):
        n = builder.shl(builder.bitcast(s, ints), constant(ints, 52))  # ROUND's own bits are shifted out
        value = builder.bitcast(builder.add(builder.bitcast(value, ints), n), numbers)  # 2^n: added to the exponent
        value = builder.select(builder.fcmp_ordered("<", x, c(-708.0)), c(0.0), value)
        found.append(builder.select(builder.fcmp_ordered(">", x, c(709.0)), c(float("inf")), value))
    return found


def exp_in_parts(builder, x):
    """The same of a vector that fills several registers."""
    return concat(builder, exp_of_each(builder, split(builder, x, max(1, x.type.count // WIDTH64))))


def gated(builder, gate, up):
    """gate / (1 + e^-gate) * up of float32, computed in float64 and rounded once."""
    wide = ir.VectorType(f64, gate.type.count)
    gate64, up64 = builder.fpext(gate, wide), builder.fpext(up, wide)
    power = exp_in_parts(builder, builder.fsub(constant(wide, 0.0), gate64))
    product = builder.fmul(builder.fdiv(gate64, builder.fadd(constant(wide, 1.0), power)), up64)
    return builder.fptrunc(product, gate.type)
