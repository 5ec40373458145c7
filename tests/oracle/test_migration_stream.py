"""A stream that QEMU wrote of a stopped machine holds what a dump of that machine does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import DumpFile, open_dump
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import stopped_machine
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.structures.elf import NT_PRFPREG, NT_S390_GS_CB
from tests.support.newer_qemu import newer_qemu_command
from tests.support.planted import plant_memory, plant_registers
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_PSERIES = "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"
_PIECE = 1 << 20


@dataclass(frozen=True)
class Row:
    """One guest.

    Attributes:
        name: Of the test.
        target: Behind qemu-system-, and the architecture that must be found for it.
        arguments: Of QEMU.
        package: Which has a newer QEMU; empty: the machine's own.
        other_notes: Types of notes of which one has more than the other: registers that the stub
            sets and the processor lacks, or that the stub alone gives.
        unlike: Memory, (gpa, end), that the guest saw otherwise: ROM lay over it.
    """

    name: str
    target: str
    arguments: tuple[str, ...] = ()
    package: str = ""
    unlike: tuple[int, int] = (0, 0)
    other_notes: frozenset[int] = frozenset()


# ROM lies over a part of it, until the BIOS lets it be seen.
_FIRST_MIB = (0, 1 << 20)

ROWS = (
    Row("q35", "x86_64", ("-M", "q35", "-smp", "2", "-cpu", "max"), unlike=_FIRST_MIB),
    Row("pc", "x86_64", ("-M", "pc"), unlike=_FIRST_MIB),
    Row("i386", "i386", ("-M", "pc", "-cpu", "486"), unlike=_FIRST_MIB),
    Row("cortex-a57", "aarch64", ("-M", "virt", "-cpu", "cortex-a57", "-smp", "2")),
    Row("cortex-a15", "arm", ("-M", "virt", "-cpu", "cortex-a15")),
    Row("riscv64", "riscv64", ("-M", "virt", "-smp", "2")),
    Row("riscv32", "riscv32", ("-M", "virt", "-bios", "none")),
    Row("s390x", "s390x", other_notes=frozenset((NT_S390_GS_CB,))),
    Row("power9", "ppc64", ("-M", _PSERIES, "-cpu", "power9", "-m", "256")),
    Row("malta", "mips64el", ("-M", "malta"), other_notes=frozenset((NT_PRFPREG,))),
    Row("q35, newer", "x86_64", ("-M", "q35", "-smp", "2"), "qemu-system-x86", _FIRST_MIB),
    Row("cortex-a57, newer", "aarch64", ("-M", "virt", "-cpu", "cortex-a57"), "qemu-system-arm"),
    Row("riscv32, newer", "riscv32", ("-M", "virt"), "qemu-system-riscv"),
    Row("loongarch64", "loongarch64", ("-M", "virt", "-m", "1G"), "qemu-system-misc"),
)


@dataclass(frozen=True)
class Pair:
    """Our dump of a machine, and the stream of it."""

    row: Row
    dump: Path
    stream: Path


def migrate_to_file(qmp: RawQmp, path: Path) -> None:
    """Have a machine write its stream."""
    qmp.execute("migrate", uri=f"exec:cat >{path}")
    wait_until(lambda: qmp.execute("query-migrate").get("status") in {"completed", "failed"})
    assert qmp.execute("query-migrate")["status"] == "completed"


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    row = request.param
    folder = tmp_path_factory.mktemp("stream")
    found = [f"qemu-system-{row.target}"]
    command = newer_qemu_command(row.target, row.package) if row.package else found
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    pair = Pair(row, folder / "dump.elf", folder / "stream")
    with stopped_machine(command, row.arguments) as machine:
        with RawQmp(machine.qmp_sockets[0]) as qmp:
            plant_registers(row.target, machine.gdb_socket)
            plant_memory(row.name, qmp, machine.gdb_socket)
        with (
            connect_qmp(str(machine.qmp_sockets[0])) as monitor,
            open_sink(str(pair.dump), force=False, standard_output=None) as sink,
        ):
            access = GuestAccess.by_qmp(monitor)
            dump(DumpRequest(), access, sink, memory=AUTO, progress=ProgressMeter(None))
        with RawQmp(machine.qmp_sockets[0]) as qmp:
            migrate_to_file(qmp, pair.stream)
    yield pair
    shutil.rmtree(folder)


def _both(first: DumpFile, second: DumpFile) -> Iterator[tuple[int, int]]:
    """Yield (gpa, size) of what both have."""
    for gpa, size in first.memory_ranges():
        for start, count in second.memory_ranges():
            low, high = max(gpa, start), min(gpa + size, start + count)
            if low < high:
                yield low, high - low


def test_registers_and_memory_are_those_of_the_dump(pair: Pair):
    with open_dump(pair.stream) as stream, open_dump(pair.dump) as ours:
        assert isinstance(stream, MigrationFile)
        assert stream.architecture.name == pair.row.target
        assert not stream.missing_registers
        assert [(note.name, note.type) for note in stream.notes] == [
            (note.name, note.type) for note in ours.notes
        ]
        for theirs, note in zip(stream.notes, ours.notes, strict=True):
            if note.type not in pair.row.other_notes:
                assert theirs.descriptor == note.descriptor, (note.name, note.type)
        compared = 0
        for gpa, size in _both(stream, ours):
            for at in range(gpa, gpa + size, _PIECE):
                piece = min(_PIECE, gpa + size - at)
                if not pair.row.unlike[0] <= at < pair.row.unlike[1]:
                    assert stream.read(at, piece) == ours.read(at, piece), hex(at)
                    compared += piece
        assert compared >= 62 << 20


def test_it_is_whole(pair: Pair):
    with open_dump(pair.stream) as stream:
        report = verify_dump(stream)
    assert not report.problems
    assert report.raw_pages
