"""A private directory through which QEMU hands over data as files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.qemu.owned_directory import own_directory, remove_abandoned

_PREFIX = "qemu-dump-"
_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of its own, mode 0700, is made there


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Make a directory, in memory where possible, and remove it with all that is in it.

    What processes that are dead left of such directories goes as well.
    """
    parent = _IN_MEMORY if _IN_MEMORY.is_dir() else None
    path, owner = None, -1
    try:
        with uninterrupted():
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            owner = own_directory(path)
            remove_abandoned(path.parent, _PREFIX)
        yield path
    finally:
        with uninterrupted():
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            if owner >= 0:
                os.close(owner)


def quote_for_monitor(path: Path) -> str:
    """Quote a file name for HMP."""
    return '"{}"'.format(str(path).replace("\\", "\\\\").replace('"', '\\"'))
