"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_sentencepiece
from hypothesis import settings

# Seeded, and without a time limit: a busy machine is no failure.
settings.register_profile("npllama", derandomize=True, deadline=None, database=None)
settings.load_profile("npllama")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Compiled code is kept for this run alone, unless a directory was given: code is loaded once it is there."""
    if "NPLLAMA_CACHE_DIR" not in os.environ:
        os.environ["NPLLAMA_CACHE_DIR"] = tempfile.mkdtemp(prefix="npllama-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("NPLLAMA_CACHE_DIR")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which kernels the run has compiled."""
    if os.environ.get("NPLLAMA_BACKEND") == "numpy" or importlib.util.find_spec("numba") is None:
        return
    from npllama.kernels import codes, matrix_unit, vector

    terminalreporter.write_line(
        f"kernels: vectors of {vector.WIDTH}, products of codes {codes.DOT}, matrix unit {matrix_unit.USED}, "
        f"FMA {vector.FMA}, F16C {vector.HALF}"
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints and golden results that lies beside a development clone."""
    folder = Path(os.environ.get("NPLLAMA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "golden").is_dir():
        pytest.skip("real checkpoints: NPLLAMA_TEST_DATA names no folder with golden results")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 pieces, trained on the spot as LLaMA 2's was (BPE, byte fallback)."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tiny_sentencepiece.trained())
    return path
