"""All that the kernels use of Numba beyond its documented interface. Every part is probed before it is used.

Numba optimises and assembles a function as soon as its types are known, then copies it into each caller, where both
happen again at every level. `compile_once` leaves callees alone until the machine
code of the whole is asked for. Then it hides all but the entry: Numba numbers functions of one name anew in each
process, and the linker takes visible ones of equal names for the same, so kept code would call another's functions.

Where a part is missing or behaves otherwise, code is compiled as Numba always does, and not kept.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba.core import cgutils

from npllama.execution.kernels.flags import PARALLEL

PARTS = (
    "numba.core.codegen:JITCodeLibrary._optimize_final_module",
    "numba.core.codegen:JITCodeLibrary._finalize_final_module",
    "numba.core.codegen:JITCodeLibrary._ensure_finalized",
    "numba.core.codegen:JITCodeLibrary.get_pointer_to_function",
    "numba.core.codegen:JITCPUCodegen._library_class",
    "numba.core.codegen:JITCPUCodegen.set_env",
    "numba.core.compiler:CompileResult._reduce",
    "numba.core.compiler:CompileResult._rebuild",
    "numba.core.compiler_lock:global_compiler_lock",
    "numba.core.registry:cpu_target.target_context.codegen",
    "numba.core.registry:cpu_target.target_context.refresh",
    "numba.core.serialize:dumps",
    "numba.core.serialize:loads",
)
"""What compiling once and keeping code need, as module:attribute."""

COLLECTING = 20000, 50, 1000
"""Python's gc.set_threshold while code is compiled."""

LIBRARY_PARTS = ("_final_module", "_finalized", "has_dynamic_globals", "finalize")
"""What every library of code has."""


def find(part: str) -> Any:
    """The object named module:attribute, or None where this version of Numba has none."""
    module, _, path = part.partition(":")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found


def missing_parts() -> list[str]:
    """The parts of `compile_once` and of kept code that this version of Numba does not have."""
    missing = [part for part in PARTS if find(part) is None]
    if missing:
        return missing
    generator = _codegen()
    library = generator.create_library("probe")
    has = {*vars(library), *dir(type(library))}
    missing += [f"library.{name}" for name in LIBRARY_PARTS if name not in has]
    engine = getattr(generator, "_engine", None)
    return missing + ([] if hasattr(engine, "get_global_value_address") else ["codegen._engine"])


def _codegen() -> Any:
    return find("numba.core.registry:cpu_target.target_context").codegen()


def target_machine() -> tuple[str, str, str]:
    """Triple, name and features of the CPU that Numba compiles for."""
    codegen = find("numba.core.registry:cpu_target.target_context.codegen")
    if codegen is not None and hasattr(codegen(), "magic_tuple"):
        triple, cpu, features = codegen().magic_tuple()
        return triple, cpu, features
    own = llvmlite.binding
    cpu = numba.config.CPU_NAME or own.get_host_cpu_name()  # type: ignore[attr-defined] # set when numba is imported
    features = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    return own.get_default_triple(), cpu, own.get_host_cpu_features().flatten() if features is None else features


def import_threads() -> None:
    """Import what starts Numba's threads. Raises what that raises where its settings are unusable."""
    importlib.import_module("numba.np.ufunc.parallel")


def lacking_features(asked: str) -> str:
    """Which of the features asked for this CPU has not, or begin with no sign: either would end the process."""
    features = llvmlite.binding.get_host_cpu_features()
    names = asked.split(",") if asked else []
    return ",".join(
        n for n in names if n[:1] not in "+-" or n[1:] == "" or (n[0] == "+" and not features.get(n[1:], True))
    )


def threads_started() -> bool:
    """Whether Numba's threads run in this process, as far as it knows. Imports nothing: it is asked after a fork."""
    return bool(getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False))


def start_threads_again(started: bool) -> None:
    """Let Numba believe again what `threads_started` said before: the next who needs threads then starts them."""
    parallel: Any = sys.modules.get("numba.np.ufunc.parallel")
    if hasattr(parallel, "_is_initialized"):
        parallel._is_initialized = started


def launch_threads() -> None:
    """Choose the threading layer and start its threads, as the first parallel loop would."""
    launch = find("numba.np.ufunc.parallel:_launch_threads")
    (launch or numba.njit(**PARALLEL)(_parallel_loop))()


def _parallel_loop() -> Any:
    done = np.zeros(2)
    for i in numba.prange(2):
        done[i] = 1
    return done


def define_symbol(name: str, address: int) -> None:
    """Tell LLVM where in this process something is that code refers to by a name."""
    llvmlite.binding.add_symbol(name, address)


def namedtuple_class(typ: Any) -> type | None:
    """The NamedTuple that a Numba type stands for; None for other types."""
    found: type | None = getattr(typ, "instance_class", None)
    return found


def namedtuple_classes(types: Iterable[Any]) -> Iterator[type]:
    """The NamedTuples that Numba types stand for or consist of."""
    for typ in types:
        found = namedtuple_class(typ)
        if found is not None:
            yield found
        yield from namedtuple_classes(getattr(typ, "types", ()))


# ---------------------------------------------------------------- compiling once


_Library: Any = find("numba.core.codegen:JITCodeLibrary") or object

NATIVE = ".native"
"""Added to the name of a function's entry from Python: the function itself."""


def _native_name(entry: str) -> str:
    """Numba's name of a function, by that of its entry from Python."""
    return entry.replace("_ZN7cpython", "_ZN", 1)


class LinkOnceLibrary(_Library):
    """The code of a function with all that it calls, linked but not optimised until its address is asked for."""

    _deferred = False

    def _optimize_final_module(self) -> None:
        """Nothing yet."""

    def _finalize_final_module(self) -> None:
        if getattr(self, "_compiled_object", None) is not None:  # from a file: it is machine code already
            super()._finalize_final_module()
            return
        self._deferred = self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Address of a function; 0 where this code has none of that name, as most have no entry from Python."""
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
        """Leave one function that other code can see, and rename the rest: this linker finds even what is internal.

        After optimising: LLVM inlines a function with a single caller whatever its size, which makes prompts slower.
        What Numba's wrapper for Python calls is seen under a name of its own: compiled code may call it.
        """
        native = _native_name(entry)
        for function in self._final_module.functions:
            if function.is_declaration or function.name == entry:
                continue
            if function.name == native:
                function.name = f"{entry}{NATIVE}"
            else:
                function.linkage, function.name = "internal", f"{function.name}.hidden"


@contextmanager
def _linked_once() -> Iterator[None]:
    """What is compiled inside becomes machine code only if Python can call it."""
    with find("numba.core.compiler_lock:global_compiler_lock"):
        find("numba.core.registry:cpu_target.target_context").refresh()  # compiles Numba's own runtime as always
        generator = _codegen()
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


@contextmanager
def collecting_less() -> Iterator[None]:
    """Look for garbage less often: compiling makes millions of objects that stay.

    Around several compilations, else each is followed by a look at all that the ones before have left.
    """
    usual = gc.get_threshold()
    gc.set_threshold(*COLLECTING)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def compile_once(function: Any, arguments: tuple[Any, ...], cache: Any) -> bool:
    """Compile a dispatcher for arguments of these types; whether it came from the cache.

    cache: a `Cache` with `warn`, to load it from and keep it in; None: none. Whatever is wrong with Numba's private
    parts costs the cache, longer compilation and one warning.
    """
    missing = missing_parts()
    reason = f"it has no {missing[0]}" if missing else ""
    if not reason:
        usual = function._cache
        try:
            function._cache = cache or usual
            with _linked_once(), collecting_less():
                type(function).compile(function, arguments)
            return bool(cache is not None and cache.loaded)
        except Exception as error:
            if not is_private(error):
                raise
            reason = str(error).splitlines()[0]
        finally:
            function._cache = usual  # the next arguments may have another cache, or none
    if cache is not None:
        cache.warn(f"compiled code is not kept: numba {numba.__version__} is not one that is known here ({reason})")
    type(function).compile(function, arguments)
    return False


def native_address(function: Any, argument_types: tuple[Any, ...]) -> int:
    """Where the function begins that was compiled for these types, for calls from compiled code; 0: not known."""
    compiled, found = function.overloads.get(argument_types), getattr(_codegen(), "_engine", None)
    if compiled is None or found is None:
        return 0
    return int(found.get_function_address(f"{compiled.fndesc.llvm_cpython_wrapper_name}{NATIVE}"))


def call_by_name(context: Any, builder: Any, name: str, signature: Any, arguments: Any) -> Any:
    """Call a function that Numba has compiled for a signature, and that `define_symbol` has given a name."""
    convention = context.call_conv
    typ = convention.get_function_type(signature.return_type, signature.args)
    callee = cgutils.get_or_insert_function(builder.module, typ, name)
    status, result = convention.call_function(builder, callee, signature.return_type, signature.args, arguments)
    with cgutils.if_unlikely(builder, status.is_error):
        convention.return_status_propagate(builder, status)
    return result


def compile_each_once(function: Any, cache_for: Callable[[tuple[Any, ...]], Any]) -> None:
    """Let a dispatcher compile with `compile_once` whenever it is called with arguments of other types.

    cache_for: the cache for a tuple of types of arguments, or None.
    """

    def compile_kept(arguments: tuple[Any, ...]) -> Any:
        compile_once(function, arguments, cache_for(arguments))
        return type(function).compile(function, arguments)  # it is compiled: this gives where it begins

    function.compile = compile_kept


def is_private(error: BaseException | None) -> bool:
    """Whether an error may come from a private part that is not as expected."""
    while error is not None:
        if isinstance(error, (AttributeError, TypeError)):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------- keeping code


Cache: Any = find("numba.core.caching:_Cache") or object
"""Base class of what Numba asks for kept code: cache_path, load_overload, save_overload, enable, disable, flush."""


def pack(signature: Any, compiled: Any) -> bytes:
    """The code of a compiled function as bytes. Raises ValueError for code that only this process can run."""
    if compiled.library.has_dynamic_globals:
        raise ValueError("it holds an address of this process, which crashes in the next")
    code: bytes = find("numba.core.serialize:dumps")((str(signature), compiled._reduce()))
    return code


def unpack(code: bytes, signature: Any, target_context: Any) -> Any:
    """The compiled function that `pack` made bytes of; None if it has another signature."""
    target_context.refresh()
    packed_signature, payload = find("numba.core.serialize:loads")(code)
    if packed_signature != str(signature):
        return None
    return find("numba.core.compiler:CompileResult._rebuild")(target_context, *payload)
