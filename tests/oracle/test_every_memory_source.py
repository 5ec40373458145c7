"""Every memory source of every target that QEMU dumps, through every door: QEMU's own files."""

from __future__ import annotations

import filecmp
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import OracleDumps
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.side_by_side import SideBySide, made_side_by_side
from tests.support.ways import (
    BY_GDB,
    DOORS,
    FORMATS,
    Outcome,
    Way,
    every_way,
    half_of,
    take_dumps,
)

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]


@dataclass(frozen=True)
class Guest:
    """A machine whose memory every source can read.

    Attributes:
        name: Of the target.
        machine: Its type, with -cpu.
        ram: A gpa of it.
        package: Which has a newer QEMU; empty: the machine's own.
        gdb: What gdb is told before it connects.
        mib: Of memory.
    """

    name: str
    machine: tuple[str, ...]
    ram: int = 0
    package: str = ""
    gdb: tuple[str, ...] = ()
    mib: int = 2


GUESTS = (
    Guest("x86_64", ("q35",)),
    Guest("i386", ("q35",)),
    Guest("aarch64", ("virt", "-cpu", "max"), ram=1 << 30),
    Guest("arm", ("virt",), ram=1 << 30),
    Guest("ppc64", ("mac99", "-cpu", "G4")),
    Guest("ppc", ("mac99", "-cpu", "G4")),
    Guest("s390x", ("s390-ccw-virtio",), mib=4),  # its firmware takes more than two
    Guest("riscv64", ("virt", "-bios", "none"), ram=2 << 30),
    Guest("riscv32", ("virt", "-bios", "none"), ram=2 << 30),
    Guest("loongarch64", ("virt",), package="qemu-system-misc", gdb=("set architecture alpha",)),
)


def _ways(guest: Guest) -> tuple[Way, ...]:
    """Return all ways, but half of those through gdb from the command line.

    There, each dump starts a gdb, in which it is taken like those of another door; the other half
    is that of the next guest.
    """
    ways = every_way()
    half = half_of([way for way in ways if way.door == BY_GDB], GUESTS.index(guest))
    return tuple(way for way in ways if way.door != BY_GDB or way in half)


@dataclass(frozen=True)
class Dumps:
    """QEMU's own dumps by format, ours in `folder`, and what was said of them."""

    native: Mapping[str, Path]
    folder: Path
    outcomes: Mapping[Way, Outcome]


def _take(guest: Guest, folder: Path) -> Dumps:
    command = [f"qemu-system-{guest.name}"]
    if guest.package:
        command = newer_qemu_command(guest.name, guest.package)
    if shutil.which(command[0]) is None or shutil.which("gdb-multiarch") is None:
        pytest.skip(f"{command[0]} or gdb-multiarch is not installed")
    machine_type, *more = guest.machine
    arguments = ["-M", f"{machine_type},memory-backend=ram", *more, "-m", f"{guest.mib}M"]
    arguments += ["-object", f"memory-backend-memfd,id=ram,size={guest.mib}M,share=on"]
    with stopped_machine(command, arguments) as machine:
        with RawGdbstub(machine.gdb_socket) as stub:
            assert stub.packet("Qqemu.PhyMemMode:1") == "OK"
            for offset in (0, 65536 - 500, (guest.mib << 20) - 1000):
                content = hashlib.shake_128(str(offset).encode()).hexdigest(1000)
                assert stub.packet(f"M{guest.ram + offset:x},{1000:x}:{content}") == "OK"
            assert stub.packet("Qqemu.PhyMemMode:0") == "OK"
        outcomes = take_dumps(machine, folder, _ways(guest), "--exact", before=guest.gdb)
        native = OracleDumps(machine, folder)
        return Dumps({name: native.take(name) for name in FORMATS}, folder, outcomes)


@pytest.fixture(scope="module")
def all_dumps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SideBySide[Guest, Dumps]]:
    with made_side_by_side(request, tmp_path_factory, "dumps", _take) as dumps:
        yield dumps


@pytest.fixture(scope="module", params=GUESTS, ids=lambda guest: guest.name)
def dumps(request: pytest.FixtureRequest, all_dumps: SideBySide[Guest, Dumps]) -> Iterator[Dumps]:
    yield all_dumps.result(request.param)
    all_dumps.discard(request.param)


def test_no_target_is_left_out():
    dumped = {name for name, known in all_architectures().items() if known.dumped_by_qemu_since}
    assert {guest.name for guest in GUESTS} == dumped


@pytest.mark.parametrize("door", DOORS)
def test_exact_dumps_are_qemus(dumps: Dumps, door: str):
    for way, outcome in dumps.outcomes.items():
        if way.door != door:
            continue
        assert outcome.status == 0, (str(way), outcome.said)
        ours, native = dumps.folder / str(way), dumps.native[way.dump_format]
        assert filecmp.cmp(ours, native, shallow=False), str(way)
        used = re.search(r"memory by ([\w+]+)", outcome.said)
        assert used, str(way)
        # A boot ROM is in no file.
        assert set(used[1].split("+")) - {"process"} == {way.source} - {"process"}, str(way)
