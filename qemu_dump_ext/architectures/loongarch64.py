"""64-bit LoongArch.

Sources:
    Linux arch/loongarch/include/uapi/asm/ptrace.h (user_pt_regs, user_fp_state), asm/elf.h
    (ELF_NGREG 45); QEMU target/loongarch/arch_dump.c (since 9.2), gdb-xml/loongarch-*.xml,
    machine.c (migration stream); LoongArch Reference Manual, volume 1, "Virtual Memory and
    Multi-level Page Table", "Direct Mapping Configuration Window", PWCL and PWCH; Linux
    Documentation/arch/loongarch/introduction.rst (the windows that it uses).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

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
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    AddressWindow,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    Translation,
    ones_above,
)
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import U64_MAX, Field, StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import EM_LOONGARCH, NT_PRFPREG
from qemu_dump_ext.structures.vmcoreinfo import PAGE_SIZES, vmcoreinfo_number

_GPRS = numbered("r", 32)
_FPRS = numbered("f", 32)
_CONTROL = "crmd prmd euen ecfg estat"
_CONDITION_FLAGS = numbered("fcc", 8).split()
_FP_VALID = {"pr_fpvalid": 1}


def _core(
    registers: str, tail: str, floating_point_end: tuple[Field, ...], *, of_others: bool
) -> Core:
    return Core(
        e_machine=EM_LOONGARCH,
        byte_order="little",
        word_size=8,
        notes=(
            prstatus(
                "LoongArch",
                "u64",
                fields_of("u64", f"{_GPRS} orig_a0 {registers} {tail}"),
                constants=_FP_VALID,
            ),
            NoteLayout(
                "CORE",
                NT_PRFPREG,
                StructLayout(
                    "user_fp_state", (*fields_of("u64", f"{_FPRS} fcc"), *floating_point_end)
                ),
                max_align=4,
            ),
        ),
        uname_machine="loongarch64",
        of_others=of_others,
    )


_MENDED = _core(
    f"pc badv {_CONTROL}",
    numbered("reserved", 5),
    fields_of("u32", "fcsr pad_end"),
    of_others=False,
)
_BY_QEMU = _core("era badv", numbered("reserved", 10), (Field("fcsr", "u32"),), of_others=True)


def _select_core(
    _vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], dialect: Dialect, _machine: str
) -> Core:
    return _BY_QEMU if dialect.qemu_note_layouts else _MENDED


_PAGING = "pgdl pgdh pwcl pwch dmw0 dmw1 dmw2 dmw3"
_CRMD_PG = 1 << 4
_ADDRESS = (1 << 48) - (1 << 12)
_VALID = LeafTest(mask=1, wanted=1)
_HUGE = LeafTest(mask=1 << 6, wanted=1 << 6)
_WINDOW_SIZE = 1 << 48
_ENTRY_SHIFT = 3
_LINUX_WINDOWS = (0x8000000000000000, 0x9000000000000000)


def page_tables(pwcl: int, pwch: int, *, kernel_half: bool) -> PageTableGeometry | None:
    """Return the tables that PWCL and PWCH describe; None where they describe none."""
    fields = ((pwcl, 5), (pwcl >> 10, 5), (pwcl >> 20, 5), (pwch, 6), (pwch >> 12, 6))
    used = [(value & (1 << size) - 1, value >> size & (1 << size) - 1) for value, size in fields]
    return _geometry(tuple((shift, bits) for shift, bits in used if bits), kernel_half=kernel_half)


@cache
def _geometry(used: Sequence[tuple[int, int]], *, kernel_half: bool) -> PageTableGeometry | None:
    """Return tables by first bit and number of bits of each level's index, the lowest first."""
    ends = [shift + bits for shift, bits in used]
    if not used or used[0][0] < 12 or ends[-1] > 63 or max(bits for _, bits in used) > 16:
        return None
    if any(end != shift for end, (shift, _) in zip(ends, used[1:], strict=False)):
        return None
    levels = [
        TableLevel(
            shift,
            entry_count=1 << bits,
            leaf=_HUGE if index else ALWAYS_LEAF,
            table_mask=_ADDRESS,
            leaf_masks=((_ADDRESS & -1 << shift, 0),),
            present=None if index else _VALID,
        )
        for index, (shift, bits) in enumerate(used)
    ]
    return PageTableGeometry(
        f"LoongArch, {len(levels)} levels, {ends[-1]} bits",
        entry_size=8,
        levels=tuple(reversed(levels)),
        present=LeafTest(0, 0),
        above=ones_above(ends[-1]) if kernel_half else 0,
    )


def _page_table_roots(registers: Mapping[str, int], _native: bool) -> Sequence[Translation]:
    if not registers["crmd"] & _CRMD_PG:
        return ()
    translations: list[Translation] = [
        AddressWindow(window >> 60 << 60, _WINDOW_SIZE, 0)
        for window in (registers[f"dmw{index}"] for index in range(4))
        if window & 0xF  # privilege levels that may use it
    ]
    for kernel_half, name in enumerate(("pgdl", "pgdh")):
        tables = page_tables(registers["pwcl"], registers["pwch"], kernel_half=bool(kernel_half))
        if tables is not None:
            translations.append(PageTableRoot(tables, registers[name] & _ADDRESS))
    return translations


def _of_linux(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[Translation]:
    """Return how a kernel that runs in a window sees all memory, and what its tables map besides.

    Those are modules, what vmalloc has, and struct pages.
    """
    start = vmcoreinfo_number(vmcoreinfo, "SYMBOL(_stext)", 16)
    if start is None or start >> 60 << 60 not in _LINUX_WINDOWS:
        return ()
    windows = tuple(AddressWindow(gva, _WINDOW_SIZE, 0) for gva in _LINUX_WINDOWS)
    root = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    tables = _tables_of_linux(vmcoreinfo)
    if root is None or tables is None:
        return windows
    return (*windows, PageTableRoot(tables, root & _ADDRESS))


def _tables_of_linux(vmcoreinfo: bytes) -> PageTableGeometry | None:
    # A table fills a page; there are as many levels as the lowest address that they map needs.
    page_size = vmcoreinfo_number(vmcoreinfo, "PAGESIZE") or 0
    lowest = vmcoreinfo_number(vmcoreinfo, "NUMBER(VMALLOC_START)", 16)
    if lowest is None or page_size not in PAGE_SIZES:
        return None
    shift = page_size.bit_length() - 1
    bits = shift - _ENTRY_SHIFT
    ends = (-lowest & U64_MAX).bit_length()
    return _geometry(tuple((first, bits) for first in range(shift, ends, bits)), kernel_half=True)


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read ` GPR04: r4 0000… r5 …`, ` f4 0000…`, `FCSR0 0x…`, `ERA=0000…`, `CRMD   b0`."""
    values = {
        name: int(value, 16)
        for name, value in re.findall(r"\b([rf]\d{1,2}) ([0-9a-f]{16})\b", text)
    }
    for name, value in re.findall(r"\b([A-Z][A-Z0-9]+)(?:=| +0x| +)([0-9a-f]{1,16})\b", text):
        if name.lower() in {"fcsr0", "era", "badv", *_CONTROL.split(), *_PAGING.split()}:
            values["fcsr" if name == "FCSR0" else name.lower()] = int(value, 16)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = {**readings.native, **readings.monitor, **readings.gdb}
    if all(name in values for name in _CONDITION_FLAGS):
        # Since QEMU 10 the stub shows each flag on its own.
        values["fcc"] = sum(
            (values[name] & 0xFF) << 8 * index for index, name in enumerate(_CONDITION_FLAGS)
        )
    return values


def _control_fields(name: str, field: str) -> dict[str, tuple[str, ...]]:
    return {name: (f"env.sys_states[0].CSR_{field}", f"env.CSR_{field}")}  # since QEMU 11, before


_MIGRATED = MigratedCpu(
    recognize=lambda section: any(
        name in section for name in _control_fields("crmd", "CRMD")["crmd"]
    ),
    fields={
        **field_names(_GPRS, "env.gpr[{}]"),
        **field_names(_FPRS, "cpu/fpu/env.fpr[{}].UD[0]", "env.fpr[{}].UD[0]", "env.fpr[{}]"),
        **field_names(" ".join(_CONDITION_FLAGS), "cpu/fpu/env.cf[{}]", "env.cf[{}]"),
        "fcsr": ("cpu/fpu/env.fcsr0", "env.fcsr0"),
        "pc": ("env.pc",),
        **{
            name: fields
            for register in f"era badv {_CONTROL} pgdl pgdh pwcl pwch".split()
            for name, fields in _control_fields(register, register.upper()).items()
        },
        **{
            name: fields
            for index in range(4)
            for name, fields in _control_fields(f"dmw{index}", f"DMW[{index}]").items()
        },
    },
)

ARCHITECTURE = Architecture(
    name="loongarch64",
    cpu_type_suffix="-loongarch-cpu",
    qemu_uname_machine="Unknown",
    registers=(
        *(Register(name, gdb=name) for name in f"{_GPRS} {_FPRS} badv fcc fcsr".split()),
        *(Register(name, gdb=name) for name in _CONDITION_FLAGS),
        Register("pc", gdb="pc", monitor=("PC",)),
        Register("era"),
        *(Register(name) for name in f"{_CONTROL} {_PAGING}".split()),
    ),
    cores=(_MENDED, _BY_QEMU),
    program_counter="pc",
    dumped_by_qemu_since=(9, 2, 0),
    page_size=4096,
    phys_base_key=None,
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
    page_table_roots=_page_table_roots,
    kernel_page_tables=_of_linux,
    # Most have no LoongArch: any little-endian architecture with registers of 64 bits can connect.
    gdb_settings=("set architecture alpha",),
    migrated=_MIGRATED,
    machines=tuple(  # since QEMU 8.1, and before
        MachineRam("virt", ((0, 0, 1 << 28), (high, 1 << 28, None)))
        for high in (0x80000000, 0x90000000)
    ),
)
