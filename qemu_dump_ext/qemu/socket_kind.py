"""What a socket is, before anything is sent to it: the one place in which every door asks.

Who connects to a gdbstub stops the guest, so it is found out before, from QEMU's command line and
the kernel's tables. Where those tell nothing (another host, another user), the peer's first
bytes do: QMP greets, the human monitor greets, telnet negotiates. A gdbstub is silent, and one
that was touched by mistake lets the guest run again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from qemu_dump_ext.errors import ConnectError, SourceError
from qemu_dump_ext.qemu._guardian_program import GoneError, StubPeer
from qemu_dump_ext.qemu.address import connectable, tcp_address, unix_path
from qemu_dump_ext.qemu.command_line import GDBSTUB, HMP, OTHER, QMP
from qemu_dump_ext.qemu.monitor_text import parse_version
from qemu_dump_ext.qemu.qemu_processes import (
    QemuProcess,
    all_pids,
    command_line_text,
    qemu_process,
)
from qemu_dump_ext.qemu.socket_tables import UnixSocket, file_number
from qemu_dump_ext.qemu.ways import UNKNOWN, SocketTables, Way, ways_of
from qemu_dump_ext.structures.dialect import QemuVersion

GREETING_SECONDS = 5.0
_STUB_SECONDS = 2.0
_NEGOTIATION_SECONDS = 1.0
_PEEK_SIZE = 256
_DETACH = b"$D#44"
_SHOWN_MAX = 40
_SILENT_SINCE: QemuVersion = (8, 0, 0)
_NEGOTIATION_MAX = 64
_TELNET = re.compile(rb"\xff(?:[\xfb-\xfe].|\xfa[^\xf0]*\xf0|[\xf0-\xf9])", re.DOTALL)
_STOP_REPLY = re.compile(rb"\+*\$[TS][0-9a-f]{2}")
_IAC = b"\xff"
_EVERYWHERE = frozenset(("", "0.0.0.0", "::"))  # noqa: S104 - where QEMU listens

_NAMES: Mapping[str, tuple[str, str]] = {
    QMP: ("this is QMP", "use --qmp"),
    HMP: ("this is the human monitor", "use --hmp"),
    GDBSTUB: ("this is a gdbstub", "use --gdb"),
    OTHER: ("this is a console or another device of the guest's", ""),
    UNKNOWN: ("QEMU has opened this for something else", ""),
}
_RECENT_SECONDS = 2.0
_MISSED_SECONDS = 0.1
_HINT_MAX = 64 << 10
QMP_HINT = "it is the path behind -qmp unix:PATH,server=on,wait=off"
_WANTED: Mapping[str, tuple[str, str]] = {
    QMP: ("QMP socket", QMP_HINT),
    HMP: ("monitor", "it is the path behind -monitor unix:PATH,server=on,wait=off"),
    GDBSTUB: ("gdbstub", "it is the ADDRESS behind QEMU's -gdb"),
}
_AT_PORT: Mapping[str, str] = {
    QMP: "it is HOST:PORT behind -qmp tcp:HOST:PORT,server=on,wait=off",
    HMP: "it is HOST:PORT behind -monitor tcp:HOST:PORT,server=on,wait=off",
}


def find_way(address: str) -> tuple[QemuProcess, Way] | None:
    """Return the QEMU of this host that listens at an address, and what it has there, or None.

    Nobody is connected to.

    Args:
        address: A path or HOST:PORT.
    """
    with contextlib.suppress(SourceError):
        tables = SocketTables()
        target = tcp_address(address)
        if target is not None and not _is_of_this_host(target[0]):
            return None
        for process in _likely_first(address, target):
            for way in ways_of(process, tables):
                if way.channel.listens and _is_at(process, way, address, target, tables):
                    return process, way
    return None


def _likely_first(address: str, target: tuple[str, int] | None) -> Iterator[QemuProcess]:
    """Yield the QEMUs of this host: before all others those whose command line has such a name.

    To look at the sockets of one takes a hundred times as long as to read its command line.
    """
    path = Path(unix_path(address))
    names = [str(path.absolute()), path.name] if target is None else [str(target[1])]
    likely = _command_lines.pids_of(names)
    yield from filter(None, map(qemu_process, likely))
    yield from filter(None, map(qemu_process, (pid for pid in all_pids() if pid not in likely)))


class _CommandLines:
    # As they were a moment ago, for who watches hundreds asks for each: they say where to look
    # first, and nothing else.
    def __init__(self) -> None:
        self._texts: Mapping[int, str] = {}
        self._taken = -_RECENT_SECONDS

    def pids_of(self, names: Sequence[str]) -> Sequence[int]:
        """Return the processes whose command lines have one of some names, of the first first."""
        self._take_after(_RECENT_SECONDS)
        if not self._with(names[0]):
            self._take_after(_MISSED_SECONDS)
        return list(dict.fromkeys(pid for name in names for pid in self._with(name)))

    def _with(self, name: str) -> Sequence[int]:
        return [pid for pid, text in self._texts.items() if name in text]

    def _take_after(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._taken > seconds:
            self._texts = {pid: command_line_text(pid)[:_HINT_MAX] for pid in all_pids()}
            self._taken = now


_command_lines = _CommandLines()


def require_kind(address: str, wanted: str, *, free: bool = False) -> Way | None:
    """Return what is known of a socket, before anybody connects to it.

    Args:
        address: A path or HOST:PORT.
        wanted: `qmp`, `hmp` or `gdbstub`.
        free: Refuse it where somebody is connected to it already, too.

    Returns:
        None where nothing is known.

    Raises:
        ConnectError: It is something else, or taken; says what, and what would be right.
    """
    found = find_way(address)
    if found is None:
        return None
    process, way = found
    if way.use != wanted and (way.use != UNKNOWN or _all_present(process, wanted)):
        raise _other_kind(address, way.use, wanted, process)
    if free and way.taken:
        raise busy(address, wanted, way)
    return way


def open_socket(address: str, wanted: str) -> socket.socket:
    """Connect to a monitor that greets; what it has said is still to be read.

    Args:
        address: A path or HOST:PORT.
        wanted: `qmp` or `hmp`.

    Raises:
        ConnectError: Nobody is there, it is busy, or it is something else.
    """
    require_kind(address, wanted)
    connection = _connect(address, wanted)
    try:
        first = first_bytes(connection, GREETING_SECONDS)
        check_greeting(connection, first, address, wanted)
    except OSError as error:
        connection.close()
        raise _not_connected(address, wanted, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def first_bytes(connection: socket.socket, seconds: float) -> bytes | None:
    """Return what a peer says by itself, without taking it; b"" where it closes, None: nothing.

    Args:
        connection: Just connected.
        seconds: How long to wait.
    """
    if not _is_readable(connection, seconds):
        return None
    first = connection.recv(_PEEK_SIZE, socket.MSG_PEEK)
    deadline = time.monotonic() + _NEGOTIATION_SECONDS
    # A greeting comes behind telnet's negotiation.
    while first.startswith(_IAC) and not without_telnet(first) and time.monotonic() < deadline:
        select.select([], [], [], 0.01)
        first = connection.recv(_PEEK_SIZE, socket.MSG_PEEK)
    return first


def without_telnet(data: bytes) -> bytes:
    """Return what is no negotiation of telnet's."""
    return _TELNET.sub(b"", data)


class TelnetFilter:
    """Drops the negotiation from what a peer says, however it is cut into pieces."""

    def __init__(self) -> None:
        self._rest = b""

    @classmethod
    def of(cls, connection: socket.socket) -> Self | None:
        """Return one for a peer that has said something and speaks telnet, or None."""
        first = connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return cls() if first == _IAC else None

    def take(self, data: bytes) -> bytes:
        """Return what is no negotiation."""
        plain = without_telnet(self._rest + data)
        complete, iac, rest = plain.rpartition(_IAC)
        self._rest = iac + rest if iac and len(rest) < _NEGOTIATION_MAX else b""
        return complete if self._rest else plain


def check_greeting(
    connection: socket.socket, first: bytes | None, address: str, wanted: str
) -> None:
    """Refuse a peer that is something else than it should be.

    Where it is a gdbstub that this connection has stopped the guest by, the guest runs again.

    Args:
        connection: To the peer.
        first: What it said, as `first_bytes` has it.
        address: For the message.
        wanted: `qmp` or `hmp`.

    Raises:
        ConnectError: It is something else, or says nothing: it serves somebody else.
    """
    spoken = _spoken(first or b"")
    if spoken == wanted and not (wanted == QMP and _speaks_telnet(first)):
        return
    if first is None:
        known = find_way(address)
        if known is not None and known[1].use == wanted:
            raise busy(address, wanted, known[1])
        if not _let_run_by_stub(connection):
            raise busy(address, wanted, None)
        spoken = GDBSTUB
    elif spoken == GDBSTUB:
        _let_run_by_stub(connection)
    if spoken == wanted:
        raise ConnectError(
            f"{address}: QMP is behind telnet there", hint="give its chardev no telnet=on"
        )
    if spoken is not None:
        raise _other_kind(address, spoken, wanted, None)
    name, hint = _WANTED[wanted]
    if not first:
        raise ConnectError(f"cannot connect to {name} {address}: it was closed at once", hint=hint)
    shown = repr(without_telnet(first)[:_SHOWN_MAX].decode("latin-1"))
    raise ConnectError(
        f"cannot connect to {name} {address}: it is none, and says {shown}", hint=hint
    )


def busy(address: str, wanted: str, way: Way | None) -> ConnectError:
    """Return the error for a socket that serves somebody else, or nobody."""
    name = _WANTED[wanted][0]
    if wanted == GDBSTUB:
        by = f": {way.holder}" if way is not None and way.holder else ""
        return ConnectError(
            f"another debugger is connected to {address}{by}", hint="QEMU serves one at a time"
        )
    if way is not None and not way.taken:
        return ConnectError(
            f"{name} {address} does not answer: no greeting in {GREETING_SECONDS:.0f} s",
            hint="its QEMU hangs, or serves somebody who cannot be seen from here; --memory process"
            " with --pid asks it nothing",
        )
    what = f"{name} {address} is busy"
    if way is not None and way.holder is not None:
        what = f"{what}: held by {way.holder}"
    elif way is None:
        what = f"{what}, or no {name}: no greeting in {GREETING_SECONDS:.0f} s"
    return ConnectError(
        what, hint=f"QEMU serves one client on a {name}; end the other one or add a {name}"
    )


def greeting_kind(address: str, seconds: float) -> str | None:
    """Return what greets at an address of which nothing else is known, or None: nobody does.

    A gdbstub that is there stops the guest.
    """
    with contextlib.suppress(ConnectError, OSError), _connect(address, GDBSTUB) as connection:
        spoken = _spoken(first_bytes(connection, seconds) or b"")
        return None if spoken == GDBSTUB else spoken
    return None


def ran_until_connected(address: str) -> bool | None:
    """Tell whether a guest ran until now, by a gdbstub that stops it: it stays stopped.

    Returns:
        None where QEMU does not tell: from 8.0 on, it says nothing unasked.

    Raises:
        ConnectError: Nobody is there, or QEMU does not answer.
    """
    with _connect(address, GDBSTUB) as connection:
        connection.settimeout(GREETING_SECONDS)
        stub = StubPeer(connection)
        try:
            # What it says of the stop comes before the answer.
            version = parse_version(stub.execute("info version"))
        except TimeoutError as error:
            raise ConnectError(
                f"QEMU does not answer gdb at {address} in {GREETING_SECONDS:.0f} s",
                hint="the guest is let run if QEMU takes the connection later",
            ) from error
        except (GoneError, OSError, ValueError, SourceError):
            return None
        if stub.told_of_stop:
            return True
        return False if version < _SILENT_SINCE else None


def other_kind(address: str, found: str) -> ConnectError:
    """Return the error for something else than the gdbstub that is wanted."""
    return _other_kind(address, found, GDBSTUB, None)


def _other_kind(address: str, found: str, wanted: str, process: QemuProcess | None) -> ConnectError:
    said, hint = _NAMES[found]
    if not hint and process is not None:
        ways = ways_of(process, SocketTables())
        listening = (way.address for way in ways if way.use == wanted and way.channel.listens)
        if right := next(filter(None, listening), None):
            hint = f"its {_WANTED[wanted][0]} is {right}"
    return ConnectError(f"{address}: {said}, not a {_WANTED[wanted][0]}", hint=hint or None)


def _all_present(process: QemuProcess, wanted: str) -> bool:
    # Where every monitor of the command line is found, nothing else is one.
    ways = ways_of(process, SocketTables())
    return (
        wanted != GDBSTUB
        and not process.command_line.configurations
        and all(way.present for way in ways if way.use == wanted)
    )


def _spoken(first: bytes) -> str | None:
    text = without_telnet(first).lstrip()
    if text.startswith(b"{"):
        return QMP
    if _STOP_REPLY.match(text):
        return GDBSTUB  # whose guest ran until now
    return HMP if text.startswith(b"QEMU ") or b"(qemu)" in text else None


def _speaks_telnet(first: bytes | None) -> bool:
    return first is not None and first.startswith(_IAC)


def _connect(address: str, wanted: str) -> socket.socket:
    target = tcp_address(address)
    try:
        if target is not None:
            return socket.create_connection(target, GREETING_SECONDS)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(GREETING_SECONDS)
            with connectable(address) as path:
                connection.connect(path)
        except BaseException:
            connection.close()
            raise
    except OSError as error:
        raise _not_connected(address, wanted, error) from error
    return connection


def _not_connected(address: str, wanted: str, error: OSError) -> ConnectError:
    name, hint = _WANTED[wanted]
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    target = tcp_address(address)
    if target is not None:
        hint = _AT_PORT.get(wanted, hint)
    elif error.errno == errno.EAGAIN:
        reason = "it takes no connections: others wait there"
        hint = "its QEMU hangs; --memory process with --pid asks it nothing"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        hint = "root may, and the user that QEMU runs as"
    elif error.errno == errno.ECONNREFUSED and not Path(unix_path(address)).is_socket():
        reason = "it is no socket"
    return ConnectError(f"cannot connect to {name} {address}: {reason or error}", hint=hint)


def _is_readable(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _let_run_by_stub(connection: socket.socket) -> bool:
    """Tell whether a gdbstub is there; a guest that it has stopped for us runs again."""
    connection.settimeout(_STUB_SECONDS)
    try:
        stub = StubPeer(connection)
        version = parse_version(stub.execute("info version"))
        # Where QEMU would have told of a stop and did not, somebody else had paused the guest.
        if stub.is_paused() and (stub.told_of_stop or version >= _SILENT_SINCE):
            stub.resume()
    except (GoneError, OSError, ValueError, SourceError):
        # One that serves another debugger may take this connection later: it will run on then.
        with contextlib.suppress(OSError):
            connection.sendall(_DETACH)
        return False
    return True


def _is_at(
    process: QemuProcess,
    way: Way,
    address: str,
    target: tuple[str, int] | None,
    tables: SocketTables,
) -> bool:
    if target is not None:
        return way.channel.backend == "tcp" and (
            process.shares_network
            and way.channel.port == target[1]
            and _is_host(way.channel.host, target[0])
        )
    path = unix_path(address)
    if way.channel.backend != "unix" or way.address is None:
        return False
    with contextlib.suppress(OSError, ValueError):
        if way.address == path or Path(way.address).samefile(path):
            return True
    return _is_file_of(_listener(process, way, tables), path)


def _listener(process: QemuProcess, way: Way, tables: SocketTables) -> UnixSocket | None:
    sockets = tables.unix_of(process)
    mine = filter(None, map(sockets.get, process.socket_inodes))
    return next((one for one in mine if one.listens and one.name == way.channel.path), None)


def _is_file_of(listener: UnixSocket | None, path: str) -> bool:
    # A QEMU that has changed its directory since: its path is one of then.
    if listener is None or not listener.file or Path(listener.name).name != Path(path).name:
        return False
    with contextlib.suppress(OSError, ValueError):
        return file_number(path) == listener.file
    return False


def _is_host(bound: str, host: str) -> bool:
    """Tell whether who listens at an address is reached by another."""
    if bound in _EVERYWHERE:
        return True
    return bool(_addresses_of(bound) & _addresses_of(host))


def _addresses_of(host: str) -> set[str]:
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return {str(entry[4][0]) for entry in found}
    return set()


def _is_of_this_host(host: str) -> bool:
    """Tell whether a name or an address is one of this host's: one can be bound to it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, _, _, _, where in found:
        with contextlib.suppress(OSError), socket.socket(family) as own:
            own.bind((where[0], 0))
            return True
    return False
