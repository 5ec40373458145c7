"""Linux on targets whose page tables QEMU's dump-guest-memory does not follow."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.cli.dump_command import main as dump_guest_memory
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.elf import ElfCoreFile, Segment
from qemu_dump_ext.errors import EXIT_INCOMPLETE, EXIT_SUCCESS
from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.doors import run_gdb
from tests.support.linux_guests import BEFORE_CONNECTING, IMAGES, NOT_BY_GDB, gpas_of, of_guests
from tests.support.raw_qmp import RawQmp
from tests.support.user_mode import stopped_for_a_program

pytestmark = [pytest.mark.qemu, pytest.mark.guest, pytest.mark.gdb]

of_all = of_guests(*IMAGES)
# What a dump of theirs says of the tables of processes.
LEFT_OUT = {
    **dict.fromkeys(("arm", "aarch64"), "no source gives 'sctlr', which paging needs"),
    **dict.fromkeys(("ppc64le", "mips64el", "mipsel"), "only the kernel's own addresses are known"),
}
# In gdb: it is not asked how soon a busy host has searched all memory.
SEARCH_AS_LONG_AS_IT_TAKES = (
    "python from qemu_dump_ext.engine import stopped_guest; stopped_guest._SEARCH_SECONDS = 600.0"
)
# Those of which more than a few windows are mapped.
WITH_TABLES = ("i386", "aarch64", "arm", "s390x", "riscv64", "loongarch64")


def dump(guest: BootedGuest, path: Path, *words: str) -> Path:
    status = dump_guest_memory(["--qmp", str(guest.qmp_sockets[0]), *words, str(path)])
    # Of MIPS, one register is the stub's alone.
    assert status in {EXIT_SUCCESS, EXIT_INCOMPLETE}
    return path


def segments_of(path: Path) -> Sequence[Segment]:
    with open_dump(path) as opened:
        assert isinstance(opened, ElfCoreFile)
        return opened.segments


def assert_translated(guest: BootedGuest, loads: Iterable[Segment]) -> None:
    """First and last byte of segments of every size, asked of QEMU's own MMU."""
    with RawQmp(guest.qmp_sockets[1]) as qmp:
        if guest.image.name == "riscv64" and qmp.execute("query-version")["qemu"]["major"] > 7:
            # It tells of no page of a program while the vCPU is in the kernel (mstatus.SUM).
            loads = [load for load in loads if load.p_vaddr >= 1 << 63]
        by_size = sorted(loads, key=lambda load: load.p_memsz)
        sample = by_size[-10:] + by_size[:: max(1, len(by_size) // 60)]
        assert sample
        for load in sample:
            for offset in (0, load.p_memsz - 1):
                pages = gpas_of(qmp, guest, load.p_vaddr + offset)
                assert (load.p_paddr + offset) >> 12 in pages, (load, offset, pages)


@of_all
def test_log_is_the_consoles(
    guest: BootedGuest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dumps = (
        dump(guest, tmp_path / "elf"),
        dump(guest, tmp_path / "kdump", "-z", "-R"),
        dump(guest, tmp_path / "bare", "--no-vmcoreinfo"),
    )
    capsys.readouterr()
    assert qemu_dump(["dmesg", "--qmp", str(guest.qmp_sockets[0])]) == 0
    live = capsys.readouterr().out
    for path in dumps:
        assert qemu_dump(["dmesg", str(path)]) == 0
        assert capsys.readouterr().out == live, path
    lines = live.splitlines()
    assert guest.files.release in "".join(lines[:40])
    # What the kernel says of a host that is busy may follow.
    assert any(guest.image.kernel_log in line for line in lines[-10:])
    assert len(lines) > 120
    console = guest.console_text()
    # The console has no more of a message than its line is long.
    missing = [line for line in lines if line[:75] not in console]
    # The emulated serial line loses a letter now and then when the host is busy.
    assert len(missing) < len(lines) // 3, missing


@of_all
def test_log_in_a_dump_that_names_no_machine(
    guest: BootedGuest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As QEMU's own: of x86 since 9.2, of all others in every version."""
    path = dump(guest, tmp_path / "kdump", "-z", "-R")
    with open_dump(path) as opened:
        machine = str(opened.header["machine"]).encode().ljust(65, b"\0")
    with path.open("r+b") as file:
        place = file.read(4096).index(machine)
        file.seek(place)
        file.write(b"Unknown".ljust(65, b"\0"))
    capsys.readouterr()
    assert qemu_dump(["dmesg", str(path)]) == 0
    assert guest.image.kernel_log in capsys.readouterr().out


@of_all
def test_segments_are_what_the_emulator_translates(
    guest: BootedGuest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = dump(guest, tmp_path / "paged", "-p")
    said = capsys.readouterr().err
    if guest.image.name in LEFT_OUT:
        assert LEFT_OUT[guest.image.name] in said
    else:
        assert "left out" not in said
    loads = segments_of(path)
    assert len(loads) > 20 or guest.image.name not in WITH_TABLES
    if guest.image.name == "ppc64le":  # vmalloc(), by radix tables
        assert any(load.p_vaddr >= 0xC008000000000000 for load in loads)
    assert_translated(guest, loads)
    with open_dump(path) as opened:
        name = int(opened.vmcoreinfo_facts["SYMBOL(init_uts_ns)"], 16)
    assert any(load.p_vaddr <= name < load.p_vaddr + load.p_memsz for load in loads)


@of_guests("arm", "aarch64")
def test_the_stub_gives_the_tables_of_processes(guest: BootedGuest, tmp_path: Path):
    path = tmp_path / "paged"
    commands = [SEARCH_AS_LONG_AS_IT_TAKES, f"qemu-dump-guest-memory -p {path}"]
    with stopped_for_a_program(guest):
        done = run_gdb(guest, commands, "gdb-multiarch")
        assert "the page tables of a vCPU lead to the kernel's name" in done.stdout or (
            "VMCOREINFO" not in done.stdout  # by the device
        ), done.stdout + done.stderr
        assert "left out" not in done.stdout
        loads = segments_of(path)
        # Since 6.10 (7af5b901e847), arm has none in its kernel but while it copies for a process.
        is_without = guest.image.name == "arm" and not guest.files.release.startswith("6.1.")
        assert any(load.p_vaddr < 0xC0000000 for load in loads) or is_without
        # What a process has is out of its kernel's reach by PAN, and so of QEMU's translation.
        reachable = [load for load in loads if guest.image.name == "arm" or load.p_vaddr >> 63]
        assert_translated(guest, reachable)


@of_guests(*(name for name in IMAGES if name not in NOT_BY_GDB))
def test_gdb_reads_the_kernels_name_in_the_core(guest: BootedGuest, tmp_path: Path):
    path = dump(guest, tmp_path / "paged", "-p")
    with open_dump(path) as opened:
        facts = opened.vmcoreinfo_facts
    name = int(facts["SYMBOL(init_uts_ns)"], 16) + int(facts["OFFSET(uts_namespace.name)"])
    release = f"x/s {name + 2 * 65:#x}"
    before = [
        word for line in BEFORE_CONNECTING.get(guest.image.name, []) for word in ("-ex", line)
    ]
    done = subprocess.run(
        ["gdb-multiarch", "--nx", "--batch", *before, "-c", path, "-ex", release],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'"{guest.files.release}"' in done.stdout, done.stdout + done.stderr


@of_guests("i386", "aarch64", "arm", "riscv64", "s390x", "ppc64le")
def test_exact_is_qemus(guest: BootedGuest, tmp_path: Path):
    """For all but x86 QEMU takes virtual addresses for physical ones."""
    with RawQmp(guest.qmp_sockets[1]) as qmp:
        native = f"file:{tmp_path / 'native'}"
        qmp.execute("dump-guest-memory", paging=True, protocol=native)
    dump(guest, tmp_path / "ours", "--exact", "-p")
    assert segments_of(tmp_path / "ours") == segments_of(tmp_path / "native")
