"""Hand-made page tables of targets that QEMU's own dump does not follow: its MMU decides."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.elf import ElfCoreFile
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import run_gdb
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

ARM_RAM, RISCV_RAM = 0x40000000, 0x80000000
TABLES_OFFSET, CODE_OFFSET = 0x1000000, 0x100000
FLAG = 1 << 10
"""Accessed: of Arm's long descriptors."""


@dataclass
class Tables:
    """Tables from `base` on, each aligned to its size."""

    base: int
    entry: str
    data: bytearray = field(default_factory=bytearray)

    def table(self, entries: Mapping[int, int], count: int) -> int:
        """Add a table of `count` entries; return its gpa."""
        codec = struct.Struct(f"<{self.entry}")
        self.data += bytes(-len(self.data) % (count * codec.size))
        start = len(self.data)
        self.data += bytes(count * codec.size)
        for index, entry in entries.items():
            codec.pack_into(self.data, start + index * codec.size, entry)
        return self.base + start


@dataclass(frozen=True)
class Case:
    """Tables, how they come into force, and addresses at which both must say the same."""

    target: str
    cpu: str
    tables: Tables
    code: bytes = b""
    commands: tuple[str, ...] = ()
    unmapped: int = 0
    probes: Sequence[int] = ()


def arm64_code(ttbr0: int, ttbr1: int, tcr: int) -> bytes:
    """Load x0 to x4, and make them TTBR0, TTBR1, TCR, SCTLR and MAIR of EL1."""
    values = (ttbr0, ttbr1, tcr, 0x30D0198D | 1, 0xFF)
    moves = (0xD5182000, 0xD5182021, 0xD5182042, 0xD518A204, 0xD5033FDF, 0xD5181003, 0xD5033FDF)
    loads = [0x58000000 | (16 + index) << 5 | index for index in range(len(values))]
    code = struct.pack(f"<{len(loads) + len(moves) + 1}I", *loads, *moves, 0x14000000)
    return code.ljust(64, b"\0") + struct.pack("<5Q", *values)


def arm_code(ttbr0: int, ttbr1: int, ttbcr: int) -> bytes:
    """Load r0 to r5, and make them TTBR0, TTBR1, TTBCR, SCTLR and DACR; r5 is 0."""
    loads = [0xE59F0000 | index << 12 | 64 - 8 for index in range(6)]
    bases = (0xEC450F02, 0xEC451F12) if ttbcr >> 31 else (0xEE020F10, 0xEE021F30)
    moves = (0xEE022F50, *bases, 0xEE034F10, 0xF57FF06F, 0xEE013F10, 0xF57FF06F)
    code = struct.pack(f"<{len(loads) + len(moves) + 1}I", *loads, *moves, 0xEAFFFFFE)
    values = (ttbr0, ttbr1, ttbcr, 0x00C50079, 0xFFFFFFFF, 0)
    return code.ljust(64, b"\0") + struct.pack("<6I", *values)


def arm64_case(granule: int, bits: int, *, lpa2: bool = False) -> Case:
    """One half of each size; pages, a block of every level that has them, and entries of no use."""
    page, per_table = 1 << granule, 1 << granule - 3
    tables = Tables(ARM_RAM + TABLES_OFFSET, "Q")
    gpa = ARM_RAM + 0x200000
    leaf = tables.table(
        {0: gpa | FLAG | 3, 1: gpa + page | FLAG | 3, 5: gpa | FLAG | 3, 6: gpa | FLAG | 1, 7: 2},
        per_table,
    )
    shift, table = granule + granule - 3, leaf
    probes = [index * page for index in range(9)]
    while shift + granule - 3 < bits:
        block = 1 << shift
        entries = {0: table | 3, 1: ARM_RAM & -block | FLAG | 1, 3: 0x7000000000 & -block | 1}
        probes += [block, block + 0x123, 3 * block]
        table = tables.table(entries, per_table)
        shift += granule - 3
    count = 1 << bits - shift
    root = tables.table({0: table | 3, count - 1: table | 3}, max(count, 8))
    probes += [(1 << bits) - (1 << shift) + probe for probe in probes]
    probes += [probe - (1 << bits) & (1 << 64) - 1 for probe in probes]
    tg0, tg1 = {12: (0, 2), 14: (2, 1), 16: (1, 3)}[granule]
    unused = 64 - bits
    tcr = unused | unused << 16 | tg0 << 14 | tg1 << 30 | 5 << 32 | (1 << 59 if lpa2 else 0)
    return Case(
        "aarch64",
        "max",
        tables,
        arm64_code(root, root, tcr),
        unmapped=2 * page,
        probes=tuple(probes),
    )


def short_case(unused: int) -> Case:
    """Sections, supersections, small and large pages, and both tables where N is not 0."""
    tables = Tables(ARM_RAM + TABLES_OFFSET, "I")
    gpa = ARM_RAM + 0x300000
    pages = tables.table(
        {0: gpa | 0x32, 1: gpa + 0x1000 | 0x33, 3: 0}
        | dict.fromkeys(range(16, 32), gpa + 0x10000 | 0x31),
        256,
    )
    high = tables.table(
        {index: ARM_RAM + (index % 16 << 20) | 0xC02 for index in range(4096)}, 4096
    )
    low = tables.table(
        {0: pages | 1, 1: ARM_RAM + 0x100000 | 0xC02, 2: 0, 5: pages | 1}
        | dict.fromkeys(range(16, 32), ARM_RAM + 0x1000000 | 1 << 18 | 0xC02),
        4096 >> unused,
    )
    probes = [0, 0x1000, 0x1FFF, 0x3000, 0x10000, 0x1FFFF, 0x100000, 0x1FFFFF, 0x200000, 0x501000]
    probes += [
        0x1000000,
        0x1523456,
        0x1FFFFFF,
        (1 << 32 - unused) - 1,
        1 << 32 - unused & 0xFFFFFFFF,
    ]
    return Case(
        "arm",
        "cortex-a15",
        tables,
        arm_code(low, high, unused),
        unmapped=0x3000,
        probes=(*probes, 0xFFF00000),
    )


def lpae_case(low: int, high: int) -> Case:
    """Tables of 40-bit addresses, the parts of the address space of sizes that TTBCR tells."""
    tables = Tables(ARM_RAM + TABLES_OFFSET, "Q")
    gpa = ARM_RAM + 0x400000
    pages = tables.table({0: gpa | FLAG | 3, 511: gpa + 0x5000 | FLAG | 3, 9: gpa | FLAG | 1}, 512)
    middle = tables.table(
        {0: pages | 3, 1: ARM_RAM + 0x200000 | FLAG | 1, 511: pages | 3, 256: pages | 3}, 512
    )
    top = dict.fromkeys(range(4), middle | 3)
    root = tables.table(top | {2: ARM_RAM | FLAG | 1}, 512)
    table0, table1 = (middle if size >= 2 else root for size in (low, high))
    probes = [
        start + offset
        for start in range(0, 1 << 32, 1 << 28)
        for offset in (0, 0x9000, 0x1FF000, 0x200000, 0xFFFFFFF)
    ]
    control = 1 << 31 | high << 16 | low
    return Case(
        "arm",
        "cortex-a15",
        tables,
        arm_code(table0, table1, control),
        unmapped=0x1000,
        probes=tuple(probes),
    )


def riscv_case(bits: int, mode: int) -> Case:
    """Pages, large pages of every level, and entries of no use."""
    narrow = bits == 32
    stride, count = (10, 1024) if narrow else (9, 512)
    tables = Tables(RISCV_RAM + TABLES_OFFSET, "I" if narrow else "Q")
    gpa = RISCV_RAM + 0x200000
    table = tables.table(
        {
            0: gpa >> 2 | 0xCF,
            1: gpa + 0x1000 >> 2 | 0xCF,
            4: gpa >> 2 | 0xC1,
            5: 0,
            9: gpa >> 2 | 0xC3,
        },
        count,
    )
    probes = [index << 12 for index in range(11)]
    for shift in range(12 + stride, bits - stride + 1, stride):
        entries = {
            0: table >> 2 | 1,
            1: RISCV_RAM >> shift << shift - 2 | 0xCF,
            count - 1: table >> 2 | 1,
        }
        probes += [1 << shift, (1 << shift) + 0x345, (count - 1) << shift]
        table = tables.table(entries, count)
    if not narrow:
        probes += [probe - (1 << bits) & (1 << 64) - 1 for probe in probes]
    satp = table >> 12 | (1 << 31 if narrow else mode << 60)
    commands = (f"set $satp = {satp:#x}", "set $priv = 1")
    cpu = "rv32,pmp=false" if narrow else "rv64,pmp=false"
    target = "riscv32" if narrow else "riscv64"
    return Case(target, cpu, tables, commands=commands, probes=tuple(probes))


CASES = {
    "aarch64-4k-39": arm64_case(12, 39),
    "aarch64-4k-48": arm64_case(12, 48),
    "aarch64-4k-42": arm64_case(12, 42),
    "aarch64-4k-52-lpa2": arm64_case(12, 52, lpa2=True),
    "aarch64-16k-36": arm64_case(14, 36),
    "aarch64-16k-47": arm64_case(14, 47),
    "aarch64-16k-52-lpa2": arm64_case(14, 52, lpa2=True),
    "aarch64-64k-42": arm64_case(16, 42),
    "aarch64-64k-48": arm64_case(16, 48),
    "aarch64-64k-52": arm64_case(16, 52),
    **{f"arm-short-{unused}": short_case(unused) for unused in (0, 1, 3)},
    **{
        f"arm-long-{low}-{high}": lpae_case(low, high)
        for low, high in ((0, 0), (0, 1), (1, 1), (2, 3))
    },
    "riscv32-sv32": riscv_case(32, 1),
    "riscv64-sv39": riscv_case(39, 8),
    "riscv64-sv48": riscv_case(48, 9),
    "riscv64-sv57": riscv_case(57, 10),
}


def machine_of(case: Case, folder: Path) -> QemuMachine:
    """Return a machine with the tables, and where there is code, a processor that begins there."""
    ram = RISCV_RAM if case.target.startswith("riscv") else ARM_RAM
    (folder / "tables").write_bytes(case.tables.data)
    (folder / "code").write_bytes(case.code or bytes(4))
    arguments = ["-M", "virt", "-cpu", case.cpu]
    if ram == RISCV_RAM:
        arguments += ["-bios", "none"]
    for name, gpa in (("tables", case.tables.base), ("code", ram + CODE_OFFSET)):
        loader = f"loader,file={folder / name},addr={gpa:#x},force-raw=on"
        arguments += ["-device", loader]
    if case.code:
        arguments += ["-device", f"loader,addr={ram + CODE_OFFSET:#x},cpu-num=0"]
    return stopped_machine([f"qemu-system-{case.target}"], arguments)


def translated(qmp: RawQmp, gva: int) -> int | None:
    """Return the page to which QEMU's MMU translates an address."""
    answer = qmp.execute("human-monitor-command", **{"command-line": f"gva2gpa {gva:#x}"})
    return int(answer[5:], 16) >> 12 if answer.startswith("gpa: ") else None


def run_code(qmp: RawQmp, unmapped: int) -> None:
    """Let the processor run until the tables are in force."""

    def has_ended() -> bool:
        qmp.execute("stop")
        if translated(qmp, unmapped) is None:
            return True
        qmp.execute("cont")
        return False

    wait_until(has_ended, "the code comes to its end")


@pytest.mark.parametrize("name", CASES)
def test_paged_elf_is_what_the_emulator_translates(tmp_path: Path, name: str):
    case = CASES[name]
    with machine_of(case, tmp_path) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            if case.code:
                run_code(qmp, case.unmapped)
        path = tmp_path / "paged"
        commands = [*case.commands, f"qemu-dump-guest-memory -p {path}"]
        done = run_gdb(machine, commands, "gdb-multiarch")
        assert "left out" not in done.stdout, done.stdout
        assert "no vCPU uses paging" not in done.stdout, done.stdout + done.stderr
        with open_dump(path) as dump:
            assert isinstance(dump, ElfCoreFile)
            loads = dump.segments
            ranges = list(dump.memory_ranges())
        places = {
            load.p_vaddr + offset: load.p_paddr + offset
            for load in loads
            for offset in (0, load.p_memsz // 2, load.p_memsz - 1)
        }
        seen = 0
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            for gva, gpa in places.items():
                assert translated(qmp, gva) == gpa >> 12, (hex(gva), hex(gpa))
            for gva in case.probes:
                page = translated(qmp, gva)
                if page is None or not any(
                    first <= page << 12 < first + size for first, size in ranges
                ):
                    expected = []
                else:
                    expected = [page]
                    seen += 1
                ours = [
                    load.p_paddr + gva - load.p_vaddr >> 12
                    for load in loads
                    if load.p_vaddr <= gva < load.p_vaddr + load.p_memsz
                ]
                assert ours == expected, (hex(gva), loads)
        assert seen > 3
