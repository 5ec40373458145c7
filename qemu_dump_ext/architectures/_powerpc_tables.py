"""How Linux on 64-bit PowerPC sees memory: all of it in a row, and by radix tables. Pure.

A guest's process table, which leads to the tables of processes, is known to its hypervisor alone.

Sources: Power ISA 3.0, book III, "Radix Tree Translation"; Linux arch/powerpc/include/asm/book3s/
64/radix.h, radix-4k.h, radix-64k.h (sizes of tables), arch/powerpc/include/asm/page.h (__pa).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    AddressWindow,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    Translation,
)
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

_PAGE_OFFSET = 0xC000000000000000
_LINEAR_SIZE = 1 << 51
_VALID, _LEAF = 1 << 63, 1 << 62
_REAL_PAGE = (1 << 57) - (1 << 12)
_NEXT_TABLE = (1 << 60) - (1 << 8)
_PAGE_SHIFTS = {4096: 12, 65536: 16}
_ROOT_SHIFT, _ROOT_BITS = 39, 13


@cache
def radix_tables(page_shift: int) -> PageTableGeometry:
    """Return the kernel's tables, for pages of 4 KiB or 64 KiB."""
    shifts = (_ROOT_SHIFT, 30, 21, page_shift)
    ends = (_ROOT_SHIFT + _ROOT_BITS, *shifts)
    levels = [
        TableLevel(
            shift,
            entry_count=1 << end - shift,
            leaf=LeafTest(_LEAF, _LEAF),
            table_mask=_NEXT_TABLE,
            leaf_masks=((_REAL_PAGE & -1 << shift, 0),),
        )
        for shift, end in zip(shifts, ends, strict=False)
    ]
    # In the tables that a kernel keeps for itself where a hash table translates, this bit is set.
    levels[0] = TableLevel(
        _ROOT_SHIFT, 1 << _ROOT_BITS, None, _NEXT_TABLE, (), present=LeafTest(_LEAF, 0)
    )
    last = levels[-1]
    levels[-1] = TableLevel(
        last.shift,
        last.entry_count,
        ALWAYS_LEAF,
        0,
        last.leaf_masks,
        present=LeafTest(_VALID | _LEAF, _VALID | _LEAF),
    )
    return PageTableGeometry(
        f"POWER, radix, pages of {1 << page_shift - 10} KiB",
        entry_size=8,
        levels=tuple(levels),
        present=LeafTest(_VALID, _VALID),
        above=_PAGE_OFFSET,
        byte_order="big",
    )


def linux_translations(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[Translation]:
    """Return how the kernel sees memory; empty where VMCOREINFO does not tell."""
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    page_shift = _PAGE_SHIFTS.get(vmcoreinfo_number(vmcoreinfo, "PAGESIZE") or 0)
    if table is None or page_shift is None or not 0 <= table - _PAGE_OFFSET < _LINEAR_SIZE:
        return ()
    return (
        AddressWindow(_PAGE_OFFSET, _LINEAR_SIZE, 0),
        PageTableRoot(radix_tables(page_shift), table - _PAGE_OFFSET),
    )
