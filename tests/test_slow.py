"""Slow tests: a plain pytest leaves them out and says so, with the reason; pytest --all runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TEST = """
import pytest

@pytest.mark.slow("take long")
@pytest.mark.parametrize("n", range(3))
def test_slow(n):
    pass

def test_quick():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "counts", "left_out"),
    [
        (["-n0"], "1 passed, 3 deselected in", True),
        (["-n1"], "1 passed in", True),  # what another process leaves out is said all the same
        (["-n0", "--all"], "4 passed in", False),
        (["-n0", "-m", "slow"], "3 passed, 1 deselected in", False),
    ],
)
def test_slow_tests_run_when_they_are_asked_for(
    arguments: list[str], counts: str, left_out: bool, tmp_path: Path
) -> None:
    (tmp_path / "test_both.py").write_text(TEST)
    settings = ["-c", str(HERE.parent / "pyproject.toml"), "-p", "conftest", "--rootdir", str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, *arguments, str(tmp_path)],
        cwd=HERE, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(counts)
    said = "left out: 3 slow tests; pytest --all runs them too\nleft out [3]: take long\n"
    assert (said in done.stdout) is left_out
