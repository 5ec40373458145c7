"""Which guests run on this host, and the ways to each; nothing is connected to, nothing stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from qemu_dump_ext.qemu.command_line import GDBSTUB, HMP, OTHER, QMP
from qemu_dump_ext.qemu.debts import Debt, abandoned_debts
from qemu_dump_ext.qemu.qemu_processes import QemuProcess, find_qemu_processes
from qemu_dump_ext.qemu.ways import SocketTables, Way, ways_of
from qemu_dump_ext.value import Value

_MIB = 1 << 20
_ORDER = {QMP: 0, HMP: 1, GDBSTUB: 2}
_HEADER = ("PID", "NAME", "TARGET", "MACHINE", "RAM", "VCPUS", "WAYS IN")


class GuestWay(Value):
    """A monitor, a gdbstub, or a socket of which the command line does not tell.

    Attributes:
        use: `qmp`, `hmp`, `gdbstub` or `unknown`.
        address: By which this process reaches it, or None: it cannot.
        backend: `unix`, `tcp`, `pty`, `stdio` or another of QEMU's words.
        taken: Somebody is connected to it.
        holder_pid: Who that is, or None.
        holder: The name of that process, or None.
    """

    use: str
    address: str | None
    backend: str
    taken: bool
    holder_pid: int | None = None
    holder: str | None = None

    @property
    def text(self) -> str:
        """Say it in words."""
        where = self.address or self.backend
        if not self.taken:
            return f"{self.use} {where}"
        by = f" by {self.holder} (PID {self.holder_pid})" if self.holder else ""
        return f"{self.use} {where}: taken{by}"


class FoundGuest(Value):
    """A guest of this host; None and "" where nothing tells.

    Attributes:
        pid: Of QEMU's process.
        name: Of the guest.
        uuid: Of the guest.
        identifier: By which its manager knows it.
        target: QEMU's name of what it emulates.
        machine: Type of the machine.
        accelerator: Such as `kvm`.
        memory: Bytes of RAM at the start.
        vcpus: How many at the start.
        kernel: Release of the kernel that QEMU boots.
        incoming: From where it is migrated.
        user: Number of the user that QEMU runs as.
        seconds: For how long it has been there.
        namespaces: In which it is and this process is not: `mnt`, `net`, `pid`, `user`.
        belongs_to: Kind and name of what it is of, such as a domain or a container, the outermost
            first.
        stopped_by: PID of a dump that has stopped it and is gone, or None.
        unreadable: Why its memory cannot be read by this process, or None: it can.
        ways: To it, the best first.
    """

    pid: int
    name: str
    uuid: str
    identifier: str
    target: str
    machine: str
    accelerator: str
    memory: int | None
    vcpus: int | None
    kernel: str | None
    incoming: str | None
    user: int | None
    seconds: float
    namespaces: Sequence[str]
    belongs_to: Sequence[tuple[str, str]]
    stopped_by: int | None
    unreadable: str | None
    ways: Sequence[GuestWay]

    def remarks(self) -> Iterator[str]:
        """Say what else there is to know."""
        for kind, name in self.belongs_to:
            yield f"{kind} {name}"
        if self.kernel is not None:
            yield f"kernel {self.kernel}"
        if self.incoming is not None:
            yield "waits for a migration, or came by one"
        if self.namespaces:
            yield f"in other namespaces: {', '.join(self.namespaces)}"
        if self.stopped_by is not None:
            yield (
                f"a dump that was killed (PID {self.stopped_by}) has left it stopped:"
                f" 'qemu-dump resume --pid {self.pid}' lets it run"
            )
        if self.unreadable is not None:
            yield f"its memory cannot be read: {self.unreadable}"


def list_guests() -> list[FoundGuest]:
    """Return the guests of this host that can be seen, by ascending pid.

    Raises:
        SourceError: There is no /proc.
    """
    tables = SocketTables()
    debts = abandoned_debts()
    return [_describe(process, tables, debts) for process in find_qemu_processes()]


def guest_names() -> list[str]:
    """Return by which names guests can be called, for completion."""
    lines = [process.command_line for process in find_qemu_processes()]
    return sorted({name for line in lines for name in (line.name, line.uuid) if name})


def lines_of(guests: Sequence[FoundGuest]) -> list[str]:
    """Return a table: one line for each way to a guest, and what else there is to know below."""
    rows: list[Sequence[str]] = [_HEADER]
    notes: dict[int, list[str]] = {}
    for guest in guests:
        ways = [way.text for way in guest.ways] or ["none"]
        memory = "-" if guest.memory is None else f"{guest.memory // _MIB}M"
        rows.append(
            (
                *(str(guest.pid), guest.name or "-", guest.target, guest.machine or "-"),
                *(memory, str(guest.vcpus or "-"), ways[0]),
            )
        )
        rows += [("",) * (len(_HEADER) - 1) + (way,) for way in ways[1:]]
        notes[len(rows)] = list(guest.remarks())
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    lines: list[str] = []
    for number, row in enumerate(rows, start=1):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True))
        lines.append("  ".join(cells).rstrip())
        lines += [f"    {remark}" for remark in notes.get(number, ())]
    return lines


def to_json(guests: Sequence[FoundGuest]) -> str:
    """Say it to a machine: one line, a list; keys are the attributes."""
    return json.dumps([asdict(guest) for guest in guests])


def _describe(process: QemuProcess, tables: SocketTables, debts: Sequence[Debt]) -> FoundGuest:
    line = process.command_line
    owed = (debt.dumper for debt in debts if debt.is_of(process))
    return FoundGuest(
        pid=process.pid,
        name=line.name,
        uuid=line.uuid,
        identifier=line.identifier,
        target=process.target,
        machine=line.machine,
        accelerator=line.accelerator,
        memory=line.memory,
        vcpus=line.vcpus,
        kernel=process.kernel_release(),
        incoming=line.incoming,
        user=process.user,
        seconds=round(process.uptime_seconds, 3),
        namespaces=process.other_namespaces,
        belongs_to=[(entry.kind, entry.name) for entry in process.belongs_to],
        stopped_by=next(owed, None),
        unreadable=process.why_unreadable(),
        ways=_ways(process, tables),
    )


def _ways(process: QemuProcess, tables: SocketTables) -> Sequence[GuestWay]:
    found = [way for way in ways_of(process, tables) if way.use != OTHER]
    found.sort(key=lambda way: (_ORDER.get(way.use, len(_ORDER)), way.address is None, way.taken))
    return tuple(map(_way, found))


def _way(way: Way) -> GuestWay:
    holder = way.holder
    return GuestWay(
        way.use,
        way.address,
        way.channel.backend,
        way.taken,
        None if holder is None else holder.pid,
        None if holder is None else holder.name,
    )
