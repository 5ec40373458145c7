"""A blocking QMP client: qemu.qmp with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qemu_dump_ext.errors import ConnectError, MonitorAnswerError, SourceError

_GREETING_SECONDS = 5.0
_ANSWER_SECONDS = 120.0

ResultT = TypeVar("ResultT")


class QmpMonitor:
    """QEMU's monitors through one QMP socket.

    Use `connect_qmp` to get one.
    """

    def __init__(self, address: str) -> None:
        # Not at module level: gdb's own Python may lack the package.
        try:
            from qemu.qmp import QMPClient, QMPError, qmp_client  # noqa: PLC0415
        except ImportError as error:
            raise ConnectError(
                f"QMP needs the Python package qemu.qmp: {error}", hint="pip install qemu.qmp"
            ) from error
        self._address = address
        self._qmp_error = QMPError
        self._execute_error = qmp_client.ExecuteError
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("qemu-dump")

    def connect(self) -> None:
        """Connect and negotiate.

        Raises:
            ConnectError: Nobody listens, or somebody else is connected: QEMU serves one client.
        """
        host, colon, port = self._address.rpartition(":")
        is_tcp = bool(colon) and port.isdecimal() and "/" not in self._address
        target: str | tuple[str, int] = (host, int(port)) if is_tcp else self._address
        try:
            self._run(self._client.connect(target), _GREETING_SECONDS)
        except TimeoutError as error:
            raise ConnectError(
                f"QMP socket {self._address} is busy: no greeting in {_GREETING_SECONDS:.0f} s",
                hint="QEMU serves one client on a QMP socket; end the other one or add a socket",
            ) from error
        except (self._qmp_error, OSError) as error:
            reason = error.__cause__ or error
            raise ConnectError(
                f"cannot connect to QMP socket {self._address}: {reason}",
                hint="it is the path behind -qmp unix:PATH,server=on,wait=off",
            ) from error

    def close(self) -> None:
        """Disconnect; harmless when repeated."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(self._qmp_error, OSError, EOFError, TimeoutError):
            self._run(self._client.disconnect(), _GREETING_SECONDS)
        self._loop.close()

    def qmp(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: QEMU refuses the command.
            SourceError: The connection is lost, or QEMU does not answer.
        """
        try:
            return self._run(self._client.execute(command, arguments), _ANSWER_SECONDS)
        except self._execute_error as error:
            raise MonitorAnswerError(command, str(error)) from error
        except TimeoutError as error:
            raise SourceError(
                f"QEMU does not answer {command} in {_ANSWER_SECONDS:.0f} s"
            ) from error
        except (self._qmp_error, OSError, EOFError) as error:
            raise SourceError("the guest is gone: QEMU closed the QMP connection") from error

    def execute(self, command: str) -> str:
        """Execute a command of the human monitor."""
        answer = self.qmp("human-monitor-command", {"command-line": command})
        return str(answer).replace("\r\n", "\n")

    def native_dump(self, gpa: int) -> bytes:
        """Let QEMU dump the byte at `gpa` as ELF through a descriptor of ours.

        Raises:
            SourceError: The socket passes no descriptors (TCP), or QEMU refuses.
        """
        with contextlib.ExitStack() as stack:
            content = os.memfd_create("qemu-dump-notes")
            stack.callback(os.close, content)
            try:
                self._client.send_fd_scm(content)
            except (self._qmp_error, OSError, ValueError) as error:
                raise SourceError(f"the QMP socket passes no descriptor: {error}") from error
            self.qmp("getfd", {"fdname": "qemu-dump-notes"})
            self.qmp(
                "dump-guest-memory",
                {"paging": False, "protocol": "fd:qemu-dump-notes", "begin": gpa, "length": 1},
            )
            return os.pread(content, os.fstat(content).st_size, 0)

    def _run(self, work: Coroutine[Any, Any, ResultT], seconds: float) -> ResultT:
        task = self._loop.create_task(asyncio.wait_for(work, seconds))
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            # After an interrupt the connection stays usable: the guest must be resumed with it.
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    self._loop.run_until_complete(task)
            raise


@contextmanager
def connect_qmp(address: str) -> Iterator[QmpMonitor]:
    """Connect to a QMP socket for the time of a `with` block.

    Args:
        address: Path of a unix socket, or HOST:PORT.

    Raises:
        ConnectError: It cannot be connected to.
    """
    monitor = QmpMonitor(address)
    try:
        monitor.connect()
        yield monitor
    finally:
        monitor.close()
