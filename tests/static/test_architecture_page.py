"""docs/architecture.md: the walk of a dump is as long as it says, and its files are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
CHANGES_MAX = 16
DOORS = 5


def walks() -> list[list[str]]:
    """Return, for each door, the cells of its column, from the first file to the count."""
    table = PAGE.partition("## The walk of a dump")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert {len(row) for row in rows} == {DOORS}
    return [[row[door].strip() for row in rows] for door in range(DOORS)]


def test_a_walk_is_as_long_as_it_says():
    for walk in walks():
        files = re.findall(r"`(\S+)`", " ".join(walk))
        assert walk[-1] == f"**{len(files) - 1}**"
        assert len(files) - 1 <= CHANGES_MAX


def test_every_file_of_a_walk_is_there():
    for walk in walks():
        for name in re.findall(r"`(\S+)`", " ".join(walk)):
            beside = name.startswith(("gdb/", "hmp/"))
            assert (ROOT / ("" if beside else "qemu_dump_ext") / name).is_file(), name


def test_every_folder_is_described():
    folders = {path.parent.name for path in (ROOT / "qemu_dump_ext").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"`(\w+)/`", PAGE))
