"""What a dump must not leave behind: files, shared memory, processes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import wait_until

_MARK = "QEMU_DUMP_TEST_MARK"


def partial_size(folder: Path) -> int:
    """Return the bytes in the partial dump that is being written in `folder`."""
    size = 0
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@contextmanager
def no_trace(folder: Path) -> Iterator[None]:
    """Fail when a dump in the `with` block leaves anything in `folder`, or a process, or memory.

    Only for dumps that fail. What other tests on this machine do at the same time does not matter.
    """
    files = _tree(folder)
    shared = _shared()
    os.environ[_MARK] = mark = secrets.token_hex(8)
    try:
        yield
    finally:
        del os.environ[_MARK]
    assert _tree(folder) == files
    left = _shared() - shared
    wait_until(lambda: not _abandoned(left), f"{left} was removed")
    wait_until(lambda: not _processes(mark), f"processes {_processes(mark)} ended")


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = status.st_ino, status.st_mtime_ns if path.is_file() else 0
    return found


def _shared() -> set[Path]:
    return set(Path("/dev/shm").glob("qemu-dump-*"))


def _abandoned(folders: set[Path]) -> set[Path]:
    """Leave out what is gone, and what a dump of somebody else still uses."""
    links = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes end, and close
            for path in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    links.append(path.readlink())
    return {path for path in folders & _shared() if not any(path in link.parents for link in links)}


def _processes(mark: str) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found - {os.getpid()}
