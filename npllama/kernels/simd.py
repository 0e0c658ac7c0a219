"""The vector operations that kernels are written in, with names.

A value of type `floats` is WIDTH float32 numbers in one register, of type `doubles` DOUBLES float64 numbers (or in as
many as the CPU needs: LLVM splits what is too wide, so the same kernel runs on every CPU). Each operation is one or a
few LLVM instructions, in the order that stands here: nothing is reassociated and nothing contracted, so a kernel gives
the same bits however it is compiled.

Addresses are (array, offset): the element `offset` of the array's data, counted in elements of a C-contiguous array.
Nothing is checked. Tuples of vectors stand for several registers and stay in registers.

What a CPU lacks is chosen by the features of Numba's target (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included): without
fused multiply-add `llvm.fma` would be a slow call, without half-precision conversion a crash.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from npllama.kernels.flags import INNER, PLAIN

i8, i16, i32, i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
f16, f32, f64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

TRIPLE, CPU, FEATURES = cpu_target.target_context.codegen().magic_tuple()
X86 = TRIPLE.startswith(("x86", "i386", "i686"))
ARM64 = TRIPLE.startswith(("aarch64", "arm64"))


def has(feature: str) -> bool:
    """Whether Numba's target has a CPU feature, by LLVM's name; never with plain kernels asked for."""
    return not PLAIN and f"+{feature}" in FEATURES.split(",")


FMA = has("fma") or (ARM64 and not PLAIN)
HAS_F16 = has("f16c") or (ARM64 and not PLAIN)
AVX512 = has("avx512f") and has("avx512vl") and has("avx512bw") and has("avx512dq")
WIDTH = 16 if AVX512 else 8
REGISTERS = 32 if AVX512 else 16
"""Vector registers of WIDTH float32 that a tile may fill."""
WIDTH64 = WIDTH // 2
"""float64 numbers in such a register."""

PREFETCH_LINES = not CPU.startswith("znver")
"""Whether quantized kernels ask for memory as they go, a line at a time and into the second cache, in small loops.

Else they ask for a group at once, into all caches, and their loops are written out. Single tokens of the 1.1B shape on
an Intel with AMX, so and otherwise: q8 22.4 and 19.6 GB/s, q4 28.4 and 26.1; by AVX2 alone q8 19.9 and 13.1, q4 22.6
and 22.1. What fits into its third cache loses: the 110M shape in q4 0.95, in q8 0.93. On Zen 4 lines and groups are
equally fast (0.97 to 1.01); on Zen 5 groups were measured, lines not; on Arm neither.
"""

NO_PREFETCH = CPU == "znver4"
"""Whether 8 and 16 bits per weight are read faster where memory is not asked for what comes next.

Decoding on Zen 4: f16 1.03 to 1.15 times as fast unasked, q8 1.03 to 1.10, q4 0.93 to 0.96. On Zen 5 asking gains a
tenth in f16, and a third in q4.
"""


class VectorType(types.Type):
    """Numba's type of a vector: `lanes` numbers of one LLVM type."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"Vector({self.llvm})")


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


floats = VectorType(f32, WIDTH)
doubles = VectorType(f64, WIDTH64)
bits16 = ir.VectorType(i16, WIDTH)


# What the operations below are made of: functions of an LLVM builder, also for intrinsics that stand elsewhere.


def address(context, builder, array_type, array, offset):
    """Pointer to element `offset` of an array's data, or of what a pointer points to."""
    if not isinstance(array_type, types.CPointer):
        array = context.make_array(array_type)(context, builder, array).data
    return builder.gep(array, [offset])


def read(builder, pointer, vector, align=1):
    """Load a vector of any LLVM type from a pointer of any type."""
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = align
    return value


def write(builder, value, pointer, align=1):
    """Store a vector to a pointer of any type."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = align


def constant(vector, number):
    """The same number in all lanes."""
    return ir.Constant(vector, [number] * vector.count)


def broadcast(builder, scalar, lanes):
    """A scalar in all lanes."""
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(i32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), constant(ir.VectorType(i32, lanes), 0))


def shuffle(builder, a, b, lanes):
    """Pick lanes from a (0 .. n-1) and b (n ..)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(lanes)), list(lanes)))


def call(builder, name, result, *arguments):
    """Call an LLVM intrinsic or a function of the runtime by its name."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in arguments]), name
    )
    return builder.call(function, arguments)


def prefetch(builder, pointer, offset, nearness=3):
    """Ask for the line of memory so many bytes from a pointer to bytes; it may lie outside of what is mapped.

    nearness: 3 for all caches, 2 for all but the first.
    """
    flags = (ir.Constant(i32, f) for f in (0, nearness, 1))  # 0: to read, 1: data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.gep(pointer, [ir.Constant(i64, offset)]), *flags)


def multiply_add(builder, a, b, c):
    """a * b + c: rounded once where the CPU can, else twice."""
    if FMA:
        return call(builder, f"llvm.fma.v{a.type.count}{a.type.element.intrinsic_name}", a.type, a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


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


def widen_bf16(builder, bits):
    """The float32 values of a vector of bfloat16 bits."""
    ints = ir.VectorType(i32, bits.type.count)
    wide = builder.shl(builder.zext(bits, ints), constant(ints, 16))
    return builder.bitcast(wide, ir.VectorType(f32, bits.type.count))


def lane_max(builder, a, b):
    """The larger of two vectors' numbers in each lane."""
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


# e^r = 1 + r + r^2 (C0 + C1 r + ... + C8 r^8) for |r| <= log(2)/2: the polynomial that meets (e^r - 1 - r) / r^2 in the
# nine Chebyshev nodes of that interval. The error of the whole function, measured at 4 million places, is at most
# 1.4e-15 of its value, with fused multiply-add and without.
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


def exp_ir(builder, x):
    """e^x = 2^n e^r of float64 with x = n log(2) + r: 0 below -708 and infinite above 709, NaN for NaN."""
    numbers, ints = x.type, ir.VectorType(i64, x.type.count)

    def c(number):
        return constant(numbers, number)

    shifted = multiply_add(builder, x, c(1.4426950408889634), c(ROUND))
    n = builder.fsub(shifted, c(ROUND))
    r = multiply_add(builder, n, c(-LOG2_HIGH), x)
    r = multiply_add(builder, n, c(-LOG2_LOW), r)
    tail = c(EXP[-1])
    for coefficient in EXP[-2::-1]:
        tail = multiply_add(builder, tail, r, c(coefficient))
    value = builder.fadd(multiply_add(builder, builder.fmul(r, r), tail, r), c(1.0))
    n = builder.shl(builder.bitcast(shifted, ints), constant(ints, 52))  # ROUND's own bits are shifted out
    value = builder.bitcast(builder.add(builder.bitcast(value, ints), n), numbers)  # 2^n: added to the exponent
    value = builder.select(builder.fcmp_ordered("<", x, c(-708.0)), c(0.0), value)
    return builder.select(builder.fcmp_ordered(">", x, c(709.0)), c(float("inf")), value)


def reduce_add(builder, a, lanes):
    """Halve a vector by adding its upper half to its lower half, until `lanes` are left."""
    while a.type.count > lanes:
        half = a.type.count // 2
        a = builder.fadd(shuffle(builder, a, a, range(half)), shuffle(builder, a, a, range(half, 2 * half)))
    return a


# The operations.


def _loads(bits, widen, what):
    """The two ways to load floats from a format: a whole vector, and its last lanes only."""

    def load(typingctx, array, offset):
        def generate(context, builder, signature, args):
            return widen(builder, read(builder, address(context, builder, signature.args[0], *args), bits, 2))

        return floats(array, types.intp), generate

    def load_last(typingctx, array, offset, n):
        def generate(context, builder, signature, args):
            array, offset, n = args
            start = address(context, builder, signature.args[0], array, offset)
            first = builder.sub(ir.Constant(i64, WIDTH), n)
            value = constant(bits, 0)
            for lane in range(WIDTH):
                i = ir.Constant(i64, lane)
                there = builder.icmp_signed(">=", i, first)
                number = builder.load(builder.gep(start, [builder.select(there, i, first)]))
                number = builder.select(there, number, ir.Constant(bits.element, 0))
                value = builder.insert_element(value, number, ir.Constant(i32, lane))
            return widen(builder, value)

        return floats(array, types.intp, types.intp), generate

    load.__doc__ = f"WIDTH {what} from array[offset] on."
    load_last.__doc__ = f"The last n lanes (1 .. WIDTH) of WIDTH {what} from array[offset] on; zeros before, not read."
    return intrinsic(load), intrinsic(load_last)


load, load_last = _loads(floats.llvm, lambda builder, value: value, "float32")
load_f16, load_last_f16 = _loads(bits16, widen_f16, "float16, bits in a uint16 array, widened to float32,")
load_bf16, load_last_bf16 = _loads(bits16, widen_bf16, "bfloat16, bits in a uint16 array, widened to float32,")


@intrinsic
def load_doubles(typingctx, array, offset):
    """DOUBLES float64 from array[offset] on."""

    def generate(context, builder, signature, args):
        return read(builder, address(context, builder, signature.args[0], *args), doubles.llvm, 8)

    return doubles(array, types.intp), generate


@intrinsic
def narrow(typingctx, low, high):
    """The float32 nearest to the float64 of two vectors, end to end."""

    def generate(context, builder, signature, args):
        few = ir.VectorType(f32, WIDTH64)
        low, high = (builder.fptrunc(a, few) for a in args)
        return shuffle(builder, low, high, range(WIDTH))

    return floats(doubles, doubles), generate


@intrinsic(prefer_literal=True)
def widened(typingctx, a, half):
    """The lower (half 0) or the upper (1) half of a vector's float32, as float64."""
    start = half.literal_value * WIDTH64

    def generate(context, builder, signature, args):
        return builder.fpext(shuffle(builder, args[0], args[0], range(start, start + WIDTH64)), doubles.llvm)

    return doubles(floats, types.literal(half.literal_value)), generate


@intrinsic
def store(typingctx, array, offset, value):
    """Write a vector to array[offset] on."""

    def generate(context, builder, signature, args):
        write(builder, args[2], address(context, builder, signature.args[0], args[0], args[1]), 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def store_last(typingctx, array, offset, value, n):
    """Write the last n lanes of WIDTH float32 that would stand at array[offset]; what is before is not touched."""

    def generate(context, builder, signature, args):
        array, offset, value, n = args
        start = address(context, builder, signature.args[0], array, offset)
        width = ir.Constant(i64, WIDTH)
        with cgutils.for_range_slice(builder, builder.sub(width, n), width, ir.Constant(i64, 1), inc=True) as (lane, _):
            builder.store(builder.extract_element(value, lane), builder.gep(start, [lane]))
        return context.get_dummy_value()

    return types.void(array, types.intp, floats, types.intp), generate


@intrinsic
def splat(typingctx, number):
    """The same number in all lanes: of `doubles` for a float64, else of `floats`."""
    vector = doubles if number == types.float64 else floats

    def generate(context, builder, signature, args):
        return broadcast(builder, args[0], vector.llvm.count)

    return vector(number), generate


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c in each lane."""

    def generate(context, builder, signature, args):
        return multiply_add(builder, *args)

    return a(a, a, a), generate


def _binary(name, doc):
    """An operation of two vectors that is one LLVM instruction."""

    def operation(typingctx, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, name)(*args)

        return a(a, a), generate

    operation.__doc__ = doc
    return intrinsic(operation)


add = _binary("fadd", "a + b in each lane.")
sub = _binary("fsub", "a - b in each lane.")
mul = _binary("fmul", "a * b in each lane.")
div = _binary("fdiv", "a / b in each lane.")


@intrinsic
def load_twice(typingctx, array, offset):
    """WIDTH / 2 float32 from array[offset] on, each in two neighbouring lanes."""

    def generate(context, builder, signature, args):
        few = ir.VectorType(f32, WIDTH // 2)
        value = read(builder, address(context, builder, signature.args[0], *args), few, 4)
        return shuffle(builder, value, value, [lane // 2 for lane in range(WIDTH)])

    return floats(array, types.intp), generate


@intrinsic
def swap_pairs(typingctx, a):
    """Lanes 1, 0, 3, 2, ..."""

    def generate(context, builder, signature, args):
        return shuffle(builder, args[0], args[0], [lane ^ 1 for lane in range(WIDTH)])

    return floats(floats), generate


@intrinsic
def negate_even(typingctx, a):
    """-a in lanes 0, 2, ..., a in the others."""

    def generate(context, builder, signature, args):
        signs = ir.Constant(floats.llvm, [-1.0, 1.0] * (WIDTH // 2))
        return builder.fmul(args[0], signs)

    return floats(floats), generate


def _number(vector):
    """Numba's type of one of a vector's numbers."""
    return types.float64 if vector == doubles else types.float32


@intrinsic
def horizontal_sum(typingctx, a):
    """The sum of all lanes, by halves: lane i + lane i + n/2, and so on."""

    def generate(context, builder, signature, args):
        return builder.extract_element(reduce_add(builder, args[0], 1), ir.Constant(i32, 0))

    return _number(a)(a), generate


@intrinsic
def noinline(typingctx):
    """Forbid to copy the function that calls this into its callers: large code is compiled again with every copy."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def pointer(typingctx, array, offset):
    """The address of array[offset]; does not keep the array alive."""

    def generate(context, builder, signature, args):
        return address(context, builder, signature.args[0], *args)

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def load_scalar(typingctx, array, offset):
    """The one number at array[offset], as it is stored."""

    def generate(context, builder, signature, args):
        return builder.load(address(context, builder, signature.args[0], *args))

    return array.dtype(array, types.intp), generate


@intrinsic
def store_scalar(typingctx, array, offset, number):
    """Write one number to array[offset]."""

    def generate(context, builder, signature, args):
        builder.store(args[2], address(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), generate


@intrinsic
def horizontal_max(typingctx, a):
    """The largest of all lanes."""

    def generate(context, builder, signature, args):
        a = args[0]
        while a.type.count > 1:
            half = a.type.count // 2
            a = lane_max(builder, shuffle(builder, a, a, range(half)), shuffle(builder, a, a, range(half, 2 * half)))
        return builder.extract_element(a, ir.Constant(i32, 0))

    return _number(a)(a), generate


@intrinsic
def maximum(typingctx, a, b):
    """The larger of a and b in each lane."""

    def generate(context, builder, signature, args):
        return lane_max(builder, *args)

    return a(a, a), generate


@intrinsic
def exp(typingctx, a):
    """e^a in each lane."""

    def generate(context, builder, signature, args):
        return exp_ir(builder, args[0])

    return doubles(doubles), generate


@intrinsic
def exp_scalar(typingctx, a):
    """e^a of one number, as `exp` gives it."""

    def generate(context, builder, signature, args):
        return builder.extract_element(exp_ir(builder, broadcast(builder, args[0], WIDTH64)), ir.Constant(i32, 0))

    return types.float64(types.float64), generate


@intrinsic
def bf16_to_f32(typingctx, bits):
    """The float32 value of one bfloat16's bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], i32), ir.Constant(i32, 16)), f32)

    return types.float32(types.uint16), generate


@intrinsic
def f16_to_f32(typingctx, bits):
    """The float32 value of one float16's bits."""

    def generate(context, builder, signature, args):
        one = builder.bitcast(args[0], ir.VectorType(i16, 1))
        return builder.extract_element(widen_f16(builder, one), ir.Constant(i32, 0))

    return types.float32(types.uint16), generate


@intrinsic
def f32_to_f16(typingctx, number):
    """The bits of the float16 nearest to one float32."""

    def generate(context, builder, signature, args):
        return narrow_to_f16(builder, args[0])

    return types.uint16(types.float32), generate


@intrinsic
def load_int8(typingctx, array, offset):
    """WIDTH int8 from array[offset] on, as float32."""

    def generate(context, builder, signature, args):
        pointer = address(context, builder, signature.args[0], *args)
        return builder.sitofp(read(builder, pointer, ir.VectorType(i8, WIDTH)), floats.llvm)

    return floats(array, types.intp), generate


@intrinsic
def num_threads(typingctx):
    """How many threads a prange of this Python thread uses.

    numba.get_num_threads is a ctypes pointer, whose address would be kept in cached code and be wrong in the next
    process; the same function under its name is not.
    """

    def generate(context, builder, signature, args):
        return call(builder, "get_num_threads", i64)  # declared as Numba declares it

    return types.int64(), generate


# How rows are cut into vectors.


@njit(**INNER)
def round_to_width(n):
    """n rounded up to a multiple of WIDTH."""
    return (n + WIDTH - 1) // WIDTH * WIDTH


@njit(**INNER)
def thread_bounds(part, parts, N):
    """A thread's part of N columns: whole vectors, as equal as can be."""
    vectors = (N + WIDTH - 1) // WIDTH
    return min(part * vectors // parts * WIDTH, N), min((part + 1) * vectors // parts * WIDTH, N)
