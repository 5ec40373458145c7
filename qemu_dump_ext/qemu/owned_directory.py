"""Directories that are known to be in use, or to be what a dead process left behind.

Whoever made one holds a lock on a file in it, which the kernel releases when the process is gone,
however it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

_OWNER = "owner"
"""The locked file; it appears under this name when it is locked already."""


def own_directory(path: Path) -> int:
    """Mark a directory as in use until the descriptor that is returned is closed.

    Raises:
        OSError: No file can be made there.
    """
    unlocked = path / f".{_OWNER}"
    descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(path / _OWNER)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove directories of ours that no living process uses.

    What is of another user, is no directory, or has no mark is left alone: it is not ours, or is
    just being made.

    Args:
        parent: Where to look.
        prefix: The prefix with which their names begin.
    """
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    if path.is_symlink() or path.stat().st_uid != os.geteuid():
        return
    descriptor = os.open(path / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
