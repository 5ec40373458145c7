"""32-bit Arm, in both byte orders, also in qemu-system-aarch64.

Sources:
    Linux arch/arm/include/asm/elf.h, ptrace.h (elf_gregset_t: r0 to r15, cpsr, orig_r0), user.h
    (user_vfp); QEMU target/arm/arch_dump.c arm_cpu_write_elf32_note(), cpu_get_dump_info().
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._arm import (
    BIG_ENDIAN,
    BYTE_ORDER_REGISTERS,
    byte_order,
    coprocessor_register,
    numbered_registers,
    runs_aarch64,
)
from qemu_dump_ext.architectures._arm_tables import linux_tables_of_arm, roots_of_arm
from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    MachineRam,
    MigratedCpu,
    NoteLayout,
    Register,
    TargetClues,
    VcpuReadings,
    field_names,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus_layout
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import Field, StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import EM_ARM, NT_ARM_VFP, NT_PRSTATUS

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_GPRS = numbered("r", 16)
_GDB_NAMES = {"r13": "sp", "r14": "lr", "r15": "pc"}
_UPPER_DOUBLES = numbered("d", 16, first=16).split()

_PRSTATUS = prstatus_layout(
    "Arm", "u32", fields_of("u32", f"{_GPRS} cpsr orig_r0"), fpvalid=Field("has_vfp", "u32")
)
_VFP = StructLayout("user_vfp", (*fields_of("u64", numbered("d", 32)), Field("fpscr", "u32")))


def _vfp_of(registers: Mapping[str, int]) -> StructLayout | None:
    return _VFP if registers.get("has_vfp") else None


_LITTLE = Core(
    e_machine=EM_ARM,
    byte_order="little",
    word_size=4,
    notes=(
        NoteLayout("CORE", NT_PRSTATUS, _PRSTATUS, max_align=4),
        NoteLayout("LINUX", NT_ARM_VFP, _VFP, max_align=4, choose=_vfp_of),
    ),
    uname_machine="armv7l",
)
_BIG = replace(_LITTLE, byte_order="big", uname_machine="armv7b")


def _select_core(
    vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
) -> Core:
    return _BIG if vcpus and vcpus[0].registers.get(BIG_ENDIAN) else _LITTLE


def _parse_monitor(text: str) -> Mapping[str, int]:
    pairs = re.findall(r"\bd(\d\d)=([0-9a-f]{16})\b", text)
    values = {f"d{int(index)}": int(value, 16) for index, value in pairs}
    fpscr = re.search(r"^FPSCR: ([0-9a-f]{8})", text, re.MULTILINE)
    return values | ({"fpscr": int(fpscr[1], 16)} if fpscr else {})


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = {**readings.native, **readings.monitor, **readings.gdb, **byte_order(readings)}
    # `info registers` prints FPSCR also where there is no floating-point unit.
    values["has_vfp"] = int("d0" in values)
    if "d15" in values:
        # A unit of 16 registers has no others.
        values = dict.fromkeys(_UPPER_DOUBLES, 0) | values
    return values


def _recognize(clues: TargetClues) -> bool:
    return clues.vcpu_property("aarch64") is None and "X00=" not in clues.register_text


_MIGRATED_SYSTEM_REGISTERS = {
    "sctlr": coprocessor_register(1, 0, wide=False),
    "ttbcr": coprocessor_register(2, 0, 0, 2, wide=False),
    "ttbr0_32": coprocessor_register(2, 0, wide=False),
    "ttbr1_32": coprocessor_register(2, 0, 0, 1, wide=False),
    "ttbr0": coprocessor_register(0, 2, wide=True),
    "ttbr1": coprocessor_register(0, 2, 1, wide=True),
}


def _derive_migrated(section: DeviceFields) -> Mapping[str, int]:
    return numbered_registers(section, _MIGRATED_SYSTEM_REGISTERS)


_MIGRATED = MigratedCpu(
    recognize=lambda section: runs_aarch64(section) is False,
    fields={
        **field_names(_GPRS, "env.regs[{}]"),
        "cpsr": ("cpsr",),
        "fpscr": ("cpu/vfp/fpscr",),
        **{
            f"d{index}": (f"cpu/vfp/env.vfp.zregs[{index // 2}].d[{index % 2}]",)
            for index in range(32)
        },
    },
    derive=_derive_migrated,
)

ARCHITECTURE = Architecture(
    name="arm",
    cpu_type_suffix="-arm-cpu",
    qemu_uname_machine="Unknown",
    gdb_name="arm",
    registers=(
        *(
            Register(name, gdb=_GDB_NAMES.get(name, name), monitor=(f"R{index:02}",))
            for index, name in enumerate(_GPRS.split())
        ),
        Register("cpsr", gdb="cpsr", monitor=("PSR",)),
        *(Register(name, gdb=name) for name in numbered("d", 32).split()),
        Register("fpscr", gdb="fpscr"),
        Register("has_vfp"),
        *BYTE_ORDER_REGISTERS,
        *(Register(name, gdb=name.upper()) for name in ("ttbcr", "ttbr0", "ttbr1")),
        *(Register(f"ttbr{index}_32", gdb=f"TTBR{index}_EL1") for index in range(2)),
    ),
    cores=(_LITTLE, _BIG),
    program_counter="r15",
    page_size=4096,
    phys_base_key=None,
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
    phys_base_is_lowest=True,
    pfn_from_phys_base=True,
    recognize=_recognize,
    page_table_roots=roots_of_arm,
    kernel_page_tables=linux_tables_of_arm,
    migrated=_MIGRATED,
    machines=(MachineRam("virt", ((0x40000000, 0, None),)),),
)
