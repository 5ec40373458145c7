"""What 32-bit and 64-bit RISC-V have in common.

Sources:
    Linux arch/riscv/include/uapi/asm/ptrace.h (user_regs_struct: pc, x1 to x31), asm/elf.h;
    QEMU target/riscv/arch_dump.c, machine.c (migration stream); RISC-V ABI specification (names
    of registers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    MachineRam,
    MigratedCpu,
    Register,
    TargetClues,
    VcpuReadings,
    field_names,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._page_tables import Translation
from qemu_dump_ext.architectures._riscv_tables import roots_by_satp
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import EM_RISCV

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_ABI_NAMES = "ra sp gp tp t0 t1 t2 fp s1 a0 a1 a2 a3 a4 a5 a6 a7 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11"
_ABI_NAMES = f"{_ABI_NAMES} t3 t4 t5 t6"
_GPRS = numbered("x", 31, first=1)
_BIG_ENDIAN = "big_endian"
_MSTATUS_UBE = 1 << 6
_MACHINES = (  # QEMU hw/riscv/virt.c
    MachineRam("virt", ((0x80000000, 0, None),), others={"riscv_virt_board.mrom": 0x1000}),
)
_MXL_WORD_SIZES = {1: 4, 2: 8}


def _select(little: Core, big: Core, vcpus: Sequence[Vcpu]) -> Core:
    return big if vcpus and vcpus[0].registers.get(_BIG_ENDIAN) else little


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read ` pc       0000…` and ` x10/a0   0000…`."""
    values = {
        name.partition("/")[0]: int(value, 16)
        for name, value in re.findall(
            r"(?:^|\s)(pc|mstatus|satp|x\d+/\w+) +([0-9a-f]{8,16})\b", text, re.MULTILINE
        )
    }
    values.pop("x0", None)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = {**readings.native, **readings.monitor, **readings.gdb}
    if "mstatus" in values:
        values[_BIG_ENDIAN] = int(values["mstatus"] & _MSTATUS_UBE != 0)
    elif readings.native_byte_order is not None:
        values[_BIG_ENDIAN] = int(readings.native_byte_order == "big")
    return values


def make_architecture(word_size: int) -> Architecture:
    """Declare RISC-V of one word size."""
    bits = 8 * word_size
    word = f"u{bits}"
    little = Core(
        e_machine=EM_RISCV,
        byte_order="little",
        word_size=word_size,
        notes=(prstatus(f"RISC-V {bits}", word, fields_of(word, f"pc {_GPRS}")),),
        uname_machine=f"riscv{bits}",
    )
    big = replace(little, byte_order="big")
    digits = 2 * word_size

    def select_core(
        vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
    ) -> Core:
        return _select(little, big, vcpus)

    def recognize(clues: TargetClues) -> bool:
        pattern = rf"^ pc +[0-9a-f]{{{digits}}}\s*$"
        return re.search(pattern, clues.register_text, re.MULTILINE) is not None

    def page_table_roots(registers: Mapping[str, int], _native: bool) -> Sequence[Translation]:
        return roots_by_satp(registers, word_size)

    def recognize_migrated(section: DeviceFields) -> bool:
        width = _MXL_WORD_SIZES.get(section.integer("env.misa_mxl") or 0)
        return width == word_size and "env.satp" in section

    migrated = MigratedCpu(
        recognize=recognize_migrated,
        fields={
            **field_names(f"x0 {_GPRS}", "env.gpr[{}]"),
            "pc": ("env.pc",),
            "mstatus": ("env.mstatus",),
            "satp": ("env.satp",),
        },
    )
    return Architecture(
        name=f"riscv{bits}",
        cpu_type_suffix="-riscv-cpu",
        qemu_uname_machine="Unknown",
        gdb_name=f"riscv:rv{bits}",
        registers=(
            Register("pc", gdb="pc"),
            *(
                Register(name, gdb=abi_name)
                for name, abi_name in zip(_GPRS.split(), _ABI_NAMES.split(), strict=True)
            ),
            Register("mstatus", gdb="mstatus"),
            Register("satp", gdb="satp"),
        ),
        cores=(little, big),
        program_counter="pc",
        page_size=4096,
        phys_base_key=None,
        select_core=select_core,
        parse_monitor=_parse_monitor,
        reconcile=_reconcile,
        recognize=recognize,
        page_table_roots=page_table_roots,
        migrated=migrated,
        machines=_MACHINES,
    )
