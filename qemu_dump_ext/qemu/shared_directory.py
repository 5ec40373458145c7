"""A private directory through which QEMU hands over data as files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.interrupts import uninterrupted

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of its own, mode 0700, is made there


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Make a directory, in memory where possible, and remove it with all that is in it."""
    parent = _IN_MEMORY if _IN_MEMORY.is_dir() else None
    path = None
    try:
        with uninterrupted():
            path = Path(tempfile.mkdtemp(prefix="qemu-dump-", dir=parent))
        yield path
    finally:
        if path is not None:
            with uninterrupted():
                shutil.rmtree(path, ignore_errors=True)


def quote_for_monitor(path: Path) -> str:
    """Quote a file name for HMP."""
    return '"{}"'.format(str(path).replace("\\", "\\\\").replace('"', '\\"'))
