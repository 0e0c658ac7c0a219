"""What is used of Numba's private parts: without any one of them code is compiled as usual, and not kept."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

# E402: these import numba, which may not be there.
from npllama.execution.disk_cache import DiskCache  # noqa: E402
from npllama.execution.kernels import numba_internals  # noqa: E402
from npllama.execution.kernels.flags import INNER, SERIAL  # noqa: E402
from npllama.execution.kernels.numba_internals import LIBRARY_PARTS, PARTS, LinkOnceLibrary, compile_once  # noqa: E402


def compiled(folder: Path) -> tuple[int, bool, list[str]]:
    """What a kernel that calls another returns for 5, whether it came from the folder, and what was said."""

    @numba.njit(**INNER)
    def inner(x: int) -> int:
        return x * x

    @numba.njit(**SERIAL)
    def outer(x: int) -> int:
        return inner(x) + 1

    said: list[str] = []
    cache = DiskCache(folder / "forward-f32-0-0", said.append)
    loaded = compile_once(outer, (numba.int64,), cache)
    return outer(5), loaded, said


def test_this_version_of_numba_has_every_part(tmp_path: Path) -> None:
    assert numba_internals.missing_parts() == []
    assert compiled(tmp_path) == (26, False, [])
    assert compiled(tmp_path) == (26, True, [])


def test_each_types_of_arguments_have_their_own_cache_or_none(tmp_path: Path) -> None:
    @numba.njit(**SERIAL)
    def twice(x: float) -> float:
        return x + x

    said: list[str] = []
    caches = {numba.int64: DiskCache(tmp_path / "op-twice-0-0", said.append), numba.float64: None}
    numba_internals.compile_each_once(twice, lambda types: caches[types[0]])
    assert twice(3) == 6
    (kept,) = tmp_path.iterdir()
    content = kept.read_bytes()
    assert (twice(1.5), twice(4), kept.read_bytes()) == (3.0, 8, content)
    assert (list(tmp_path.iterdir()), said) == ([kept], [])


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_code_is_compiled_and_not_kept(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = numba_internals.find
    monkeypatch.setattr(numba_internals, "find", lambda name: None if name == part else find(name))
    answer, loaded, said = compiled(tmp_path)
    assert (answer, loaded, list(tmp_path.iterdir())) == (26, False, [])
    assert [message for message in said if part in message and "not kept" in message] == said
    assert len(said) == 1


@pytest.mark.parametrize("name", LIBRARY_PARTS)
def test_a_library_without_a_part_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_internals, "LIBRARY_PARTS", (f"{name}_of_another_version",))
    assert numba_internals.missing_parts() == [f"library.{name}_of_another_version"]


@pytest.mark.parametrize("name", ["_finalize_final_module", "_hide_all_but", "get_pointer_to_function"])
def test_an_attribute_error_in_a_part_takes_the_same_road(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*arguments: Any) -> None:
        raise AttributeError("'JITCodeLibrary' object has no attribute '_final_module'")

    monkeypatch.setattr(LinkOnceLibrary, name, changed)
    answer, loaded, said = compiled(tmp_path)
    assert (answer, loaded, list(tmp_path.iterdir())) == (26, False, [])
    assert len(said) == 1
    assert "_final_module" in said[0]


def test_compiling_as_usual_leaves_numba_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = numba_internals._codegen()
    usual, collecting = generator._library_class, gc.get_threshold()
    monkeypatch.setattr(LinkOnceLibrary, "_hide_all_but", None)
    compiled(tmp_path)
    assert gc.get_threshold() == collecting
    assert generator._library_class is usual
    assert "set_env" not in vars(generator)


def test_a_kernel_that_cannot_be_typed_is_an_error_as_ever(tmp_path: Path) -> None:
    @numba.njit(**SERIAL)
    def wrong(x: int) -> int:
        return x + "1"

    said: list[str] = []
    with pytest.raises(numba.core.errors.TypingError):
        compile_once(wrong, (numba.int64,), DiskCache(tmp_path / "forward-f32-0-0", said.append))


def test_the_target_is_found_without_numbas_code_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    triple, cpu, features = numba_internals.target_machine()
    monkeypatch.setattr(numba_internals, "find", lambda name: None)
    other_triple, other_cpu, other_features = numba_internals.target_machine()
    assert (other_triple.split("-")[0], other_cpu) == (triple.split("-")[0], cpu)
    assert {f for f in features.split(",") if f[:1] == "+"} <= set(other_features.split(","))


def test_threads_are_started_without_numbas_private_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_internals, "find", lambda name: None)
    numba_internals.launch_threads()
    assert numba.threading_layer() in ("omp", "tbb", "workqueue")
