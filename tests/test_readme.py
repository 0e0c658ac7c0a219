"""The README: every command and program in it runs as it stands.

Lines that install something need a network: .ci/run runs them, and here it is only checked that it does. The rest runs
in NumPy: it is the commands that are tested here, not the kernels.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import environment, run
from helpers import write_safetensors_checkpoint

from npllama.checkpoints.gguf.blocks import BLOCK_TYPES
from npllama.numbers import FORMATS
from npllama.store.plan import OWN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_peers
import compare_formats
import speed_chart
import story_grammar
import train_demo

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


def test_every_block_is_of_a_kind_that_is_run_but_for_the_file_tree() -> None:
    assert {language for language, _ in BLOCKS} <= {"sh", "python", "text"}
    assert README.count("```") == 2 * len(BLOCKS)
    assert [text.splitlines()[0] for language, text in BLOCKS if language == "text"] == ["npllama/"]  # see test_map.py


def test_the_story_at_the_top_is_what_the_command_beside_it_prints() -> None:
    before, story = re.findall(r"\n\n([^>\n][^\n]*(?:\n[^>\n][^\n]*)*)\n\n((?:> .*\n)+)", README)[0]
    (command,) = re.findall(r"`npllama (generate [^`]*)`", before)
    done = run(*shlex.split(command), NPLLAMA_BACKEND="numpy")
    assert done.code == 0, done.err
    assert " ".join(re.sub(r"^> ", "", story, flags=re.MULTILINE).split()) == done.text.strip()


@pytest.mark.slow("run every command of the README, or measure its table of formats again")
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


def between(markers: tuple[str, str]) -> str:
    """What a tool has written into the README."""
    (shown,) = re.findall(f"{re.escape(markers[0])}\n(.*?)\n{re.escape(markers[1])}", README, re.DOTALL)
    return shown


def report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "tools" / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(("features", "name"), [("", "speed.json"), ("avx2", "speed-avx2.json")])
def test_the_table_of_speeds_is_what_was_measured(features: str, name: str) -> None:
    found = report(name)
    assert between(bench_peers.MARKERS_OF[features]) == bench_peers.table(found)
    assert found["about"].get("features", "") == features
    assert len(found["results"]) >= 9
    for one in found["results"]:
        for peer, ratio in one["ratio"].items():
            rates = one["tokens_per_second"]
            assert ratio == pytest.approx(rates["npllama"] / rates[peer], rel=0.15), "of medians, and median of ratios"


def test_the_chart_of_speeds_is_what_the_tool_draws() -> None:
    svg = speed_chart.CHART.read_text(encoding="utf-8")
    assert svg == speed_chart.chart(report("speed.json")), "run: python tools/speed_chart.py"
    ((alt, file),) = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README)
    assert (ROOT / file).samefile(speed_chart.CHART)
    assert len(alt.split()) > 10


def test_the_chart_of_speeds_is_legible_on_light_and_on_dark_pages() -> None:
    svg = speed_chart.CHART.read_text(encoding="utf-8")
    for color in set(re.findall(r"text \{[^}]*fill: (#\w{6})", svg)):
        assert min(contrast(color, page) for page in ("#ffffff", "#0d1117")) >= 4
    for color in set(re.findall(r'fill="(#\w{6})"', svg)) | set(re.findall(r"stroke: (#\w{6})", svg)):
        assert min(contrast(color, page) for page in ("#ffffff", "#0d1117")) >= 3


def contrast(color: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2), 1 to 21."""
    lighter, darker = sorted((luminance(color), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_table_of_formats_has_every_format_with_its_size_from_the_registry() -> None:
    found = report("formats.json")
    assert between(compare_formats.MARKERS) == compare_formats.table(found)
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) GB \|", between(compare_formats.MARKERS), re.MULTILINE)
    assert [name for name, _, _ in rows] == list(FORMATS)
    for name, bits, gigabytes in rows:
        assert float(bits) == pytest.approx(FORMATS[name].bits_per_weight(), abs=0.05), "the output of q4 has more"
        assert float(gigabytes) == pytest.approx(float(bits) * 6.738 / 8, abs=0.06), "LLaMA 2 7B has 6.738e9 weights"


def test_the_table_of_gguf_types_is_what_exports_go_by() -> None:
    rows = re.findall(r"^\| ([A-Z]+\d\w*(?:, \w+)*) \| (\w+|the same) \| ", README, re.MULTILINE)
    found = {name: own for names, own in rows for name in names.split(", ")}
    kept = dict.fromkeys(["F32", "F16", "BF16", *(kind.name for kind in BLOCK_TYPES.values())], "the same")
    assert found == kept | {name: own for name, own in OWN.items() if name != "f64"}
    assert all(name.lower() in FORMATS for name, own in found.items() if own == "the same")


@pytest.mark.slow("run every command of the README, or measure its table of formats again")
def test_the_table_of_formats_measures_what_it_says() -> None:
    """A few of the stories again: the same order, and the same sizes within what so few can say."""
    texts = list(story_grammar.stories(train_demo.HELD_OUT_SEED, 0, 4))
    again = compare_formats.measure(texts)["results"]
    for name, one in report("formats.json")["results"].items():
        assert again[name]["kl_divergence"] == pytest.approx(one["kl_divergence"], rel=0.3, abs=1e-12), name


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:npllama|tools)/[\w./]+)`", README):
        assert (ROOT / name).is_file(), name


def test_environment_variables_that_the_readme_names_are_read_by_the_package() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "npllama").rglob("*.py"))
    for name in set(re.findall(r"`(NPLLAMA_\w+)`", README)):
        assert f'"{name}"' in sources
