"""Page tables of Linux on Arm64 and RISC-V, as VMCOREINFO describes them. Pure.

Sources: Arm ARM, "VMSAv8-64 translation table format descriptors"; Linux arch/arm64/kernel/
vmcore_info.c (crash_core.c before v6.9), arch/arm64/mm/proc.S (offset_ttbr1). RISC-V privileged
architecture, "Sv39", "Sv48", "Sv57"; Linux arch/riscv/kernel/vmcore_info.c.
"""

from __future__ import annotations

from functools import cache

from qemu_dump_ext.page_table_walk import (
    ALWAYS_LEAF,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
)
from qemu_dump_ext.vmcoreinfo import vmcoreinfo_number

_U64 = (1 << 64) - 1
_VALID = LeafTest(mask=1, wanted=1)
_ARM_BLOCK = LeafTest(mask=2, wanted=0)
_ARM_PAGE = LeafTest(mask=3, wanted=3)
_ARM_ADDRESS = (1 << 48) - 1
"""Addresses of 52 bits have their highest bits elsewhere; no guest has so much memory."""
_ARM_GRANULES = {1 << shift: shift for shift in (12, 14, 16)}
_ARM_VA_BITS = range(36, 53)
_RISCV_LEAF = LeafTest(mask=0b1110, wanted=None)  # readable, writable or executable
_RISCV_PPN = (1 << 54) - (1 << 10)
_RISCV_PPN_LEFT = 2  # bit 10 of the entry is bit 12 of the address
_RISCV_MODES = {8: 39, 9: 48, 10: 57}


@cache
def arm64_tables(granule_shift: int, va_bits: int) -> PageTableGeometry:
    """Return the tables of one half of the address space: the kernel's, at its end."""
    stride = granule_shift - 3
    count = -(-(va_bits - granule_shift) // stride)
    levels = []
    for depth in range(count):
        shift = granule_shift + stride * (count - 1 - depth)
        last = depth == count - 1
        levels.append(
            TableLevel(
                shift,
                entry_count=1 << (min(va_bits, shift + stride) - shift),
                # There is no block of the size of what an entry of level 0 maps.
                leaf=ALWAYS_LEAF if last else _ARM_BLOCK if count - depth <= 3 else None,
                table_mask=_ARM_ADDRESS & -1 << granule_shift,
                leaf_masks=((_ARM_ADDRESS & -1 << shift, 0),),
                present=_ARM_PAGE if last else None,
            )
        )
    return PageTableGeometry(
        f"Arm64, pages of {1 << granule_shift - 10} KiB, {va_bits} bits",
        entry_size=8,
        levels=tuple(levels),
        present=_VALID,
        high_half="ones",
    )


def arm64_kernel_tables(vmcoreinfo: bytes, _phys_base: int | None) -> PageTableRoot | None:
    """Return where the kernel's page tables begin; None where VMCOREINFO does not tell."""
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    offset = vmcoreinfo_number(vmcoreinfo, "NUMBER(kimage_voffset)")
    granule = _ARM_GRANULES.get(vmcoreinfo_number(vmcoreinfo, "PAGESIZE") or 0)
    configured = vmcoreinfo_number(vmcoreinfo, "NUMBER(VA_BITS)")
    if table is None or offset is None or granule is None or configured is None:
        return None
    unused = vmcoreinfo_number(vmcoreinfo, "NUMBER(TCR_EL1_T1SZ)")
    va_bits = configured if unused is None else 64 - unused
    if va_bits not in _ARM_VA_BITS or configured not in _ARM_VA_BITS:
        return None
    gpa = (table - offset) & _ARM_ADDRESS
    tables = arm64_tables(granule, va_bits)
    if configured > va_bits and granule == 16:
        # A kernel built for 52 bits keeps its table of 1024 entries and uses the last ones.
        in_use = tables.levels[0].entry_count
        gpa += 8 * (arm64_tables(granule, configured).levels[0].entry_count - in_use)
    return PageTableRoot(tables, gpa)


@cache
def riscv64_tables(va_bits: int) -> PageTableGeometry:
    """Return the tables of Sv39, Sv48 or Sv57."""
    shifts = range(va_bits - 9, 11, -9)
    return PageTableGeometry(
        f"RISC-V, Sv{va_bits}",
        entry_size=8,
        levels=tuple(
            TableLevel(
                shift,
                entry_count=512,
                leaf=ALWAYS_LEAF if shift == 12 else _RISCV_LEAF,
                table_mask=_RISCV_PPN,
                leaf_masks=((_RISCV_PPN & -1 << shift - _RISCV_PPN_LEFT, _RISCV_PPN_LEFT),),
                address_shift=_RISCV_PPN_LEFT,
                present=_RISCV_LEAF if shift == 12 else None,
            )
            for shift in shifts
        ),
        present=_VALID,
        high_half="sign",
    )


def riscv64_kernel_tables(vmcoreinfo: bytes, _phys_base: int | None) -> PageTableRoot | None:
    """Return where the kernel's page tables begin; None where VMCOREINFO does not tell."""
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    offset = vmcoreinfo_number(vmcoreinfo, "NUMBER(va_kernel_pa_offset)")
    va_bits = vmcoreinfo_number(vmcoreinfo, "NUMBER(VA_BITS)")
    mode = vmcoreinfo_number(vmcoreinfo, "NUMBER(satp)")
    if mode is not None:
        va_bits = _RISCV_MODES.get((mode & _U64) >> 60)
    if table is None or offset is None or va_bits not in _RISCV_MODES.values():
        return None
    return PageTableRoot(riscv64_tables(va_bits or 0), (table - offset) & (1 << 56) - 1)
