"""What is installed is what is in the tree: every module, every data file, every command."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.folders import folder_for

pytest.importorskip("setuptools", minversion="77")

REPOSITORY = Path(__file__).resolve().parents[2]
# Where a folder of the tree is installed.
INSTALLED_AS = {
    "qemu_dump_ext": "qemu_dump_ext",
    "gdb": "qemu_dump_ext/gdb_scripts",
    "hmp": "qemu_dump_ext/hmp_proxy",
}
_MADE = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "cache", "build", "dist")
# Run inside gdb, or inside drgn.
_SCRIPTS = ("/gdb_scripts/", "/drgn_trace.py")
_BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


@dataclass(frozen=True)
class Built:
    """The distributions.

    Attributes:
        tree: Files that they were built from.
        source: Files of the source distribution.
        wheel: Folder with the files of the wheel.
    """

    tree: frozenset[str]
    source: frozenset[str]
    wheel: Path


def _run(*words: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(kind: str, tree: Path, folder: Path) -> Path:
    folder.mkdir()
    _run("-c", _BUILD, kind, folder, folder=tree)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Built:
    folder = folder_for(request, "built")
    tree = shutil.copytree(REPOSITORY, folder / "tree", ignore=_MADE)
    files = frozenset(_files(tree))
    archive = _build("build_sdist", tree, folder / "sdist")
    shutil.unpack_archive(archive, folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    # Out of the source distribution, as pip does it where it finds no wheel.
    sent = frozenset(_files(source))
    wheel = _build("build_wheel", source, folder / "wheel")
    shutil.unpack_archive(wheel, folder / "installed", "zip")
    return Built(files, sent, folder / "installed")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_every_module_and_every_data_file(built: Built):
    expected = {"qemu_dump_ext/images_data/images.yaml"}
    for name in built.tree:
        folder, _, rest = name.partition("/")
        if folder in INSTALLED_AS:
            expected.add(f"{INSTALLED_AS[folder]}/{rest}")
    found = _files(built.wheel)
    assert {name for name in found if name.startswith("qemu_dump_ext/")} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_the_source_distribution_has_all_of_the_tree(built: Built):
    made = {"PKG-INFO", "setup.cfg"}
    found = {name for name in built.source if ".egg-info/" not in name}
    assert found - made == built.tree


def test_every_installed_module_can_be_imported(built: Built, tmp_path: Path):
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sorted(_files(built.wheel))
        if name.endswith(".py") and not any(part in name for part in _SCRIPTS)
    ]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: print(importlib.import_module(name).__file__)\n"
    )
    files = _run("-c", script, *modules, folder=tmp_path, PYTHONPATH=str(built.wheel))
    assert all(Path(file).is_relative_to(built.wheel) for file in files.splitlines())
    assert "qemu_dump_ext.hmp_proxy.proxy" in modules


def _commands() -> dict[str, str]:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        scripts: dict[str, str] = tomllib.load(file)["project"]["scripts"]
    return scripts


@pytest.mark.parametrize("command", _commands())
def test_every_command_starts(built: Built, tmp_path: Path, command: str):
    (metadata,) = built.wheel.glob("*.dist-info")
    entries = configparser.ConfigParser()
    entries.read(metadata / "entry_points.txt")
    module, _, function = entries["console_scripts"][command].partition(":")
    script = f"import sys, {module} as m; sys.argv[0] = {command!r}; sys.exit(m.{function}())"
    environment = {"PYTHONPATH": str(built.wheel)}
    said = _run("-c", script, "--help", folder=tmp_path, **environment)
    assert f"usage: {command}" in said


def test_gdb_finds_what_is_installed(built: Built, tmp_path: Path):
    said = _run(
        "-c",
        "from qemu_dump_ext.cli.gdb_driver import gdb_script_path; print(gdb_script_path())",
        folder=tmp_path,
        PYTHONPATH=str(built.wheel),
    )
    assert Path(said.strip()) == built.wheel / "qemu_dump_ext" / "gdb_scripts" / "qemu_dump.py"
