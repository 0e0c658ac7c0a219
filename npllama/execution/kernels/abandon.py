"""The flag that says that a call was abandoned: whoever sees it returns at once, with garbage.

Code refers to the flag by a name, which each process binds to its own memory before it loads any: so code that is kept
on disk holds no address.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllama.execution.abandon import FLAG
from npllama.execution.kernels import llvm
from npllama.execution.kernels.numba_internals import define_symbol

NAME = "npllama_abandoned"

define_symbol(NAME, FLAG.ctypes.data)


@intrinsic
def abandoned(typingctx):
    """Whether this call was abandoned. Read anew each time."""

    def generate(context, builder, signature, args):
        flag = llvm.load_shared(builder, llvm.external(builder, llvm.i32, NAME), llvm.i32)
        return builder.icmp_signed("!=", flag, ir.Constant(llvm.i32, 0))

    return types.boolean(), generate
