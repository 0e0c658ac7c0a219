"""The vector operations that kernels are written in, with names.

A value of type `floats` is WIDTH float32 numbers in a register, of type `doubles` WIDTH64 float64 numbers. Where a CPU
has narrower registers, LLVM splits them: the same kernel runs everywhere. Nothing is reassociated and nothing is
contracted, so a kernel gives the same bits however it is compiled.

Addresses are (array, offset): the element `offset` of a C-contiguous array's data, or of what a pointer points to.
Nothing is checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

from npllama.execution.kernels import ir_math, llvm
from npllama.execution.kernels.flags import INNER
from npllama.execution.kernels.llvm import address, f32, f64, i8, i16, i32, i64
from npllama.execution.kernels.target import AVX512, WIDTH, WIDTH64


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
AT_ONCE = 4
"""Vectors of float64 whose exponentials are computed together: each is a chain of operations that wait."""
MANY_EXPS = WIDTH64 if AVX512 else AT_ONCE * WIDTH64
"""Numbers of `store_exps`. With registers of eight, more would stand where few scores of a block are seen."""
many_floats = VectorType(f32, AT_ONCE * WIDTH64)
bits16 = ir.VectorType(i16, WIDTH)


def _scalar(vector):
    """Numba's type of one lane."""
    return types.float64 if vector == doubles else types.float32


# ---------------------------------------------------------------- load and store


def _loads(stored, widen, what):
    """Two loads of floats from a number format: of a whole vector, and of its last lanes only."""

    def load(typingctx, array, offset):
        def generate(context, builder, signature, args):
            start = address(context, builder, signature.args[0], *args)
            return widen(builder, llvm.load(builder, start, stored, 2))

        return floats(array, types.intp), generate

    def load_last(typingctx, array, offset, n):
        def generate(context, builder, signature, args):
            array, offset, n = args
            start = address(context, builder, signature.args[0], array, offset)
            return widen(builder, _last_lanes(builder, start, n, stored))

        return floats(array, types.intp, types.intp), generate

    load.__doc__ = f"WIDTH {what} from array[offset] on."
    load_last.__doc__ = f"The last n lanes (1 .. WIDTH) of WIDTH {what} from array[offset] on; zeros before, not read."
    return intrinsic(load), intrinsic(load_last)


def _last_lanes(builder, start, n, stored):
    """A vector whose last n lanes are loaded; the others read one of these and become zero."""
    first = builder.sub(ir.Constant(i64, WIDTH), n)
    value = llvm.constant(stored, 0)
    for lane in range(WIDTH):
        i = ir.Constant(i64, lane)
        wanted = builder.icmp_signed(">=", i, first)
        place = llvm.gep(builder, start, stored.element, builder.select(wanted, i, first))
        number = builder.select(wanted, llvm.load(builder, place, stored.element), ir.Constant(stored.element, 0))
        value = builder.insert_element(value, number, ir.Constant(i32, lane))
    return value


load, load_last = _loads(floats.llvm, lambda builder, value: value, "float32")
load_f16, load_last_f16 = _loads(bits16, ir_math.widen_f16, "float16, bits in a uint16 array, widened to float32,")
load_bf16, load_last_bf16 = _loads(bits16, ir_math.widen_bf16, "bfloat16, bits in a uint16 array, widened to float32,")


@intrinsic
def load_many(typingctx, array, offset):
    """AT_ONCE * WIDTH64 float32 from array[offset] on."""

    def generate(context, builder, signature, args):
        return llvm.load(builder, address(context, builder, signature.args[0], *args), many_floats.llvm, 4)

    return many_floats(array, types.intp), generate


@intrinsic
def load_doubles(typingctx, array, offset):
    """WIDTH64 float64 from array[offset] on."""

    def generate(context, builder, signature, args):
        return llvm.load(builder, address(context, builder, signature.args[0], *args), doubles.llvm, 8)

    return doubles(array, types.intp), generate


@intrinsic
def load_int8(typingctx, array, offset):
    """WIDTH int8 from array[offset] on, as float32."""

    def generate(context, builder, signature, args):
        start = address(context, builder, signature.args[0], *args)
        return builder.sitofp(llvm.load(builder, start, ir.VectorType(i8, WIDTH), 1), floats.llvm)

    return floats(array, types.intp), generate


@intrinsic
def load_twice(typingctx, array, offset):
    """WIDTH / 2 float32 from array[offset] on, each in two neighbouring lanes."""

    def generate(context, builder, signature, args):
        half = ir.VectorType(f32, WIDTH // 2)
        value = llvm.load(builder, address(context, builder, signature.args[0], *args), half, 4)
        return llvm.shuffle(builder, value, value, [lane // 2 for lane in range(WIDTH)])

    return floats(array, types.intp), generate


@intrinsic
def store(typingctx, array, offset, value):
    """Write a vector to array[offset] on."""

    def generate(context, builder, signature, args):
        llvm.store(builder, args[2], address(context, builder, signature.args[0], args[0], args[1]), 4)
        return llvm.nothing(context)

    return types.void(array, types.intp, value), generate


@intrinsic
def store_last(typingctx, array, offset, value, n):
    """Write only the last n lanes of a vector of float32 that would begin at array[offset]."""

    def generate(context, builder, signature, args):
        array, offset, value, n = args
        start = address(context, builder, signature.args[0], array, offset)
        width = ir.Constant(i64, WIDTH)
        with llvm.loop(builder, builder.sub(width, n), width) as lane:
            llvm.store(builder, builder.extract_element(value, lane), llvm.gep(builder, start, f32, lane))
        return llvm.nothing(context)

    return types.void(array, types.intp, floats, types.intp), generate


@intrinsic
def pointer(typingctx, array, offset):
    """The address of array[offset]; it does not keep the array alive."""

    def generate(context, builder, signature, args):
        return address(context, builder, signature.args[0], *args)

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def keep_alive(typingctx, arrays):
    """Nothing: arrays that are used here, after their addresses were, are not freed before."""

    def generate(context, builder, signature, args):
        return llvm.nothing(context)

    return types.void(arrays), generate


@intrinsic
def load_scalar(typingctx, array, offset):
    """The one number at array[offset], as it is stored."""

    def generate(context, builder, signature, args):
        element = llvm.element_type(context, signature.args[0])
        return llvm.load(builder, address(context, builder, signature.args[0], *args), element)

    return array.dtype(array, types.intp), generate


@intrinsic
def store_scalar(typingctx, array, offset, number):
    """Write one number to array[offset]."""

    def generate(context, builder, signature, args):
        llvm.store(builder, args[2], address(context, builder, signature.args[0], *args[:2]))
        return llvm.nothing(context)

    return types.void(array, types.intp, array.dtype), generate


# ---------------------------------------------------------------- arithmetic, lane by lane


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


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c in each lane."""

    def generate(context, builder, signature, args):
        return ir_math.multiply_add(builder, *args)

    return a(a, a, a), generate


@intrinsic
def maximum(typingctx, a, b):
    """The larger of a and b in each lane."""

    def generate(context, builder, signature, args):
        return ir_math.lane_max(builder, *args)

    return a(a, a), generate


@intrinsic
def store_exps(typingctx, array, offset, level, total):
    """Replace MANY_EXPS float64, from array[offset] on, by e^(number - level); total plus each vector in turn."""

    def generate(context, builder, signature, args):
        array, offset, level, total = args
        start = address(context, builder, signature.args[0], array, offset)
        numbers = llvm.load(builder, start, ir.VectorType(f64, MANY_EXPS), 8)
        powers = ir_math.exp_in_parts(builder, builder.fsub(numbers, llvm.broadcast(builder, level, MANY_EXPS)))
        llvm.store(builder, powers, start, 8)
        for i in range(0, MANY_EXPS, WIDTH64):
            total = builder.fadd(total, llvm.shuffle(builder, powers, powers, range(i, i + WIDTH64)))
        return total

    return doubles(array, types.intp, types.float64, doubles), generate


@intrinsic
def gated(typingctx, gate, up):
    """gate / (1 + e^-gate) * up in each lane of vectors of float32."""

    def generate(context, builder, signature, args):
        return ir_math.gated(builder, *args)

    return gate(gate, gate), generate


@intrinsic
def exp_scalar(typingctx, a):
    """e^a of one number, as `exp` gives it."""

    def generate(context, builder, signature, args):
        return llvm.lane(builder, ir_math.exp(builder, llvm.broadcast(builder, args[0], WIDTH64)), 0)

    return types.float64(types.float64), generate


# ---------------------------------------------------------------- lanes


@intrinsic
def splat(typingctx, number):
    """The same number in all lanes: of `doubles` for a float64, else of `floats`."""
    vector = doubles if number == types.float64 else floats

    def generate(context, builder, signature, args):
        return llvm.broadcast(builder, args[0], vector.llvm.count)

    return vector(number), generate


@intrinsic
def swap_pairs(typingctx, a):
    """Lanes 1, 0, 3, 2, ..."""

    def generate(context, builder, signature, args):
        return llvm.shuffle(builder, args[0], args[0], [lane ^ 1 for lane in range(WIDTH)])

    return floats(floats), generate


@intrinsic
def negate_even(typingctx, a):
    """-a in lanes 0, 2, ..., a in the others."""

    def generate(context, builder, signature, args):
        return builder.fmul(args[0], ir.Constant(floats.llvm, [-1.0, 1.0] * (WIDTH // 2)))

    return floats(floats), generate


@intrinsic
def horizontal_sum(typingctx, a):
    """The sum of all lanes, by halves: lane i + lane i + n/2, and so on."""

    def generate(context, builder, signature, args):
        return llvm.reduce(builder, builder.fadd, args[0])

    return _scalar(a)(a), generate


@intrinsic
def horizontal_max(typingctx, a):
    """The largest of all lanes."""

    def generate(context, builder, signature, args):
        return llvm.reduce(builder, lambda low, high: ir_math.lane_max(builder, low, high), args[0])

    return _scalar(a)(a), generate


# ---------------------------------------------------------------- conversions


@intrinsic(prefer_literal=True)
def widened(typingctx, a, half):
    """The lower (half 0) or the upper (1) half of a vector's float32, as float64."""
    start = half.literal_value * WIDTH64

    def generate(context, builder, signature, args):
        return builder.fpext(llvm.shuffle(builder, args[0], args[0], range(start, start + WIDTH64)), doubles.llvm)

    return doubles(floats, types.literal(half.literal_value)), generate


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
        return llvm.lane(builder, ir_math.widen_f16(builder, builder.bitcast(args[0], ir.VectorType(i16, 1))), 0)

    return types.float32(types.uint16), generate


@intrinsic
def f32_to_f16(typingctx, number):
    """The bits of the float16 nearest to one float32."""

    def generate(context, builder, signature, args):
        return ir_math.narrow_to_f16(builder, args[0])

    return types.uint16(types.float32), generate


# ---------------------------------------------------------------- the compiler and the threads


@intrinsic
def noinline(typingctx):
    """Keep the function that calls this out of its callers: large code would be compiled again with every copy."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return llvm.nothing(context)

    return types.void(), generate


@intrinsic
def num_threads(typingctx):
    """Threads that a prange of this Python thread uses.

    Called by its name: numba.get_num_threads would put an address of this process into code that is kept.
    """

    def generate(context, builder, signature, args):
        return llvm.call(builder, "get_num_threads", i64)  # declared as Numba declares it

    return types.int64(), generate


@njit(**INNER)
def round_to_width(n):
    """n rounded up to a multiple of WIDTH."""
    return (n + WIDTH - 1) // WIDTH * WIDTH


@njit(**INNER)
def thread_bounds(part, parts, N):
    """A thread's part of N columns: whole vectors, as equal as can be."""
    vectors = (N + WIDTH - 1) // WIDTH
    return min(part * vectors // parts * WIDTH, N), min((part + 1) * vectors // parts * WIDTH, N)
