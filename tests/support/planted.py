"""Registers and memory of a machine that never ran, each with a value of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from qemu_dump_ext.architectures import all_architectures
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp

# Written, they change the mode that the vCPU is in, or stop at an assertion of QEMU.
_LEFT_ALONE = (
    "msr lpcr hid0 pvr cpsr SCTLR vg pswm mstatus eflags efer cr0 cr3 cr4 cs ds es fs gs ss"
    " fs_base gs_base k_gs_base"
)


def plant_registers(
    architecture: str, gdb_socket: Path, planted: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Give every register of every vCPU a value by its name.

    Args:
        architecture: Whose registers.
        gdb_socket: Of the machine.
        planted: Registers by the stub's names with other values.
    """
    wanted = {register.gdb for register in all_architectures()[architecture].registers}
    with RawGdbstub(gdb_socket) as stub:
        threads = []
        answer = stub.packet("qfThreadInfo")
        while answer.startswith("m"):
            threads += answer[1:].split(",")
            answer = stub.packet("qsThreadInfo")
        registers = list(stub.described_registers())
        for thread in threads:
            stub.packet(f"Hg{thread}")
            for name, number, size in registers:
                if name in planted:
                    value = planted[name].to_bytes(size, "big")
                elif name in wanted - set(_LEFT_ALONE.split()):
                    value = hashlib.shake_128(f"{thread} {name}".encode()).digest(size)
                else:
                    continue
                stub.packet(f"P{number:x}={value.hex()}")


def plant_memory(seed: str, qmp: RawQmp, gdb_socket: Path) -> None:
    """Write at some places of the largest RAM block."""
    command = {"command-line": "info mtree -f"}
    ranges = re.findall(
        r"([0-9a-f]{16})-([0-9a-f]{16}) \(prio \d+, ram\)",
        qmp.execute("human-monitor-command", **command),
    )
    first, last = max(((int(a, 16), int(b, 16)) for a, b in ranges), key=lambda r: r[1] - r[0])
    with RawGdbstub(gdb_socket) as stub:
        assert stub.packet("Qqemu.PhyMemMode:1") == "OK"
        for address in (first + 65536 - 500, first + 5 * 4096, last + 1 - 1000):
            content = hashlib.shake_128(f"{seed} {address}".encode()).hexdigest(1000)
            assert stub.packet(f"M{address:x},{1000:x}:{content}") == "OK"
        assert stub.packet("Qqemu.PhyMemMode:0") == "OK"
