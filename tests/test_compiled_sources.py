"""What the stamp of compiled code depends on, and which files of compiled code stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import environment

import npllama
from npllama.execution import compiled_code, compiled_sources

PACKAGE = Path(npllama.__file__).parent
STAMP = "from npllama.execution import compiled_code; print(compiled_code.stamp())"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "npllama", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    return tmp_path / "npllama"


def stamp(copy: Path) -> str:
    """The stamp of a copy of the package, in a process of its own."""
    env = environment(PYTHONPATH=str(copy.parent), NPLLAMA_CACHE_DIR=str(copy.parent / "compiled"))
    return subprocess.run(
        [sys.executable, "-c", STAMP], env=env, capture_output=True, text=True, check=True, cwd=copy.parent
    ).stdout


def digest(package: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, computed from the files of a copy by the package under test: quicker, for nothing is imported anew."""
    with monkeypatch.context() as patch:
        for module in (compiled_code, compiled_sources):
            patch.setattr(module, "PACKAGE", package)
        return compiled_code._stamp.__wrapped__(())


@pytest.fixture(scope="module")
def unchanged() -> str:
    """The stamp of the package as it is: which copy of it is asked makes no difference."""
    return compiled_code._stamp.__wrapped__(())


def test_a_copy_of_the_package_has_its_stamp(copy: Path, unchanged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stamp(copy).strip() == digest(copy, monkeypatch) == unchanged


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{file.name} has no {old!r}"
    file.write_text(text.replace(old, new, 1))


WORDS = {
    "an error of the reader of weights": ("store/opening.py", "raise ModelError(", 'raise ModelError("Oh! " '),
    "an error of the cache": ("cache.py", "is not known; it needs", "is unknown; it needs"),
    "an error of a kernel": ("execution/kernels/linear.py", "no kernel for weights", "there is no kernel for weights"),
    "a docstring": ("execution/kernels/linear.py", '"""ops.linear', '"""The step ops.linear'),
    "a comment": ("model.py", "import annotations", "import annotations  # as everywhere"),
    "how weights are read": ("store/opening.py", "import annotations\n", "import annotations\n\n_UNUSED = 1\n"),
    "a warning about a file": ("execution/disk_cache.py", "compiling again", "it is compiled again"),
    "an error about a forked process": ("errors.py", "Base of every error", "The base of every error"),
    "how NumPy computes a step": ("ops.py", "gain * (x * scale", "gain * (+x * scale"),
}


@pytest.mark.parametrize("what", WORDS)
def test_other_words_compile_nothing_again(
    copy: Path, unchanged: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    edit(copy / WORDS[what][0], *WORDS[what][1:])
    assert digest(copy, monkeypatch) == unchanged


CODE = {
    "the model": ("model.py", "x = x + ", "x = x + x + "),
    "the order of the weights": ("weights.py", "    wk: Annotated", "    other_wk: Annotated"),
    "which slot a position has": ("cache.py", "BLOCK_SLOTS = 64\n", "BLOCK_SLOTS = 32\n"),
    "what a cache consists of": ("cache.py", "    table: np.ndarray\n", "    blocks: np.ndarray\n"),
    "a constant of a number format": ("numbers/q4.py", "Q4_CODEBOOK = (-34", "Q4_CODEBOOK = (-35"),
    "a constant that another one is made of": (
        "numbers/blocks.py",
        "_SCALE_CODES = np.arange(256",
        "_SCALE_CODES = np.arange(0, 256",
    ),
    "a kernel": ("execution/kernels/float_linear.py", "SERIAL_BELOW = 1 << 16", "SERIAL_BELOW = 1 << 17"),
    "the compiler's flags": ("execution/kernels/flags.py", '"nogil": True', '"nogil": False'),
    "the arguments of a step": ("ops.py", "def swiglu(gate", "def swiglu(up_gate"),
}


@pytest.mark.parametrize("what", CODE)
def test_what_machine_code_is_made_from_compiles_again(
    copy: Path, unchanged: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    edit(copy / CODE[what][0], *CODE[what][1:])
    assert digest(copy, monkeypatch) != unchanged


def test_a_file_that_is_added_brings_what_it_uses_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text("from npllama.numbers import activations as a\nx = a.quantize_rows\n")
    texts = compiled_sources.compiled_sources([tmp_path / "kernel.py"])
    assert any(text.startswith("npllama.numbers.activations.quantize_rowsFunctionDef") for text in texts)
    assert any(text.startswith("npllama.numbers.blocks.GROUPAssign") for text in texts)


def test_the_stamp_of_known_sources_is_remembered(copy: Path) -> None:
    before = stamp(copy)
    compiled = copy.parent / "compiled"
    compiled.mkdir(mode=0o700)
    program = STAMP + "; from pathlib import Path; import sys; compiled_code.note_use(Path(sys.argv[1]))"
    env = environment(PYTHONPATH=str(copy.parent), NPLLAMA_CACHE_DIR=str(compiled))
    (compiled / "forward-x").touch()
    subprocess.run(
        [sys.executable, "-c", program, compiled / "forward-x"],
        env=env,
        cwd=copy.parent,
        check=True,
        capture_output=True,
    )
    (known,) = compiled.glob("stamp-*")
    assert known.read_text() == before.strip()
    known.write_text("0123456789abcdef")
    assert stamp(copy) == "0123456789abcdef\n", "it is what was remembered"
    known.write_text("no stamp")
    assert stamp(copy) == before


def written(folder: Path, name: str, unused_days: float = 0.0, size: int = 10) -> Path:
    file = folder / name
    file.write_bytes(b"x" * size)
    when = time.time() - unused_days * 86400
    os.utime(file, (when, when))
    return file


def test_files_of_other_installations_stay_until_nobody_uses_them(tmp_path: Path) -> None:
    new = written(tmp_path, "forward-f32.0.kv_f32-aaaa-cpu")
    others = [written(tmp_path, f"forward-f32.0.kv_f32-{stamp}-cpu", 30) for stamp in ("bbbb", "cccc", "dddd")]
    foreign = written(tmp_path, "notes.txt", 1000)
    old = written(tmp_path, "forward-f32.0.kv_f32-eeee-cpu", compiled_code.MAX_DAYS + 1)
    unfinished, writing = written(tmp_path, "new-a", 1), written(tmp_path, "new-b")
    compiled_code.tidy(tmp_path, new)
    assert sorted(tmp_path.iterdir()) == sorted([new, *others, foreign, writing])
    assert not old.exists()
    assert not unfinished.exists()


def test_the_longest_unused_files_go_when_all_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_code, "MAX_BYTES", 35)
    files = [written(tmp_path, f"forward-{age}", age) for age in range(6)]
    compiled_code.tidy(tmp_path, files[5])
    assert sorted(tmp_path.iterdir()) == [*files[:3], files[5]]
