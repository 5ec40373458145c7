"""Page tables of 64-bit and 32-bit Arm, and where Linux keeps its own. Pure.

Sources: Arm ARM for A-profile, "VMSAv8-64 translation table format descriptors", "The VMSAv8-32
Short-descriptor" and "Long-descriptor translation table format", TCR_EL1, TTBCR. Linux
arch/arm64/kernel/vmcore_info.c (crash_core.c before v6.9), arch/arm64/mm/proc.S (offset_ttbr1),
arch/arm/kernel/head.S (swapper_pg_dir).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from qemu_dump_ext.architectures._arm import BIG_ENDIAN
from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    LargeLeaf,
    LeafTest,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    ones_above,
)
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number, vmcoreinfo_value

_UNUSED_BITS = ("TCR_EL1_T1SZ", "tcr_el1_t1sz")
"""Names of what Linux 5.9 tells, and vendors' earlier kernels."""
_VALID = LeafTest(mask=1, wanted=1)
_BLOCK = LeafTest(mask=2, wanted=0)
_PAGE = LeafTest(mask=3, wanted=3)
_ADDRESS_BITS = 48
_ADDRESS_BITS_LPA2 = 50
"""Bits 51 and 50 of an address are elsewhere in an entry; no guest has so much memory."""
_GRANULES = {1 << shift: shift for shift in (12, 14, 16)}
_VA_BITS = range(16, 53)
_KERNEL_VA_BITS = range(36, 53)
_TG0 = {0: 12, 1: 16, 2: 14}
_TG1 = {1: 14, 2: 12, 3: 16}
_SCTLR_M = 1
_TCR_DS = 1 << 59
_PSTATE_EL = 0b1100
_EL2 = 0b1000
_AARCH32 = 1 << 4
_LPAE_BITS = 40
_TTBCR_EAE = 1 << 31
_4_GIB = 1 << 32
_LINUX_SPLITS = 0xF0000000
"""PAGE_OFFSET has no other bits, and the kernel image is not larger."""


@cache
def long_tables(
    granule_shift: int,
    va_bits: int,
    *,
    above: int,
    address_bits: int = _ADDRESS_BITS,
    byte_order: ByteOrder = "little",
) -> PageTableGeometry:
    """Return the tables of one part of the address space, with entries of 8 bytes.

    Args:
        granule_shift: log2 of the page size.
        va_bits: How many bits of an address they translate.
        above: What an address has above them.
        address_bits: How many bits a guest physical address has in an entry; more than 48 with
            LPA2.
        byte_order: The byte order of the entries.
    """
    stride = granule_shift - 3
    count = -(-(va_bits - granule_shift) // stride)
    address = (1 << address_bits) - 1
    levels = []
    for depth in range(count):
        shift = granule_shift + stride * (count - 1 - depth)
        last = depth == count - 1
        # There is no block of the size of what an entry of level 0 maps.
        blocks = count - depth <= (3 if address_bits <= _ADDRESS_BITS else 4)
        levels.append(
            TableLevel(
                shift,
                entry_count=1 << (min(va_bits, shift + stride) - shift),
                leaf=ALWAYS_LEAF if last else _BLOCK if blocks else None,
                table_mask=address & -1 << granule_shift,
                leaf_masks=((address & -1 << shift, 0),),
                present=_PAGE if last else None,
            )
        )
    return PageTableGeometry(
        f"Arm, pages of {1 << granule_shift - 10} KiB, {va_bits} bits",
        entry_size=8,
        levels=tuple(levels),
        present=_VALID,
        above=above,
        byte_order=byte_order,
    )


@cache
def short_tables(unused_bits: int, byte_order: ByteOrder = "little") -> PageTableGeometry:
    """Return the tables with entries of 4 bytes, for addresses without their highest bits."""
    any_type = LeafTest(mask=3, wanted=None)
    is_section = LeafTest(mask=2, wanted=2)
    supersection = LargeLeaf(
        LeafTest(mask=1 << 18, wanted=1 << 18),
        24,
        # Bits 35:32 and 39:36 of the address are bits 23:20 and 8:5 of the entry.
        ((0xFF000000, 0), (0x00F00000, 12), (0x000001E0, 31)),
    )
    large_page = LargeLeaf(LeafTest(mask=3, wanted=1), 16, ((0xFFFF0000, 0),))
    sections = TableLevel(
        20, 4096 >> unused_bits, is_section, 0xFFFFFC00, ((0xFFF00000, 0),), large=supersection
    )
    pages = TableLevel(12, 256, ALWAYS_LEAF, 0, ((0xFFFFF000, 0),), large=large_page)
    return PageTableGeometry(
        "Arm, short descriptors",
        entry_size=4,
        levels=(sections, pages),
        present=any_type,
        above=0,
        byte_order=byte_order,
    )


def _byte_order(registers: Mapping[str, int]) -> ByteOrder:
    return "big" if registers.get(BIG_ENDIAN) else "little"


def _base(register: int, tables: PageTableGeometry, address_bits: int) -> int:
    size = max(tables.levels[0].entry_count * tables.entry_size, 64)
    return register & (1 << address_bits) - 1 & -size


def roots_of_aarch64(registers: Mapping[str, int], _native: bool) -> Sequence[PageTableRoot]:
    """Return the tables of EL1 and EL0: the user's half of the address space, and the kernel's.

    Raises:
        KeyError: A register is missing; only the stub gives them.
    """
    pstate = registers["pstate"]
    if pstate & _AARCH32:
        raise KeyError("the translation registers of 32-bit code")
    if pstate & _PSTATE_EL >= _EL2:
        raise KeyError("the translation registers of EL2 and EL3")
    sctlr = registers["sctlr_el1"] if "sctlr_el1" in registers else registers["sctlr"]
    if not sctlr & _SCTLR_M:
        return ()
    tcr = registers["tcr_el1"]
    address_bits = _ADDRESS_BITS_LPA2 if tcr & _TCR_DS else _ADDRESS_BITS
    halves = (
        (registers["ttbr0_el1"], tcr & 0x3F, _TG0.get(tcr >> 14 & 3), tcr >> 7 & 1),
        (registers["ttbr1_el1"], tcr >> 16 & 0x3F, _TG1.get(tcr >> 30 & 3), tcr >> 23 & 1),
    )
    roots = []
    for is_kernel, (register, unused, granule, is_off) in enumerate(halves):
        bits = 64 - unused
        if is_off or granule is None or bits not in _VA_BITS or bits <= granule:
            continue
        tables = long_tables(
            granule,
            bits,
            above=ones_above(bits) if is_kernel else 0,
            address_bits=address_bits,
            byte_order=_byte_order(registers),
        )
        roots.append(PageTableRoot(tables, _base(register, tables, _ADDRESS_BITS)))
    return roots


def roots_of_arm(registers: Mapping[str, int], _native: bool) -> Sequence[PageTableRoot]:
    """Return the tables behind TTBR0 and TTBR1, of the kind that TTBCR tells.

    Raises:
        KeyError: A register is missing; only the stub gives them.
    """
    sctlr = registers["sctlr_el1"] if "sctlr_el1" in registers else registers["sctlr"]
    if not sctlr & _SCTLR_M:
        return ()
    control, order = registers["ttbcr"], _byte_order(registers)
    if not control & _TTBCR_EAE:
        return _short_roots(control, registers["ttbr0_32"], registers["ttbr1_32"], order)
    low, high = control & 7, control >> 16 & 7
    # Where only one of them has a size, the other table translates the rest.
    low_end = _4_GIB >> low if low else _4_GIB - (_4_GIB >> high) if high else _4_GIB
    high_start = _4_GIB - (_4_GIB >> high) if high else low_end
    roots = []
    if not control >> 7 & 1:
        tables = long_tables(12, 32 - low, above=0, address_bits=_LPAE_BITS, byte_order=order)
        base = _base(registers["ttbr0"], tables, _LPAE_BITS)
        roots.append(PageTableRoot(tables, base, last=low_end - 1))
    if high_start < _4_GIB and not control >> 23 & 1:
        above = _4_GIB - (_4_GIB >> high)
        tables = long_tables(12, 32 - high, above=above, address_bits=_LPAE_BITS, byte_order=order)
        base = _base(registers["ttbr1"], tables, _LPAE_BITS)
        roots.append(PageTableRoot(tables, base, first=high_start))
    return roots


def _short_roots(control: int, ttbr0: int, ttbr1: int, order: ByteOrder) -> Sequence[PageTableRoot]:
    unused = control & 7
    roots = []
    if not control >> 4 & 1:
        tables = short_tables(unused, order)
        roots.append(PageTableRoot(tables, _base(ttbr0, tables, 32)))
    if unused and not control >> 5 & 1:
        tables = short_tables(0, order)
        roots.append(PageTableRoot(tables, _base(ttbr1, tables, 32), first=_4_GIB >> unused))
    return roots


def linux_tables_of_aarch64(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[PageTableRoot]:
    """Return the kernel's page tables; empty where VMCOREINFO does not tell."""
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    offset = vmcoreinfo_number(vmcoreinfo, "NUMBER(kimage_voffset)")
    granule = _GRANULES.get(vmcoreinfo_number(vmcoreinfo, "PAGESIZE") or 0)
    configured = vmcoreinfo_number(vmcoreinfo, "NUMBER(VA_BITS)")
    if table is None or offset is None or granule is None or configured is None:
        return ()
    told = (vmcoreinfo_number(vmcoreinfo, f"NUMBER({name})") for name in _UNUSED_BITS)
    unused = next((bits for bits in told if bits is not None), None)
    va_bits = configured if unused is None else 64 - unused
    if va_bits not in _KERNEL_VA_BITS or configured not in _KERNEL_VA_BITS:
        return ()
    gpa = (table - offset) & (1 << _ADDRESS_BITS) - 1
    tables = long_tables(granule, va_bits, above=ones_above(va_bits))
    if configured > va_bits and granule == 16:
        # A kernel built for 52 bits keeps its table of 1024 entries and uses the last ones.
        whole = long_tables(granule, configured, above=ones_above(configured))
        gpa += 8 * (whole.levels[0].entry_count - tables.levels[0].entry_count)
    return (PageTableRoot(tables, gpa),)


def linux_tables_of_arm(vmcoreinfo: bytes, phys_base: int | None) -> Sequence[PageTableRoot]:
    """Return the kernel's page tables; empty where VMCOREINFO does not tell."""
    table = vmcoreinfo_number(vmcoreinfo, "SYMBOL(swapper_pg_dir)", 16)
    if table is None or phys_base is None or not 0 <= table < _4_GIB:
        return ()
    gpa = table - (table & _LINUX_SPLITS) + phys_base
    if vmcoreinfo_value(vmcoreinfo, "CONFIG_ARM_LPAE") == "y":
        return (PageTableRoot(long_tables(12, 32, above=0, address_bits=_LPAE_BITS), gpa),)
    return (PageTableRoot(short_tables(0), gpa),)
