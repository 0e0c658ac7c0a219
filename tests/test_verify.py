"""npllama verify: it passes sound kernels, and catches a kernel that is wrong in one place of a hundred."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

from npllama.commands import verify as command
from npllama.errors import UsageError
from npllama.execution.engine import Engine
from npllama.measure.verify import largest_error, verify, whole_model_error
from npllama.store.opening import open_model

pytestmark = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)


pytest.importorskip("numba")


@pytest.fixture(scope="module", params=["f32", "f16", "bf16", "q8", "q6", "q4"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("verify") / "model"
    helpers.write_any_model(folder, request.param)
    return Engine(open_model(folder), "numba")


def test_sound_kernels_pass_in_every_step_and_kind_of_weight(engine: Engine) -> None:
    rows = verify(engine)
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    kinds = {"wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"}
    assert {row.weight for row in rows if row.step == "linear"} == kinds
    assert {row.step for row in rows} >= {"embed", "rms_norm", "rope", "attend", "swiglu"}
    assert all(row.calls for row in rows)


def test_the_model_compiled_whole_is_its_kernels_one_by_one(engine: Engine) -> None:
    assert whole_model_error(engine).error == 0


def test_a_kernel_with_one_wrong_scale_in_a_hundred_is_caught(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = engine.kernels_per_op()

    def scaled(y):
        y[:, ::100] *= np.float32(1.01)
        return y

    wrong = {
        "linear": lambda x, w: scaled(sound["linear"](x, w)),
        "linears": lambda x, ws: tuple(scaled(y) for y in sound["linears"](x, ws)),
    }
    monkeypatch.setattr(engine, "kernels_per_op", lambda: {**sound, **wrong})
    failed = {row.weight for row in verify(engine) if not row.passed}
    assert failed == {"wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"}


def test_a_result_that_is_not_finite_or_of_another_type_is_an_error() -> None:
    ones = np.ones((2, 2), np.float32)
    assert largest_error(ones, ones) == 0
    assert largest_error(ones * np.float32(np.nan), ones) == np.inf
    assert largest_error(ones, ones * np.float32(np.inf)) == np.inf
    assert largest_error(ones.astype(np.float64), ones) == np.inf
    assert largest_error(ones[:1], ones) == np.inf


def test_the_numpy_execution_has_nothing_to_verify(tmp_path: Path) -> None:
    helpers.write_model_directory(tmp_path / "model")
    with pytest.raises(UsageError, match="has no kernels"):
        verify(Engine(open_model(tmp_path / "model"), "numpy"))


# ---------------------------------------------------------------- the command


@pytest.fixture
def twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of what stands in for the process of the plain twins, which tells its arguments through `said`.

    It notes whether the other process had made `checked` when it was let go on.
    """
    os.mkfifo(tmp_path / "said")
    program = tmp_path / "program"
    program.write_text(
        f'#!/bin/sh\ncd {tmp_path}\necho "$NPLLAMA_PLAIN_KERNELS $@" > said\ncat\n'
        "test -e checked && touch in_turn\n(echo compiling ...; echo a remark) >&2\nexit 5\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("NPLLAMA_PLAIN_KERNELS", raising=False)
    return tmp_path


def test_plain_twins_compile_meanwhile_and_are_compared_afterwards(
    call, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def checked(args: argparse.Namespace, notes: object) -> int:
        told.append((twins / "said").read_text())  # the other process has begun
        (twins / "checked").touch()
        return 0

    monkeypatch.setattr(command, "_verify", checked)
    done = call("verify", "--kv-dtype", "q8", "-m", "a model", "-t", 3)
    assert (done.code, done.err) == (5, "a remark\n")
    assert told == ["1 -m npllama verify --in-turn --kv-dtype q8 -m a model -t 3\n"]
    assert (twins / "in_turn").exists()


def test_plain_twins_end_with_a_check_that_fails(call, twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(args: argparse.Namespace, notes: object) -> int:
        (twins / "said").read_text()
        (twins / "checked").touch()
        raise UsageError("no such model")

    monkeypatch.setattr(command, "_verify", fails)
    done = call("verify", "-m", "a model")
    assert done.code != 5
    assert "no such model" in done.err
    assert not (twins / "in_turn").exists()
