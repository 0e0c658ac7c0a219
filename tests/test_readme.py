"""The README: every command and program in it runs as it stands.

Lines that install something need a network: .ci/run runs them, and here it is only checked that it does. The rest runs
in NumPy: it is the commands that are tested here, not the kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment
from helpers import write_safetensors_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line.strip()]
INSTALLING = [line for line in LINES if "pip install" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the paths of the README exist, and `npllama` and `python` mean what is under test."""
    path = tmp_path_factory.mktemp("readme")
    write_safetensors_checkpoint(path / "path" / "to" / "llama-2-7b")
    (path / "path" / "to" / "text.txt").write_text("the cat sat on the mat. " * 20)
    (path / "tools").symlink_to(ROOT / "tools")
    (path / "bin").mkdir()
    for name, command in {"npllama": [sys.executable, "-m", "npllama"], "python": [sys.executable]}.items():
        script = path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
    return path


def test_the_first_block_installs_and_tells_a_story_then_installs_and_tests() -> None:
    language, text = BLOCKS[0]
    assert language == "sh"
    first, second = text.splitlines()
    assert first.startswith("pip install . && npllama generate ")
    assert second == 'pip install ".[test]" && pytest'
    before = README[: README.index("```")].split("\n\n")
    assert len(before) == 3, "title, one sentence, then the commands"
    assert before[1].rstrip().count(". ") == 0
    assert before[1].rstrip().endswith(".")


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} <= {"sh", "python"}
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.skipif(os.name == "nt", reason="a shell")
def test_the_commands_run_one_after_the_other(folder: Path) -> None:
    env = environment(NPLLAMA_BACKEND="numpy", PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for line in LINES:
        if line not in INSTALLING:
            done = subprocess.run(
                ["sh", "-ec", line], cwd=folder, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=False
            )
            assert done.returncode == 0, f"{line}: {done.stderr.decode()}"


def test_what_installs_is_run_by_the_ci_script() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    first_block = BLOCKS[0][1].splitlines()
    assert "mapfile -t commands" in script, "it takes the first block from the README"
    for line in INSTALLING:
        taken = re.match("pip install .* --no-deps", line) and "grep '^pip install .* --no-deps' README.md" in script
        assert line in first_block or taken


@pytest.mark.parametrize("program", [text for language, text in BLOCKS if language == "python"])
def test_the_programs_run_and_print(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(NPLLAMA_BACKEND="numpy"), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.split()) > 5


def test_the_table_of_speeds_is_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("bench_peers", ROOT / "tools" / "bench_peers.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    begin, end = (re.escape(marker) for marker in tool.MARKERS)
    (shown,) = re.findall(f"{begin}\n(.*?)\n{end}", README, re.DOTALL)
    report = json.loads((ROOT / "tools" / "speed.json").read_text(encoding="utf-8"))
    assert shown == tool.table(report)
    assert len(report["results"]) >= 9
    for one in report["results"]:
        for peer, ratio in one["ratio"].items():
            rates = one["tokens_per_second"]
            assert ratio == pytest.approx(rates["npllama"] / rates[peer], rel=0.15), "of medians, and median of ratios"


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:npllama|tools)/[\w./]+)`", README):
        assert (ROOT / name).is_file(), name


def test_environment_variables_that_the_readme_names_are_read_by_the_package() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "npllama").rglob("*.py"))
    for name in set(re.findall(r"`(NPLLAMA_\w+)`", README)):
        assert f'"{name}"' in sources
