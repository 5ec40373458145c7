"""LoongArch, which QEMU itself dumps only since 9.2: Linux's own layout of the notes."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import struct
from pathlib import Path

import pytest

from qemu_dump_ext.dialect import MENDED
from qemu_dump_ext.dump_plan import GuestSnapshot, make_plan
from qemu_dump_ext.guest_images.machine import stopped_machine
from qemu_dump_ext.guest_probe import GuestAccess, probe_guest
from qemu_dump_ext.sync_qmp import connect_qmp
from qemu_dump_ext.vmcoreinfo import UtsName
from tests.support.doors import run_cli, run_gdb
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import OracleDumps
from tests.support.raw_gdbstub import RawGdbstub

_R0, _ERA = 112, 112 + 33 * 8


@pytest.mark.qemu
def test_registers_stand_where_linux_has_them():
    if shutil.which("qemu-system-loongarch64") is None:
        pytest.skip("qemu-system-loongarch64 is not installed")
    with stopped_machine(["qemu-system-loongarch64"], ["-M", "virt", "-m", "1G"]) as machine:
        with RawGdbstub(machine.gdb_socket) as stub:
            for name, number, size in stub.described_registers():
                if name[0] in "rf" and name[1:].isdecimal() and name != "r0":
                    value = (0xA0 if name[0] == "r" else 0xF0) << 56 | int(name[1:])
                    stub.packet(f"P{number:x}={value.to_bytes(size, 'little').hex()}")
        with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
            guest = probe_guest(GuestAccess(monitor, None, monitor.native_dump))
    plan = make_plan(
        GuestSnapshot(guest.architecture, guest.ram_blocks, guest.vcpus, b"", UtsName()), MENDED
    )
    assert plan.core.e_machine == 258
    status = 20
    registers = struct.unpack_from("<32Q", plan.notes, status + _R0)
    assert registers == (0, *(0xA0 << 56 | number for number in range(1, 32)))
    (pc,) = struct.unpack_from("<Q", plan.notes, status + _ERA)
    assert pc == 0x1C000000  # where the machine begins
    floating_point = struct.unpack_from("<32Q", plan.notes, status + 480 + 20)
    assert floating_point == tuple(0xF0 << 56 | number for number in range(32))
    # `info registers` of QEMU 7.2 shows neither.
    assert set(plan.missing["CORE", 0]) <= {"ecfg", "fcc"}


@pytest.mark.qemu
@pytest.mark.gdb
def test_exact_dump_is_that_of_a_qemu_which_dumps_it(tmp_path: Path):
    command = newer_qemu_command("loongarch64", "qemu-system-misc")
    with stopped_machine(command, ["-M", "virt", "-m", "1G", "-smp", "2"]) as machine:
        with RawGdbstub(machine.gdb_socket) as stub:
            for name, number, size in stub.described_registers():
                if name[0] in "rf" and name[1:].isdecimal() and name != "r0":
                    value = hashlib.shake_128(name.encode()).digest(size)
                    stub.packet(f"P{number:x}={value.hex()}")
        native = OracleDumps(machine, tmp_path)
        for dump_format, words in (("elf", ()), ("kdump-zlib", ("-z",))):
            ours = tmp_path / f"ours-{dump_format}"
            done = run_cli("--qmp", machine.qmp_sockets[0], "--exact", *words, ours)
            assert done.returncode == 0, done.stderr
            assert filecmp.cmp(ours, native.take(dump_format), shallow=False)
        # gdb 13 knows no LoongArch; the registers come in packets that it need not understand.
        in_gdb, by_gdb = tmp_path / "in-gdb", tmp_path / "by-gdb"
        dump = f"qemu-dump-guest-memory --exact {in_gdb}"
        before = ["set architecture alpha"]
        said = run_gdb(machine, [dump], "gdb-multiarch", before=before)
        assert filecmp.cmp(in_gdb, native.elf, shallow=False), said.stdout + said.stderr
        sockets = ("--gdb", machine.gdb_socket, "--qmp", machine.qmp_sockets[0])
        on_line = run_cli(*sockets, "--exact", by_gdb)
        assert filecmp.cmp(by_gdb, native.elf, shallow=False), on_line.stderr
