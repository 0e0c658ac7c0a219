"""Prefetching by numbers that are read from memory when a kernel runs: see execution/prefetching/ahead.py.

As in abandon.py, code refers to them by a name that each process binds.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllama.execution.kernels import llvm
from npllama.execution.kernels.llvm import address, i64
from npllama.execution.kernels.numba_internals import define_symbol
from npllama.execution.kernels.target import PREFETCHES
from npllama.execution.prefetching.ahead import AHEAD, BYTES, HALVES, KINDS, PACKED, STYLES, use

NAME = "npllama_prefetch"

define_symbol(NAME, AHEAD.ctypes.data)
for _kind, _prefetch in PREFETCHES.items():
    use(_kind, _prefetch)


def _number(builder, kind, style):
    """Pointer to how far ahead a kind is prefetched in a style."""
    first = llvm.external(builder, ir.ArrayType(i64, len(KINDS) * len(STYLES)), NAME)
    return llvm.gep(builder, first, i64, KINDS.index(kind) * len(STYLES) + STYLES.index(style))


def _make_group(kind):
    """Makes an operation that prefetches a whole group, where groups are."""

    def group(typingctx, array, offset, n_bytes):
        """Prefetch the group of so many bytes that lies ahead of array[offset ...]. It may lie outside."""

        def generate(context, builder, signature, args):
            # Read each time: hoisted, it would be a reason to compile the loop around it twice.
            ahead = llvm.load_shared(builder, _number(builder, kind, "groups"), i64)
            with builder.if_then(builder.icmp_signed(">", ahead, ir.Constant(i64, 0))):
                start = address(context, builder, signature.args[0], *args[:2])
                start = llvm.gep(builder, start, llvm.i8, ahead)
                for line in range(0, n_bytes.literal_value, 64):
                    llvm.prefetch(builder, start, line, 3)
            return llvm.nothing(context)

        return types.void(array, types.intp, n_bytes), generate

    return intrinsic(prefer_literal=True)(group)


def _make_line(kind):
    """Makes an operation that prefetches one cache line, where lines are; elsewhere the one that is read anyway."""

    def line(typingctx, array, offset):
        """Prefetch the line that lies ahead of array[offset]. It may lie outside."""

        def generate(context, builder, signature, args):
            start = address(context, builder, signature.args[0], *args)
            llvm.prefetch(builder, start, llvm.load(builder, _number(builder, kind, "lines"), i64), 2)
            return llvm.nothing(context)

        return types.void(array, types.intp), generate

    return intrinsic(line)


packed_group, bytes_group = _make_group(PACKED), _make_group(BYTES)
packed_line, bytes_line = _make_line(PACKED), _make_line(BYTES)


def halves_ahead(builder, pointer):
    """Prefetch what lies ahead of a pointer to float16 or bfloat16; where nothing is, what is read anyway.

    They stand in no groups: both styles, of which one is 0, mean the same.
    """
    groups, lines = (llvm.load(builder, _number(builder, HALVES, style), i64) for style in STYLES)
    llvm.prefetch(builder, pointer, builder.add(groups, lines), 3)
