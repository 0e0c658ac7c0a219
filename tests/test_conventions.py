"""What the sources promise about themselves, checked by parsing them: layers, safety, kernels' flags, docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from command_line import environment

import npllama
from npllama import rope

PACKAGE = Path(npllama.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# From the bottom to the top: a module imports only from rows below its own. Folders are one entry; inside a folder,
# modules may import each other as long as there is no cycle.
LAYERS = (
    {"errors"},
    {"version"},
    {"system", "options"},
    {"rope"},
    {"config"},
    {"numbers"},
    {"weights", "text"},
    {"checkpoints"},
    {"store", "cache"},
    {"ops"},
    {"model"},
    {"execution"},
    {"generation"},
    {"inference"},
    {"measure", "integrations"},
    {"__init__"},
    {"commands"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def each(*names: str) -> list[str]:
    """The files of the package, or those whose path begins with one of the names."""
    return [file for file in TREES if not names or file.startswith(names)]


def for_each(files: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """One test of what holds for each of the files; it names every file that breaks the rule."""

    def decorate(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            broken = []
            for file in files:
                try:
                    check(file)
                except AssertionError as error:
                    broken.append(f"{file}: {error}")
            assert not broken, "\n".join(broken)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def module(file: str) -> str:
    """The entry of LAYERS that a file belongs to: its folder, or its own name."""
    return file.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, wherever in the file; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(file: str) -> Iterator[str]:
    """Files of the package that a file imports."""
    for name in imports(TREES[file]):
        parts = name.split(".")
        if parts[0] != "npllama":
            continue
        for end in range(len(parts), 0, -1):
            path = "/".join(parts[1:end])
            found = [f for f in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if f in TREES]
            if found:
                yield found[0]
                break


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of a plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


# ---------------------------------------------------------------- layers


@for_each(each())
def test_imports_only_go_down(file: str) -> None:
    assert module(file) in RANK, f"{file} has no row in LAYERS"
    for other in own_imports(file):
        if module(other) != module(file):
            assert RANK[module(other)] < RANK[module(file)], f"{file} imports {other}: not a lower layer"


def test_no_module_imports_itself_through_others() -> None:
    below = {file: set(own_imports(file)) - {file} for file in TREES}
    while leaves := [file for file, others in below.items() if not others]:
        below = {file: others - set(leaves) for file, others in below.items() if file not in leaves}
    assert not below, f"a cycle of imports: {sorted(below)}"


@for_each(each())
def test_only_what_compiles_imports_numba_and_only_the_tokenizer_sentencepiece(file: str) -> None:
    roots = {name.split(".")[0] for name in imports(TREES[file])}
    if module(file) != "execution":
        assert not roots & {"numba", "llvmlite"}
    if module(file) != "text":
        assert "sentencepiece" not in roots


@for_each(each("execution/", "ops.py", "model.py", "numbers/"))
def test_what_computes_knows_nothing_of_text(file: str) -> None:
    assert not [other for other in own_imports(file) if module(other) in ("text", "checkpoints")]


def test_importing_the_package_or_the_command_line_does_not_import_numba_nor_numpy() -> None:
    program = "import npllama.commands.cli, sys; sys.exit(bool({'numba', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


# What opening a model directory with a SentencePiece tokenizer needs nothing of: other tokenizers, checkpoints, the
# compiler, and large parts of the standard library.
LATE = (
    *("npllama.text.bpe", "npllama.text.derived", "npllama.text.readers", "npllama.text.vocabulary"),
    *("npllama.checkpoints", "npllama.store.export", "npllama.store.find_tokenizer", "npllama.store.text_rules"),
    *("npllama.execution.disk_cache", "npllama.execution.kernels.compile", "npllama.measure", "npllama.commands"),
    *("numba", "importlib.metadata", "email", "concurrent.futures", "asyncio"),
)


def test_loading_the_demo_model_imports_nothing_that_only_other_models_and_calls_need() -> None:
    program = "import npllama, sys; npllama.load(backend='numpy'); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], env=environment(), text=True).split()
    assert not [name for name in loaded if any(f"{name}.".startswith(f"{late}.") for late in LATE)]


@for_each([f for f in TREES if module(f) != "commands"])
def test_only_the_command_line_prints(file: str) -> None:
    assert not list(calls(TREES[file], "print"))
    attributes = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute)]
    names = {ast.unparse(n) for n in attributes if isinstance(n.value, ast.Name)}
    assert not names & {"sys.stdout", "sys.stderr", "sys.stdin"}


def test_all_lists_exactly_what_the_package_imports_for_its_users() -> None:
    names = {name.rsplit(".", 1)[1] for name in imports(TREES["__init__.py"]) if name.startswith("npllama.")}
    assert npllama.__all__ == sorted(names - {"inference", "session"})  # which __getattr__ imports on first use
    assert all(hasattr(npllama, name) for name in npllama.__all__)


# ---------------------------------------------------------------- safety

FORBIDDEN_IMPORTS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jinja2",
    "torch",
}
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__")


@for_each(each())
def test_nothing_in_the_package_executes_data(file: str) -> None:
    roots = {name.split(".")[0] for name in imports(TREES[file])}
    assert not roots & FORBIDDEN_IMPORTS
    for name in FORBIDDEN_CALLS:
        assert not list(calls(TREES[file], name)), name
    for node in ast.walk(TREES[file]):
        assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), "allow_pickle"


@for_each(each())
def test_no_guard_is_an_assert(file: str) -> None:
    """`python -O` drops them."""
    assert not [node.lineno for node in ast.walk(TREES[file]) if isinstance(node, ast.Assert)]


READERS = each(
    *("checkpoints/", "system/", "text/", "config.py", "rope.py"),
    *("store/opening.py", "store/export.py", "store/text_rules.py"),
)


@for_each(READERS)
def test_readers_of_foreign_files_have_no_broad_except(file: str) -> None:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ExceptHandler) and ast.unparse(node.body[-1]) != "raise":  # what is passed on is fine
            assert node.type is not None, f"{file}:{node.lineno}: except without a type"
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            assert not names & {"Exception", "BaseException"}, f"{file}:{node.lineno}"


# ---------------------------------------------------------------- the model and its steps

PAPERS_STEPS = {"rms_norm", "rotation", "rope", "attend", "swiglu"}
SHAPE = re.compile(r"\((?:[A-Z](?:\*[A-Z])?|[A-Z]/2|rows)(?:, ?(?:[A-Z](?:[*/][A-Z0-9])?|columns))*,?\)")


def public_functions(file: str) -> list[ast.FunctionDef]:
    return [n for n in TREES[file].body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


@pytest.mark.parametrize("op", public_functions("ops.py"), ids=lambda op: op.name)
def test_every_op_says_its_shapes_and_where_it_comes_from(op: ast.FunctionDef) -> None:
    text = ast.get_docstring(op) or ""
    assert SHAPE.search(text), f"{op.name} names no shape"
    assert text.split("\n")[0].endswith((".", "format.")), f"{op.name} does not begin with a sentence"
    if op.name in PAPERS_STEPS:
        assert re.search(r"Source: .*arXiv:\d{4}\.\d{5}", text, re.DOTALL), f"{op.name} names no paper"


@pytest.mark.parametrize("op", public_functions("ops.py"), ids=lambda op: op.name)
def test_ops_carry_no_decorators_because_the_compiler_knows_them_by_identity(op: ast.FunctionDef) -> None:
    assert not op.decorator_list


def test_the_model_contains_no_arithmetic_but_x_plus_a_block() -> None:
    """Python floats are float64 in compiled code: everything else is an op."""
    for function in public_functions("model.py"):
        for statement in function.body:
            for node in ast.walk(statement):
                assert not isinstance(node, (ast.AugAssign, ast.UnaryOp)), f"model.py:{node.lineno}"
                if isinstance(node, ast.BinOp):
                    sums = isinstance(node.op, ast.Add) and isinstance(node.left, ast.Name) and node.left.id == "x"
                    assert sums, f"model.py:{node.lineno}: {ast.unparse(node)}"
                    assert isinstance(node.right, ast.Call), f"model.py:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("formula", rope.FORMULAS.values(), ids=rope.FORMULAS)
def test_every_way_to_scale_rotary_positions_gives_its_equation_and_its_source(formula: rope.Formula) -> None:
    text = inspect.getdoc(formula) or ""
    assert re.search(r"^    .*f'\[i\] = |theta' = ", text, re.MULTILINE)
    assert re.search(r"Source: .*(arXiv:\d{4}\.\d{5}|\.py)", text, re.DOTALL)


# ---------------------------------------------------------------- kernels


def jitted(tree: ast.AST) -> Iterator[tuple[int, list[ast.keyword] | None]]:
    """Line and keywords of every use of njit or jit; None where it is used without a call."""
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in ("njit", "jit", "vectorize", "guvectorize") and id(node) not in called:
            yield node.lineno, None
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("njit", "jit"):
            yield node.lineno, node.keywords


def sets_of_flags() -> set[str]:
    """The sets of flags.py, and what is made from them as NAME = {**SERIAL, ...}."""
    names = {"SERIAL", "PARALLEL", "INNER", "INNER_PARALLEL"}
    for file in each("execution/kernels/"):
        for node in TREES[file].body:
            if isinstance(node, ast.Assign) and re.match(
                r"\{\*\*(SERIAL|PARALLEL|INNER|INNER_PARALLEL), ", ast.unparse(node.value)
            ):
                names.update(ast.unparse(target) for target in node.targets)
    return names


@for_each(each("execution/kernels/"))
def test_every_kernel_states_its_flags(file: str) -> None:
    for line, keywords in jitted(TREES[file]):
        stated = [ast.unparse(k.value) for k in keywords or [] if k.arg is None]
        problem = f"{file}:{line}: a kernel without flags inherits its caller's"
        assert len(stated) == 1, problem
        assert stated[0] in sets_of_flags(), problem


def test_no_kernel_is_compiled_with_reassociation() -> None:
    from_flags = compile(ast.parse((PACKAGE / "execution" / "kernels" / "flags.py").read_text()), "flags", "exec")
    flags: dict[str, dict[str, object]] = {}
    exec(from_flags, flags)  # the file itself, because importing the package's kernels needs numba
    for name in ("SERIAL", "PARALLEL", "INNER", "INNER_PARALLEL"):
        assert flags[name]["fastmath"] is False
        assert flags[name]["nogil"] is True
    for file in each("execution/kernels/"):
        if file != "execution/kernels/flags.py":
            assert not [n for n in ast.walk(TREES[file]) if isinstance(n, ast.keyword) and n.arg == "fastmath"], file


# What kernels take from numba.core. All else that is not documented goes through numba_internals.py.
OPEN_PARTS = ("numba.core.cgutils", "numba.core.errors.", "numba.core.imputils")


@for_each(each())
def test_private_parts_of_numba_are_used_in_one_place(file: str) -> None:
    if file == "execution/kernels/numba_internals.py":
        return
    for name in imports(TREES[file]):
        if name.startswith(("numba.core", "numba.np", "llvmlite.binding")):
            assert name.startswith(OPEN_PARTS), f"{file} imports {name}"
    for node in ast.walk(TREES[file]) if module(file) == "execution" else ():
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("_cache", "_reduce", "_rebuild", "_final_module", "magic_tuple"), file


@for_each([f for f in each("execution/kernels/") if f != "execution/kernels/llvm.py"])
def test_memory_is_addressed_through_llvm_py_which_names_the_element_type(file: str) -> None:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "builder":
            assert node.attr not in ("load", "store", "gep"), f"{file}:{node.lineno}"
        assert not (isinstance(node, ast.Attribute) and node.attr in ("as_pointer", "make_array")), file


@for_each(each("execution/kernels/"))
def test_nothing_is_summed_over_threads(file: str) -> None:
    """A sum that belongs to no thread depends on how many there are."""
    for loop in ast.walk(TREES[file]):
        if not (
            isinstance(loop, ast.For) and isinstance(loop.iter, ast.Call) and "prange" in ast.unparse(loop.iter.func)
        ):
            continue
        own = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        added = {
            n.target.id: n for n in ast.walk(loop) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)
        }
        plain = {
            t.id for n in ast.walk(loop) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        for name, node in added.items():
            assert name in plain & own, f"{file}:{node.lineno}: {name} is summed over prange"


# ---------------------------------------------------------------- words

# Words of our own that have gone -> the field's, or the one word that a concept has here.
GONE = {
    r"\b_?asks?_|\bUNASKED\b|\bask(s|ed)? (the )?memory|memory asked": "prefetch",
    r"\bturned\b|\bturn_(square|block)\b": "transposed, rotated",
    r"\bkeep_apart\b": "noinline",
    r"\bbrain\b|_brain\b": "bf16",
    r"\bmatrix[ _]unit\b": "AMX",
    r"\b(first|second|third)(-level)? cache\b": "L1, L2, L3",
    r"\bQ4_LEVELS\b": "codebook",
    r"\bfurther\b(?! (reading|entries))": "stride",
    r"\bsooner done\b": "starting threads costs more than it saves",
    r"(?<!ast\.)\bwalks?\b": "attend, loop",
    r"\b_?(MOST|LARGEST|LONGEST|SMALLEST|LEAST|FEWEST)_[A-Z]|\b_?LARGEST\b": "MAX_, MIN_",
    r"\b(ALONE|LEAST_PARALLEL)\b": "SERIAL_BELOW",
    r"\bMachine\b": "PickleMachine",
    r"\bclass _?Rows?\b|\b_?Rows?\(": "SourceTensor, StepCheck",
    r"\bhalves=|\.halves\b": "neox_head_dim",
    r"\bRounded\b": "Int8KV",
    r"\broom\s*=|\broom[\[.]": "buffer, workspace",
    r"\bplaces\b": "ids, CPU sets, paths, weight_map",
    r"\bsingle_kernels\b": "kernels_per_op",
    r"\bcache_directory\(": "compiled_code_directory",
    r"\bkinds? of numbers?\b": "number format",
    r"\bnobody vouches\b|\bno business\b": "files that others have made",
    r"\b(single|several|deferred|stored|steps|entry|places|vector|codes|panel|tile)\.py\b": "per_op.py ...",
}
MAY_SAY = {("model.py", "turned")}  # a rotation in words


@for_each([*each(), "README.md"])
def test_words_that_have_gone_stay_away(file: str) -> None:
    folder = Path(__file__).resolve().parent.parent if file == "README.md" else PACKAGE
    text = (folder / file).read_text(encoding="utf-8")
    for pattern, word in GONE.items():
        found = [one.group() for one in re.finditer(pattern, text) if (file, one.group()) not in MAY_SAY]
        assert not found, f"{file}: {found[0]!r} is {word} here"


# What only a measurement can say: it stands in tools/LOG.md, with date, CPU and command.
FIGURE = re.compile(
    r"\d ?(GB/s|GFLOP|tok/s|tokens?(/s| per second| a second)|microseconds?\b|milliseconds?\b|ms\b)"
    r"|\d ?(%|percent) (faster|slower|of the (speed|time)|more|less)"
    r"|\btimes as (fast|slow|long)\b|\d times (faster|slower|longer|the (speed|time|work))"
    r"|\b(half|third|quarter|fifth|tenth|fifteenth) (of )?(the time|the speed|a second|slower|faster)\b"
)


def words_for_people(file: str) -> Iterator[tuple[int, str]]:
    """The docstrings, other bare strings and comments of a file, with their lines."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    with (PACKAGE / file).open("rb") as source:
        yield from ((t.start[0], t.string) for t in tokenize.tokenize(source.readline) if t.type == tokenize.COMMENT)


@for_each(each())
def test_figures_stand_in_the_log_and_not_in_docstrings_and_comments(file: str) -> None:
    for line, text in words_for_people(file):
        found = FIGURE.search(" ".join(text.split()))
        assert found is None, f"{file}:{line}: {found.group()!r} belongs into tools/LOG.md" if found else ""


@pytest.mark.parametrize(
    "text",
    [
        "64 GB/s without",
        "1.12 times as fast",
        "3 % slower",
        "a tenth of the time",
        "times as long",
        "40 tokens/s",
    ],
)
def test_figures_are_recognised(text: str) -> None:
    assert FIGURE.search(text)


# ---------------------------------------------------------------- sizes

MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_MODULES = 50, 500, 12
PROGRAMS = {**TREES, **{f"tools/{p.name}": ast.parse(p.read_text()) for p in (PACKAGE.parent / "tools").glob("*.py")}}


@for_each(PROGRAMS)
def test_functions_are_short(file: str) -> None:
    for node in ast.walk(PROGRAMS[file]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{file}:{node.lineno}: {node.name} has {lines} lines"


@for_each(each())
def test_files_are_short(file: str) -> None:
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda folder: folder.name)
def test_folders_hold_few_modules(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    longer = ("kernels", "commands")  # a module for each kernel, and for each command
    assert folder.name in longer or len(modules) <= MAX_MODULES, f"{folder.name}: {len(modules)} modules"
