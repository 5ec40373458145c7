"""Targets that are paths, and what is there."""

from __future__ import annotations

from pathlib import Path

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.sinks._sink import reason_of


def path_of(target: str) -> Path:
    """Return the absolute path that PATH or file:PATH names.

    Raises:
        RequestError: It names none.
        DumpWriteError: No file can have that name.
    """
    path = target.removeprefix("file:")
    if not path:
        raise RequestError("the name of the dump is empty")
    try:
        # A symbolic link stays one: its target is what is replaced.
        resolved = Path(path).expanduser().resolve()
        is_loop = resolved.is_symlink()  # where Python 3.13 leaves one
    except RuntimeError as error:  # no such user's home, or a loop of links
        raise RequestError(f"{path} names no file: {error}") from error
    except OSError as error:
        raise DumpWriteError(f"cannot create {path}: {reason_of(error)}") from error
    if is_loop:
        raise RequestError(f"{path} names no file: a loop of symbolic links")
    return resolved


def mode_of(path: Path) -> int | None:
    """Return what is at a path, as st_mode has it, or None where nothing is.

    Raises:
        DumpWriteError: That cannot be told.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DumpWriteError(f"cannot create {path}: {reason_of(error)}") from error
