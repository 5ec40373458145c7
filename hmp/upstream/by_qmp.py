"""QEMU by its QMP socket: the human monitor, and QMP itself for the QMP door."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import Message, QMPError, Runstate

from qemu_dump_ext.errors import ConnectError, MonitorAnswerError, SourceError
from qemu_dump_ext.qemu.address import tcp_address
from qemu_dump_ext.qemu.command_line import QMP
from qemu_dump_ext.qemu.qmp_client import client_class
from qemu_dump_ext.qemu.socket_kind import GREETING_SECONDS, open_socket

from .upstream import Event, Upstream, reason_of

_ANSWER_SECONDS = 120.0
_DUMP = "dump-guest-memory"
_UCRED = struct.Struct("3i")

Reply = dict[str, Any]
ReplyHandler = Callable[[Reply | None], None]
"""Gets QEMU's answer, or None when QEMU is gone."""


# Its class is made when it is asked for: gdb imports its file, and may lack qemu.qmp.
class _Client(client_class()):  # type: ignore[misc]
    # Hands out every message in the order of the wire: the base class would put events and
    # answers into different queues.

    def __init__(
        self, route: Callable[[Message], None], waiting_ids: Callable[[], Iterable[str]]
    ) -> None:
        super().__init__()
        self._route = route
        self._waiting_ids = waiting_ids

    def waiting_ids(self) -> Iterable[str]:
        return (*super().waiting_ids(), *self._waiting_ids())

    async def _on_message(self, msg: Message) -> None:
        self._route(msg)

    def post(self, message: Mapping[str, object]) -> None:
        """Send a request; its id is the caller's affair."""
        self._outgoing.put_nowait(Message(message))

    def peer_pid(self) -> int | None:
        """Return the process behind a unix socket."""
        transport_socket = self._writer.get_extra_info("socket") if self._writer else None
        if transport_socket is None or transport_socket.family != socket.AF_UNIX:
            return None
        credentials = transport_socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size
        )
        pid: int = _UCRED.unpack(credentials)[0]
        return pid


class QmpUpstream(Upstream):
    """One QMP connection for all doors.

    Attributes:
        greeting: QEMU's, for the QMP door's own clients.
        descriptor_lock: Held from sending a descriptor until QEMU has taken it.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.greeting: dict[str, Any] = {}
        self._handlers: dict[str, ReplyHandler] = {}
        self._client = self._new_client()
        self._next_id = 0
        self._hidden_dumps = 0
        self.descriptor_lock = asyncio.Lock()
        self._directory: Path | None = None

    def _new_client(self) -> _Client:
        return _Client(self._route, lambda: self._handlers)

    def post(self, request: Mapping[str, object], handler: ReplyHandler) -> None:
        """Send a QMP request; `handler` gets the answer, in order with events.

        Args:
            request: `execute` or `exec-oob`, and `arguments`; an `id` is replaced.
            handler: Called once.
        """
        if not self.connected or self._client.runstate != Runstate.RUNNING:
            handler(None)
            return
        self._next_id += 1
        identifier = f"proxy-{self._next_id}"
        self._handlers[identifier] = handler
        self._client.post({**request, "id": identifier})

    async def call(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: QEMU refuses it.
            SourceError: QEMU is gone, or does not answer.
        """
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

        def answered(reply: Reply | None) -> None:
            if not future.done():
                future.set_result(reply)

        self.post({"execute": command, "arguments": dict(arguments or {})}, answered)
        if command == _DUMP:
            self._hidden_dumps += 1  # its event is ours alone
        reply = await future
        if reply is None:
            raise self._gone()
        if "error" in reply:
            if command == _DUMP:
                self._hidden_dumps = max(0, self._hidden_dumps - 1)
            raise MonitorAnswerError(command, str(reply["error"].get("desc")))
        return reply.get("return")

    async def execute_hmp(self, line: str, cpu_index: int | None = None) -> str:
        """Return the answer of a line of the human monitor."""
        arguments: dict[str, object] = {"command-line": line}
        if cpu_index is not None:
            arguments["cpu-index"] = cpu_index
        return str(await self.call("human-monitor-command", arguments))

    async def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor, which a command can ask for by `name`.

        Raises:
            SourceError: The socket passes none.
        """
        async with self.descriptor_lock:
            self.send_descriptor(descriptor)
            await self.call("getfd", {"fdname": name})

    def send_descriptor(self, descriptor: int) -> None:
        """Send a descriptor; the next getfd or add-fd takes it.

        Raises:
            SourceError: The socket passes none.
        """
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError, ValueError, AttributeError) as error:
            raise SourceError(f"the QMP socket passes no descriptor: {error}") from error

    @property
    def passes_descriptors(self) -> bool:
        """Whether the socket is one that passes descriptors: a unix socket."""
        return tcp_address(self.address) is None

    def qemu_directory(self) -> Path:
        """Return QEMU's working directory, as the kernel tells who is behind a unix socket."""
        return self._directory or Path.cwd()

    async def close(self) -> None:
        """Disconnect."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    def _route(self, message: Message) -> None:
        content = dict(message)
        if "event" in content:
            if self._hidden_dumps and content["event"] == "DUMP_COMPLETED":
                self._hidden_dumps -= 1
            else:
                self.on_event(Event(content))
            return
        identifier = content.get("id")
        if identifier is None and self._handlers:
            identifier = next(iter(self._handlers))  # QEMU could not even read its id
        handler = self._handlers.pop(str(identifier), None)
        if handler is not None:
            handler(content)

    async def _connect(self) -> None:
        self._client = self._new_client()
        self._hidden_dumps = 0
        connection = await asyncio.to_thread(open_socket, self.address, QMP)
        connection.setblocking(False)
        try:
            await asyncio.wait_for(self._client.connect(connection), GREETING_SECONDS)
        except (TimeoutError, QMPError, OSError) as error:
            connection.close()
            raise ConnectError(
                f"cannot connect to QMP socket {self.address}: {reason_of(error)}",
                hint="it is the path behind -qmp unix:PATH,server=on,wait=off",
            ) from error
        greeting = self._client.greeting
        if greeting is None:
            raise ConnectError(f"{self.address} is no QMP socket")
        qemu = greeting.QMP
        self.greeting = {
            "QMP": {"version": dict(qemu.version), "capabilities": list(qemu.capabilities)}
        }
        number = self.greeting["QMP"]["version"]["qemu"]
        self.version = (number["major"], number["minor"], number["micro"])
        pid = self._client.peer_pid()
        self._directory = None if pid is None else _working_directory(pid)

    async def _wait_lost(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        await self.close()
        handlers, self._handlers = self._handlers, {}
        self.connected = False
        for handler in handlers.values():
            handler(None)


def _working_directory(pid: int) -> Path | None:
    # Only where its paths are ours.
    try:
        if not Path(f"/proc/{pid}/root").samefile("/"):
            return None
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


def formats_of(answer: object) -> Sequence[str]:
    """Return the formats of an answer of query-dump-guest-memory-capability."""
    formats = answer.get("formats") if isinstance(answer, dict) else None
    return [str(name) for name in formats] if isinstance(formats, list) else []
