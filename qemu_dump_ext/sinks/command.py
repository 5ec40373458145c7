"""A dump that a command reads from its standard input."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess

from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.sinks._declaration import SinkKind, Target
from qemu_dump_ext.sinks._sink import Sink

_COMMAND_ENDS_SECONDS = 2.0


class CommandSink(Sink):
    """The standard input of a shell command."""

    def __init__(self, command: str) -> None:
        super().__init__(f"|{command}")
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def _open(self) -> int:
        with refused_as(DumpWriteError, f"start {self.name}"):
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


def _make(target: Target) -> CommandSink | None:
    if not target.word.startswith("|"):
        return None
    command = target.word.removeprefix("|")
    if not command.strip():
        raise RequestError("no command behind |", hint="as in '|zstd > out.zst'")
    return CommandSink(command)


SINK = SinkKind("command", 10, "'|COMMAND'", _make)
