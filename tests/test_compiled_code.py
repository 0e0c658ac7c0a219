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
