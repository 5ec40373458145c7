"""Who may import whom is said in full, and nothing gets around it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_FOLDERS = ("qemu_dump_ext", "hmp", "gdb")
_COLLECTOR = "qemu_dump_ext/crash_collector"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for folder in _FOLDERS:
        shutil.copytree(
            REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def _broken_contracts(tree: Path) -> str:
    """Return the report on the contracts that the tree breaks."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--no-cache"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def _add(tree: Path, file: str, line: str = "") -> None:
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{path.read_text() if path.exists() else ''}\n{line}\n")


def test_an_import_upwards_breaks_a_contract(copied: Path):
    upwards = {
        "qemu_dump_ext/guest/model.py": "qemu_dump_ext.architectures",
        "qemu_dump_ext/errors.py": "qemu_dump_ext.structures.elf",
        "qemu_dump_ext/dump_formats/elf.py": "qemu_dump_ext.engine.dump",
        "qemu_dump_ext/engine/info.py": "qemu_dump_ext.cli",
        "qemu_dump_ext/sinks/file.py": "qemu_dump_ext.memory_sources.process",
        f"{_COLLECTOR}/store/prune.py": "qemu_dump_ext.crash_collector.agent.journal",
        "hmp/sockets/listener.py": "hmp.qmp.session",
        "qemu_dump_ext/plan/plan.py": "hmp.dump_job",
        "qemu_dump_ext/qemu/probe.py": "gdb",
    }
    for file, imported in upwards.items():
        _add(copied, file, f"import {imported}")
    report = _broken_contracts(copied)
    for file, imported in upwards.items():
        importer = file.removesuffix(".py").replace("/", ".")
        assert f"{importer} -> {imported} (" in report


def test_a_file_that_stands_in_no_layer_breaks_a_contract(copied: Path):
    strays = ("qemu_dump_ext/stray.py", f"{_COLLECTOR}/stray.py", "hmp/stray.py")
    for file in strays:
        _add(copied, file)
    _add(copied, "qemu_dump_ext/new_folder/__init__.py")
    report = _broken_contracts(copied)
    for file in (*strays, "qemu_dump_ext/new_folder.py"):
        assert f"- {file.removesuffix('.py').replace('/', '.')}\n" in report


def _private_imports(tree: Path) -> Iterator[str]:
    """Yield each import of a module or name that another folder keeps to itself."""
    for folder in _FOLDERS:
        for path in sorted((tree / folder).rglob("*.py")):
            package = ".".join(path.parent.relative_to(tree).parts)
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                for imported in _imported(node, package):
                    if _is_private_to_others(imported, package):
                        yield f"{path.relative_to(tree)} imports {imported}"


def _imported(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), package)
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def _is_private_to_others(imported: str, package: str) -> bool:
    owner, separator, _ = imported.partition("._")
    is_ours = imported.partition(".")[0] in _FOLDERS
    return bool(separator) and is_ours and not f"{package}.".startswith(f"{owner}.")


def test_what_a_folder_keeps_to_itself_is_used_in_it_alone():
    assert not list(_private_imports(REPOSITORY))


@pytest.mark.parametrize(
    ("file", "line", "imported"),
    [
        (
            "qemu_dump_ext/engine/toy.py",
            "from qemu_dump_ext.sinks._sink import Sink",
            "qemu_dump_ext.sinks._sink.Sink",
        ),
        ("gdb/toy.py", "import qemu_dump_ext.sinks._sink", "qemu_dump_ext.sinks._sink"),
        (
            "hmp/human/toy.py",
            "def run():\n    from ..qmp.session import _answer",
            "hmp.qmp.session._answer",
        ),
    ],
)
def test_what_is_used_by_another_folder_is_found(
    tmp_path: Path, file: str, line: str, imported: str
):
    for folder in _FOLDERS:
        (tmp_path / folder).mkdir()
    _add(tmp_path, file, line)
    (offence,) = _private_imports(tmp_path)
    assert offence.startswith(file)
    assert offence.endswith(f" imports {imported}")


def test_a_folder_below_may_use_what_is_private_above_it(tmp_path: Path):
    (tmp_path / "qemu_dump_ext" / "cli").mkdir(parents=True)
    line = "from qemu_dump_ext.cli._declaration import Subcommand"
    _add(tmp_path, "qemu_dump_ext/cli/subcommands/toy.py", line)
    assert not list(_private_imports(tmp_path))
