"""Which files of a folder are plug-ins."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from qemu_dump_ext.discovery import names


def test_what_no_import_could_name_is_none(tmp_path: Path):
    package = ModuleType("package")
    package.__path__ = [str(tmp_path)]
    for file in ("b.py", "a.py", "_a.py", "__init__.py", "a.pyc", ".py", "a"):
        (tmp_path / file).touch()
    for file in (".#a.py", "._a.py", "a.orig.py", "a-1.py"):
        (tmp_path / file).symlink_to("nowhere")
    assert names(package) == ["a", "b"]
