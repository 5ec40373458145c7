"""Every memory source of every target that QEMU dumps, through every door: QEMU's own files."""

from __future__ import annotations

import filecmp
import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import all_memory_sources
from tests.support.doors import run_cli, run_gdb
from tests.support.oracle import OracleDumps
from tests.support.raw_gdbstub import RawGdbstub

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

SOURCES = tuple(all_memory_sources())
# There is no stub behind a QMP socket, and no QMP behind a stub.
SOURCES_BY_STUB = tuple(source for source in SOURCES if source != "native_stream")
SOURCES_BY_QMP = tuple(source for source in SOURCES if source != "gdbstub")
FORMATS = {"elf": (), "kdump-zlib": ("-z",)}


@dataclass(frozen=True)
class Guest:
    """A machine whose memory every source can read.

    Attributes:
        target: Behind qemu-system-.
        machine: Its type, with -cpu.
        memory_mib: Of RAM.
        ram: A gpa of it.
    """

    target: str
    machine: tuple[str, ...]
    memory_mib: int = 4
    ram: int = 0


GUESTS = (
    Guest("x86_64", ("q35",)),
    Guest("i386", ("q35",)),
    Guest("aarch64", ("virt", "-cpu", "max"), ram=1 << 30),
    Guest("arm", ("virt",), ram=1 << 30),
    Guest("ppc64", ("mac99", "-cpu", "G4")),
    Guest("ppc", ("mac99", "-cpu", "G4")),
    Guest("s390x", ("s390-ccw-virtio",)),
    Guest("riscv64", ("virt", "-bios", "none"), ram=2 << 30),
    Guest("riscv32", ("virt", "-bios", "none"), ram=2 << 30),
)


@dataclass(frozen=True)
class Dumps:
    """QEMU's own dumps, ours in `folder`, and what gdb said."""

    native: OracleDumps
    folder: Path
    said: str


NAMES = [
    *(("gdb", source, "elf") for source in SOURCES_BY_STUB),
    *(("gdb-with-qmp", source, "kdump-zlib") for source in SOURCES),
    *(("cli-by-qmp", source, "kdump-zlib") for source in SOURCES_BY_QMP),
    # What its gdb does was done by the other one: each start of a gdb costs a second.
    *(("cli-by-gdb", source, "elf") for source in ("process", "gdbstub")),
]


def _in_gdb(machine: QemuMachine, folder: Path) -> str:
    commands = []
    for door, source, dump_format in NAMES:
        if door.startswith("gdb"):
            words = ["--exact", "--memory", source, *FORMATS[dump_format]]
            words += ["--qmp", str(machine.qmp_sockets[0])] if door == "gdb-with-qmp" else []
            path = folder / f"{door}.{source}.{dump_format}"
            commands.append(f"qemu-dump-guest-memory {' '.join(words)} {path}")
    done = run_gdb(machine, commands, "gdb-multiarch")
    return done.stdout + done.stderr


def _on_the_command_line(machine: QemuMachine, folder: Path) -> str:
    said = ""
    by_qmp = ["--qmp", machine.qmp_sockets[0]]
    ways = {"cli-by-qmp": by_qmp, "cli-by-gdb": ["--gdb", machine.gdb_socket, *by_qmp]}
    for door, source, dump_format in NAMES:
        if door in ways:
            path = folder / f"{door}.{source}.{dump_format}"
            words = ["--exact", "--memory", source, *FORMATS[dump_format], path]
            done = run_cli(*ways[door], *words)
            said += done.stdout + done.stderr
    return said


@pytest.fixture(scope="module", params=GUESTS, ids=lambda guest: guest.target)
def dumps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dumps]:
    guest: Guest = request.param
    command = f"qemu-system-{guest.target}"
    if shutil.which(command) is None or shutil.which("gdb-multiarch") is None:
        pytest.skip(f"{command} or gdb-multiarch is not installed")
    folder = tmp_path_factory.mktemp(guest.target)
    machine_type, *more = guest.machine
    size = f"{guest.memory_mib}M"
    arguments = ["-M", f"{machine_type},memory-backend=ram", *more, "-m", size]
    arguments += ["-object", f"memory-backend-memfd,id=ram,size={size},share=on"]
    with stopped_machine([command], arguments) as machine:
        with RawGdbstub(machine.gdb_socket) as stub:
            assert stub.packet("Qqemu.PhyMemMode:1") == "OK"
            for offset in (0, 65536 - 500, (guest.memory_mib << 20) - 1000):
                content = hashlib.shake_128(str(offset).encode()).hexdigest(1000)
                assert stub.packet(f"M{guest.ram + offset:x},{1000:x}:{content}") == "OK"
            assert stub.packet("Qqemu.PhyMemMode:0") == "OK"
        said = _in_gdb(machine, folder) + _on_the_command_line(machine, folder)
        native = OracleDumps(machine, folder)
        for dump_format in FORMATS:
            native.take(dump_format)
    yield Dumps(native, folder, said)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("door", "source", "dump_format"), NAMES)
def test_exact_dump_is_qemus(dumps: Dumps, door: str, source: str, dump_format: str):
    ours = dumps.folder / f"{door}.{source}.{dump_format}"
    assert ours.exists(), dumps.said
    assert filecmp.cmp(ours, dumps.native.take(dump_format), shallow=False)
    line = dumps.said.partition(f"{ours}: ")[2].partition("\n")[0]
    used = re.search(r"memory by ([\w+]+)", line)
    assert used
    # A boot ROM is in no file.
    assert set(used[1].split("+")) - {"process"} == {source} - {"process"}
