"""Run npllama as a user does, in a process of its own: the package under test, whichever directory that is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import npllama

SHARED_CPUS = "NPLLAMA_TESTS_SHARE_CPUS"
"""The environment variable that says that OMP_NUM_THREADS was set by conftest.py."""
COMMAND = [sys.executable, "-m", "npllama"]


def environment(**changes: str) -> dict[str, str]:
    """The environment for a process that is to import the package that this one has imported.

    It uses as many threads as it would without tests that run beside it.
    """
    own = dict(os.environ)
    if own.pop(SHARED_CPUS, None) is not None:
        own.pop("OMP_NUM_THREADS", None)
    return {**own, "PYTHONPATH": str(Path(npllama.__file__).parent.parent), **changes}


def run(*arguments: object, stdin: bytes | None = None, cwd: Path | None = None, **changes: str) -> Done:
    """Run one command to its end; stdin None: empty. `changes` are environment variables."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin or b"",
        capture_output=True,
        cwd=cwd,
        env=environment(**changes),
        check=False,
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr.decode())


def share_compiled(cache: Path) -> None:
    """Let the other tests of the run load what a test has had compiled into a cache directory of its own."""
    shared = Path(os.environ["NPLLAMA_CACHE_DIR"])
    shared.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in cache.iterdir():
        if not (shared / file.name).exists():
            new = shared / f"new-{file.name}-{os.getpid()}"
            shutil.copyfile(file, new)
            os.replace(new, shared / file.name)  # at once: others may be loading


class Done:
    """How a command ended: exit code, the bytes of stdout, the text of stderr."""

    def __init__(self, code: int, out: bytes, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def text(self) -> str:
        return self.out.decode()
