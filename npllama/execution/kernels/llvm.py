"""Pieces of LLVM IR that intrinsics are made of: functions of an llvmlite IRBuilder.

Whatever goes through a pointer names its element type here. So kernels work with llvmlite's typed pointers and with
its opaque ones, which are to replace them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba import types
from numba.core import cgutils

i8, i16, i32, i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
f16, f32, f64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


# ---------------------------------------------------------------- pointers


def index(value):
    """A Python integer as an LLVM index; an LLVM value as it is."""
    return ir.Constant(i64, value) if isinstance(value, int) else value


def cast(builder, pointer, element):
    """The same address as a pointer to this type, where pointers have types."""
    if getattr(pointer.type, "is_opaque", True):
        return pointer
    return builder.bitcast(pointer, element.as_pointer())


def gep(builder, pointer, element, offset):
    """Pointer to the element of this type that stands so many elements after the one pointed to."""
    return builder.gep(cast(builder, pointer, element), [index(offset)], source_etype=element)


def load(builder, pointer, element, align=None):
    """Load a value of this type. align: bytes; None: as the type has it."""
    value = builder.load(cast(builder, pointer, element), typ=element)
    value.align = align
    return value


def store(builder, value, pointer, align=None):
    """Store a value. align: bytes; None: as the type has it."""
    builder.store(value, cast(builder, pointer, value.type)).align = align


def load_shared(builder, pointer, element):
    """Load a value that another thread may store at any time: neither left out nor moved by the compiler."""
    return builder.load_atomic(cast(builder, pointer, element), "monotonic", element.width // 8, typ=element)


def external(builder, element, name):
    """Pointer to a variable of this type that another module, or the process, defines under this name."""
    known = builder.module.globals.get(name)
    return ir.GlobalVariable(builder.module, element, name) if known is None else known


def variable(builder, element, value=None):
    """Pointer to a local variable of this type, set to the value if one is given."""
    if value is None:
        return cgutils.alloca_once(builder, element)
    return cgutils.alloca_once_value(builder, value)


def copy(builder, target, source, n_items, item_bytes):
    """Copy so many items from a pointer to another."""
    cgutils.raw_memcpy(builder, target, source, n_items, item_bytes)


def element_type(context, array_type):
    """LLVM's type of the elements of an array, or of what a Numba pointer points to."""
    return context.get_data_type(array_type.dtype)


def address(context, builder, array_type, array, offset):
    """Pointer to element `offset` of an array's data, or of what a pointer points to."""
    if not isinstance(array_type, types.CPointer):
        array = context.make_array(array_type)(context, builder, array).data
    return gep(builder, array, element_type(context, array_type), offset)


# ---------------------------------------------------------------- vectors


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


def split(builder, a, n):
    """A vector cut into n equal ones."""
    lanes = a.type.count // n
    return [shuffle(builder, a, a, range(i * lanes, (i + 1) * lanes)) for i in range(n)]


def concat(builder, vectors):
    """Vectors end to end; their number is a power of two."""
    while len(vectors) > 1:
        lanes = range(2 * vectors[0].type.count)
        vectors = [shuffle(builder, a, b, lanes) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def pinned(builder, value):
    """The same vector in a register of an x86 CPU, computed where it stands: LLVM would change the order."""
    signature = ir.FunctionType(value.type, [value.type])
    return builder.call(ir.InlineAsm(signature, "", "=x,0", side_effect=True), [value])


def lane(builder, vector, i):
    """One lane as a scalar."""
    return builder.extract_element(vector, ir.Constant(i32, i))


def reduce(builder, combine, vector):
    """Combine all lanes to one number: the lower half with the upper half, until one lane is left."""
    while vector.type.count > 1:
        n = vector.type.count
        low, high = (shuffle(builder, vector, vector, range(i, i + n // 2)) for i in (0, n // 2))
        vector = combine(low, high)
    return lane(builder, vector, 0)


def reduce_each(builder, combine, vectors):
    """`reduce` of several vectors of one type, which share registers as they get shorter: as many scalars.

    A round puts the lower halves of two vectors into one and the upper halves into another, piece by piece, and
    combines these: lane by lane what `reduce` combines.
    """
    lanes, count = vectors[0].type.count, len(vectors)
    owners, piece = [[n] for n in range(count)], lanes  # whose piece each piece of a vector is
    while piece > 1:
        half = piece // 2
        low = [side + start + i for start in range(0, lanes, piece) for side in (0, lanes) for i in range(half)]
        high = [i + half for i in low]
        if len(vectors) % 2:
            vectors, owners = [*vectors, vectors[-1]], [*owners, owners[-1]]
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
        vectors = [combine(shuffle(builder, a, b, low), shuffle(builder, a, b, high)) for a, b in pairs]
        owners = [
            [n for both in zip(a, b, strict=True) for n in both] for a, b in zip(owners[::2], owners[1::2], strict=True)
        ]
        piece = half
    where = {n: (vector, i) for vector, own in zip(vectors, owners, strict=True) for i, n in enumerate(own)}
    return [lane(builder, *where[n]) for n in range(count)]


# ---------------------------------------------------------------- control


def nothing(context):
    """What an intrinsic returns that has no result."""
    return context.get_dummy_value()


def call(builder, name, result, *arguments):
    """Call an LLVM intrinsic, or a function of Numba's runtime, by its name."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in arguments]), name
    )
    return builder.call(function, arguments)


def prefetch(builder, pointer, offset, locality=3):
    """Prefetch the cache line so many bytes after a pointer; it need not be mapped. locality 3: to L1, 2: to L2."""
    flags = (ir.Constant(i32, f) for f in (0, locality, 1))  # 0: for reading, 1: data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), gep(builder, pointer, i8, offset), *flags)


@contextmanager
def loop(builder, start, stop, step=1) -> Iterator[ir.Value]:
    """A counted loop over start, start + step, ... below stop."""
    with cgutils.for_range_slice(builder, index(start), index(stop), index(step), inc=True) as (i, _):
        yield i
