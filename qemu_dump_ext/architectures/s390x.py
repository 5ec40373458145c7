"""IBM Z.

Sources:
    Linux arch/s390/include/uapi/asm/ptrace.h (s390_regs, s390_fp_regs), asm/elf.h,
    arch/s390/kernel/ptrace.c (regsets behind the notes); QEMU target/s390x/arch_dump.c,
    machine.c (migration stream);
    z/Architecture Principles of Operation, "Dynamic Address Translation", "Prefixing"; Linux
    arch/s390/include/asm/page.h (__pa), arch/s390/kernel/machine_kexec.c (VMCOREINFO).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    MachineRam,
    MigratedCpu,
    NoteLayout,
    Register,
    VcpuReadings,
    field_names,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus, wide_fields
from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
)
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import U64_MAX, Field, StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import (
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
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_GPRS = numbered("r", 16)
_ACCESS = numbered("acr", 16)
_FPRS = numbered("f", 16)
_CONTROL = numbered("cr", 16)
_VECTOR_LOW = " ".join(f"v{index}l" for index in range(16))
_VECTOR_HIGH = numbered("v", 16, first=16)
_GUARDED_STORAGE = "gs_reserved gsd gssm gsepla"
_CONDITION_CODE_SHIFT = 44


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


def _core(psw_mask: str, pid: Field, *, of_others: bool) -> Core:
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
        of_others=of_others,
    )


_PID = Field("pr_pid", "u32")
_HOST_ORDER_PID = Field("pr_pid", "wide_le", 4)
_MENDED = _core("psw_mask", _PID, of_others=False)
_BY_QEMU = _core("psw_mask_as_stored", _PID, of_others=True)
_BY_QEMU_BEFORE_9_1 = _core("psw_mask_as_stored", _HOST_ORDER_PID, of_others=True)


_PSW_DAT = 1 << 58
_ASCE_REAL_SPACE = 1 << 5
_ORIGIN = (1 << 64) - (1 << 12)
_PAGE_TABLE_ORIGIN = (1 << 64) - (1 << 11)
_LARGE = LeafTest(mask=1 << 10, wanted=1 << 10)
_PREFIX_SIZE = 1 << 13
_INVALID, _TABLE_TYPE = 1 << 5, 3 << 2
_SEGMENT, _REGION_3, _REGION_2, _REGION_1 = range(4)
_SHIFTS = {_SEGMENT: 20, _REGION_3: 31, _REGION_2: 42, _REGION_1: 53}
_PAGE_TABLE = TableLevel(
    12, 256, ALWAYS_LEAF, 0, ((_ORIGIN, 0),), present=LeafTest(mask=3 << 10, wanted=0)
)


@cache
def page_tables(top: int, quarters: int) -> PageTableGeometry:
    """Return the tables from that of the type `top` on.

    Inner tables count as complete, as they are in Linux.

    Args:
        top: The designation type of the address space.
        quarters: The length of the table there, in fourths of 2048 entries.
    """
    levels = [
        TableLevel(
            _SHIFTS[kind],
            512 * quarters if kind == top else 2048,
            leaf=_LARGE if kind <= _REGION_3 else None,
            table_mask=_ORIGIN if kind else _PAGE_TABLE_ORIGIN,
            leaf_masks=((_ORIGIN & -1 << _SHIFTS[kind], 0),),
            # An entry says of which type of table it is.
            present=LeafTest(_INVALID | _TABLE_TYPE, kind << 2),
        )
        for kind in range(top, -1, -1)
    ]
    return PageTableGeometry(
        f"s390x, {len(levels) + 1} levels",
        entry_size=8,
        levels=(*levels, _PAGE_TABLE),
        present=LeafTest(0, 0),
        above=0,
        byte_order="big",
    )


def _page_table_roots(registers: Mapping[str, int], _native: bool) -> Sequence[PageTableRoot]:
    """Return the home space, which is the kernel's, and the primary one."""
    if not registers["psw_mask"] & _PSW_DAT:
        return ()
    roots = []
    prefix = registers["prefix"]
    for control in dict.fromkeys((registers["cr13"], registers["cr1"])):
        if not control & _ASCE_REAL_SPACE:
            tables = page_tables(control >> 2 & 3, (control & 3) + 1)
            exchanged = (prefix, _PREFIX_SIZE) if prefix else None
            roots.append(PageTableRoot(tables, control & _ORIGIN, exchanged=exchanged))
    return roots


def _linux_tables(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[PageTableRoot]:
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    if table is None:
        return ()
    if vmcoreinfo_number(vmcoreinfo, "IDENTITYBASE", 16) is not None:
        # Since Linux 6.10 the kernel's image is apart from what it maps one to one.
        start = vmcoreinfo_number(vmcoreinfo, "KERNELOFFSET", 16)
        behind = vmcoreinfo_number(vmcoreinfo, "KERNELOFFPHYS", 16)
        if start is None or behind is None:
            return ()
        table = table - start + behind
    # Entries say of which type they are: in a table taken for another, nothing is found.
    return tuple(PageTableRoot(page_tables(top, 4), table) for top in (_REGION_3, _REGION_2))


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
            values |= {f"f{index}": value >> 64, f"v{index}l": value & U64_MAX}
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


def _guessed(readings: VcpuReadings) -> Collection[str]:
    return () if readings.native else ("psw_mask_as_stored",)


def _derive_migrated(section: DeviceFields) -> Mapping[str, int]:
    values = {}
    for index in range(16, 32):
        halves = [section.integer(f"cpu/vregs/env.vregs[{index}][{half}]") for half in (0, 1)]
        if halves[0] is not None and halves[1] is not None:
            values[f"v{index}"] = halves[0] << 64 | halves[1]
    return values


_MIGRATED = MigratedCpu(
    recognize=lambda section: "env.psw.addr" in section,
    fields={
        **field_names(_GPRS, "env.regs[{}]"),
        **field_names(_ACCESS, "env.aregs[{}]"),
        **field_names(_CONTROL, "env.cregs[{}]"),
        **field_names(_FPRS, "cpu/fpu/env.vregs[{}][0]"),
        **field_names(_VECTOR_LOW, "cpu/vregs/env.vregs[{}][1]"),
        **field_names(_GUARDED_STORAGE, "cpu/gscb/env.gscb[{}]"),
        "fpc": ("cpu/fpu/env.fpc",),
        "psw_mask": ("env.psw.mask",),
        "psw_addr": ("env.psw.addr",),
        "prefix": ("env.psa",),
        "cpu_timer": ("env.cputm",),
        "clock_comparator": ("env.ckc",),
        "tod_register": ("env.todpr",),
    },
    derive=_derive_migrated,
    absent_is_zero=frozenset(f"{_VECTOR_LOW} {_VECTOR_HIGH} {_GUARDED_STORAGE}".split()),
)

_SAME_IN_STUB = f"{_ACCESS} fpc {_FPRS} {_VECTOR_LOW} {_VECTOR_HIGH} {_GUARDED_STORAGE} prefix"

ARCHITECTURE = Architecture(
    name="s390x",
    cpu_type_suffix="-s390x-cpu",
    qemu_uname_machine="S390X",
    gdb_name="s390:64-bit",
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
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
    guessed_by_reconcile=_guessed,
    page_table_roots=_page_table_roots,
    kernel_page_tables=_linux_tables,
    migrated=_MIGRATED,
    machines=(MachineRam("s390-ccw-virtio", ((0, 0, None),)),),
)
