"""Where the bytes of a dump go: a file that appears when it is complete, a descriptor, a command.

A sink is a context manager. Making one refuses what is impossible and touches nothing; entering it
opens; leaving it without an error commits the dump; leaving it with one removes every trace of it,
where there is one to remove.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import signal
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.file_writer import FileWriter
from qemu_dump_ext.interrupts import uninterrupted

_FILE_MODE = 0o600
_COMMAND_ENDS_SECONDS = 2.0


class Sink:
    """A descriptor to which a dump is written, in order or at offsets.

    Attributes:
        name: As the user gave it.
        seekable: `write_at` may be used.
        bytes_written: Data handed to the operating system so far.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seekable = False
        self.bytes_written = 0
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
        if size > free:
            raise DumpWriteError(
                f"no room for {self.name}: the dump takes {size >> 20} MiB,"
                f" the file system has {free >> 20} MiB left",
                hint="-z takes less",
            )

    def _write_error(self, error: OSError) -> DumpWriteError:
        if error.errno == errno.EPIPE:
            return DumpWriteError(f"cannot write {self.name}: its reader has gone away")
        return DumpWriteError(f"cannot write {self.name}: {_reason(error)}")

    def _count(self, size: int) -> None:
        with self._counting:
            self.bytes_written += size

    def commit(self) -> None:
        """Make the dump final."""

    def abort(self) -> None:
        """Remove what was written."""

    def __enter__(self) -> Self:
        try:
            self._descriptor = self._open()
            mode = os.fstat(self._descriptor).st_mode
            appends = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_APPEND
            self.seekable = (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not appends
        except BaseException:
            self.abort()
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
            except BaseException:
                self._abort_uninterrupted()
                raise
        else:
            self._abort_uninterrupted()

    def _abort_uninterrupted(self) -> None:
        with uninterrupted():
            self.abort()


class FileSink(Sink):
    """A new file: written aside, mode 0600, and renamed when it is complete.

    What is written in order is collected first: in blocks that can go past the page cache.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        super().__init__(str(path))
        self._path = path
        self._force = force
        self._partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
        self._writer: FileWriter | None = None
        mode = _mode_of(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise RequestError(f"{path} is a directory", hint="name a file in it")
        if mode is None and _mode_of(path.parent) is None:
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
        try:
            with uninterrupted():
                self._descriptor = os.open(self._partial, flags, _FILE_MODE)
        except OSError as error:
            raise DumpWriteError(f"cannot create {self._path}: {_reason(error)}") from error
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
            self._partial.unlink()

    def abort(self) -> None:
        """Remove the partial file."""
        with contextlib.suppress(OSError):
            self._partial.unlink()
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class CommandSink(Sink):
    """The standard input of a shell command."""

    def __init__(self, command: str) -> None:
        super().__init__(f"|{command}")
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def _open(self) -> int:
        self._process = subprocess.Popen(
            ("/bin/sh", "-c", self._command),
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours; the command sees the end of its input
        )
        if self._process.stdin is None:
            raise DumpWriteError(f"cannot start {self.name}")
        return self._process.stdin.fileno()

    def commit(self) -> None:
        """End the command's input and wait for it."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        status = self._process.wait()
        if status:
            raise DumpWriteError(f"command {self.name} ended with status {status}")

    def abort(self) -> None:
        """End the command before it takes a part for the whole."""
        process = self._process
        if process is None or process.stdin is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_COMMAND_ENDS_SECONDS)
                return

    def _write_error(self, error: OSError) -> DumpWriteError:
        if error.errno != errno.EPIPE or self._process is None:
            return super()._write_error(error)
        how = "closed its input"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(_COMMAND_ENDS_SECONDS)
            how = f"ended with status {status}"
        return DumpWriteError(f"command {self.name} {how} before it had read the whole dump")


def open_sink(target: str, *, force: bool, standard_output: int | None) -> Sink:
    """Return the sink for what the user named; entering it opens it.

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
        return _DescriptorSink("-", standard_output)
    if target.startswith("fd:"):
        number = target.removeprefix("fd:")
        if not (number.isascii() and number.isdecimal()):
            raise RequestError(f"{target}: fd: wants the number of an open descriptor, as in fd:3")
        return _DescriptorSink(target, int(number))
    path = target.removeprefix("file:")
    if not path:
        raise RequestError("the name of the dump is empty")
    return _path_sink(path, force=force)


def _path_sink(path: str, *, force: bool) -> Sink:
    try:
        # A symbolic link stays one: its target is what is replaced.
        resolved = Path(path).expanduser().resolve()
    except RuntimeError as error:  # no such user's home, or a loop of links
        raise RequestError(f"{path} names no file: {error}") from error
    mode = _mode_of(resolved)
    if mode is not None and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return _DeviceSink(resolved)
    if mode is not None and (stat.S_ISBLK(mode) or stat.S_ISSOCK(mode)):
        raise RequestError(f"{path} is a block device or a socket", hint="name a file or fd:N")
    return FileSink(resolved, force=force)


class _DeviceSink(Sink):
    # A pipe or a character device such as /dev/null: written in place.
    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def _open(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DumpWriteError(f"cannot open {self.name}: {_reason(error)}") from error
        if os.isatty(descriptor):
            os.close(descriptor)
            raise _is_terminal(self.name)
        return descriptor

    def commit(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    abort = commit


class _DescriptorSink(Sink):
    # Looked at now, before a connection of ours takes a number that was free.
    def __init__(self, name: str, descriptor: int) -> None:
        super().__init__(name)
        self._given = descriptor
        try:
            access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        except (OSError, OverflowError) as error:
            raise RequestError(
                f"{name} is no open descriptor", hint="a shell opens one by 3>FILE"
            ) from error
        if access == os.O_RDONLY:
            raise RequestError(f"{name} is open for reading only")
        if os.isatty(descriptor):
            raise _is_terminal(name)

    def _open(self) -> int:
        return self._given


def _is_terminal(name: str) -> RequestError:
    return RequestError(f"{name} is a terminal, and a dump is not text", hint="name a file")


def _mode_of(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DumpWriteError(f"cannot create {path}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)
