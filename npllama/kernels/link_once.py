"""Compile a function and all that it calls once, as one.

Numba optimises and assembles a function as soon as its types are known, then copies it into each caller, where it is
optimised and assembled again: ten levels of kernels cost three times the work. Nobody calls the inner ones by
themselves while the model is compiled. So they are left as they are until the code of the whole is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import codegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

POSSIBLE = all(
    hasattr(codegen.JITCodeLibrary, name)
    for name in ("_optimize_final_module", "_finalize_final_module", "get_pointer_to_function", "_ensure_finalized")
) and hasattr(codegen.JITCPUCodegen, "_library_class")
"""Whether this version of Numba has the parts that are replaced here; without them it compiles as it always does."""


class LinkOnceLibrary(codegen.JITCodeLibrary):
    """The code of one function, with that of all it calls linked in; machine code when its address is asked for."""

    _deferred = False

    def _optimize_final_module(self) -> None:
        """Nothing yet."""

    def _finalize_final_module(self) -> None:
        if getattr(self, "_compiled_object", None) is not None:  # from a file: it is machine code already
            super()._finalize_final_module()
            return
        self._deferred = self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Address of a function, 0 where this code has none of that name: most have no entry from Python."""
        self._ensure_finalized()
        if self._deferred:
            try:
                self._final_module.get_function(name)
            except NameError:
                return 0
            self._deferred = False
            super()._optimize_final_module()
            self._hide_all_but(name)
            super()._finalize_final_module()
        return int(super().get_pointer_to_function(name))

    def _hide_all_but(self, entry: str) -> None:
        """Leave one function that other code can see.

        Numba numbers functions of one name in the order in which a process meets them, and visible ones of equal names
        are taken for the same by the linker. So code from a file, numbered in another process, would run the functions
        of this one, or give it its own: kernels of two formats, say, whose arguments are of the same types. They get
        other names, because this linker finds even what is hidden, and then has no address for it. Only once all is
        optimised: what LLVM knows to have a single caller it copies there whatever its size, and prompts take a quarter
        longer.
        """
        for function in self._final_module.functions:
            if not function.is_declaration and function.name != entry:
                function.linkage, function.name = "internal", f"{function.name}.hidden"


@contextmanager
def compiled_as_one() -> Iterator[None]:
    """What is compiled inside is machine code only if Python can call it: a function's callees become part of it."""
    if not POSSIBLE:
        yield
        return
    with global_compiler_lock:
        cpu_target.target_context.refresh()  # the run-time library of Numba itself is compiled here, as always
        generator = cpu_target.target_context.codegen()
        usual, environments = generator._library_class, []

        def set_env(name: str, env: Any) -> None:
            environments.append((name, env))  # written into the code, which is not there yet

        generator._library_class, generator.set_env = LinkOnceLibrary, set_env
        try:
            yield
        finally:
            generator._library_class = usual
            del generator.set_env
            for name, env in environments:
                if generator._engine.get_global_value_address(name):  # none: nothing of the function was left
                    generator.set_env(name, env)
