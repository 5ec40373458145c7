"""Every way to a dump: a door, a memory source behind it, and a format.

Many dumps are taken by one gdb and by one Python: each start costs more than a small dump.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from tests.support.doors import run_gdb, run_often

FORMATS = {"elf": (), "kdump-zlib": ("-z",)}
_IN_GDB = ("gdb", "gdb-with-qmp")
BY_GDB = "cli-by-gdb"
_BY_QMP = "cli-by-qmp"
DOORS = (*_IN_GDB, BY_GDB, _BY_QMP)
_SECONDS = 1200  # on a host that runs much else at the same time


@dataclass(frozen=True)
class Way:
    """One way to a dump; as text, the name of its file."""

    door: str
    source: str
    dump_format: str

    @property
    def has_stub(self) -> bool:
        """Registers come from the gdbstub."""
        return self.door != _BY_QMP

    def __str__(self) -> str:
        return f"{self.door}.{self.source}.{self.dump_format}"


@dataclass(frozen=True)
class Outcome:
    """Exit status of a dump, and what was said of it."""

    status: int
    said: str


def every_way(*, sources: Collection[str] = tuple(all_memory_sources())) -> tuple[Way, ...]:
    """Return what there is; no stub is behind a QMP socket, and no QMP behind a stub."""
    never = {(_BY_QMP, "gdbstub"), ("gdb", "native_stream")}
    return tuple(
        Way(door, source, dump_format)
        for door in DOORS
        for source in sources
        for dump_format in FORMATS
        if (door, source) not in never
    )


def half_of(ways: Collection[Way], turn: int) -> tuple[Way, ...]:
    """Return of each door and source the way to one format, the other one in the next turn.

    All doors and all sources have both formats where there is more than one of the other.
    """
    sources = sorted({way.source for way in ways})
    formats = tuple(FORMATS)
    return tuple(
        way
        for way in ways
        if (DOORS.index(way.door) + sources.index(way.source) + turn) % len(formats)
        == formats.index(way.dump_format)
    )


def take_dumps(
    machine: QemuMachine,
    folder: Path,
    ways: Sequence[Way],
    *words: str,
    before: Sequence[str] = (),
) -> Mapping[Way, Outcome]:
    """Take a dump in each way into `folder`.

    Args:
        machine: Stopped.
        folder: Where the files will be.
        ways: Which.
        words: Options of every dump.
        before: Commands that come before gdb connects.
    """
    by_qmp = ["--qmp", str(machine.qmp_sockets[0])]
    connections = {
        "gdb": [],
        "gdb-with-qmp": by_qmp,
        BY_GDB: ["--gdb", str(machine.gdb_socket), *by_qmp],
        _BY_QMP: by_qmp,
    }
    lines = {
        way: [
            *(*connections[way.door], *words, *FORMATS[way.dump_format]),
            *(() if way.source == AUTO else ("--memory", way.source)),
            str(folder / str(way)),
        ]
        for way in ways
    }
    in_gdb = {way: line for way, line in lines.items() if way.door in _IN_GDB}
    others = {way: line for way, line in lines.items() if way not in in_gdb}
    return {
        **(_take_in_gdb(machine, in_gdb, before) if in_gdb else {}),
        **_take_on_the_command_line(others),
    }


def _take_in_gdb(
    machine: QemuMachine, lines: Mapping[Way, Sequence[str]], before: Sequence[str]
) -> dict[Way, Outcome]:
    commands = []
    for way, line in lines.items():
        commands += [f"echo WAY {way}\\n", f"qemu-dump-guest-memory {' '.join(line)}"]
        commands += ['printf "STATUS %d\\n", $_qemu_dump_status']
    done = run_gdb(machine, commands, "gdb-multiarch", before=before, timeout=_SECONDS)
    found = re.findall(r"^WAY (\S+)\n(.*?)^STATUS (\d+)$", done.stdout, re.DOTALL | re.MULTILINE)
    said = {name: (int(status), text) for name, text, status in found}
    assert said.keys() == set(map(str, lines)), done.stdout + done.stderr
    outcomes = {}
    for way in lines:
        status, text = said[str(way)]
        outcomes[way] = Outcome(status, text if status in {0, 6} else text + done.stderr)
    return outcomes


def _take_on_the_command_line(lines: Mapping[Way, Sequence[str]]) -> dict[Way, Outcome]:
    told = run_often("qemu_dump_guest_memory", list(lines.values()))
    return {
        way: Outcome(done.returncode, done.stderr) for way, done in zip(lines, told, strict=True)
    }
