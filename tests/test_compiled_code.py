"""What of compiled code is kept for the next process."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from command_line import environment

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


def test_code_that_holds_an_address_of_this_process_is_not_kept(tmp_path: Path) -> None:
    """numba.get_num_threads in a kernel is such code: in the next process it ends in a segmentation fault."""
    numba = pytest.importorskip("numba")
    from npllama.execution.disk_cache import DiskCache

    @numba.njit
    def kernel() -> int:
        return numba.get_num_threads()

    said: list[str] = []
    kernel._cache = DiskCache(tmp_path / "forward-f32-0-0", said.append)
    assert kernel() >= 1
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 1
    assert "holds an address of this process" in said[0]


def test_what_only_compiled_code_calls_becomes_machine_code_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba would optimise and assemble a callee for itself, and again in each of its callers."""
    numba = pytest.importorskip("numba")
    from numba.core import codegen

    from npllama.execution.kernels.flags import INNER, SERIAL
    from npllama.execution.kernels.numba_internals import NATIVE, compile_once

    numba.njit(**SERIAL)(lambda x: x).compile((numba.float64,))  # and with it, once, Numba's own run-time library
    assembled: list[str] = []
    usual = codegen.JITCodeLibrary._finalize_specific

    def finalize(library: codegen.JITCodeLibrary) -> None:
        assembled.append(library.name)
        usual(library)

    monkeypatch.setattr(codegen.JITCodeLibrary, "_finalize_specific", finalize)

    @numba.njit(**INNER)
    def innermost(x: float) -> float:
        return x * x

    @numba.njit(**INNER)
    def inner(x: float) -> float:
        return innermost(x) + 1

    @numba.njit(**SERIAL)
    def whole(x: float) -> float:
        return inner(x) + innermost(x)

    assert not compile_once(whole, (numba.float64,), None)
    assert whole(3.0) == 19.0
    assert [name.rsplit(".", 1)[-1] for name in assembled] == ["whole"]
    (compiled,) = whole.overloads.values()
    defined = list(compiled.library.get_defined_functions())
    entry = compiled.fndesc.llvm_cpython_wrapper_name
    assert sorted(f.name for f in defined if f.linkage.name != "internal") == [entry, f"{entry}{NATIVE}"]


def test_code_from_a_file_runs_its_own_functions_and_not_others_of_the_same_name(tmp_path: Path) -> None:
    """Numba numbers functions of one name anew in each process, and two kernels may differ in nothing else."""
    pytest.importorskip("numba")
    program = """
import sys
import numba
from npllama.execution.kernels.numba_internals import compile_once
from npllama.execution.disk_cache import DiskCache
from npllama.execution.kernels.flags import INNER, SERIAL
from npllama.execution.kernels.simd import noinline
from pathlib import Path

def make(number):
    @numba.njit(**INNER)
    def inner(x):
        noinline()
        return x + number

    @numba.njit(**SERIAL)
    def outer(x):
        return inner(x)

    return outer

for number in map(int, sys.argv[2:]):
    function = make(number)
    cache = DiskCache(Path(sys.argv[1], f"forward-{number}-0-0"), print)
    compile_once(function, (numba.int64,), cache)
    print(function(0), cache.loaded)
"""

    def run(*numbers: int) -> list[str]:
        command = [sys.executable, "-c", program, str(tmp_path), *map(str, numbers)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.split()

    assert run(1) == ["1", "False"]
    assert run(2, 1) == ["2", "False", "1", "True"]
    assert run(2, 1) == ["2", "True", "1", "True"]


def test_each_step_on_its_own_is_kept_for_each_types_of_arguments(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    program = """
import numpy as np
from npllama.execution.disk_cache import kept_ops, open_caches

step, x = kept_ops(open_caches(print))["swiglu"], np.ones((2, 3), np.float32)
mapped = x.view()
mapped.flags.writeable = False
print(step(x, x).tobytes().hex(), step(mapped, mapped).tobytes().hex())
"""

    def run() -> tuple[str, dict[str, int]]:
        env = environment(NPLLAMA_CACHE_DIR=str(tmp_path / "kept"))
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        return done.stdout, {file.name: file.stat().st_ino for file in (tmp_path / "kept").glob("op-swiglu.*")}

    said, files = run()
    assert len(files) == 2
    assert run() == (said, files), "nothing is written anew"
    damaged = tmp_path / "kept" / min(files)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again, mended = run()
    assert "its checksum does not match" in again
    assert again.endswith(said)
    assert [name for name in files if files[name] != mended[name]] == [damaged.name]


class Foreign(NamedTuple):
    """A weight of a module that no number format names."""

    codes: np.ndarray


def test_code_for_types_that_the_stamp_does_not_follow_is_not_kept() -> None:
    numba = pytest.importorskip("numba")
    from npllama.execution.disk_cache import _cache_for
    from npllama.numbers.f16 import F16

    def itself(name: str) -> Any:  # in the place of its cache
        return name

    def kept(*arguments: object) -> Any:
        return _cache_for(itself, "linears", tuple(map(numba.typeof, arguments)))

    x, bits = np.ones((2, 3), np.float32), np.ones((2, 3), np.uint16)
    assert str(kept(x, (F16(bits), F16(bits)))).startswith("op-linears.")
    assert kept(x, (F16(bits),)) != kept(x, (F16(bits), F16(bits))) != kept(x, (x, x))
    assert kept(x, (F16(bits), Foreign(bits))) is None


def test_the_kernels_compiled_are_those_asked_for() -> None:
    """NPLLAMA_PLAIN_KERNELS=1 in the environment of the whole run: no instruction of one family of CPUs is used."""
    pytest.importorskip("numba")
    from npllama.execution.kernels import int8_dot, target

    if os.environ.get("NPLLAMA_PLAIN_KERNELS", "0") != "0":
        assert (int8_dot.DOT, target.WIDTH, target.FMA, target.HAS_F16) == ("plain", 8, False, False)
        return
    features = target.FEATURES.split(",")
    forms = {"vnni": "+avx512vnni", "avxvnni": "+avxvnni", "avx2": "+avx2"}
    best = [dot for dot, needed in forms.items() if needed in features]
    assert [*best, "plain"][0] == int8_dot.DOT
    assert ("+fma" in features or target.ARM64) == target.FMA
    assert ("+f16c" in features or target.ARM64) == target.HAS_F16


def test_code_for_amx_is_kept_in_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the system does not let use it must not load what another has compiled for it."""
    pytest.importorskip("numba")
    from npllama.execution.kernels import amx
    from npllama.execution.kernels import compile as compiler

    def target(used: bool) -> str:
        monkeypatch.setattr(amx, "USED", used)
        return compiler.target()

    assert target(True) != target(False)


def test_two_hundred_flipped_bits_and_cut_files_are_noticed_and_cost_a_compilation(tmp_path: Path) -> None:
    numba = pytest.importorskip("numba")
    from npllama.execution.disk_cache import DiskCache
    from npllama.execution.kernels.flags import SERIAL

    file, said = tmp_path / "forward-f32-0-0", []

    def answer() -> tuple[int, bool]:
        kernel = numba.njit(**SERIAL)(lambda x: x * x + 1)
        kernel._cache = DiskCache(file, said.append)
        return kernel(5), kernel._cache.loaded

    assert answer() == (26, False)
    sound = file.read_bytes()
    assert answer() == (26, True)
    rng = random.Random(0)
    damaged = [bytearray(sound) for _ in range(200)]
    for content in damaged:
        content[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
    cut = [b"", sound[:31], sound[:-1], sound[:40], sound + b"\0", bytes(len(sound))]
    for content in [*map(bytes, damaged), *cut]:
        file.write_bytes(content)
        assert DiskCache(file, said.append).load_overload(None, None) is None
        (warning,) = said
        assert "its checksum does not match" in warning, "nothing of it was looked at"
        said.clear()
    for content in (bytes(damaged[0]), *cut):
        file.write_bytes(content)
        assert answer() == (26, False)
        assert len(said) == 1, "one warning"
        said.clear()
        assert answer() == (26, True), "the file is replaced"


@pytest.fixture
def keep(tmp_path: Path) -> Callable[[], tuple[int, list[str]]]:
    """Compile a small kernel that is to be kept in tmp_path: what it returns, and what was said."""
    numba = pytest.importorskip("numba")
    from npllama.execution.disk_cache import DiskCache
    from npllama.execution.kernels.flags import SERIAL

    def keep() -> tuple[int, list[str]]:
        said: list[str] = []
        kernel = numba.njit(**SERIAL)(lambda x: x * x + 1)
        kernel._cache = DiskCache(tmp_path / "forward-f32-0-0", said.append)
        return kernel(5), said

    return keep


@pytest.mark.parametrize("call", ["fdopen", "replace"])
@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EXDEV", "ENOTSUP"])
def test_code_that_cannot_be_kept_is_one_warning_and_leaves_no_file(
    tmp_path: Path, keep: Callable[[], tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch, call: str, code: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, call, refuse)
    number, (line,) = keep()
    assert number == 26
    assert "cannot keep compiled code" in line
    assert os.strerror(getattr(errno, code)) in line
    assert list(tmp_path.iterdir()) == []


def test_old_files_that_cannot_be_removed_do_not_make_the_new_one_unkept(
    tmp_path: Path, keep: Callable[[], tuple[int, list[str]]]
) -> None:
    (tmp_path / "forward-f32-1-0").mkdir()  # unlink fails
    assert keep() == (26, [])
    assert (tmp_path / "forward-f32-0-0").is_file()


def test_what_a_process_that_was_killed_has_left_is_removed_after_an_hour(
    tmp_path: Path, keep: Callable[[], tuple[int, list[str]]]
) -> None:
    for name, age_s in (("new-old", 4000), ("new-young", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(time.time() - age_s,) * 2)
    keep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forward-f32-0-0", "new-young"]
