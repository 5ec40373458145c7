"""What a door is told of where a guest is, and the one place that connects to it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from qemu_dump_ext.connections.guest_name import find_by_name, find_by_pid
from qemu_dump_ext.errors import ConnectError, RequestError
from qemu_dump_ext.guest.access import GuestAccess, Stub
from qemu_dump_ext.qemu.command_line import GDBSTUB, HMP, QMP
from qemu_dump_ext.qemu.qemu_processes import QemuProcess, process_at_terminal
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.qemu.ways import SocketTables, Way, ways_of
from qemu_dump_ext.untrusted import parse_unsigned
from qemu_dump_ext.value import Value

_OF_SYSTEM = "/var/lib/libvirt/"
_MONITORS = frozenset((QMP, HMP))


class GuestTarget(Value):
    """One guest; at most one of these is told.

    Attributes:
        qmp: Its QMP socket: a path or HOST:PORT.
        hmp: Its human monitor: a path of a socket or of a pty, or HOST:PORT.
        guest: Its name, UUID, PID, or a beginning that no other guest has.
        pid: Of QEMU's process.
        libvirt: Its domain: the name, UUID or ID; with it, `connect` may be told.
        connect: URI of libvirt's connection; None: virsh's default.
    """

    qmp: str | None = None
    hmp: str | None = None
    guest: str | None = None
    pid: int | None = None
    libvirt: str | None = None
    connect: str | None = None

    @property
    def is_told(self) -> bool:
        """Tell whether there is one."""
        return any(getattr(self, field.name) is not None for field in fields(self))


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name a guest, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--qmp", metavar="SOCKET", help="the QMP socket of the guest: unix path or HOST:PORT"
    )
    group.add_argument(
        "--hmp",
        metavar="MONITOR",
        help="the human monitor of the guest, where there is no QMP: unix path, HOST:PORT or a pty",
    )
    group.add_argument(
        "--guest",
        metavar="NAME",
        help="the guest by its name, UUID or PID, or by a beginning that no other guest of this"
        " host has; 'qemu-dump guests' shows them",
    )
    group.add_argument(
        "--pid", type=_pid, metavar="N", help="the guest by the PID of its QEMU on this host"
    )

    group.add_argument(
        "--libvirt", metavar="DOMAIN", help="the guest by its domain of libvirt: name, UUID or ID"
    )
    parser.add_argument(
        "--connect", metavar="URI", help="of libvirt's connection, such as qemu:///system"
    )


def _pid(word: str) -> int:
    number = parse_unsigned(word, bits=31)
    if not number:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of a process")
    return number


def target_of_arguments(arguments: argparse.Namespace) -> GuestTarget:
    """Return what the options of `add_target_arguments` tell.

    Raises:
        RequestError: A connection to libvirt is told, and no domain.
    """
    if arguments.connect is not None and arguments.libvirt is None:
        raise RequestError("--connect is where a domain is", hint="--libvirt DOMAIN")
    return GuestTarget(
        arguments.qmp,
        arguments.hmp,
        arguments.guest,
        arguments.pid,
        arguments.libvirt,
        arguments.connect,
    )


def parse_target(text: str) -> GuestTarget:
    """Return the guest that a program names.

    Args:
        text: `pid:N`, `name:NAME`, `hmp:MONITOR`, `libvirt:DOMAIN`, or a QMP socket as it is.

    Raises:
        RequestError: What stands behind `pid:` is no number.
    """
    prefix, _, rest = text.partition(":")
    if prefix == "pid":
        number = parse_unsigned(rest, bits=31)
        if not number:
            raise RequestError(f"{text!r} names no process", hint="as in pid:4711")
        return GuestTarget(pid=number)
    if prefix == "name":
        return GuestTarget(guest=rest)
    if prefix == "libvirt":
        return GuestTarget(libvirt=rest)
    if prefix == "hmp":
        return GuestTarget(hmp=rest)
    return GuestTarget(qmp=text)


class MonitorAddress(Value):
    """A monitor of a guest's.

    Attributes:
        use: `qmp` or `hmp`.
        address: A path or HOST:PORT.
        pid: Of QEMU's process, where it is known by more than the connection.
    """

    use: str
    address: str
    pid: int | None = None


def find_monitor(target: GuestTarget) -> MonitorAddress:
    """Return the monitor by which a guest is reached; nobody is connected to.

    Raises:
        RequestError: No guest is told, or several are called so.
        ConnectError: There is no such guest, or it has no monitor that is free; says what it has.
    """
    if target.qmp is not None:
        return MonitorAddress(QMP, target.qmp)
    if target.hmp is not None:
        from qemu_dump_ext.qemu.hmp import is_terminal  # noqa: PLC0415 - for few

        pid = process_at_terminal(target.hmp) if is_terminal(target.hmp) else None
        return MonitorAddress(HMP, target.hmp, pid)
    process = find_process(target)
    if process is None:
        raise RequestError("which guest?", hint="--guest NAME, --qmp SOCKET or --hmp MONITOR")
    way = _best(ways_of(process, SocketTables()))
    if way is None or way.address is None:
        raise _unreachable(process)
    return MonitorAddress(way.use, way.address, process.pid)


def managed_by(target: GuestTarget) -> tuple[str, str | None] | None:
    """Return domain and URI where libvirt is the way to a guest; None: it is not.

    Raises:
        RequestError: Several guests are called so.
        ConnectError: There is no such guest.
    """
    if target.libvirt is not None:
        return target.libvirt, target.connect
    process = find_process(target)
    if process is None or not _domains_of(process):
        return None
    if _best(ways_of(process, SocketTables())) is not None:
        return None
    is_of_system = any(_OF_SYSTEM in word for word in process.words)
    return process.command_line.uuid, f"qemu:///{'system' if is_of_system else 'session'}"


def _domains_of(process: QemuProcess) -> list[str]:
    return [name for kind, name in process.belongs_to if kind == "libvirt domain"]


def find_process(target: GuestTarget) -> QemuProcess | None:
    """Return the QEMU of a guest that is told by name or PID, or None; errors as `find_monitor`."""
    if target.pid is not None:
        return find_by_pid(target.pid)
    return None if target.guest is None else find_by_name(target.guest)


def free_monitor(process: QemuProcess) -> str | None:
    """Return the address of the monitor by which a guest is reached, or None: none is free."""
    way = _best(ways_of(process, SocketTables()))
    return None if way is None else way.address


def has_monitor(process: QemuProcess) -> bool:
    """Tell whether a guest has any monitor, be it free or taken."""
    return any(way.use in _MONITORS for way in ways_of(process, SocketTables()))


def _best(ways: Iterable[Way]) -> Way | None:
    usable = [way for way in ways if way.use in _MONITORS and way.address and not way.taken]
    return min(usable, key=lambda way: way.use != QMP, default=None)


def _unreachable(process: QemuProcess) -> ConnectError:
    ways = list(ways_of(process, SocketTables()))
    monitors = [way for way in ways if way.use in _MONITORS]
    told = "; ".join(
        f"{way.use} {way.address or way.channel.backend}: {way.state}" for way in monitors
    )
    stub = next((way.address for way in ways if way.use == GDBSTUB and way.address), None)
    hint = None
    if domains := _domains_of(process):
        hint = f"libvirt has it: --libvirt {domains[0]}"
    elif stub is not None:
        hint = f"its gdbstub is free: --gdb {stub}"
    return ConnectError(
        f"process {process.pid} has no monitor that is free ({told or 'it has none'})", hint=hint
    )


@contextmanager
def open_guest(target: GuestTarget, stub: Stub | None = None) -> Iterator[GuestAccess]:
    """Connect to a guest for the time of a `with` block.

    Args:
        target: Which.
        stub: Its gdbstub, where there is a debugger.

    Raises:
        RequestError: No guest is told, or several are called so.
        ConnectError: It cannot be connected to.
    """
    # Of the ways to a guest, one is taken, and the modules of the others are not needed.
    if (domain := managed_by(target)) is not None:
        from qemu_dump_ext.connections.libvirt import connect_libvirt  # noqa: PLC0415

        with connect_libvirt(*domain) as managed:
            yield GuestAccess.by_manager(managed, stub)
        return
    found = find_monitor(target)
    if found.use == QMP:
        with connect_qmp(found.address) as qmp:
            yield GuestAccess.by_qmp(qmp, stub)
    else:
        from qemu_dump_ext.qemu.hmp import connect_hmp  # noqa: PLC0415

        with connect_hmp(found.address) as monitor:
            yield GuestAccess.by_hmp(monitor, stub, found.pid)
