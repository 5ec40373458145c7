"""Where the bytes of a dump go: a file that appears when it is complete, a descriptor, a command.

A sink is a context manager. Making one refuses what is impossible and touches nothing; entering it
opens; leaving it without an error commits the dump; leaving it with one removes every trace of it,
where there is one to remove.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.interrupts import uninterrupted


class Sink:
    """A descriptor to which a dump is written, in order or at offsets.

    Attributes:
        name: As the user gave it.
        seekable: `write_at` may be used.
        bytes_written: Data handed to the operating system so far.
        remarks: What could not be done though the dump is complete.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seekable = False
        self.bytes_written = 0
        self.remarks: tuple[str, ...] = ()
        self._descriptor = -1
        self._counting = threading.Lock()

    def _open(self) -> int:
        """Return a descriptor to write to."""
        raise NotImplementedError

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`.

        Raises:
            DumpWriteError: With the operating system's reason.
        """
        try:
            self._append(memoryview(data))
        except OSError as error:
            raise self._write_error(error) from error
        self._count(len(data))

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`, in bytes from the start of the dump; from any thread.

        Raises:
            DumpWriteError: With the operating system's reason.
        """
        try:
            self._place(offset, memoryview(data))
        except OSError as error:
            raise self._write_error(error) from error
        self._count(len(data))

    def _append(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _place(self, offset: int, view: memoryview) -> None:
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view = view[written:]
            offset += written

    @property
    def directory(self) -> Path:
        """Where there is room for files beside the dump."""
        import tempfile  # noqa: PLC0415 - for copies of guests, which are taken of few

        return Path(tempfile.gettempdir())

    def can_leave_holes(self) -> bool:
        """Tell whether what is not written reads as zeros: in a regular file that is empty."""
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode) or os.lseek(self._descriptor, 0, os.SEEK_CUR):
            return False
        appends = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_APPEND
        return status.st_size == 0 and not appends

    def set_size(self, size: int) -> None:
        """Give a file in which holes were left its size, in bytes.

        Raises:
            DumpWriteError: With the operating system's reason.
        """
        try:
            os.ftruncate(self._descriptor, size)
            # Whoever writes next to an inherited descriptor does so behind the dump.
            os.lseek(self._descriptor, size, os.SEEK_SET)
        except OSError as error:
            raise self._write_error(error) from error

    def require_room(self, size: int) -> None:
        """Refuse before the first byte what cannot fit.

        Raises:
            DumpWriteError: The file system has less than `size` bytes left.
        """
        if not self.seekable:
            return
        room = os.fstatvfs(self._descriptor)
        free = room.f_bavail * room.f_frsize
        # One without blocks counts none: that of a memfd, or a tmpfs without a limit.
        if room.f_blocks and size > free:
            raise DumpWriteError(
                f"no room for {self.name}: the dump takes {size >> 20} MiB,"
                f" the file system has {free >> 20} MiB left",
                hint="-z takes less",
            )

    def _write_error(self, error: OSError) -> DumpWriteError:
        if error.errno == errno.EPIPE:
            return DumpWriteError(f"cannot write {self.name}: its reader has gone away")
        return DumpWriteError(f"cannot write {self.name}: {reason_of(error)}")

    def _count(self, size: int) -> None:
        with self._counting:
            self.bytes_written += size

    def commit(self) -> None:
        """Make the dump final."""

    def abort(self) -> None:
        """Remove what was written.

        Raises:
            OSError: It cannot be removed.
        """

    def __enter__(self) -> Self:
        try:
            self._descriptor = self._open()
            mode = os.fstat(self._descriptor).st_mode
            appends = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_APPEND
            self.seekable = (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not appends
        except BaseException as failure:
            self._abort_uninterrupted(failure)
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is None:
            try:
                self.commit()
            except BaseException as failure:
                self._abort_uninterrupted(failure)
                raise
        elif error is not None:
            self._abort_uninterrupted(error)

    def _abort_uninterrupted(self, cause: BaseException) -> None:
        with uninterrupted():
            try:
                self.abort()
            except OSError as error:
                left = os.fsdecode(error.filename or self.name)
                cause.add_note(f"{left} was left behind, it cannot be removed: {reason_of(error)}")


def is_terminal(name: str) -> RequestError:
    """Return the error for a target that is a terminal."""
    return RequestError(f"{name} is a terminal, and a dump is not text", hint="name a file")


def reason_of(error: OSError) -> str:
    """Return the system's words for an error."""
    return os.strerror(error.errno or errno.EIO)
