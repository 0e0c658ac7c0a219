"""The pieces of LLVM IR: the same code from pointers that carry a type and from opaque ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba")

# E402: these need numba's llvmlite, which may not be there.
import llvmlite.binding
from llvmlite import ir
from numba import types

from npllama.execution.kernels import llvm
from npllama.execution.kernels.llvm import f32, i8, i32, i64

TYPED = f32.as_pointer()
OPAQUE = ir.PointerType()


def assembled(pointer: ir.Type) -> Any:
    """A function of a pointer to float32 that uses each helper, as LLVM understands it."""
    module = ir.Module("pointers")
    function = ir.Function(module, ir.FunctionType(f32, [pointer, i64]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    start, n = function.args
    context: Any = SimpleNamespace(get_data_type=lambda typ: {types.float32: f32}[typ])
    at = llvm.address(context, builder, types.CPointer(types.float32), start, n)
    vector = llvm.load(builder, at, ir.VectorType(f32, 4), 4)
    as_bytes = llvm.load(builder, llvm.gep(builder, at, i8, 3), i32, 1)
    total = llvm.variable(builder, f32, llvm.reduce(builder, builder.fadd, vector))
    with llvm.loop(builder, 0, n, 2) as i:
        number = llvm.load(builder, llvm.gep(builder, start, f32, i), f32)
        llvm.store(builder, builder.fadd(llvm.load(builder, total, f32), number), total)
    llvm.prefetch(builder, at, 64, 2)
    llvm.store(builder, vector, llvm.gep(builder, start, f32, 8), 4)
    llvm.store(builder, as_bytes, start, 4)
    builder.ret(llvm.load(builder, total, f32))
    parsed = llvmlite.binding.parse_assembly(str(module))
    parsed.verify()
    return parsed


def assembly(module: Any) -> str:
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
    return str(machine.emit_assembly(module))


def test_typed_and_opaque_pointers_give_the_same_code() -> None:
    assert TYPED.is_opaque is False
    assert OPAQUE.is_opaque is True
    assert assembly(assembled(TYPED)) == assembly(assembled(OPAQUE))


def test_the_element_type_of_every_access_is_the_one_that_is_named() -> None:
    text = str(assembled(OPAQUE))
    for access in (
        "getelementptr i8, ptr",
        "load <4 x float>, ptr",
        "load i32, ptr",
        "store <4 x float>",
        "@llvm.prefetch",
    ):
        assert access in text
