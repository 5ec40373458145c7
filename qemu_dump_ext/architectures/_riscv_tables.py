"""Page tables of RISC-V, and where Linux keeps its own. Pure.

Sources: RISC-V privileged architecture, "Sv32", "Sv39", "Sv48", "Sv57", satp; Linux
arch/riscv/kernel/vmcore_info.c (crash_core.c before v6.9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
)
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

_VALID = LeafTest(mask=1, wanted=1)
_LEAF = LeafTest(mask=0b1110, wanted=None)  # readable, writable or executable
_PPN_LEFT = 2  # bit 10 of the entry is bit 12 of the address
_MODES = {8: 39, 9: 48, 10: 57}


@cache
def riscv_tables(va_bits: int) -> PageTableGeometry:
    """Return the tables of Sv32, Sv39, Sv48 or Sv57."""
    stride, entry_size = (10, 4) if va_bits == 32 else (9, 8)
    page_numbers = (1 << (32 if va_bits == 32 else 54)) - (1 << 10)
    return PageTableGeometry(
        f"RISC-V, Sv{va_bits}",
        entry_size=entry_size,
        levels=tuple(
            TableLevel(
                shift,
                entry_count=1 << stride,
                leaf=ALWAYS_LEAF if shift == 12 else _LEAF,
                table_mask=page_numbers,
                leaf_masks=((page_numbers & -1 << shift - _PPN_LEFT, _PPN_LEFT),),
                address_shift=_PPN_LEFT,
                present=_LEAF if shift == 12 else None,
            )
            for shift in range(va_bits - stride, 11, -stride)
        ),
        present=_VALID,
        above=0 if va_bits == 32 else "sign",
    )


def roots_by_satp(registers: Mapping[str, int], word_size: int) -> Sequence[PageTableRoot]:
    """Return the tables of a vCPU; empty where it uses none.

    Raises:
        KeyError: No source gave satp.
    """
    satp = registers["satp"]
    if word_size == 4:
        return (
            (PageTableRoot(riscv_tables(32), (satp & (1 << 22) - 1) << 12),) if satp >> 31 else ()
        )
    bits = _MODES.get(satp >> 60)
    return (PageTableRoot(riscv_tables(bits), (satp & (1 << 44) - 1) << 12),) if bits else ()


def linux_tables(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[PageTableRoot]:
    """Return the page tables of a 64-bit kernel; empty where VMCOREINFO does not tell."""
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    offset = vmcoreinfo_number(vmcoreinfo, "NUMBER(va_kernel_pa_offset)")
    va_bits = vmcoreinfo_number(vmcoreinfo, "NUMBER(VA_BITS)")
    mode = vmcoreinfo_number(vmcoreinfo, "NUMBER(satp)")
    if mode is not None:
        va_bits = _MODES.get((mode & U64_MAX) >> 60)
    if table is None or offset is None or va_bits not in _MODES.values():
        return ()
    return (PageTableRoot(riscv_tables(va_bits or 0), (table - offset) & (1 << 56) - 1),)
