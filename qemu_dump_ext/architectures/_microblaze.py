"""What MicroBlaze of both byte orders have in common.

Sources:
    Linux arch/microblaze/include/uapi/asm/ptrace.h (struct pt_regs is pr_reg); QEMU
    target/microblaze/gdbstub.c, gdb-xml/microblaze-core.xml (names), target/microblaze/translate.c
    mb_cpu_dump_state().
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    Register,
    TargetClues,
    VcpuReadings,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._undumped import (
    g_packet,
    make_architecture,
    recognize_by_byte_order,
)
from qemu_dump_ext.structures.c_struct import ByteOrder, fields_of
from qemu_dump_ext.structures.elf import EM_MICROBLAZE

_GPRS = numbered("r", 32)
_CONTROL = "pc msr ear esr fsr"
_G_BEGIN = g_packet((4, f"{_GPRS} {_CONTROL}"))
_G_PACKET = g_packet((4, f"{_GPRS} rpc rmsr rear resr rfsr {numbered('other', 22)}"))
_MSR_UM = 1 << 11


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `r04=…`, `pc=0x…`."""
    values = {
        f"r{int(index)}": int(value, 16)
        for index, value in re.findall(r"\br(\d\d)=([0-9a-f]{8})\b", text)
    }
    for name, value in re.findall(r"\b([a-z]+)=0x([0-9a-f]+)\b", text):
        if name in _CONTROL.split():
            values[name] = int(value, 16)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    # The stub of QEMU 11 is big-endian for both byte orders.
    values = {**readings.gdb, **readings.monitor}
    if "msr" in values:
        values["pt_mode"] = int(not values["msr"] & _MSR_UM)  # 1 in the kernel
    return values


def _recognize_by(name: str, byte_order: ByteOrder) -> Callable[[TargetClues], bool]:
    by_target = recognize_by_byte_order(name, byte_order, _G_BEGIN, _parse_monitor)

    def recognize(clues: TargetClues) -> bool:
        little = clues.vcpu_property("little-endian")  # one target for both byte orders
        if little is None:
            return by_target(clues)
        return (little == "true") == (byte_order == "little")

    return recognize


def make_microblaze(name: str, byte_order: ByteOrder) -> Architecture:
    """Declare MicroBlaze of one byte order."""
    return make_architecture(
        name,
        Core(
            e_machine=EM_MICROBLAZE,
            byte_order=byte_order,
            word_size=4,
            notes=(prstatus("MicroBlaze", "u32", fields_of("u32", f"{_GPRS} {_CONTROL} pt_mode")),),
            uname_machine="microblaze",
            u64_align=4,
        ),
        (
            *(Register(register, gdb=register) for register in _GPRS.split()),
            *(Register(register, gdb=f"r{register}") for register in _CONTROL.split()),
            Register("pt_mode"),
        ),
        "pc",
        cpu_type_suffix="microblaze-cpu",
        g_packet=_G_PACKET,
        parse_monitor=_parse_monitor,
        reconcile=_reconcile,
        recognize=_recognize_by(name, byte_order),
        # Most have no MicroBlaze: any architecture with enough registers of 32 bits can connect.
        gdb_settings=("set architecture sh4", f"set endian {byte_order}"),
    )
