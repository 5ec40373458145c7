"""AArch64, in both byte orders; also a vCPU that runs 32-bit code.

Sources:
    Linux arch/arm64/include/uapi/asm/ptrace.h (user_pt_regs, user_fpsimd_state,
    user_sve_header and the layout behind it); QEMU target/arm/arch_dump.c
    aarch64_write_elf64_note(), cpu_get_dump_info(); target/arm/helper.c
    aarch64_sync_32_to_64() (which register a 32-bit one is).
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
    numbered_registers,
    runs_aarch64,
    system_register,
)
from qemu_dump_ext.architectures._arm_tables import linux_tables_of_aarch64, roots_of_aarch64
from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    FrameRecord,
    MachineRam,
    MigratedCpu,
    NoteLayout,
    Register,
    TargetClues,
    VcpuReadings,
    field_names,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus, wide_fields
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import Field, StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import EM_AARCH64, NT_ARM_SVE, NT_PRFPREG

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_GPRS = numbered("x", 31)
_VECTORS = numbered("v", 32)
_SVE_VECTORS = numbered("z", 32)
_SVE_PREDICATES = f"{numbered('p', 16)} ffr"
_VQ_SIZE = 16
_MAX_VQ = 16
_SVE_PT_REGS_SVE = 1
_UNBANKED = 8
"""Registers of 32-bit code that are the same in every mode."""

_FPREGSET = StructLayout(
    "user_fpsimd_state",
    (*wide_fields(_VECTORS, 16), *fields_of("u32", "fpsr fpcr"), *fields_of("u32", "pad0 pad1")),
)


def _sve_offsets(vq: int) -> tuple[int, int]:
    """Return where fpsr is, and where the note ends; `vq` is the vector length in 16 bytes."""
    registers_end = 16 + (32 * _VQ_SIZE + 17 * 2) * vq
    fpsr = registers_end + -registers_end % 16
    return fpsr, fpsr + 8 + -(fpsr + 8) % 16


def _sve(vq: int) -> StructLayout:
    fpsr, end = _sve_offsets(vq)
    registers_end = 16 + (32 * _VQ_SIZE + 17 * 2) * vq
    return StructLayout(
        f"user_sve_header and registers of {128 * vq} bits",
        (
            *fields_of("u32", "sve_size sve_max_size"),
            *fields_of("u16", "sve_vl sve_max_vl flags reserved"),
            # Memory images of vectors: little-endian on every kernel.
            *wide_fields(_SVE_VECTORS, _VQ_SIZE * vq, "wide_le"),
            *wide_fields(_SVE_PREDICATES, 2 * vq, "wide_le"),
            Field("pad_registers", "bytes", fpsr - registers_end),
            *fields_of("u32", "fpsr fpcr"),
            Field("pad_end", "bytes", end - fpsr - 8),
        ),
    )


_SVE = tuple(_sve(vq) for vq in range(1, _MAX_VQ + 1))


def _sve_of(registers: Mapping[str, int]) -> StructLayout | None:
    vq = registers.get("sve_vl", 0) // _VQ_SIZE
    return _SVE[vq - 1] if 1 <= vq <= _MAX_VQ else None


_LITTLE = Core(
    e_machine=EM_AARCH64,
    byte_order="little",
    word_size=8,
    notes=(
        prstatus(
            "AArch64", "u64", fields_of("u64", f"{_GPRS} sp pc pstate"), constants={"pr_fpvalid": 1}
        ),
        NoteLayout("CORE", NT_PRFPREG, _FPREGSET, max_align=8),
        NoteLayout(
            "LINUX",
            NT_ARM_SVE,
            _SVE[0],
            max_align=4,
            constants={"flags": _SVE_PT_REGS_SVE},
            alternatives=_SVE[1:],
            choose=_sve_of,
        ),
    ),
    uname_machine="aarch64",
)
_BIG = replace(_LITTLE, byte_order="big", uname_machine="aarch64_be")


def _select_core(
    vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
) -> Core:
    return _BIG if vcpus and vcpus[0].registers.get(BIG_ENDIAN) else _LITTLE


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read what is printed while the vCPU runs 32-bit code: `R00=` to `R15=`, `PSR=`."""
    psr = re.search(r"^PSR=([0-9a-f]{8})", text, re.MULTILINE)
    if psr is None:
        return {}
    registers = dict(re.findall(r"\bR(\d\d)=([0-9a-f]{8})\b", text))
    values = {
        f"x{index}": int(registers[f"{index:02}"], 16)
        for index in range(_UNBANKED)
        if f"{index:02}" in registers
    }
    if "15" in registers:
        values["pc"] = int(registers["15"], 16)
    return values | {"pstate": int(psr[1], 16), "runs_32_bit_code": 1}


def _vq(values: Mapping[str, int], most: int) -> int:
    """Return the vector length in 16 bytes: each exception level may have set a shorter one."""
    level = values.get("pstate", 0) >> 2 & 3
    names = ("zcr_el1", "zcr_el2", "zcr_el3")
    limits = [values[name] & 0xF for name in names[max(level, 1) - 1 :] if name in values]
    return min((*limits, most - 1)) + 1


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    native, stub = readings.native, readings.gdb
    values = {**native, **readings.monitor, **stub, **byte_order(readings)}
    if readings.monitor.get("runs_32_bit_code"):
        # The stub shows 64-bit registers as they were before; QEMU's notes have the banked ones.
        for name in f"{_GPRS} sp pc pstate".split():
            values.pop(name, None)
            for source in (readings.monitor, native):
                if name in source:
                    values[name] = source[name]
    if "z0" in stub:
        # The low halves; with them the stub has no registers of the smaller kind.
        for vector, sve in zip(_VECTORS.split(), _SVE_VECTORS.split(), strict=True):
            if sve in stub:
                values[vector] = stub[sve] & (1 << 128) - 1
    if "vg" in stub:
        values["sve_vl"] = 8 * stub["vg"]
    if readings.qom.get("sve_max_vq"):
        values["sve_max_vl"] = _VQ_SIZE * readings.qom["sve_max_vq"]
        if "zcr_el1" in values:
            values["sve_vl"] = _VQ_SIZE * _vq(values, readings.qom["sve_max_vq"])
    for length, size in (("sve_vl", "sve_size"), ("sve_max_vl", "sve_max_size")):
        if values.get(length):
            values[size] = _sve_offsets(values[length] // _VQ_SIZE)[1]
    return values


def _recognize(clues: TargetClues) -> bool:
    return clues.vcpu_property("aarch64") is not None or "X00=" in clues.register_text


_FPSR_BITS, _FPCR_BITS = 0xF800009F, 0x07FF9F00
_MIGRATED_SYSTEM_REGISTERS = {
    "sctlr_el1": system_register(3, 0, 1, 0, 0),
    "ttbr0_el1": system_register(3, 0, 2, 0, 0),
    "ttbr1_el1": system_register(3, 0, 2, 0, 1),
    "tcr_el1": system_register(3, 0, 2, 0, 2),
    "zcr_el1": system_register(3, 0, 1, 2, 0),
    "zcr_el2": system_register(3, 4, 1, 2, 0),
    "zcr_el3": system_register(3, 6, 1, 2, 0),
}


def _derive_migrated(section: DeviceFields) -> Mapping[str, int]:
    values = numbered_registers(section, _MIGRATED_SYSTEM_REGISTERS)
    for index, name in enumerate(_VECTORS.split()):
        halves = section.integers(f"cpu/vfp/env.vfp.zregs[{index}].d")
        if len(halves) == 2:
            values[name] = halves[1] << 64 | halves[0]
    both = section.integer("cpu/vfp/fpscr")
    if both is not None:
        values |= {"fpsr": both & _FPSR_BITS, "fpcr": both & _FPCR_BITS}
    values |= _sve_registers(section)
    return values


def _sve_registers(section: DeviceFields) -> Mapping[str, int]:
    values = {}
    for index, name in enumerate(_SVE_VECTORS.split()):
        low = section.integers(f"cpu/vfp/env.vfp.zregs[{index}].d")
        high = section.integers(f"cpu/sve/env.vfp.zregs[{index}].d")
        if low and high:
            values[name] = _wide([*low, *high])
    for index, name in enumerate(_SVE_PREDICATES.split()):
        if words := section.integers(f"cpu/sve/env.vfp.pregs[{index}].p"):
            values[name] = _wide(words)
    return values


def _wide(words: Sequence[int]) -> int:
    return sum(word << 64 * index for index, word in enumerate(words))


_MIGRATED = MigratedCpu(
    recognize=lambda section: runs_aarch64(section) is True,
    fields={
        **field_names(f"{_GPRS} sp", "env.xregs[{}]"),
        "pc": ("env.pc",),
        "pstate": ("cpsr",),
    },
    derive=_derive_migrated,
    needed_for={"cpu/sve/": "sve_vl"},
)

ARCHITECTURE = Architecture(
    name="aarch64",
    cpu_type_suffix="-arm-cpu",
    qemu_uname_machine="Unknown",
    gdb_name="aarch64",
    registers=(
        *(
            Register(name, gdb=name, monitor=(f"X{index:02}",))
            for index, name in enumerate(_GPRS.split())
        ),
        Register("sp", gdb="sp", monitor=("SP",)),
        Register("pc", gdb="pc", monitor=("PC",)),
        Register("pstate", gdb="cpsr", monitor=("PSTATE",)),
        *(Register(name, gdb=name) for name in f"{_VECTORS} fpsr fpcr".split()),
        *(Register(name, gdb=name) for name in f"{_SVE_VECTORS} {_SVE_PREDICATES} vg".split()),
        *(Register(name) for name in ("sve_vl", "sve_max_vl", "sve_size", "sve_max_size")),
        Register("sve_max_vq", qom="sve-max-vq"),
        *BYTE_ORDER_REGISTERS,
        *(Register(name, gdb=name.upper()) for name in ("tcr_el1", "ttbr0_el1", "ttbr1_el1")),
    ),
    cores=(_LITTLE, _BIG),
    program_counter="pc",
    page_size=65536,
    phys_base_key="NUMBER(PHYS_OFFSET)",
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
    phys_base_is_lowest=True,
    recognize=_recognize,
    page_table_roots=roots_of_aarch64,
    kernel_page_tables=linux_tables_of_aarch64,
    frame_record=FrameRecord("x29", 0, 8, r"el1h?_\w+"),
    migrated=_MIGRATED,
    machines=(MachineRam("virt", ((0x40000000, 0, None),)),),
)
