"""The map of the source: the README's tree, its table "where is ... decided?", what each folder says of its files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import npllama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import file_tree

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(npllama.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
TABLE = README.partition("| what | where |\n|---|---|\n")[2].partition("\n\n")[0]
ROWS = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in TABLE.splitlines()]
# Files of others that are mentioned elsewhere than behind "Source".
FOREIGN = {"convert_llama_weights_to_hf.py", "zero_to_fp32.py"}


def test_every_folder_is_a_package_of_the_wheel() -> None:
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert listed is not None
    named = {".".join(folder.relative_to(PACKAGE.parent).parts) for folder in FOLDERS}
    assert named <= set(re.findall(r'"([\w.]+)"', listed[1]))


def between(markers: tuple[str, str]) -> str:
    begin, end = markers
    return README.partition(f"{begin}\n")[2].partition(f"\n{end}")[0]


def definitions(path: Path) -> set[str]:
    """Functions, classes and constants of a file; what a class has, as Class.name."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= names_of(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in names_of(inner)}
    return found


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_a_folder_names_each_of_its_files_and_folders_once(folder: Path) -> None:
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.name}/" for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(name for name, _ in file_tree.listed(folder)) == sorted([*files, *folders])


def test_the_readme_shows_the_tree_as_the_folders_tell_it() -> None:
    assert between(file_tree.MARKERS) == file_tree.tree(), "run: python tools/file_tree.py --readme README.md"


def test_the_tree_has_a_line_for_every_module() -> None:
    n_modules = len([path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"])
    assert len(re.findall(r"^ +\w+\.py  +\w", between(file_tree.MARKERS), re.MULTILINE)) == n_modules


def test_where_things_are_decided_has_a_row_for_each_question() -> None:
    assert len(ROWS) >= 30
    assert len({question for question, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("question", "answer"), ROWS)
def test_where_something_is_decided_names_files_and_what_they_define(question: str, answer: str) -> None:
    named = re.findall(r"`([^`]+)`", answer)
    assert named
    assert named[0].endswith(".py"), "first a file, then what is in it"
    assert not re.search(r":\d|\bline \d", answer), "line numbers do not stay true"
    defined: set[str] = set()
    for name in named:
        if name.endswith(".py"):
            defined = definitions(PACKAGE / name)
        else:
            assert name in defined, f"{question}: {name}"


def test_every_folder_that_says_how_to_add_something_is_in_the_table() -> None:
    telling = [f for f in FOLDERS if re.search(r"^A new [\w ]+ is ", docstring(f / "__init__.py"), re.MULTILINE)]
    assert len(telling) >= 6
    for folder in telling:
        file = (folder / "__init__.py").relative_to(PACKAGE).as_posix()
        assert any(q.startswith("where a new") and f"`{file}`" in answer for q, answer in ROWS), file


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def words(path: Path) -> str:
    """Docstrings and comments of a file, but for the paragraphs that give the sources of others."""
    text = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    told = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    told = [re.sub(r"Sources?\b.*?:.*?(\n\s*\n|\Z)", "", one, flags=re.DOTALL) for one in told]
    return "\n".join([*told, *re.findall(r"#.*", text)])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_that_docstrings_name_exist(path: Path) -> None:
    folders = (PACKAGE, ROOT / "tools", ROOT / "tests")
    known = [f"/{file.relative_to(one.parent).as_posix()}" for one in folders for file in one.rglob("*.py")]
    for name in set(re.findall(r"(?:\w+/)*\w+\.py\b", words(path))):
        assert name.split("/")[-1] in FOREIGN or any(file.endswith(f"/{name}") for file in known), name


def test_functions_that_folders_name_in_backticks_exist() -> None:
    """As `module.name`, or as a name that some file of the package defines."""
    defined = {path: definitions(path) for path in PACKAGE.rglob("*.py")}
    anywhere = set().union(*defined.values())
    for folder in FOLDERS:
        for name in re.findall(r"`([\w./]+)`", docstring(folder / "__init__.py")):
            module, _, rest = name.rpartition("/")[2].partition(".")
            theirs = [found for path, found in defined.items() if path.stem == module]
            attributes = {each.rpartition(".")[2] for each in anywhere}
            assert name in anywhere | attributes or any(rest in found for found in theirs), f"{folder.name}: {name}"
