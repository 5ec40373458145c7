"""Where the bytes of a dump go: a file that appears when it is complete, a descriptor, a command.

A sink is a context manager. Leaving it without an error commits the dump; leaving it with one
removes every trace of it, where there is one to remove.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.writeback import Writeback

_FILE_MODE = 0o600


class Sink:
    """A descriptor to which a dump is written, in order or at offsets.

    Attributes:
        name: As the user gave it.
        seekable: `write_at` may be used.
        bytes_written: Data handed to the operating system so far.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor
        mode = os.fstat(descriptor).st_mode
        self.seekable = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
        self.bytes_written = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`.

        Raises:
            DumpWriteError: With the operating system's reason.
        """
        view = memoryview(data)
        try:
            while view:
                written = os.write(self._descriptor, view)
                view = view[written:]
                self.bytes_written += written
            self._advance(len(data))
        except OSError as error:
            raise self._write_error(error) from error

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`, in bytes from the start of the dump.

        Raises:
            DumpWriteError: With the operating system's reason.
        """
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view = view[written:]
                offset += written
                self.bytes_written += written
            self._advance(len(data))
        except OSError as error:
            raise self._write_error(error) from error

    @property
    def directory(self) -> Path:
        """Where there is room for files beside the dump."""
        return Path(tempfile.gettempdir())

    def can_leave_holes(self) -> bool:
        """Tell whether what is not written reads as zeros: in a regular file that is empty."""
        status = os.fstat(self._descriptor)
        appends = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_APPEND
        return stat.S_ISREG(status.st_mode) and status.st_size == 0 and not appends

    def set_size(self, size: int) -> None:
        """Give a file in which holes were left its size, in bytes.

        Raises:
            DumpWriteError: With the operating system's reason.
        """
        try:
            os.ftruncate(self._descriptor, size)
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
        if size > free:
            raise DumpWriteError(
                f"no room for {self.name}: the dump takes {size >> 20} MiB,"
                f" the file system has {free >> 20} MiB left"
            )

    def _write_error(self, error: OSError) -> DumpWriteError:
        reason = os.strerror(error.errno or errno.EIO)
        return DumpWriteError(f"cannot write {self.name}: {reason}")

    def _advance(self, size: int) -> None:
        """Count what was written."""

    def commit(self) -> None:
        """Make the dump final."""

    def abort(self) -> None:
        """Remove what was written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise


class FileSink(Sink):
    """A new file: written aside, mode 0600, and renamed when it is complete."""

    def __init__(self, path: Path, *, force: bool) -> None:
        self._path = path
        self._force = force
        if path.is_dir():
            raise RequestError(f"{path} is a directory: name a file in it")
        self._refuse_existing()
        self._partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
        try:
            descriptor = os.open(
                self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE
            )
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise DumpWriteError(f"cannot create {path}: {reason}") from error
        super().__init__(str(path), descriptor)
        self._writeback = Writeback(descriptor)

    def _advance(self, size: int) -> None:
        self._writeback.advance(size)

    @property
    def directory(self) -> Path:
        """That of the dump."""
        return self._path.parent

    def _refuse_existing(self) -> None:
        if not self._force and os.path.lexists(self._path):
            raise RequestError(f"{self._path} exists", hint="--force replaces it")

    def commit(self) -> None:
        """Give the file its name."""
        try:
            self._writeback.close()
            os.fsync(self._descriptor)
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
            self._partial.unlink()

    def abort(self) -> None:
        """Remove the partial file."""
        with contextlib.suppress(OSError):
            self._writeback.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class CommandSink(Sink):
    """The standard input of a shell command."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            ("/bin/sh", "-c", command),
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours; the command sees the end of its input
        )
        if self._process.stdin is None:
            raise DumpWriteError(f"cannot start |{command}")
        super().__init__(f"|{command}", self._process.stdin.fileno())

    def commit(self) -> None:
        """End the command's input and wait for it."""
        status = self._finish()
        if status:
            raise DumpWriteError(f"command {self.name} ended with status {status}")

    def abort(self) -> None:
        """End the command."""
        self._process.terminate()
        self._finish()

    def _finish(self) -> int:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        return self._process.wait()


def open_sink(target: str, *, force: bool, standard_output: int | None) -> Sink:
    """Open what the user named.

    Args:
        target: A path, `file:PATH`, `fd:N`, `-` or `|command`.
        force: Replace an existing file.
        standard_output: Descriptor behind `-`; None where there is none to give away.

    Raises:
        RequestError: `target` is malformed, or exists and `force` is false.
        DumpWriteError: It cannot be created.
    """
    if target.startswith("|"):
        if not target[1:].strip():
            raise RequestError("no command behind |", hint="as in '|zstd > out.zst'")
        return CommandSink(target[1:])
    if target == "-":
        if standard_output is None:
            raise RequestError("- is not possible here", hint="name a file, fd:N or |command")
        return _descriptor_sink("-", standard_output)
    if target.startswith("fd:"):
        number = target.removeprefix("fd:")
        if not number.isdecimal():
            raise RequestError(f"{target}: fd: wants the number of an open descriptor, as in fd:3")
        return _descriptor_sink(target, int(number))
    path = target.removeprefix("file:")
    if not path:
        raise RequestError("the name of the dump is empty")
    return _path_sink(Path(path).expanduser(), force=force)


def _path_sink(path: Path, *, force: bool) -> Sink:
    resolved = path.resolve()  # a symbolic link stays one: its target is what is replaced
    if resolved.is_fifo() or resolved.is_char_device():
        return _DeviceSink(resolved)
    if resolved.is_block_device() or resolved.is_socket():
        raise RequestError(f"{path} is a block device or a socket", hint="name a file or fd:N")
    return FileSink(resolved, force=force)


class _DeviceSink(Sink):
    # A pipe or a character device such as /dev/null: written in place.
    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise DumpWriteError(f"cannot open {path}: {reason}") from error
        super().__init__(str(path), descriptor)

    def commit(self) -> None:
        os.close(self._descriptor)

    abort = commit


def _descriptor_sink(name: str, descriptor: int) -> Sink:
    try:
        sink = Sink(name, descriptor)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise RequestError(f"{name} is no open descriptor: {reason}") from error
    if os.isatty(descriptor):
        raise RequestError(f"{name} is a terminal, and a dump is not text")
    return sink
