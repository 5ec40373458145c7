"""x86-64, in every mode: long mode, and a guest still in real or 32-bit mode.

Sources:
    Linux arch/x86/include/asm/elf.h, user_64.h, user_32.h (elf_prstatus, user_fxsr_struct); QEMU
    target/i386/arch_dump.c (order and contents of the notes, struct QEMUCPUState);
    target/i386/cpu-dump.c (text of `info registers`), machine.c (migration stream). Page tables:
    Intel SDM volume 3A, chapter "Paging"; what QEMU makes of them:
    target/i386/arch_memory_mapping.c.
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
from qemu_dump_ext.architectures._linux_notes import prstatus
from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    ones_above,
)
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import U32_MAX, U64_MAX, Field, StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import (
    EM_386,
    EM_X86_64,
    NT_PRFPREG,
    NT_PRXFPREG,
    NT_QEMU,
)
from qemu_dump_ext.structures.fxsave import FXSAVE_SIZE
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_LEGACY_GPRS = "rax rbx rcx rdx rsi rdi rsp rbp"
_LONG_GPRS = "r8 r9 r10 r11 r12 r13 r14 r15"
_DEBUG_REGISTERS = "dr0 dr1 dr2 dr3 dr6 dr7"
_FLOATING_POINT_STATE = "fcw fsw ftw mxcsr"
_XMM_COUNT = 16
_SEGMENTS = "cs ds es fs gs ss"
_DESCRIPTORS = f"{_SEGMENTS} ldt tr gdt idt"
_SEGMENT_BASE_GDB = {"fs": "fs_base", "gs": "gs_base"}

_EFER_LMA = 1 << 10
_CR0_PE = 1 << 0
_CR0_PG = 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
_A20 = 1 << 20
_EFLAGS_VM = 1 << 17
_SEGMENT_L = 1 << 21
_PRINTED_FLAGS = 0x00FFFF00
_CUT_BASES = (*(f"{segment}_base" for segment in _SEGMENTS.split()), "kernel_gs_base")
_4G = 1 << 32
_KERNEL_HALF = 1 << 63
_KERNEL_MAP_BASE = 0xFFFFFFFF80000000
"""__START_KERNEL_map: where the kernel image is linked, and mapped but for KASLR."""

_PRSTATUS_64 = prstatus(
    "x86-64",
    "u64",
    (
        *fields_of("u64", "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi"),
        *fields_of("u64", "orig_rax rip cs_selector eflags rsp ss_selector fs_base gs_base"),
        *fields_of("u64", "ds_selector es_selector fs_selector gs_selector"),
    ),
)
_PRSTATUS_32 = prstatus(
    "i386",
    "u32",
    (
        *fields_of("u32", "rbx rcx rdx rsi rdi rbp rax"),
        *(
            half
            for segment in ("ds", "es", "fs", "gs")
            for half in fields_of("u16", f"{segment}_selector pad_{segment}")
        ),
        *fields_of("u32", "orig_rax rip"),
        *fields_of("u16", "cs_selector pad_cs"),
        *fields_of("u32", "eflags rsp"),
        *fields_of("u16", "ss_selector pad_ss"),
    ),
)
_QEMU_STATE = StructLayout(
    "QEMUCPUState",
    (
        *fields_of("u32", "version size"),
        *fields_of("u64", f"{_LEGACY_GPRS} {_LONG_GPRS} rip eflags"),
        *(
            member
            for name in _DESCRIPTORS.split()
            for member in (
                *fields_of("u32", f"{name}_selector {name}_limit {name}_flags pad_{name}"),
                Field(f"{name}_base", "u64"),
            )
        ),
        *fields_of("u64", "cr0 cr1 cr2 cr3 cr4 kernel_gs_base"),
    ),
)
_QEMU_NOTE = NoteLayout(
    "QEMU",
    NT_QEMU,
    _QEMU_STATE,
    max_align=8,
    constants={"version": 1, "size": 440},
    after_all_vcpus=True,
    alternatives=(StructLayout("QEMUCPUState", _QEMU_STATE.fields[:-1]),),
)


def _floating_point(owner: str, note_type: int) -> NoteLayout:
    # Neither monitor nor stub has all of what FXSAVE stores, and QEMU has no such note.
    area = StructLayout("fxsave", (Field("fxsave", "wide_le", FXSAVE_SIZE),))
    return NoteLayout(
        owner, note_type, area, 8, choose=lambda registers: area if "fxsave" in registers else None
    )


_LEGACY_NOTES = (_PRSTATUS_32, _floating_point("LINUX", NT_PRXFPREG), _QEMU_NOTE)

LONG_MODE = Core(
    e_machine=EM_X86_64,
    byte_order="little",
    word_size=8,
    notes=(_PRSTATUS_64, _floating_point("CORE", NT_PRFPREG), _QEMU_NOTE),
    uname_machine="x86_64",
)
LEGACY_32 = Core(
    e_machine=EM_386,
    byte_order="little",
    word_size=4,
    notes=_LEGACY_NOTES,
    uname_machine="i686",
    u64_align=4,
)
LEGACY_64 = Core(
    e_machine=EM_386,
    byte_order="little",
    word_size=8,
    notes=_LEGACY_NOTES,
    uname_machine="i686",
    u64_align=4,
)


def _select_core(
    vcpus: Sequence[Vcpu], blocks: Sequence[RamBlock], dialect: Dialect, _machine: str
) -> Core:
    deciding = vcpus[:1] if dialect.first_vcpu_decides else vcpus
    if any(vcpu.registers.get("efer", 0) & _EFER_LMA for vcpu in deciding):
        return LONG_MODE
    # A PC has its BIOS at the end of the first 4 GiB, so this is the rule there.
    return LEGACY_64 if any(block.end > _4G - 1 for block in blocks) else LEGACY_32


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read the lines of descriptors: `CS =0010 <base> <limit> <flags> …`, `GDT= <base> <limit>`."""
    values: dict[str, int] = {}
    for name, numbers in re.findall(
        r"^(ES|CS|SS|DS|FS|GS|LDT|TR|GDT|IDT) *= *((?:[0-9a-f]+ ?)+)", text, re.MULTILINE
    ):
        prefix = name.lower()
        words = [int(number, 16) for number in numbers.split()]
        if len(words) == 2:  # a table has neither selector nor attributes
            words = [0, *words, 0]
        if len(words) == 4:
            parts = (f"{prefix}_selector", f"{prefix}_base", f"{prefix}_limit", f"{prefix}_flags")
            values |= dict(zip(parts, words, strict=True))
    return values | _parse_floating_point(text)


def _parse_floating_point(text: str) -> dict[str, int]:
    """Read `FPR0=<mantissa> <exponent>`, `XMM00=<high> <low>`, or `YMM00=` with two more before."""
    values = {
        f"fpr{number}": int(exponent + mantissa, 16)
        for number, mantissa, exponent in re.findall(
            r"\bFPR([0-7])=([0-9a-f]{16}) ([0-9a-f]{4})\b", text
        )
    }
    for number, words in re.findall(r"\b[XYZ]MM(\d\d)=((?:[0-9a-f]{16} ?){2,8})", text):
        if int(number) < _XMM_COUNT:
            values[f"xmm{int(number)}"] = int("".join(words.split()[-2:]), 16)
    return values


def _hidden_flags(segment: str, values: Mapping[str, int]) -> int | None:
    """Guess bits 0-7 and 24-31 of a descriptor's high word, which `info registers` masks.

    QEMU's translator keeps the descriptor as it was loaded, so they are bits 16-23 and 24-31 of
    its base; a segment of real mode, and a base that came from an MSR, have none.
    """
    base, selector = values.get(f"{segment}_base"), values.get(f"{segment}_selector")
    if base is None or selector is None:
        return None
    system = segment in {"ldt", "tr"}
    real_mode = not values.get("cr0", 0) & _CR0_PE or values.get("eflags", 0) & _EFLAGS_VM
    if (real_mode and not system) or not selector & ~3:
        return 0
    if not system and (base >= _4G or base == selector << 4):
        return 0
    return base & 0xFF000000 | base >> 16 & 0xFF


def reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    """Merge what the sources say; each cuts something else."""
    native = readings.native
    values = {**native, **readings.monitor, **readings.gdb}
    code_is_64_bit = values.get("cs_flags", 0) & _SEGMENT_L
    if values.get("efer", 0) & _EFER_LMA and not code_is_64_bit:
        # In 32-bit code the stub and the monitor cut everything to 32 bits; only QEMU's own
        # notes have the rest.
        for name in (*_LEGACY_GPRS.split(), *_LONG_GPRS.split(), "rip", *_CUT_BASES):
            if name in native:
                values[name] = native[name]
            else:
                values.pop(name, None)
    if values.get("cr2") == native.get("cr2", 0) & U32_MAX:
        # Outside long mode the monitor prints 32 bits of it.
        values["cr2"] = native.get("cr2", values["cr2"])
    for segment in f"{_SEGMENTS} ldt tr".split():
        flags = f"{segment}_flags"
        if flags not in values:
            continue
        printed = values[flags] & _PRINTED_FLAGS
        if flags in native and native[flags] & _PRINTED_FLAGS == printed:
            values[flags] = native[flags]
        elif not readings.hardware_segments:
            values[flags] = printed | (_hidden_flags(segment, values) or 0)
    return values


def guessed_flags(readings: VcpuReadings) -> Collection[str]:
    """Name the attributes of segments whose hidden bits are those that most segments have."""
    if readings.hardware_segments:
        return ()  # which has no hidden bits
    names = (f"{segment}_flags" for segment in f"{_SEGMENTS} ldt tr".split())
    return [name for name in names if name in readings.monitor and name not in readings.native]


def _per_cpu_base(registers: Mapping[str, int]) -> int | None:
    # In user mode, the kernel's base waits in the other register.
    bases = (registers.get(name, 0) for name in ("gs_base", "kernel_gs_base"))
    return next((base for base in bases if base & _KERNEL_HALF), None)


_PRESENT = LeafTest(mask=1, wanted=1)
_PAGE_SIZE_BIT = LeafTest(mask=1 << 7, wanted=1 << 7)
_ADDRESS = 0x000FFFFFFFFFF000
"""Bits 51:12 of an entry; above are flags, protection keys and bits for software."""


def _long_levels(count: int, *, native: bool) -> tuple[TableLevel, ...]:
    """Return the tables of entries of 8 bytes, `count` levels of them."""
    # QEMU lets bits 62:52 of a leaf into the address.
    leaf_bits = (1 << 63) - 1 if native else _ADDRESS

    def level(shift: int, leaf: LeafTest | None) -> TableLevel:
        return TableLevel(shift, 512, leaf, _ADDRESS, ((leaf_bits & -1 << shift, 0),))

    return (
        *(level(shift, None) for shift in (48, 39)[5 - count :]),
        level(30, _PAGE_SIZE_BIT),
        level(21, _PAGE_SIZE_BIT),
        level(12, ALWAYS_LEAF),
    )


@cache
def _long_mode_tables(count: int, *, native: bool) -> PageTableGeometry:
    # QEMU takes every address for one of the kernel's half.
    return PageTableGeometry(
        f"x86-64, {count} levels",
        entry_size=8,
        levels=_long_levels(count, native=native),
        present=_PRESENT,
        above=ones_above(12 + 9 * count) if native else "sign",
    )


@cache
def pae_tables(*, native: bool) -> PageTableGeometry:
    """Return the tables of 32-bit mode with entries of 8 bytes."""
    next_table = U64_MAX & ~0xFFF if native else _ADDRESS
    directory_pointers = TableLevel(30, 4, None, next_table, ())
    return PageTableGeometry(
        "x86, PAE",
        entry_size=8,
        levels=(directory_pointers, *_long_levels(4, native=native)[2:]),
        present=_PRESENT,
        above=0,
    )


@cache
def legacy_tables(*, large_pages: bool) -> PageTableGeometry:
    """Return the tables of 32-bit mode with entries of 4 bytes."""
    # Of a 4 MiB page, bits 39:32 of the address are bits 20:13 of the entry (PSE-36).
    directory = TableLevel(
        22,
        1024,
        _PAGE_SIZE_BIT if large_pages else None,
        0xFFFFF000,
        ((0xFFC00000, 0), (0x001FE000, 19)),
    )
    table = TableLevel(12, 1024, ALWAYS_LEAF, 0, ((0xFFFFF000, 0),))
    return PageTableGeometry(
        "x86, 32-bit", entry_size=4, levels=(directory, table), present=_PRESENT, above=0
    )


def _page_table_roots(registers: Mapping[str, int], native: bool) -> Sequence[PageTableRoot]:
    if not registers["cr0"] & _CR0_PG:
        return ()
    cr3, cr4 = registers["cr3"], registers["cr4"]
    # In system management mode the line A20 is not masked.
    masked = not registers.get("a20", 1) and not registers.get("smm", 0)
    address_mask = U64_MAX & ~_A20 if masked else U64_MAX
    if not cr4 & _CR4_PAE:
        tables = legacy_tables(large_pages=bool(cr4 & _CR4_PSE))
        return (PageTableRoot(tables, cr3 & ~0xFFF, address_mask),)
    if not registers["efer"] & _EFER_LMA:
        return (PageTableRoot(pae_tables(native=native), cr3 & ~0x1F, address_mask),)
    tables = _long_mode_tables(5 if cr4 & _CR4_LA57 else 4, native=native)
    return (PageTableRoot(tables, cr3 & _ADDRESS, address_mask),)


def _kernel_page_tables(vmcoreinfo: bytes, phys_base: int | None) -> Sequence[PageTableRoot]:
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    if table is None or phys_base is None:
        return ()
    five = vmcoreinfo_number(vmcoreinfo, "NUMBER(pgtable_l5_enabled)") == 1
    gpa = (table - _KERNEL_MAP_BASE + phys_base) & _ADDRESS
    return (PageTableRoot(_long_mode_tables(5 if five else 4, native=False), gpa),)


def _gpr(name: str) -> Register:
    monitor = (name.upper(), f"E{name[1:].upper()}") if name in _LEGACY_GPRS else (name.upper(),)
    return Register(name, gdb=name, monitor=monitor)


_SEGMENT_NUMBERS = field_names("es cs ss ds fs gs", "env.segs[{}]")
_HFLAGS_SMM = 1 << 19


def _descriptor_fields() -> dict[str, tuple[str, ...]]:
    places = {name: f"env.{name}" for name in ("ldt", "tr", "gdt", "idt")}
    places |= {name: fields[0] for name, fields in _SEGMENT_NUMBERS.items()}
    return {
        f"{name}_{part}": (f"{place}.{part}",)
        for name, place in places.items()
        for part in ("selector", "base", "limit", "flags")
    }


def _derive_migrated(section: DeviceFields) -> Mapping[str, int]:
    mask, flags = section.integer("env.a20_mask"), section.integer("env.hflags")
    values = {} if mask is None else {"a20": int(mask & _A20 != 0)}
    return values if flags is None else values | {"smm": int(flags & _HFLAGS_SMM != 0)}


def migrated_cpu(word_size: int) -> MigratedCpu:
    """Return what a QEMU of one word size calls the registers."""
    return MigratedCpu(
        recognize=lambda section: len(section.data("env.eip") or b"") == word_size,
        fields={
            **field_names(f"rax rcx rdx rbx rsp rbp rsi rdi {_LONG_GPRS}", "env.regs[{}]"),
            "rip": ("env.eip",),
            "eflags": ("env.eflags",),
            **_descriptor_fields(),
            **{f"cr{number}": (f"env.cr[{number}]",) for number in (0, 2, 3, 4)},
            "kernel_gs_base": ("env.kernelgsbase",),
            "efer": ("env.efer",),
        },
        derive=_derive_migrated,
    )


def _machine_ram(machine: str, below_4g: int, size_min: int) -> MachineRam:
    """Return the memory of a PC, which has a hole below 4 GiB."""
    return MachineRam(
        machine,
        ((0, 0, below_4g), (_4G, below_4g, None)),
        size_min,
        ends={"pc.bios": _4G},
        screen=(0xA0000, 0xC0000),
    )


# QEMU hw/i386/pc_q35.c, pc_piix.c, microvm.c; with max-ram-below-4g the hole is elsewhere.
MACHINES = (
    _machine_ram("pc-q35-", 0x80000000, 0xB0000000),
    _machine_ram("pc-q35-", 0xB0000000, 0),
    _machine_ram("pc-i440fx-", 0xC0000000, 0xE0000000),
    _machine_ram("pc-i440fx-", 0xE0000000, 0),
    _machine_ram("microvm", 0xC0000000, 0),
    *(
        _machine_ram(machine, below_4g, below_4g)
        for machine in ("pc-q35-", "pc-i440fx-", "microvm")
        for below_4g in (0xE0000000, 0xC0000000, 0x80000000, 0x40000000)
    ),
)

ARCHITECTURE = Architecture(
    name="x86_64",
    cpu_type_suffix="-x86_64-cpu",
    qemu_uname_machine="x86_64",
    gdb_name="i386:x86-64",
    registers=(
        *(_gpr(name) for name in f"{_LEGACY_GPRS} {_LONG_GPRS}".split()),
        Register("rip", gdb="rip", monitor=("RIP", "EIP")),
        Register("eflags", gdb="eflags", monitor=("RFL", "EFL")),
        *(
            Register(
                f"{name}_{part}",
                gdb={
                    "selector": name if name in _SEGMENTS.split() else None,
                    "base": _SEGMENT_BASE_GDB.get(name),
                }.get(part),
            )
            for name in _DESCRIPTORS.split()
            for part in ("selector", "limit", "flags", "base")
        ),
        *(
            Register(name, gdb=name, monitor=(name.upper(),))
            for name in ("cr0", "cr2", "cr3", "cr4")
        ),
        Register("kernel_gs_base", gdb="k_gs_base"),
        Register("efer", gdb="efer", monitor=("EFER",)),
        *(Register(name, monitor=(name.upper(),)) for name in _DEBUG_REGISTERS.split()),
        *(Register(name, monitor=(name.upper(),)) for name in _FLOATING_POINT_STATE.split()),
        *(Register(f"fpr{number}") for number in range(8)),
        *(Register(f"xmm{number}") for number in range(_XMM_COUNT)),
        Register("fxsave"),
        Register("a20", monitor=("A20",)),
        Register("smm", monitor=("SMM",)),
    ),
    cores=(LONG_MODE, LEGACY_64, LEGACY_32),
    program_counter="rip",
    kernel_pointers=("idt_base",),
    page_size=4096,
    phys_base_key="NUMBER(phys_base)",
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    page_table_roots=_page_table_roots,
    paged_by_qemu=True,
    kernel_page_tables=_kernel_page_tables,
    reconcile=reconcile,
    guessed_by_reconcile=guessed_flags,
    per_cpu_base=_per_cpu_base,
    has_orc=True,
    migrated=migrated_cpu(8),
    machines=MACHINES,
    runs_windows=True,
    windows_by_qemu=True,
)
