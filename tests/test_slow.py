"""Slow tests: a plain pytest leaves them out and says so, with the reason; pytest --all runs them."""

from __future__ import annotations

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


@pytest.mark.parametrize("processes", ["-n0", "-n1"])
@pytest.mark.parametrize(
    ("asked", "counts", "left_out"),
    [([], "1 passed, 3 deselected", True), (["--all"], "4 passed", False), (["-m", "slow"], "3 passed", False)],
)
def test_slow_tests_run_when_they_are_asked_for(
    processes: str, asked: list[str], counts: str, left_out: bool, tmp_path: Path
) -> None:
    (tmp_path / "test_both.py").write_text(TEST)
    settings = ["-c", str(HERE.parent / "pyproject.toml"), "-p", "conftest", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, processes, *asked, str(tmp_path)],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if processes == "-n0":
        assert counts.split(",")[0] in done.stdout.splitlines()[-1]
    said = "left out: 3 slow tests; pytest --all runs them too\nleft out [3]: take long\n"
    assert (said in done.stdout) is left_out
