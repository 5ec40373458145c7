"""One QMP connection to one guest, which comes back when QEMU does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, Message, QMPClient, QMPError, Runstate, qmp_client

from qemu_dump_ext.crash_collector.record import QemuFacts
from qemu_dump_ext.crash_collector.watch.events import Event
from qemu_dump_ext.errors import ConnectError, MonitorAnswerError, SourceError
from qemu_dump_ext.qemu.address import tcp_address
from qemu_dump_ext.qemu.process import process_at_other_end
from qemu_dump_ext.qemu.qmp import SharedQmp

_GREETING_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_RETRY_SECONDS_MAX = 5.0
_GONE_SECONDS = 5.0
_COMMAND_LINE_MAX = 1 << 20
_START_TIME_FIELD = 19  # of /proc/PID/stat, behind the name in parentheses

_logger = logging.getLogger(__name__)
# What it logs is in its exceptions as well.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class _Events(EventListener):
    # Hands events on at once: the base class would keep every event forever.
    def __init__(self, handle: Callable[[Event], None]) -> None:
        super().__init__()
        self._handle = handle

    async def put(self, event: Message) -> None:
        self._handle(dict(event))


@dataclass(frozen=True)
class Contact:
    """A connection to one QEMU.

    Attributes:
        client: Connected.
        facts: About QEMU.
        instance: Differs between any two QEMUs of this host that have the same socket one after
            the other, where its process can be seen.
    """

    client: QMPClient
    facts: QemuFacts
    instance: str


class GuestSession:
    """Connects, and connects again, until it is cancelled.

    Attributes:
        contact: The connection, or None.
        last_facts: About the last QEMU that was there, or None.
    """

    def __init__(self, address: str, answer_seconds: float) -> None:
        self.address = address
        self.contact: Contact | None = None
        self.last_facts: QemuFacts | None = None
        self._answer_seconds = answer_seconds
        self._told: str | None = None

    async def run(
        self,
        on_event: Callable[[Event], None],
        on_contact: Callable[[], Awaitable[None]],
        on_lost: Callable[[bool], None],
    ) -> None:
        """Watch QEMU.

        Args:
            on_event: Gets every event.
            on_contact: Called when QEMU is there.
            on_lost: Called when it is gone; is told whether its process has ended, too.
        """
        pause = _RETRY_SECONDS
        while True:
            try:
                async with asyncio.timeout(2 * _GREETING_SECONDS):
                    contact = await self._connect(on_event)
            except (ConnectError, SourceError, TimeoutError) as error:
                self._tell(str(error) or f"{self.address} does not answer")
                await asyncio.sleep(pause * (1 + random.random() / 4))  # noqa: S311 - not all at once
                pause = min(2 * pause, _RETRY_SECONDS_MAX)
                continue
            pause, self._told = _RETRY_SECONDS, None
            self.contact, self.last_facts = contact, contact.facts
            try:
                with contextlib.suppress(SourceError):
                    await on_contact()
                while contact.client.runstate is Runstate.RUNNING:
                    await contact.client.runstate_changed()
            finally:
                self.contact = None
                with contextlib.suppress(QMPError, OSError, EOFError):
                    await contact.client.disconnect()
            on_lost(await _has_ended(contact))

    async def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: QEMU refuses it.
            SourceError: QEMU is gone, or does not answer.
        """
        if self.contact is None:
            raise SourceError(f"QEMU is gone: nothing answers at {self.address}")
        return await _execute(self.contact.client, self._answer_seconds, command, arguments)

    async def status(self) -> str:
        """Return the run state; as `qmp`."""
        return str((await self.qmp("query-status"))["status"])

    def for_thread(self) -> SharedQmp:
        """Return the connection for another thread.

        Raises:
            SourceError: There is none.
        """
        if self.contact is None:
            raise SourceError(f"QEMU is gone: nothing answers at {self.address}")
        loop = asyncio.get_running_loop()
        return SharedQmp(
            self.contact.client, loop, self.address, answer_seconds=self._answer_seconds
        )

    async def _connect(self, on_event: Callable[[Event], None]) -> Contact:
        connection = await self._open_socket()
        try:
            pid = await asyncio.to_thread(_pid_of_peer, connection, self.address)
            client = QMPClient("qemu-crash-collector")
            client.events.event_filter = lambda _event: False
            client.register_listener(_Events(on_event))
            async with asyncio.timeout(_GREETING_SECONDS):
                await client.connect(connection)
        except TimeoutError as error:
            connection.close()
            raise ConnectError(
                f"QMP socket {self.address} is busy: no greeting in {_GREETING_SECONDS:.0f} s",
                hint="QEMU serves one client on a QMP socket; end the other one or add a socket",
            ) from error
        except (QMPError, OSError, EOFError) as error:
            connection.close()
            reason = str(error.__cause__ or error) or "it was closed"
            raise ConnectError(f"cannot connect to QMP socket {self.address}: {reason}") from error
        except BaseException:
            connection.close()
            raise
        try:
            facts = await self._ask_facts(client, pid)
        except (KeyError, TypeError) as error:
            await client.disconnect()
            raise ConnectError(f"{self.address} is no QMP socket of QEMU") from error
        except BaseException:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()
            raise
        start = None if pid is None else _start_time(pid)
        return Contact(client, facts, f"{pid}:{start}" if start else self.address)

    async def _open_socket(self) -> socket.socket:
        target = tcp_address(self.address)
        family: socket.AddressFamily = socket.AF_UNIX
        where: Any = self.address
        if target is not None:
            loop = asyncio.get_running_loop()
            try:
                infos = await loop.getaddrinfo(*target, type=socket.SOCK_STREAM)
            except OSError as error:
                raise ConnectError(f"nobody is called {target[0]}") from error
            family, where = infos[0][0], infos[0][4]
        connection = socket.socket(family)
        connection.setblocking(False)
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, where)
        except (OSError, TimeoutError) as error:
            connection.close()
            raise ConnectError(f"nobody listens at {self.address}") from error
        return connection

    async def _ask_facts(self, client: QMPClient, pid: int | None) -> QemuFacts:
        greeting = client.greeting
        version: Any = greeting.QMP.version["qemu"] if greeting else {}
        target = await _execute(client, self._answer_seconds, "query-target")
        return QemuFacts(
            version=".".join(str(version.get(part)) for part in ("major", "minor", "micro")),
            target=str(target["arch"]),
            pid=pid,
            command_line=None if pid is None else read_command_line(pid),
        )

    def _tell(self, message: str) -> None:
        if message != self._told:
            self._told = message
            _logger.info("%s", message)


async def _execute(
    client: QMPClient, seconds: float, command: str, arguments: Mapping[str, object] | None = None
) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await client.execute(command, arguments)
    except qmp_client.ExecuteError as error:
        raise MonitorAnswerError(command, str(error)) from error
    except TimeoutError as error:
        raise SourceError(f"QEMU does not answer {command} in {seconds:.0f} s") from error
    except (QMPError, OSError, EOFError) as error:
        raise SourceError("the guest is gone: QEMU closed the QMP connection") from error


def _pid_of_peer(connection: socket.socket, address: str) -> int | None:
    with contextlib.suppress(SourceError, OSError):
        return process_at_other_end(connection, address)
    return None


def read_command_line(pid: int) -> tuple[str, ...] | None:
    """Return the command line of a process of this host, or None where it cannot be read."""
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            text = file.read(_COMMAND_LINE_MAX)
    except OSError:
        return None
    return tuple(text.decode("utf-8", "replace").removesuffix("\0").split("\0"))


def _start_time(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[_START_TIME_FIELD]


async def _has_ended(contact: Contact) -> bool:
    """Tell whether QEMU's process has ended; its connections are closed a little earlier."""
    pid = contact.facts.pid
    if pid is None:
        return True  # as far as anybody can see
    for _ in range(int(_GONE_SECONDS / 0.1)):
        if not contact.instance.endswith(f":{_start_time(pid)}") or _is_zombie(pid):
            return True
        await asyncio.sleep(0.1)
    return False


def _is_zombie(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] in {"Z", "X"}


def find_command_line(address: str) -> tuple[str, ...] | None:
    """Return the command line of the QEMU on this host that names a socket, or None."""
    for entry in Path("/proc").iterdir():
        words = read_command_line(int(entry.name)) if entry.name.isdecimal() else None
        if words and any(address in word for word in words) and "qemu" in " ".join(words[:4]):
            return words
    return None
