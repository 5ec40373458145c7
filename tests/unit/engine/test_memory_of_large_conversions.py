"""A conversion takes no memory in proportion to the guest: of 64 GiB, nearly all of it holes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from tests.support.sample_migration import around_mapped

_SIZE = 64 << 30
_BASE = 0x80000000
_PAGES_AT = 4 << 20
"""Where the file has the pages, behind a bitmap that says that it has each."""
_PEAK_MAX_KIB = 300 << 10
_CONTENT = random.Random(64).randbytes(4 << 20)  # noqa: S311 - the same each time
_PLACES = (0, _SIZE // 2 + 0x3000, _SIZE - len(_CONTENT))
_RUN = """
from pathlib import Path
from qemu_dump_ext.cli import main
status = main()
print(Path("/proc/self/status").read_text())
raise SystemExit(status)
"""
_KDUMP = ("--format", "kdump-raw-zlib", "--omit-zero")


def _write_stream(path: Path) -> None:
    head, tail = around_mapped(_SIZE, pages_place=_PAGES_AT)
    with path.open("wb") as file:
        file.write(head + b"\xff" * (_SIZE // 4096 // 8))
        for place in _PLACES:
            file.seek(_PAGES_AT + place)
            file.write(_CONTENT)
        file.write(tail)


def _peak_kib(*words: object) -> int:
    """Convert in a process of its own, and return how much memory it had at most.

    The process tells itself: what `wait4` has is at least what this one had when it started it.
    """
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "convert", *map(str, words), "--search-seconds", "0.1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 6}, done.stderr
    return int(done.stdout.partition("VmHWM:")[2].split()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    _write_stream(folder / "stream")
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        ("stream", "elf", ("--format", "elf")),
        ("elf", "kdump", _KDUMP),
        ("kdump", "again", _KDUMP),
        ("kdump", "back", ("--format", "elf")),
    ],
)
def test_memory_is_bounded(folder: Path, source: str, target: str, options: tuple[str, ...]):
    assert _peak_kib(folder / source, folder / target, *options) < _PEAK_MAX_KIB
    with open_dump(folder / target) as dump:
        for place in _PLACES:
            assert dump.read(_BASE + place, len(_CONTENT)) == _CONTENT
