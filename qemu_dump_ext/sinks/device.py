"""A dump written to a device or a named pipe that exists."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.sinks._declaration import SinkKind, Target
from qemu_dump_ext.sinks._paths import mode_of, path_of
from qemu_dump_ext.sinks._sink import Sink, is_terminal, reason_of


class DeviceSink(Sink):
    """A pipe or a character device such as /dev/null, written in place."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def _open(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DumpWriteError(f"cannot open {self.name}: {reason_of(error)}") from error
        if os.isatty(descriptor):
            os.close(descriptor)
            raise is_terminal(self.name)
        return descriptor

    def commit(self) -> None:
        """Close it: what was written cannot be taken back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    abort = commit


def _make(target: Target) -> DeviceSink | None:
    path = path_of(target.word)
    mode = mode_of(path)
    if mode is None:
        return None
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        name = target.word.removeprefix("file:")
        raise RequestError(f"{name} is a block device or a socket", hint="name a file or fd:N")
    return DeviceSink(path) if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) else None


SINK = SinkKind("device", 30, "", _make)
