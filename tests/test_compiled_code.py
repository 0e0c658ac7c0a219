"""What of compiled code is kept for the next process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


def test_code_that_holds_an_address_of_this_process_is_not_kept(tmp_path: Path) -> None:
    """numba.get_num_threads in a kernel is such code: in the next process it ends in a segmentation fault."""
    numba = pytest.importorskip("numba")
    from npllama.disk_cache import DiskCache

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

    from npllama.kernels.deferred import compiled_as_one
    from npllama.kernels.flags import INNER, SERIAL

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

    with compiled_as_one():
        whole.compile((numba.float64,))
    assert whole(3.0) == 19.0
    assert [name.rsplit(".", 1)[-1] for name in assembled] == ["whole"]
    (compiled,) = whole.overloads.values()
    defined = list(compiled.library.get_defined_functions())
    assert [f.name for f in defined if f.linkage.name != "internal"] == [compiled.fndesc.llvm_cpython_wrapper_name]


def test_code_from_a_file_runs_its_own_functions_and_not_others_of_the_same_name(tmp_path: Path) -> None:
    """Numba numbers functions of one name anew in each process, and two kernels may differ in nothing else."""
    pytest.importorskip("numba")
    program = """
import sys
import numba
from npllama.kernels.deferred import compiled_as_one
from npllama.disk_cache import DiskCache
from npllama.kernels.flags import INNER, SERIAL
from npllama.kernels.vector import keep_apart
from pathlib import Path

def make(number):
    @numba.njit(**INNER)
    def inner(x):
        keep_apart()
        return x + number

    @numba.njit(**SERIAL)
    def outer(x):
        return inner(x)

    return outer

for number in map(int, sys.argv[2:]):
    function = make(number)
    function._cache = DiskCache(Path(sys.argv[1], f"forward-{number}-0-0"), print)
    with compiled_as_one():
        function.compile((numba.int64,))
    print(function(0), function._cache.loaded)
"""

    def run(*numbers: int) -> list[str]:
        command = [sys.executable, "-c", program, str(tmp_path), *map(str, numbers)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.split()

    assert run(1) == ["1", "False"]
    assert run(2, 1) == ["2", "False", "1", "True"]
    assert run(2, 1) == ["2", "True", "1", "True"]


def test_the_kernels_compiled_are_those_asked_for() -> None:
    """NPLLAMA_PLAIN_KERNELS=1 in the environment of the whole run: no instruction of one family of CPUs is used."""
    pytest.importorskip("numba")
    from npllama.kernels import codes, vector

    if os.environ.get("NPLLAMA_PLAIN_KERNELS", "0") != "0":
        assert (codes.DOT, vector.WIDTH, vector.FMA, vector.HALF) == ("plain", 8, False, False)
        return
    features = vector.FEATURES.split(",")
    forms = {"vnni": "+avx512vnni", "avxvnni": "+avxvnni", "avx2": "+avx2"}
    best = [dot for dot, needed in forms.items() if needed in features]
    assert [*best, "plain"][0] == codes.DOT
    assert ("+fma" in features or vector.ARM64) == vector.FMA
    assert ("+f16c" in features or vector.ARM64) == vector.HALF


def test_code_for_the_matrix_unit_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the system does not let use it must not load what another has compiled for it."""
    pytest.importorskip("numba")
    from npllama.kernels import entry, matrix_unit

    def target(used: bool) -> str:
        monkeypatch.setattr(matrix_unit, "USED", used)
        return entry.target()

    assert target(True) != target(False)


def test_two_hundred_flipped_bits_and_cut_files_cost_a_compilation_each(tmp_path: Path) -> None:
    numba = pytest.importorskip("numba")
    from npllama.disk_cache import DiskCache
    from npllama.kernels.flags import SERIAL

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
    for content in [*map(bytes, damaged), b"", sound[:31], sound[:-1], sound[:40], sound + b"\0", bytes(len(sound))]:
        file.write_bytes(content)
        assert answer() == (26, False)
        assert len(said) == 1, "one warning"
        said.clear()
        assert answer() == (26, True), "the file is replaced"
