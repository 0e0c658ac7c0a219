"""What of compiled code is kept for the next process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


def test_code_that_holds_an_address_of_this_process_is_not_kept(tmp_path: Path) -> None:
    """numba.get_num_threads in a kernel is such code: in the next process it ends in a segmentation fault."""
    numba = pytest.importorskip("numba")
    from npllama.kernels.entry import DiskCache

    @numba.njit
    def kernel() -> int:
        return numba.get_num_threads()  # type: ignore[no-any-return]

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
