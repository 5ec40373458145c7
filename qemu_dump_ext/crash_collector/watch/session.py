"""One QMP connection to one guest, which comes back when QEMU does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qemu.qmp import EventListener, Message, QMPClient, QMPError, Runstate, qmp_client

from qemu_dump_ext.connections.libvirt import LibvirtMonitor
from qemu_dump_ext.crash_collector.record import QemuFacts
from qemu_dump_ext.crash_collector.watch.events import Event
from qemu_dump_ext.crash_collector.watch.hmp_questions import HmpQuestions
from qemu_dump_ext.crash_collector.watch.patience import LimitedQmp, Patience
from qemu_dump_ext.errors import ConnectError, DumpError, MonitorAnswerError, SourceError
from qemu_dump_ext.qemu.address import connectable, tcp_address, unix_path
from qemu_dump_ext.qemu.command_line import QMP
from qemu_dump_ext.qemu.process import find_listeners, process_at_other_end
from qemu_dump_ext.qemu.qmp_client import new_client
from qemu_dump_ext.qemu.qmp_message import bad_reply, run_state, target_of, version_text
from qemu_dump_ext.qemu.socket_kind import (
    GREETING_SECONDS,
    check_greeting,
    first_bytes,
    require_kind,
)
from qemu_dump_ext.value import Value

_NOBODY = frozenset((errno.ENOENT, errno.ECONNREFUSED))
_RETRY_SECONDS = 0.2
_RETRY_SECONDS_MAX = 5.0
_GONE_SECONDS = 5.0
_ENDED_SECONDS = 0.1
_COMPLAINTS_MAX = 5
_COMMAND_LINE_MAX = 1 << 20
_START_TIME_FIELD = 19  # of /proc/PID/stat, behind the name in parentheses

Questions = LimitedQmp | LibvirtMonitor | HmpQuestions
"""A connection to QEMU for another thread."""

_logger = logging.getLogger(__name__)


class _Events(EventListener):
    # Hands events on at once: the base class would keep every event forever.
    def __init__(self, handle: Callable[[Event], None]) -> None:
        super().__init__()
        self._handle = handle

    async def put(self, event: Message) -> None:
        try:
            self._handle(dict(event))
        except Exception:  # a mistake of ours must not end the connection
            _logger.exception("an event is passed over")


class _Complaints:
    # A peer that talks nonsense all day is told about a few times.
    def __init__(self, address: str) -> None:
        self._address = address
        self._left = _COMPLAINTS_MAX

    def __call__(self, message: str) -> None:
        if self._left > 0:
            self._left -= 1
            more = "" if self._left else "; more of this connection are not told"
            _logger.warning("%s: %s%s", self._address, message, more)


class Link(Protocol):
    """What a session needs of a connection to one QEMU."""

    @property
    def is_open(self) -> bool:
        """Whether QEMU can still be asked."""

    async def changed(self) -> None:
        """Wait until that may have changed."""

    async def execute(
        self, seconds: float, command: str, arguments: Mapping[str, object] | None = None
    ) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: QEMU refuses it.
            SourceError: QEMU is gone, or does not answer within so many seconds.
        """

    async def close(self) -> None:
        """Disconnect; says nothing of what has ended it."""

    def for_thread(self, answer_seconds: float, patience: Patience) -> Questions:
        """Return the connection for another thread."""


class Contact(Value):
    """A connection to one QEMU.

    Attributes:
        link: Connected.
        facts: About QEMU.
        instance: Differs between any two QEMUs of this host that have the same socket one after
            the other, where its process can be seen.
    """

    link: Link
    facts: QemuFacts
    instance: str


Connect = Callable[[Callable[[Event], None]], Awaitable[Contact]]
"""Connects to a QEMU, of which every event goes to what is given."""


class _QmpLink:
    # By a QMP socket of its own.
    def __init__(self, client: QMPClient, address: str, pid: int | None) -> None:
        self._client = client
        self._address = address
        self._pid = pid

    @property
    def is_open(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    async def changed(self) -> None:
        await self._client.runstate_changed()

    async def execute(
        self, seconds: float, command: str, arguments: Mapping[str, object] | None = None
    ) -> Any:
        return await _execute(self._client, seconds, command, arguments)

    async def close(self) -> None:
        await _disconnect(self._client)

    def for_thread(self, answer_seconds: float, patience: Patience) -> LimitedQmp:
        return LimitedQmp(
            self._client,
            asyncio.get_running_loop(),
            self._address,
            answer_seconds=answer_seconds,
            patience=patience,
            pid=self._pid,
        )


class GuestSession:
    """Connects, and connects again, until it is cancelled.

    Attributes:
        contact: The connection, or None.
        last_facts: About the last QEMU that was there, or None.
    """

    def __init__(self, address: str, answer_seconds: float, connect: Connect | None = None) -> None:
        """Prepare.

        Args:
            address: Of the guest, for messages.
            answer_seconds: How long QEMU may take for an answer.
            connect: Connects to it; None: `address` is that of its QMP socket.
        """
        self.address = address
        self._connect = connect or partial(connect_by_qmp, address, answer_seconds)
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
            on_contact: Called when QEMU is there; called again when it raises.
            on_lost: Called when it is gone; is told whether its process has ended, too.
        """
        contact: Contact | None = None
        while True:
            contact = contact or await self._connect_again(on_event)
            self.contact, self.last_facts, self._told = contact, contact.facts, None
            try:
                await self._greet(contact.link, on_contact)
                while contact.link.is_open:
                    await contact.link.changed()
            finally:
                self.contact = None
                await contact.link.close()
            ended, contact = await self._look_behind(contact, on_event)
            try:
                on_lost(ended)
            except Exception as error:  # noqa: BLE001 - whatever it is, the guest is watched again
                self._tell_why(error)

    async def _connect_again(self, on_event: Callable[[Event], None]) -> Contact:
        pause = _RETRY_SECONDS
        while True:
            if (contact := await self._try_to_connect(on_event)) is not None:
                return contact
            await asyncio.sleep(pause * (1 + random.random() / 4))  # noqa: S311 - not all at once
            pause = min(2 * pause, _RETRY_SECONDS_MAX)

    async def _try_to_connect(self, on_event: Callable[[Event], None]) -> Contact | None:
        try:
            async with asyncio.timeout(2 * GREETING_SECONDS):
                return await self._connect(on_event)
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest is watched again
            self._tell_why(error)
            return None

    async def _look_behind(
        self, lost: Contact, on_event: Callable[[Event], None]
    ) -> tuple[bool, Contact | None]:
        """Tell whether QEMU has ended, and return the next connection if there is one at once.

        Its process ends a little later than its connections.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _GONE_SECONDS
        while loop.time() < deadline:
            if _has_ended(lost):
                return True, None
            if (contact := await self._try_to_connect(on_event)) is not None:
                return contact.instance != lost.instance, contact
            await asyncio.sleep(_ENDED_SECONDS)
        return lost.facts.pid is None, None  # as far as anybody can see

    async def _greet(self, link: Link, on_contact: Callable[[], Awaitable[None]]) -> None:
        """Call `on_contact` until QEMU has answered what it asks, or is gone."""
        pause = _RETRY_SECONDS
        while link.is_open:
            try:
                await on_contact()
            except Exception as error:  # noqa: BLE001 - whatever it is, the guest is watched further
                self._tell_why(error)
            else:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await link.changed()
            pause = min(2 * pause, _RETRY_SECONDS_MAX)

    async def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command and return what it returns.

        Raises:
            MonitorAnswerError: QEMU refuses it.
            SourceError: QEMU is gone, or does not answer.
        """
        if self.contact is None:
            raise SourceError(f"QEMU is gone: nothing answers at {self.address}")
        return await self.contact.link.execute(self._answer_seconds, command, arguments)

    async def status(self) -> str:
        """Return the run state; as `qmp`."""
        return run_state(await self.qmp("query-status"))

    def for_thread(self, patience: Patience) -> Questions:
        """Return the connection for another thread.

        Args:
            patience: The patience for how long.

        Raises:
            SourceError: There is none.
        """
        if self.contact is None:
            raise SourceError(f"QEMU is gone: nothing answers at {self.address}")
        return self.contact.link.for_thread(self._answer_seconds, patience)

    def _tell_why(self, error: Exception) -> None:
        if not isinstance(error, (DumpError, TimeoutError)):
            _logger.error("%s: watched again after", self.address, exc_info=error)
            return
        self._tell(str(error) or f"{self.address} does not answer")

    def _tell(self, message: str) -> None:
        if message != self._told:
            self._told = message
            _logger.info("%s", message)


async def connect_by_qmp(
    address: str, answer_seconds: float, on_event: Callable[[Event], None]
) -> Contact:
    """Connect to a QMP socket.

    Args:
        address: A path or HOST:PORT.
        answer_seconds: How long QEMU may take for an answer.
        on_event: Gets every event.

    Raises:
        ConnectError: Nobody is there, it is busy, or it is something else.
        SourceError: QEMU does not answer.
    """
    await asyncio.to_thread(require_kind, address, QMP, free=True)
    connection = await _open_socket(address)
    try:
        await _require_greeting(connection, address)
        pid = await asyncio.to_thread(_pid_of_peer, connection, address)
        client = new_client(_Complaints(address))
        client.events.event_filter = lambda _event: False
        client.register_listener(_Events(on_event))
        async with asyncio.timeout(GREETING_SECONDS):
            await client.connect(connection)
    except (TimeoutError, QMPError, OSError, EOFError) as error:
        connection.close()
        reason = str(error.__cause__ or error) or "it was closed"
        raise ConnectError(f"cannot connect to QMP socket {address}: {reason}") from error
    except BaseException:
        connection.close()
        raise
    try:
        facts = await _ask_facts(client, pid, address, answer_seconds)
    except BaseException:
        await _disconnect(client)
        raise
    return Contact(_QmpLink(client, address, pid), facts, instance_of(pid) or address)


async def _ask_facts(
    client: QMPClient, pid: int | None, address: str, answer_seconds: float
) -> QemuFacts:
    greeting = client.greeting
    try:
        target = target_of(await _execute(client, answer_seconds, "query-target"))
    except MonitorAnswerError as error:
        if _is_unknown_command(error):  # another program's QMP, such as qemu-storage-daemon's
            raise
        target = "unknown"
        _logger.warning("%s: %s", address, error)
    return QemuFacts(
        version=version_text(greeting.QMP.version if greeting else None),
        target=target,
        pid=pid,
        command_line=None if pid is None else read_command_line(pid),
    )


async def _open_socket(address: str) -> socket.socket:
    family: socket.AddressFamily = socket.AF_UNIX
    where: Any = None
    if (target := tcp_address(address)) is not None:
        family, where = await _resolve(*target)
    connection = socket.socket(family)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            if where is not None:
                await loop.sock_connect(connection, where)
            else:
                with connectable(address) as path:
                    await loop.sock_connect(connection, path)
    except OSError as error:
        connection.close()
        known = error.errno in _NOBODY or not error.strerror
        reason = "" if known else f": {error.strerror}"
        raise ConnectError(f"nobody listens at {address}{reason}") from error
    except BaseException:
        connection.close()
        raise
    return connection


async def _require_greeting(connection: socket.socket, address: str) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GREETING_SECONDS):
                await readable.wait()
    finally:
        loop.remove_reader(connection)
    first = await asyncio.to_thread(first_bytes, connection, 0)
    await asyncio.to_thread(check_greeting, connection, first, address, QMP)
    connection.setblocking(False)


async def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectError(f"nobody is called {host}") from error
    return infos[0][0], infos[0][4]


async def _execute(
    client: QMPClient, seconds: float, command: str, arguments: Mapping[str, object] | None = None
) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await client.execute(command, arguments)
    except qmp_client.ExecuteError as error:
        raise MonitorAnswerError(command, str(error)) from error
    except qmp_client.BadReplyError as error:
        raise bad_reply(command) from error
    except TimeoutError as error:
        raise SourceError(f"QEMU does not answer {command} in {seconds:.0f} s") from error
    except (QMPError, OSError, EOFError) as error:
        raise SourceError("the guest is gone: QEMU closed the QMP connection") from error


def _is_unknown_command(error: MonitorAnswerError) -> bool:
    cause = error.__cause__
    return isinstance(cause, qmp_client.ExecuteError) and cause.error_class == "CommandNotFound"


async def _disconnect(client: QMPClient) -> None:
    # It raises whatever ended the connection, which is of no interest any more.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_GONE_SECONDS):
            await client.disconnect()


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


def instance_of(pid: int | None) -> str | None:
    """Return what no other process of this host has, or None where it cannot be seen."""
    start = None if pid is None else _start_time(pid)
    return f"{pid}:{start}" if start else None


def _start_time(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[_START_TIME_FIELD]


def _has_ended(contact: Contact) -> bool:
    pid = contact.facts.pid
    if pid is None:
        return False  # nobody can see
    return not contact.instance.endswith(f":{_start_time(pid)}") or _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] in {"Z", "X"}


def find_command_line(address: str) -> tuple[str, ...] | None:
    """Return the command line of the QEMU on this host that has a socket, or None."""
    listeners = () if tcp_address(address) else find_listeners(unix_path(address))
    for pid in listeners:
        if (words := read_command_line(pid)) and _is_qemu(words):
            return words
    for entry in Path("/proc").iterdir():
        words = read_command_line(int(entry.name)) if entry.name.isdecimal() else None
        if words and any(address in word for word in words) and _is_qemu(words):
            return words
    return None


def _is_qemu(words: tuple[str, ...]) -> bool:
    return "qemu" in " ".join(words[:4])
