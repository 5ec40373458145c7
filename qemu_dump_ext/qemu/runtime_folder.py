"""Where dumps write down what others of this host are to know of guests, while the host is up."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qemu_dump_ext.qemu.qemu_processes import QemuProcess

_NAME = "qemu-dump"


def own_folder() -> Path:
    """Return the folder of this user, which nobody else can write to.

    Raises:
        OSError: There is none, and none can be made.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime else Path("/run")
    folder = parent / _NAME
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        folder = Path("/tmp") / f"{_NAME}-{os.geteuid()}"  # noqa: S108 - looked at below
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not ours")
    return folder


def runtime_folders() -> Iterator[Path]:
    """Yield the folders of all users in which something may be."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield Path(runtime) / _NAME
    yield Path("/run") / _NAME
    with contextlib.suppress(OSError):
        yield from (path / _NAME for path in Path("/run/user").iterdir())
    with contextlib.suppress(OSError):
        yield from Path("/tmp").glob(f"{_NAME}-[0-9]*")  # noqa: S108 - files are looked at


def speaks_for(owner: int, process: QemuProcess | None) -> bool:
    """Tell whether what a user has written is believed: it is of a guest of his own, or he is root.

    Args:
        owner: Who has written it.
        process: The QEMU that it is about.
    """
    return owner in {0, os.geteuid(), None if process is None else process.user}
