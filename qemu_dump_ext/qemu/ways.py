"""The monitors and gdbstubs of QEMUs on this host: where, free or taken, and by whom.

A channel of a command line and a socket of the kernel's tables belong together by the descriptors
of the process, where those can be seen, and by their paths otherwise. Nothing is connected to.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path

from qemu_dump_ext.qemu.address import format_tcp_address
from qemu_dump_ext.qemu.command_line import HMP, PTY, QMP, Channel
from qemu_dump_ext.qemu.qemu_processes import QemuProcess, all_pids, descriptors_of, socket_inode
from qemu_dump_ext.qemu.socket_tables import (
    TcpSocket,
    UnixSocket,
    tcp_sockets,
    unix_socket_of,
    unix_sockets,
)
from qemu_dump_ext.value import Value

UNKNOWN = "unknown"
"""Spoken at a socket of which the command line does not tell: it was opened later."""


class Holder(Value):
    """A process that has the other end of a socket of QEMU's.

    Attributes:
        pid: The ID of the process.
        name: Its name, as the kernel has it.
    """

    pid: int
    name: str

    def __str__(self) -> str:
        return f"PID {self.pid} ({self.name})"


class Way(Value):
    """A channel of a QEMU's, as it is now.

    Attributes:
        channel: What the command line says of it; `use` is `unknown` where it says nothing.
        address: By which this process reaches it: a path, or HOST:PORT; None: it cannot.
        taken: Somebody is connected to it.
        present: The socket is there as the command line has it, as far as that can be seen.
        find_holder: Returns who that is, where it can be seen.
    """

    channel: Channel
    address: str | None
    taken: bool = False
    present: bool = True
    find_holder: Callable[[], Holder | None] = field(
        default=lambda: None, compare=False, repr=False
    )

    @cached_property
    def holder(self) -> Holder | None:
        """Who is connected to it, where that can be seen."""
        return self.find_holder()

    @property
    def use(self) -> str:
        """What is spoken there: `qmp`, `hmp`, `gdbstub`, `other` or `unknown`."""
        return self.channel.use

    @property
    def state(self) -> str:
        """`free`, `taken`, or by whom."""
        if self.holder is not None:
            return f"taken by {self.holder}"
        return "taken" if self.taken else "free"


class SocketTables:
    """The sockets of this host, each table read once; no more of them than is asked for."""

    def __init__(self) -> None:
        self._unix: dict[int | None, dict[int, UnixSocket]] = {}
        self._own: dict[int, dict[int, UnixSocket]] = {}
        self._tcp: dict[int | None, dict[int, TcpSocket]] = {}

    def unix_of(self, process: QemuProcess) -> Mapping[int, UnixSocket]:
        """Return those that a process may have, by inode: its own, where its descriptors are seen.

        Where hundreds of guests are, the whole table has thousands, and takes as long.
        """
        if not process.shares_network or not process.socket_inodes:
            return self.unix(process)
        if process.pid not in self._own:
            self._own[process.pid] = own = {}
            for inode in process.socket_inodes:
                with contextlib.suppress(OSError, struct.error):  # it is of another family
                    if (entry := unix_socket_of(inode)) is not None:
                        own[inode] = entry
        return self._own[process.pid] or self.unix(process)

    def unix(self, process: QemuProcess) -> Mapping[int, UnixSocket]:
        """Return those of the network namespace of a process, by inode."""
        pid = None if process.shares_network else process.pid
        if pid not in self._unix:
            self._unix[pid] = unix_sockets(pid)
        return self._unix[pid]

    def tcp(self, process: QemuProcess) -> Mapping[int, TcpSocket]:
        """Return those of the network namespace of a process, by inode."""
        pid = None if process.shares_network else process.pid
        if pid not in self._tcp:
            self._tcp[pid] = tcp_sockets(pid)
        return self._tcp[pid]

    @cached_property
    def _owners(self) -> Mapping[int, int]:
        # The pid that has a socket; of several, the one that had it first.
        owners: dict[int, int] = {}
        for pid in all_pids():
            for link in descriptors_of(pid).values():
                if (inode := socket_inode(link)) is not None:
                    owners.setdefault(inode, pid)
        return owners

    def first_owner(self, inodes: Iterable[int]) -> Holder | None:
        """Return the process that has the first of sockets of which that can be seen, or None."""
        return next(filter(None, map(self._owner, filter(None, inodes))), None)

    def _owner(self, inode: int) -> Holder | None:
        pid = self._owners.get(inode)
        if pid is None:
            return None
        with contextlib.suppress(OSError):
            return Holder(pid, Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip())
        return None


def ways_of(process: QemuProcess, tables: SocketTables) -> Iterator[Way]:
    """Yield the ways to one QEMU; consoles and other devices are among them.

    What the command line does not tell comes last, for it takes longest: who has found what he
    looks for need not know of all TCP connections of the host.
    """
    channels = process.command_line.channels
    terminals = _terminals_of(process, channels)
    explained: set[int] = set()
    for index, channel in enumerate(channels):
        if not channel.listens and channel.backend in {"unix", "tcp"}:
            yield _way_from_qemu(process, channel, tables)
        elif channel.backend == "unix":
            yield _unix_way(process, channel, tables, explained)
        elif channel.backend == "tcp":
            yield _tcp_way(process, channel, tables, explained)
        else:
            yield Way(channel, terminals.get(index))
    yield from _opened_later(process, tables, explained)


def _terminals_of(process: QemuProcess, channels: Sequence[Channel]) -> dict[int, str]:
    """Return the pty of each channel that is one, by its place among `channels`."""
    ptys = [index for index, channel in enumerate(channels) if channel.backend == PTY]
    if not ptys:
        return {}
    terminals = list(process.terminals())
    declared = {bool(channels[index].device) for index in ptys if _comes_early(channels[index])}
    if len(terminals) != len(ptys) or len(declared) > 1:
        return {}  # which is which, the command line does not tell
    # QEMU makes consoles behind what monitors and -chardev have.
    order = sorted(ptys, key=lambda index: not _comes_early(channels[index]))
    return dict(zip(order, terminals, strict=True))


def _comes_early(channel: Channel) -> bool:
    return bool(channel.device) or channel.use in {QMP, HMP}


def _way_from_qemu(process: QemuProcess, channel: Channel, tables: SocketTables) -> Way:
    # Which QEMU has opened to somebody: nobody else can come there.
    sockets = tables.unix(process)
    peers = [
        entry.peer
        for inode in process.socket_inodes
        if (entry := sockets.get(inode)) is not None
        and (other := sockets.get(entry.peer)) is not None
        and other.name == channel.path
    ]
    return Way(channel, None, taken=True, find_holder=lambda: tables.first_owner(peers))


def _unix_way(
    process: QemuProcess, channel: Channel, tables: SocketTables, explained: set[int]
) -> Way:
    sockets = tables.unix_of(process)
    if channel.descriptor is not None:
        inode = socket_inode(process.descriptors.get(channel.descriptor, "")) or 0
        inherited = sockets.get(inode)
        if inherited is not None:
            channel = replace(channel, path=channel.path or inherited.name or None)
            explained.add(inode)
    if channel.path is None:
        return Way(channel, None)
    mine = [
        entry
        for entry in sockets.values()
        if entry.name == channel.path
        and (not process.socket_inodes or entry.inode in process.socket_inodes)
    ]
    explained.update(entry.inode for entry in mine if entry.listens)
    peers = [entry.peer for entry in mine if entry.connected]
    return Way(
        channel,
        process.path_from_here(channel.path),
        bool(peers),
        present=any(entry.listens for entry in mine),
        find_holder=lambda: tables.first_owner(peers),
    )


def _tcp_way(
    process: QemuProcess, channel: Channel, tables: SocketTables, explained: set[int]
) -> Way:
    sockets = tables.tcp(process)
    mine = [entry for entry in sockets.values() if entry.inode in process.socket_inodes]
    known = mine or list(sockets.values())
    listening = [entry for entry in known if entry.listens]
    if channel.port == 0:  # which the kernel has chosen
        others = {entry.port for entry in process.command_line.channels}
        listening = [
            entry
            for entry in listening
            if entry.local[1] not in others and entry.inode not in explained
        ]
        if not mine or len(listening) != 1:
            return Way(channel, None, present=False)
        channel = replace(channel, port=listening[0].local[1])
    explained.update(entry.inode for entry in listening if entry.local[1] == channel.port)
    connected = [entry for entry in known if entry.connected and entry.local[1] == channel.port]
    ends = {(entry.local, entry.remote): entry.inode for entry in sockets.values()}
    peers = [ends.get((entry.remote, entry.local), 0) for entry in connected]
    return Way(
        channel,
        channel.address if process.shares_network else None,
        bool(connected),
        present=any(entry.local[1] == channel.port for entry in listening),
        find_holder=lambda: tables.first_owner(peers),
    )


def _opened_later(process: QemuProcess, tables: SocketTables, explained: set[int]) -> Iterator[Way]:
    for inode in sorted(process.socket_inodes - explained):
        if (unix := tables.unix_of(process).get(inode)) is not None:
            if unix.listens and unix.name:
                channel = Channel(UNKNOWN, "unix", unix.name, listens=True)
                yield Way(channel, process.path_from_here(unix.name))
        elif (tcp := tables.tcp(process).get(inode)) is not None and tcp.listens:
            host, port = tcp.local
            channel = Channel(UNKNOWN, "tcp", None, host, port, listens=True)
            yield Way(channel, format_tcp_address(host, port) if process.shares_network else None)
