"""What gdb loads needs the standard library alone: gdb's own Python need not see our environment.

Walked by folder, with every file that is found by being there: one that nobody has imported yet is
held to it as well.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "qemu_dump_ext"
# Of the package, gdb loads everything but what only other doors need.
NOT_IN_GDB = {
    f"{PACKAGE}.{name}"
    for name in (
        "api",
        "cli",
        "crash_collector",
        "dump_readers",
        "engine.convert",
        "engine.differences",
        "engine.dmesg",
        "engine.inspect",
        "engine.recognize",
        "engine.stored_guest",
        "engine.verify",
        "entry",
        "guest_images",
    )
}


def _is_in_gdb(module: str) -> bool:
    return not any(f"{module}.".startswith(f"{other}.") for other in NOT_IN_GDB)


def _modules(tree: Path) -> dict[str, Path]:
    """Return the modules of the package that gdb may load, by name."""
    found = {}
    for path in sorted((tree / PACKAGE).rglob("*.py")):
        parts = path.relative_to(tree).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if _is_in_gdb(name):
            found[name] = path
    return found


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of what is imported when the module is, and not when it is used."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def _offences(tree: Path) -> list[str]:
    gdb = {path.stem: path for path in sorted((tree / "gdb").glob("*.py"))}
    modules = _modules(tree) | gdb
    found = []
    for name, path in modules.items():
        own = {"gdb", *gdb} if name in gdb else set()
        for line, imported in _imports(ast.parse(path.read_text("utf-8"))):
            first = imported.partition(".")[0]
            if first == PACKAGE:
                # The package itself has what all its files have.
                allowed = _is_in_gdb(imported)
            else:
                allowed = first in sys.stdlib_module_names or first in own
            if not allowed:
                found.append(f"{path.relative_to(tree)}:{line} imports {imported}")
    return found


def _loaded(tree: Path) -> subprocess.CompletedProcess[str]:
    """Import everything in a Python that has no site-packages; print what it got from elsewhere."""
    script = (
        "import importlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]: importlib.import_module(name)\n"
        "foreign = {name.partition('.')[0] for name in sys.modules}\n"
        f"foreign -= {{*sys.stdlib_module_names, '{PACKAGE}', '__main__'}}\n"
        "print(*sorted(name for name in foreign if not name.startswith('_')))\n"
    )
    words = [sys.executable, "-S", "-I", "-B", "-c", script, str(tree), *_modules(tree)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_no_file_imports_more_than_the_standard_library():
    assert not _offences(REPOSITORY)


def test_every_file_can_be_imported_without_anything_else():
    done = _loaded(REPOSITORY)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for folder in (PACKAGE, "gdb"):
        shutil.copytree(
            REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def test_those_that_import_more_are_found(copied: Path):
    files = [
        "gdb/gdb_guest.py",
        f"{PACKAGE}/architectures/toy.py",
        f"{PACKAGE}/dump_formats/kdump.py",
        f"{PACKAGE}/errors.py",
        f"{PACKAGE}/memory_sources/_pieces.py",
        f"{PACKAGE}/new_folder/new_file.py",
        f"{PACKAGE}/page_codecs/zstd.py",
    ]
    texts = ["import numpy", "try:\n    import yaml\nexcept ImportError:\n    pass"]
    for path in (copied / file for file in files):
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"\n{text}\n" for text in texts)
    found = {re.sub(r":\d+", "", offence) for offence in _offences(copied)}
    assert found == {f"{file} imports {name}" for file in files for name in ("numpy", "yaml")}


def test_one_that_imports_what_gdb_does_not_load_is_found(copied: Path):
    others = [f"{PACKAGE}.{name}" for name in ("cli.entry", "dump_readers", "engine.verify")]
    text = "".join(f"import {name}\n" for name in others)
    (copied / PACKAGE / "sinks" / "toy.py").write_text(text, "utf-8")
    expected = [f"{PACKAGE}/sinks/toy.py:{n} imports {name}" for n, name in enumerate(others, 1)]
    assert sorted(_offences(copied)) == expected


def test_what_cannot_be_imported_without_anything_else_is_found(copied: Path):
    (copied / PACKAGE / "page_codecs" / "toy.py").write_text("import numpy\n", "utf-8")
    done = _loaded(copied)
    assert done.returncode
    assert "No module named 'numpy'" in done.stderr


def test_what_is_imported_in_a_function_is_not_meant(copied: Path):
    text = "def pack() -> None:\n    import numpy\n"
    (copied / PACKAGE / "page_codecs" / "toy.py").write_text(text, "utf-8")
    assert not _offences(copied)
