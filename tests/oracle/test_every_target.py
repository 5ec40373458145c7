"""Our dump of every target that QEMU dumps, against QEMU's own: registers name themselves.

By the machine's QEMU, and by a newer one, which spells its dumps in its own way.
"""

from __future__ import annotations

import filecmp
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli.gdb_driver import gdb_script_path
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.convert import convert
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import stopped_machine
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.newer_qemu import newer_qemu_command, own_qemu_is_newer
from tests.support.planted import plant_memory, plant_registers
from tests.support.raw_qmp import RawQmp
from tests.support.side_by_side import SideBySide, made_side_by_side

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_GDB_SECONDS = 60


@dataclass(frozen=True)
class Row:
    """One guest.

    Attributes:
        name: Of the test.
        architecture: File that must be found for it.
        target: Behind qemu-system-.
        arguments: Of QEMU.
        planted: Registers by the stub's names with a value of the test's own.
        mended: Where the notes of our default dump differ from QEMU's: type of the note, and
            what differs.
        block_size: Of QEMU's kdump.
        data_encoding: EI_DATA of QEMU's dump.
        mended_data_encoding: EI_DATA of ours.
        package: Which has a newer QEMU; empty: the machine's own.
        gdb: What gdb is told before it connects.
    """

    name: str
    architecture: str
    target: str
    arguments: tuple[str, ...] = ()
    planted: dict[str, int] = field(default_factory=dict)
    mended: frozenset[str] = frozenset()
    block_size: int = 4096
    data_encoding: int = 1
    mended_data_encoding: int | None = None
    package: str = ""
    gdb: tuple[str, ...] = ()


_VIRT = ("-M", "virt")
_PSERIES = (
    "-M",
    "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
    "-vga",
    "none",
    "-m",
    "256",
)
# LINUX as owner; VRSAVE filled. SPE has nothing to fill where there is none.
_POWERPC_NOTES = frozenset(("0x100 owner", "0x101 owner", "0x102 owner"))
_PPC64 = _POWERPC_NOTES | {"0x1 word 32", "0x100 word 528"}
_PPC32 = _POWERPC_NOTES | {"0x1 size", "0x2 size", "0x100 word 528"}
# PC instead of ERA, CRMD, and the end of user_fp_state padded.
_LOONGARCH = frozenset(("0x1 word 376", "0x1 word 380", "0x1 word 392", "0x2 size"))
_SPE_HIGH_HALVES = frozenset(f"0x101 word {4 * index}" for index in range(32))

_ROWS_OF_7_2 = (
    Row("x86_64", "x86_64", "x86_64", ("-cpu", "max", "-smp", "2")),
    Row("i386", "i386", "i386", ("-cpu", "486", "-smp", "2")),
    Row(
        "aarch64-sve", "aarch64", "aarch64", (*_VIRT, "-cpu", "max", "-smp", "2"), block_size=65536
    ),
    Row("sve-512", "aarch64", "aarch64", (*_VIRT, "-cpu", "max,sve-max-vq=4"), block_size=65536),
    Row("cortex-a57", "aarch64", "aarch64", (*_VIRT, "-cpu", "cortex-a57"), block_size=65536),
    Row(
        "aarch64-big-endian",
        "aarch64",
        "aarch64",
        (*_VIRT, "-cpu", "max,cfgend=on", "-smp", "2"),
        block_size=65536,
        data_encoding=2,
    ),
    Row("cortex-a15-in-aarch64", "arm", "aarch64", (*_VIRT, "-cpu", "cortex-a15")),
    Row("cortex-a15", "arm", "arm", (*_VIRT, "-cpu", "cortex-a15", "-smp", "2")),
    Row("arm-big-endian", "arm", "arm", (*_VIRT, "-cpu", "cortex-a15,cfgend=on"), data_encoding=2),
    Row("arm926", "arm", "arm", ("-M", "versatilepb")),
    Row("cortex-m3", "arm", "arm", ("-M", "mps2-an385", "-m", "16")),
    Row("cortex-m4", "arm", "arm", ("-M", "mps2-an386", "-m", "16")),
    Row(
        "power9",
        "ppc64",
        "ppc64",
        (*_PSERIES, "-cpu", "power9", "-smp", "2"),
        mended=_PPC64,
        block_size=65536,
        data_encoding=2,
    ),
    # The kernel of a pseries guest says its byte order to the hypervisor, which sets LPCR.ILE.
    Row(
        "power10-little-endian",
        "ppc64",
        "ppc64",
        (*_PSERIES, "-cpu", "power10"),
        # MSR.LE turns the stub's byte order for all that is planted behind it: LPCR.ILE.
        planted={"msr": 1 << 63 | 1, "lpcr": 0x02 << 32},
        mended=frozenset(("byte order",)),
        block_size=65536,
        data_encoding=2,
        mended_data_encoding=1,
    ),
    Row(
        "g4-in-ppc64",
        "ppc64",
        "ppc64",
        ("-M", "mac99", "-cpu", "G4"),
        mended=_PPC64,
        data_encoding=2,
    ),
    Row("g4", "ppc", "ppc", ("-M", "mac99", "-cpu", "G4"), mended=_PPC32, data_encoding=2),
    Row(
        "e500",
        "ppc",
        "ppc",
        ("-M", "ppce500", "-cpu", "e500v2_v30", "-smp", "2", "-m", "64", "-bios", "FIRMWARE"),
        mended=_PPC32 - {"0x100 word 528"} | _SPE_HIGH_HALVES,
        data_encoding=2,
    ),
    Row(
        "s390x",
        "s390x",
        "s390x",
        ("-cpu", "max", "-smp", "2"),
        mended=frozenset(("0x1 word 32",)),
        data_encoding=2,
    ),
    Row("riscv64", "riscv64", "riscv64", (*_VIRT, "-bios", "none", "-smp", "2")),
    Row("riscv32", "riscv32", "riscv32", (*_VIRT, "-bios", "none", "-smp", "2")),
)


_PACKAGES = {
    "x86_64": "qemu-system-x86",
    "i386": "qemu-system-x86",
    "aarch64": "qemu-system-arm",
    "arm": "qemu-system-arm",
    "ppc64": "qemu-system-ppc",
    "ppc": "qemu-system-ppc",
    "s390x": "qemu-system-s390x",
    "riscv64": "qemu-system-riscv",
    "riscv32": "qemu-system-riscv",
}
_PID = "0x1 word 32"  # right since 9.1
_OTHERWISE_IN_NEWER: dict[str, dict[str, Any]] = {
    "arm926": {"arguments": ("-M", "versatilepb", "-audio", "none")},
    # Their registers are more lines than the gdbstub could answer at once.
    "riscv32": {"arguments": (*_VIRT, "-bios", "none", "-smp", "4")},
    "power10-little-endian": {
        # Readers of little-endian cores find VSCR in the first word of its 16 bytes.
        "mended": _PPC64 - {_PID} | {"0x100 word 512", "0x100 word 524"},
        "data_encoding": 1,
        "mended_data_encoding": None,
    },
}
_IN_NEWER = tuple(
    replace(row, **({"mended": row.mended - {_PID}} | _OTHERWISE_IN_NEWER.get(row.name, {})))
    for row in _ROWS_OF_7_2
)
ROWS = _IN_NEWER if own_qemu_is_newer() else _ROWS_OF_7_2
NEWER_ROWS = (
    *(replace(row, name=f"newer-{row.name}", package=_PACKAGES[row.target]) for row in _IN_NEWER),
    # gdb 13 knows no LoongArch; the registers come in packets that it need not understand.
    Row(
        "newer-loongarch64",
        "loongarch64",
        "loongarch64",
        (*_VIRT, "-smp", "2"),
        mended=_LOONGARCH,
        package="qemu-system-misc",
        gdb=("set architecture alpha",),
    ),
)


_VRSAVE = {"0x100 word 528"}
NOT_IN_QEMUS_NOTES = {
    "power9": _VRSAVE,
    "power10-little-endian": _VRSAVE,
    "g4-in-ppc64": _VRSAVE,
    "g4": _VRSAVE,
    "e500": _SPE_HIGH_HALVES,
    # Its condition code is stale there.
    "s390x": {"0x1 word 32"},
    "loongarch64": _LOONGARCH - {"0x2 size"},
}
"""By row: words that QEMU does not write, and that converting its dump cannot bring back."""


@dataclass(frozen=True)
class Dumps:
    """What was dumped of a row, and what gdb said."""

    row: Row
    folder: Path
    gdb_output: str
    settings_before: str
    settings_after: str

    def path(self, name: str) -> Path:
        return self.folder / name


def _firmware(path: Path) -> Path:
    """Write an ELF of 32-bit PowerPC: the ppce500 machine does not start without one."""
    address = 0xF00000
    path.write_bytes(
        b"\x7fELF\x01\x02\x01".ljust(16, b"\0")
        + struct.pack(">HHIIIIIHHHHHH", 2, 20, 1, address, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        + struct.pack(">IIIIIIII", 1, 84, address, address, 16, 16, 5, 4)
        + bytes(16)
    )
    return path


def _qmp_dumps(socket: Path, folder: Path) -> None:
    with connect_qmp(str(socket)) as monitor:
        access = GuestAccess.by_qmp(monitor)
        for name, request in (
            ("qmp.elf", DumpRequest(exact=True)),
            ("qmp.kdump", DumpRequest(exact=True, format="kdump-zlib")),
            ("qmp.mended", DumpRequest()),
        ):
            with open_sink(str(folder / name), force=False, standard_output=None) as sink:
                dump(request, access, sink, memory=AUTO, progress=ProgressMeter(None))


def _take(row: Row, folder: Path) -> Dumps:
    firmware = str(_firmware(folder / "firmware"))
    arguments = ["-m", "32"]  # a row's own counts
    arguments += [firmware if word == "FIRMWARE" else word for word in row.arguments]
    command = [f"qemu-system-{row.target}"]
    if row.package:
        command = newer_qemu_command(row.target, row.package)
    if shutil.which(command[0]) is None or shutil.which("gdb-multiarch") is None:
        pytest.skip(f"{command[0]} or gdb-multiarch is not installed")
    with stopped_machine(command, arguments) as machine:
        with RawQmp(machine.qmp_sockets[0]) as qmp:
            plant_registers(row.architecture, machine.gdb_socket, row.planted)
            plant_memory(row.name, qmp, machine.gdb_socket)
            for name, extra in (("native.elf", {}), ("native.kdump", {"format": "kdump-zlib"})):
                protocol = f"file:{folder / name}"
                qmp.execute("dump-guest-memory", paging=False, protocol=protocol, **extra)
        commands = [
            "set confirm off",
            "set pagination off",
            *row.gdb,
            f"target remote {machine.gdb_socket}",
            f"source {gdb_script_path()}",
            "echo SETTINGS\\n",
            "show endian",
            "show architecture",
            "echo DUMPS\\n",
            f"qemu-dump-guest-memory --exact {folder / 'gdb.elf'}",
            f"qemu-dump-guest-memory --exact -z zlib {folder / 'gdb.kdump'}",
            f"qemu-dump-guest-memory {folder / 'gdb.mended'}",
            f"qemu-dump-guest-memory -z zlib -R {folder / 'gdb.mended.kdump'}",
            "echo SETTINGS\\n",
            "show endian",
            "show architecture",
            "disconnect",  # its end would let the guest run
        ]
        script = folder / "script"
        script.write_text("\n".join(commands) + "\n")
        finished = subprocess.run(
            ["gdb-multiarch", "--nx", "--quiet", "--batch", "-x", str(script)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_GDB_SECONDS,
            check=False,
        )
        _qmp_dumps(machine.qmp_sockets[0], folder)
    before, _, rest = finished.stdout.partition("SETTINGS\n")[2].partition("DUMPS\n")
    output, _, after = rest.partition("SETTINGS\n")
    return Dumps(row, folder, output + finished.stderr, before, after)


@pytest.fixture(scope="module")
def all_dumps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SideBySide[Row, Dumps]]:
    with made_side_by_side(request, tmp_path_factory, "dumps", _take) as dumps:
        yield dumps


@pytest.fixture(scope="module", params=ROWS + NEWER_ROWS, ids=lambda row: row.name)
def dumps(request: pytest.FixtureRequest, all_dumps: SideBySide[Row, Dumps]) -> Iterator[Dumps]:
    yield all_dumps.result(request.param)
    all_dumps.discard(request.param)


@dataclass(frozen=True)
class _Note:
    owner: bytes
    type: int
    descriptor: bytes


def _elf(path: Path) -> tuple[int, list[_Note]]:
    """Return EI_DATA and the notes; independent of the package's own reader."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    order = "<" if head[5] == 1 else ">"
    wide = head[4] == 2
    (phoff,) = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", head, 32 if wide else 28)
    if wide:
        offset, size = (struct.unpack_from(f"{order}Q", head, phoff + at)[0] for at in (8, 32))
    else:
        offset, size = (struct.unpack_from(f"{order}I", head, phoff + at)[0] for at in (4, 16))
    notes, end = [], offset + size
    while offset < end:
        name_size, size, note_type = struct.unpack_from(f"{order}III", head, offset)
        start = offset + 12 + (name_size + 3) // 4 * 4
        notes.append(_Note(head[offset + 12 :][: name_size - 1], note_type, head[start:][:size]))
        offset = start + (size + 3) // 4 * 4
    return head[5], notes


def _elf_memory(path: Path) -> list[tuple[int, bytes]]:
    """Return gpa and content of the memory in a core, neighbours as one; by pyelftools."""
    found: list[tuple[int, bytes]] = []
    with path.open("rb") as file:
        loads = sorted(ELFFile(file).iter_segments("PT_LOAD"), key=lambda load: load["p_paddr"])
        for load in loads:
            gpa, content = load["p_paddr"], load.data()
            if found and found[-1][0] + len(found[-1][1]) == gpa:
                gpa, before = found.pop()
                content = before + content
            found.append((gpa, content))
    return found


def _differences(native: list[_Note], ours: list[_Note]) -> set[str]:
    found = set()
    for theirs, mine in zip(native, ours, strict=True):
        assert theirs.type == mine.type
        label = f"{theirs.type:#x}"
        if theirs.owner != mine.owner:
            found.add(f"{label} owner")
        if len(theirs.descriptor) != len(mine.descriptor):
            found.add(f"{label} size")
            continue
        for at in range(0, len(theirs.descriptor), 4):
            if theirs.descriptor[at : at + 4] != mine.descriptor[at : at + 4]:
                found.add(f"{label} word {at}")
    return found


def test_no_target_is_left_out():
    dumped = {name for name, known in all_architectures().items() if known.dumped_by_qemu_since}
    assert {row.architecture for row in ROWS + NEWER_ROWS} == dumped


@pytest.mark.parametrize("door", ["gdb", "qmp"])
@pytest.mark.parametrize("form", ["elf", "kdump"])
def test_exact_is_what_qemu_writes(dumps: Dumps, door: str, form: str):
    ours = dumps.path(f"{door}.{form}")
    assert ours.exists(), dumps.gdb_output
    assert filecmp.cmp(dumps.path(f"native.{form}"), ours, shallow=False)


def test_the_default_differs_in_what_is_mended_and_nothing_else(dumps: Dumps):
    row = dumps.row
    encoding, native = _elf(dumps.path("native.elf"))
    ours_encoding, ours = _elf(dumps.path("gdb.mended"))
    assert encoding == row.data_encoding
    assert ours_encoding == (row.mended_data_encoding or encoding)
    if ours_encoding != encoding:
        assert row.mended == {"byte order"}
        return
    assert _differences(native, ours) == row.mended


def test_both_doors_say_the_same(dumps: Dumps):
    assert filecmp.cmp(dumps.path("gdb.mended"), dumps.path("qmp.mended"), shallow=False)


def _converted(source: Path, target: Path, dump_format: str, level: int | None = None) -> Path:
    with open_dump(source) as earlier:
        sink = open_sink(str(target), force=False, standard_output=None)
        request = DumpRequest(format=dump_format, level=level)
        with sink:
            convert(request, earlier, sink, progress=ProgressMeter(None))
    return target


def test_what_qemu_wrote_is_converted_into_what_we_write(dumps: Dumps, tmp_path: Path):
    """But for the registers that QEMU's notes do not have."""
    ours = dumps.path("gdb.mended")
    lost = NOT_IN_QEMUS_NOTES.get(dumps.row.name.removeprefix("newer-"), set())
    if dumps.row.mended == {"byte order"}:  # QEMU before 8.1 takes the wrong one
        found = _converted(dumps.path("native.elf"), tmp_path / "elf", "elf")
        assert found.read_bytes()[5] == dumps.row.data_encoding
        return
    lost = lost & dumps.row.mended
    for form in ("elf", "kdump"):
        found = _converted(dumps.path(f"native.{form}"), tmp_path / form, "elf")
        assert _differences(_elf(ours)[1], _elf(found)[1]) == lost, form
        assert _elf_memory(found) == _elf_memory(ours), form
    # With a level, pages are packed anew, and not as QEMU has packed them.
    kdump = _converted(dumps.path("native.kdump"), tmp_path / "raw", "kdump-raw-zlib", level=1)
    if not lost:
        assert filecmp.cmp(kdump, dumps.path("gdb.mended.kdump"), shallow=False)


def test_nothing_is_missing(dumps: Dumps):
    assert "incomplete" not in dumps.gdb_output


def test_the_settings_of_gdb_stay(dumps: Dumps):
    assert dumps.settings_before
    assert dumps.settings_before in dumps.settings_after


def test_the_kdump_has_the_block_size_of_the_target(dumps: Dumps):
    row = dumps.row
    order = "<" if (row.mended_data_encoding or row.data_encoding) == 1 else ">"
    with dumps.path("gdb.mended.kdump").open("rb") as file:
        head = file.read(512)
    machine = head[272:337].rstrip(b"\0").decode()
    offset = 416 if all_architectures()[row.architecture].cores[0].word_size == 4 else 428
    if row.architecture == "i386":
        offset = 428  # its BIOS ends at 4 GiB, so its headers are the 64-bit ones
    assert struct.unpack_from(f"{order}I", head, offset) == (row.block_size,)
    cores = all_architectures()[row.architecture].cores
    assert machine in {core.uname_machine for core in cores}
