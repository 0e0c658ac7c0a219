"""Draw the file tree of the README: the package's folders and files with the line that each folder says about them.

    python tools/file_tree.py [--readme README.md]

Every folder's __init__.py lists its files and folders in the order in which to read them. That is the one place where
these lines are written; the README repeats them.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

from markers import write_between  # noqa: E402

PACKAGE = ROOT / "npllama"
MARKERS = ("<!-- files: begin -->", "<!-- files: end -->")
BEFORE = "Files, in the order in which to read them:\n\n"
LINE = re.compile(r"    (\w+(?:\.py|/)) +(\S.*)")
INDENT = 2


def main() -> None:
    """Print the tree, or write it into a README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args()
    if args.readme:
        write_between(MARKERS, args.readme, tree())
    else:
        print(tree())


def listed(folder: Path) -> list[tuple[str, str]]:
    """What a folder's __init__.py says about its files and folders: name, line."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    lines = text.partition(BEFORE)[2].partition("\n\n")[0].splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    if not found or None in found:
        sys.exit(f"{folder}/__init__.py: a list of name and line behind {BEFORE.strip()!r} is needed; found {lines}")
    return [(match[1], match[2]) for match in found if match]


def tree() -> str:
    """The tree as a fenced block of Markdown."""
    rows = [("npllama/", ""), *rows_of(PACKAGE, INDENT)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["```text", *(f"{name:<{width}}  {line}".rstrip() for name, line in rows), "```"])


def rows_of(folder: Path, indent: int) -> Iterator[tuple[str, str]]:
    """The lines of a folder and of the folders in it."""
    for name, line in listed(folder):
        yield " " * indent + name, line
        if name.endswith("/") and (folder / name / "__init__.py").exists():
            yield from rows_of(folder / name, indent + INDENT)


if __name__ == "__main__":
    main()
