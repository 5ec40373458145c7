"""Linux of every target while its vCPUs run programs; comes behind what wants a kernel.

The vCPUs are in user mode from here on, and stay there.
"""

from __future__ import annotations

import filecmp
import re
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.elf import ElfCoreFile
from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.guest.test_every_guest import of_the_others, of_those_dumped_by_qemu
from tests.support.doors import run_cli, run_gdb
from tests.support.folders import folder_for
from tests.support.linux_guests import BEFORE_CONNECTING, gpas_of, of_guests
from tests.support.oracle import OracleDumps
from tests.support.raw_qmp import RawQmp
from tests.support.user_mode import stop_in_user_mode

pytestmark = [pytest.mark.guest, pytest.mark.qemu, pytest.mark.gdb]


@pytest.fixture(scope="module")
def guest_in_user_mode(guest: BootedGuest) -> BootedGuest:
    stop_in_user_mode(guest)
    return guest


@pytest.fixture(scope="module")
def native_in_user_mode(
    guest_in_user_mode: BootedGuest, request: pytest.FixtureRequest
) -> OracleDumps:
    return OracleDumps(guest_in_user_mode, folder_for(request, "native"))


@of_those_dumped_by_qemu
def test_exact_dump_by_qmp_of_programs_is_qemus(
    guest_in_user_mode: BootedGuest, native_in_user_mode: OracleDumps, tmp_path: Path
):
    ours = tmp_path / "ours"
    done = run_cli("--qmp", guest_in_user_mode.qmp_sockets[0], "--exact", ours)
    assert done.returncode == 0, done.stderr
    assert filecmp.cmp(ours, native_in_user_mode.elf, shallow=False)


@of_those_dumped_by_qemu
def test_exact_dump_by_the_stub_of_programs_is_qemus(
    guest_in_user_mode: BootedGuest, native_in_user_mode: OracleDumps, tmp_path: Path
):
    ours = tmp_path / "ours"
    command = f"qemu-dump-guest-memory --exact {ours}"
    before = BEFORE_CONNECTING.get(guest_in_user_mode.image.name, [])
    done = run_gdb(guest_in_user_mode, [command], "gdb-multiarch", before=before)
    assert filecmp.cmp(ours, native_in_user_mode.elf, shallow=False), done.stdout + done.stderr


@of_the_others
def test_gdb_shows_the_registers_of_programs(guest_in_user_mode: BootedGuest, tmp_path: Path):
    guest, core = guest_in_user_mode, tmp_path / "core"
    names = [*(f"r{index}" for index in range(1, 32)), "lo", "hi", "pc", "sr", "bad", "cause"]
    values = ", ".join(f"${name}" for name in names)
    show = f'thread apply all -ascending printf "vcpu{" %#lx" * len(names)}\\n", {values}'
    before = BEFORE_CONNECTING[guest.image.name]
    commands = [f"qemu-dump-guest-memory {core}", show]
    # Without, gdb cuts addresses of a live guest to 32 bits.
    before = [*before, "set mips abi n64"] if guest.image.name == "mips64el" else before
    live = run_gdb(guest, commands, "gdb-multiarch", before=before)
    done = run_gdb(None, [f"core-file {core}", show], "gdb-multiarch")
    shown, expected = (
        re.findall(r"^vcpu (.*)$", text, re.MULTILINE) for text in (done.stdout, live.stdout)
    )
    assert len(expected) == guest.image.cpus, live.stdout + live.stderr
    assert shown == expected


@of_guests("i386", "aarch64", "arm", "riscv64", "s390x", "loongarch64")
def test_segments_of_programs_are_what_the_emulator_translates(
    guest_in_user_mode: BootedGuest, tmp_path: Path
):
    """What a program may not reach QEMU does not translate; what it may must be right."""
    guest, path = guest_in_user_mode, tmp_path / "paged"
    before = BEFORE_CONNECTING.get(guest.image.name, [])
    done = run_gdb(guest, [f"qemu-dump-guest-memory -p {path}"], "gdb-multiarch", before=before)
    assert "left out" not in done.stdout, done.stdout
    with open_dump(path) as dump:
        assert isinstance(dump, ElfCoreFile)
        loads = dump.segments
    by_size = sorted(loads, key=lambda load: load.p_memsz)
    right = wrong = 0
    with RawQmp(guest.qmp_sockets[1]) as qmp:
        for load in by_size[:: max(1, len(by_size) // 500)]:
            for offset in (0, load.p_memsz - 1):
                pages = gpas_of(qmp, guest, load.p_vaddr + offset)
                right += (load.p_paddr + offset) >> 12 in pages
                wrong += bool(pages) and (load.p_paddr + offset) >> 12 not in pages
    assert right > 10
    # Of s390x the kernel's space and a program's both begin at 0.
    assert not wrong or guest.image.name == "s390x"
