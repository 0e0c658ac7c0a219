"""A number format of another package goes wherever the package's own formats go, once it is registered."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import environment
from helpers import write_safetensors_checkpoint
from slow import COMPILES_AGAIN

HERE = Path(__file__).resolve().parent
compiled_only = pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)

PROGRAM = """
import contextlib, io, json, sys
import numpy as np
import q5_format
import npllama
from npllama.commands import cli

checkpoint, wide, exported, quantized, *backends = sys.argv[1:]

def run(*arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(arguments) == 0, arguments
    return printed.getvalue()

if checkpoint:
    run("export", checkpoint, wide, "--dtype", "f32")
    run("export", checkpoint, exported, "--dtype", "q5")
    run("quantize", wide, quantized, "--dtype", "q5")
found = {"info": json.loads(run("info", exported, "--check", "--json"))}
found["backends"], found["errors"] = {}, {}
ids = np.random.default_rng(0).integers(0, 300, 50).tolist()
with npllama.load(wide, backend="numpy") as llm:
    expected = llm.logits(ids)
for backend in backends:
    with npllama.load(exported, backend=backend, threads=1) as llm:
        found["backends"][backend] = llm.logits(ids).tobytes().hex()
for dtype in ("q4", "q5", "q6") if checkpoint else ():
    run("quantize", wide, quantized + dtype, "--dtype", dtype)
    with npllama.load(quantized + dtype, backend="numpy") as llm:
        found["errors"][dtype] = float(np.square(llm.logits(ids) - expected).sum())
print(json.dumps(found))
"""


def run(folder: Path, *backends: str, anew: bool = True) -> dict[str, Any]:
    """Use q5, from the files in `folder`, in a process of its own; what it found out."""
    paths = [str(folder / name) for name in ("wide", "exported", "quantized")]
    checkpoint = str(folder / "checkpoint") if anew else ""
    env = environment(PYTHONPATH=os.pathsep.join([str(folder), *sys.path]), NPLLAMA_CACHE_DIR=str(folder / "compiled"))
    command = [sys.executable, "-c", PROGRAM, checkpoint, *paths, *backends]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    for name in ("q5_format.py", "q5_kernel.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "compiled").mkdir(mode=0o700)
    return tmp_path


def test_it_goes_through_export_quantize_info_and_numpy(folder: Path) -> None:
    found = run(folder, "numpy")
    assert found["info"]["number_formats"]["wq"] == found["info"]["number_formats"]["output"] == "q5"
    assert found["info"]["number_formats"]["norm"] == "f32"
    assert found["errors"]["q6"] < found["errors"]["q5"] < found["errors"]["q4"]
    for file in (folder / "exported").iterdir():
        assert (folder / "quantized" / file.name).read_bytes() == file.read_bytes(), file.name


@COMPILES_AGAIN
@compiled_only
def test_its_kernel_computes_what_numpy_does_and_another_kernel_is_compiled_anew(folder: Path) -> None:
    pytest.importorskip("numba", reason="compiled kernels: numba is not installed")
    found = run(folder, "numpy", "numba")["backends"]
    assert found["numba"] == found["numpy"], "the same bits"
    (kept,) = (folder / "compiled").glob("forward-*")
    kernel = folder / "q5_kernel.py"
    own = kernel.read_text()
    kernel.write_text(own.replace("ZERO_POINT = LOWEST", "ZERO_POINT = LOWEST + 1"))
    other = run(folder, "numba", anew=False)["backends"]["numba"]
    assert other != found["numba"], "the edited kernel runs"
    assert len(list((folder / "compiled").glob("forward-*"))) == 2, "beside the code of the first"
    kernel.write_text(own.replace("The kernel of q5_format", "Other words"))
    written = kept.stat().st_ino
    assert run(folder, "numba", anew=False)["backends"]["numba"] == found["numba"]
    assert kept.stat().st_ino == written, "other words compile nothing again"
