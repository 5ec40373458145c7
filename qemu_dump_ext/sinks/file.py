"""A dump in a file, which appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from pathlib import Path

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.sinks._declaration import SinkKind, Target
from qemu_dump_ext.sinks._file_writer import FileWriter
from qemu_dump_ext.sinks._paths import mode_of, path_of
from qemu_dump_ext.sinks._sink import Sink, reason_of

_FILE_MODE = 0o600
_PARTIAL = re.compile(r"\..{1,200}\.[0-9a-f]{8}\.partial", re.DOTALL)
_ABANDONED_SECONDS = 60


class FileSink(Sink):
    """A new file: written aside, mode 0600, and renamed when it is complete.

    What is written in order is collected first: in blocks that can go past the page cache.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        super().__init__(str(path))
        self._path = path
        self._force = force
        self._partial = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}.partial")
        self._writer: FileWriter | None = None
        mode = mode_of(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise RequestError(f"{path} is a directory", hint="name a file in it")
        if mode is None and mode_of(path.parent) is None:
            raise DumpWriteError(f"cannot create {path}: there is no directory {path.parent}")
        self._refuse_existing()

    def _append(self, view: memoryview) -> None:
        if self._writer is None:
            super()._append(view)
        else:
            self._writer.append(view)

    def _place(self, offset: int, view: memoryview) -> None:
        if self._writer is None:
            super()._place(offset, view)
        else:
            self._writer.write_at(offset, view)

    @property
    def directory(self) -> Path:
        """That of the dump."""
        return self._path.parent

    def _refuse_existing(self) -> None:
        if not self._force and os.path.lexists(self._path):
            raise RequestError(f"{self._path} exists", hint="--force replaces it")

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        _remove_abandoned(self._path.parent)
        try:
            with uninterrupted():
                self._descriptor = os.open(self._partial, flags, _FILE_MODE)
                _hold(self._descriptor)
        except OSError as error:
            raise DumpWriteError(f"cannot create {self._path}: {reason_of(error)}") from error
        with refused_as(DumpWriteError, f"write {self._path}"):
            self._writer = FileWriter(self._descriptor)
        return self._descriptor

    def commit(self) -> None:
        """Give the file its name."""
        try:
            if self._writer is not None:
                self._writer.finish()
            # Whole or not at all, and an interrupt knows which.
            with uninterrupted():
                if self._force:
                    self._partial.replace(self._path)
                else:
                    self._rename_to_new_name()
        except OSError as error:
            raise self._write_error(error) from error
        self._close()

    def _rename_to_new_name(self) -> None:
        try:
            os.link(self._partial, self._path)  # unlike rename, never replaces
        except FileExistsError:
            self._refuse_existing()
            raise
        except OSError:  # a file system without hard links
            self._refuse_existing()
            self._partial.rename(self._path)
        else:
            try:
                self._partial.unlink()
            except OSError as error:
                self._has_two_names(error)

    def _has_two_names(self, error: OSError) -> None:
        self.remarks += (
            (
                f"{self._path} is complete; its other name {self._partial} cannot be removed:"
                f" {reason_of(error)}"
            ),
        )

    def abort(self) -> None:
        """Remove the partial file."""
        try:
            self._partial.unlink(missing_ok=True)
        finally:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _hold(descriptor: int) -> None:
    # For as long as this process lives, however it ends. Some file systems have no locks.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(directory: Path) -> None:
    """Remove what dumps of ours left behind that were killed; what anybody writes to is left."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)]
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            _remove_if_abandoned(directory / name)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        # One that was made just now may not be held yet.
        is_old = time.time() - status.st_mtime > _ABANDONED_SECONDS
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and is_old:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    finally:
        os.close(descriptor)


def _make(target: Target) -> FileSink:
    return FileSink(path_of(target.word), force=target.force)


SINK = SinkKind("file", 90, "PATH, file:PATH", _make)
