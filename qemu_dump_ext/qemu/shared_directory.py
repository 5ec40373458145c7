"""A private directory through which QEMU hands over data as files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.qemu.owned_directory import own_directory, remove_abandoned

_PREFIX = "qemu-dump-"
_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of its own, mode 0700, is made there


@contextmanager
def shared_directory(room: int = 0) -> Iterator[Path]:
    """Make a directory, in memory where possible, and remove it with all that is in it.

    What processes that are dead left of such directories goes as well.

    Args:
        room: How much will be written there, in bytes.

    Raises:
        SourceError: There is no place for it.
    """
    path, owner = None, -1
    try:
        with uninterrupted():
            path = _make_directory(room)
            with refused_as(SourceError, f"use {path}"):
                owner = own_directory(path)
                remove_abandoned(path.parent, _PREFIX)
        yield path
    finally:
        with uninterrupted():
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            if owner >= 0:
                os.close(owner)


def _make_directory(room: int) -> Path:
    with suppress(OSError):  # there is none, or it is read-only
        if _free(_IN_MEMORY) >= room:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_IN_MEMORY))
    with refused_as(SourceError, "make a directory that is shared with QEMU"):
        path = Path(tempfile.gettempdir())
        if (free := _free(path)) < room:
            raise SourceError(
                f"{_IN_MEMORY} and {path} have less room than the {room >> 20} MiB that QEMU's"
                f" files take: {free >> 20} MiB"
            )
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))


def _free(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def quote_for_monitor(path: Path) -> str:
    """Quote a file name for HMP."""
    return '"{}"'.format(str(path).replace("\\", "\\\\").replace('"', '\\"'))
