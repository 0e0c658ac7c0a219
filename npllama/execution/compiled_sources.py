"""Which source text does machine code depend on? The kernels, and what they use of the package's other modules.

Files of kernels count whole. Of other modules count the definitions that kernels use, those that these use, and so on:
the NamedTuples that are arguments, constants, functions that are compiled as they stand. Of a function that a kernel
replaces only the arguments count. Nothing is imported; sources are parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
NOT_COMPILED = {"npllama.errors", "npllama.execution.compiled_code", "npllama.execution.disk_cache"}
"""Modules that machine code does not depend on, though modules of kernels import them."""

Reference = tuple[str, str]
"""A module's dotted name, and a name that it defines."""


def compiled_sources(files: Sequence[Path]) -> list[str]:
    """The text of these files and of all definitions of the package that they use, without words for people."""
    return _Sources(files).texts


class _Sources:
    def __init__(self, files: Sequence[Path]) -> None:
        self._whole = set(files)
        self._modules: dict[str, _Module | None] = {}
        self._done: set[Reference] = set()
        modules = [_Module("", file) for file in files]
        self._replaced = {found for module in modules for found in module.replaced()}
        self.texts = [ast.dump(module.tree) for module in modules]
        for module in modules:
            for reference in module.references(module.nodes):
                self._add(*reference)

    def _add(self, name: str, what: str) -> None:
        """Add the definition of a name in a module, and what it uses."""
        if (name, what) in self._done or name in NOT_COMPILED:
            return
        self._done.add((name, what))
        module = self._module(name)
        if module is None:
            return
        if what in module.imported:
            self._add(*module.imported[what])
        for node in module.defined.get(what, ()):
            if (name, what) in self._replaced and isinstance(node, ast.FunctionDef):
                self.texts.append(f"{name}.{what}{ast.dump(node.args)}")
                continue
            self.texts.append(f"{name}.{what}{ast.dump(node)}")
            for reference in module.references(ast.walk(node)):
                self._add(*reference)

    def _module(self, name: str) -> _Module | None:
        """A module of the package, unless it is among the whole files, or none."""
        if name not in self._modules:
            file = _file(name)
            self._modules[name] = None if file is None or file in self._whole else _Module(name, file)
        return self._modules[name]


class _Module:
    """One parsed file without words for people: what it imports from the package, and what it defines."""

    def __init__(self, name: str, file: Path) -> None:
        self.tree = _WithoutWords().visit(ast.parse(file.read_text(encoding="utf-8")))
        self.nodes = list(ast.walk(self.tree))  # once, because it takes as long as parsing
        self.name = name
        self.imported: dict[str, Reference] = {}  # its own name for it -> what it is
        self.aliases: dict[str, str] = {}  # its own name for a module -> the module
        self.defined: dict[str, list[ast.stmt]] = {}
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "npllama":
                for alias in node.names:
                    whole, own = f"{node.module}.{alias.name}", alias.asname or alias.name
                    if _file(whole):
                        self.aliases[own] = whole
                    else:
                        self.imported[own] = (str(node.module), alias.name)
        for statement in _statements(self.tree.body):
            for defined in _names(statement):
                self.defined.setdefault(defined, []).append(statement)

    def references(self, nodes: Iterable[ast.AST]) -> Iterator[Reference]:
        """What nodes of this module use of itself and of the package's modules."""
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in self.imported:
                yield self.imported[node.id]
            elif isinstance(node, ast.Name) and self.name and node.id in self.defined:
                yield self.name, node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.aliases:
                yield self.aliases[node.value.id], node.attr

    def replaced(self) -> Iterator[Reference]:
        """The functions for which this module has a kernel: those that its decorators `overload` name."""
        for node in self.nodes:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "overload":
                    yield from self.references(ast.walk(decorator.args[0]))


def _file(module: str) -> Path | None:
    """The file of a module of the package."""
    parts = module.split(".")
    stem = PACKAGE.joinpath(*parts[1:])
    files = (stem.with_name(f"{stem.name}.py"), stem / "__init__.py") if len(parts) > 1 else (PACKAGE / "__init__.py",)
    return next((file for file in files if parts[0] == "npllama" and file.is_file()), None)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those inside its ifs and tries too."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody") if isinstance(statement, (ast.If, ast.Try)) else ():
            yield from _statements(getattr(statement, part, []))


def _names(statement: ast.stmt) -> set[str]:
    """What a statement of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return set()
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


class _WithoutWords(ast.NodeTransformer):
    """Drops what is written for people: docstrings, and what is said with an exception."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        words = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if words else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(exc=kind, cause=None)
