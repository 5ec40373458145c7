"""IBM Z.

Sources:
    Linux arch/s390/include/uapi/asm/ptrace.h (s390_regs, s390_fp_regs), asm/elf.h,
    arch/s390/kernel/ptrace.c (regsets behind the notes); QEMU target/s390x/arch_dump.c.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    NoteLayout,
    Register,
    VcpuReadings,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus, wide_fields
from qemu_dump_ext.c_struct import Field, StructLayout, fields_of
from qemu_dump_ext.dialect import Dialect
from qemu_dump_ext.elf_structs import (
    EM_S390,
    NT_PRFPREG,
    NT_S390_CTRS,
    NT_S390_GS_CB,
    NT_S390_PREFIX,
    NT_S390_TIMER,
    NT_S390_TODCMP,
    NT_S390_TODPREG,
    NT_S390_VXRS_HIGH,
    NT_S390_VXRS_LOW,
)
from qemu_dump_ext.guest import RamBlock, Vcpu

_GPRS = numbered("r", 16)
_ACCESS = numbered("acr", 16)
_FPRS = numbered("f", 16)
_CONTROL = numbered("cr", 16)
_VECTOR_LOW = " ".join(f"v{index}l" for index in range(16))
_VECTOR_HIGH = numbered("v", 16, first=16)
_GUARDED_STORAGE = "gs_reserved gsd gssm gsepla"
_CONDITION_CODE_SHIFT = 44
_LOW_64 = (1 << 64) - 1


def _linux(note_type: int, name: str, *fields: Field) -> NoteLayout:
    return NoteLayout("LINUX", note_type, StructLayout(name, fields), max_align=8)


_LINUX_NOTES = (
    _linux(NT_S390_PREFIX, "prefix", Field("prefix", "u32")),
    _linux(NT_S390_CTRS, "control registers", *fields_of("u64", _CONTROL)),
    _linux(NT_S390_TIMER, "CPU timer", Field("cpu_timer", "u64")),
    _linux(NT_S390_TODCMP, "clock comparator", Field("clock_comparator", "u64")),
    _linux(NT_S390_TODPREG, "TOD programmable register", Field("tod_register", "u32")),
    _linux(NT_S390_VXRS_LOW, "vector registers, low", *fields_of("u64", _VECTOR_LOW)),
    _linux(NT_S390_VXRS_HIGH, "vector registers, high", *wide_fields(_VECTOR_HIGH, 16)),
    _linux(NT_S390_GS_CB, "guarded storage", *fields_of("u64", _GUARDED_STORAGE)),
)


def _core(psw_mask: str, pid: Field) -> Core:
    return Core(
        e_machine=EM_S390,
        byte_order="big",
        word_size=8,
        notes=(
            prstatus(
                "s390x",
                "u64",
                (
                    *fields_of("u64", f"{psw_mask} psw_addr {_GPRS}"),
                    *fields_of("u32", _ACCESS),
                    Field("orig_gpr2", "u64"),
                ),
                pid=pid,
            ),
            NoteLayout(
                "CORE",
                NT_PRFPREG,
                StructLayout(
                    "s390_fp_regs", (*fields_of("u32", "fpc pad"), *fields_of("u64", _FPRS))
                ),
                max_align=8,
            ),
            *_LINUX_NOTES,
        ),
        uname_machine="s390x",
    )


_PID = Field("pr_pid", "u32")
_HOST_ORDER_PID = Field("pr_pid", "wide_le", 4)
_MENDED = _core("psw_mask", _PID)
_BY_QEMU = _core("psw_mask_as_stored", _PID)
_BY_QEMU_BEFORE_9_1 = _core("psw_mask_as_stored", _HOST_ORDER_PID)


def _select_core(
    _vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], dialect: Dialect, _machine: str
) -> Core:
    if not dialect.qemu_note_layouts:
        return _MENDED
    return _BY_QEMU_BEFORE_9_1 if dialect.pid_unconverted else _BY_QEMU


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read the PSW (`PSW=mask … addr … cc …`) and the vector registers `V00=` or `F00=`."""
    values: dict[str, int] = {}
    psw = re.search(
        r"^PSW=mask ([0-9a-f]+) addr ([0-9a-f]+)(?: cc 0?([0-3])\b)?", text, re.MULTILINE
    )
    if psw:
        values["psw_addr"] = int(psw[2], 16)
        if psw[3]:
            code = 3 << _CONDITION_CODE_SHIFT
            values["psw_mask"] = int(psw[1], 16) & ~code | int(psw[3]) << _CONDITION_CODE_SHIFT
    for number, digits in re.findall(r"\bV(\d\d)=([0-9a-f]{32})\b", text):
        index, value = int(number), int(digits, 16)
        if index < 16:
            values |= {f"f{index}": value >> 64, f"v{index}l": value & _LOW_64}
        else:
            values[f"v{index}"] = value
    for number, digits in re.findall(r"\bF(\d\d)=([0-9a-f]{16})\b", text):
        values[f"f{int(number)}"] = int(digits, 16)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = {**readings.native, **readings.monitor, **readings.gdb}
    # The translator keeps the condition code elsewhere; QEMU's own notes have what is stored.
    for name in ("psw_mask_as_stored", "psw_mask"):
        if name in readings.native:
            values["psw_mask_as_stored"] = readings.native[name]
            values.setdefault("psw_mask", readings.native[name])
            return values
    if "psw_mask" in values:
        values["psw_mask_as_stored"] = values["psw_mask"]
    return values


_SAME_IN_STUB = f"{_ACCESS} fpc {_FPRS} {_VECTOR_LOW} {_VECTOR_HIGH} {_GUARDED_STORAGE} prefix"

ARCHITECTURE = Architecture(
    name="s390x",
    cpu_type_suffix="-s390x-cpu",
    qemu_uname_machine="S390X",
    registers=(
        *(
            Register(f"{ours}{index}", gdb=f"{ours}{index}", monitor=(f"{theirs}{index:02}",))
            for ours, theirs in (("r", "R"), ("cr", "C"))
            for index in range(16)
        ),
        *(Register(name, gdb=name) for name in _SAME_IN_STUB.split()),
        Register("psw_mask", gdb="pswm"),
        Register("psw_mask_as_stored"),
        Register("psw_addr", gdb="pswa"),
        Register("cpu_timer", gdb="cputm"),
        Register("clock_comparator", gdb="ckc"),
        Register("tod_register"),
    ),
    cores=(_MENDED, _BY_QEMU, _BY_QEMU_BEFORE_9_1),
    program_counter="psw_addr",
    page_size=4096,
    phys_base_key=None,
    kernel_map_base=None,
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
)
