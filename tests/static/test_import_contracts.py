"""Who may import whom is said in full, and nothing gets around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
