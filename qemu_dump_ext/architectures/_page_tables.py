"""How page tables of an architecture are laid out: declarations, no walk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from qemu_dump_ext.structures.c_struct import U64_MAX, ByteOrder
from qemu_dump_ext.value import Value


class LeafTest(Value):
    """Which entries map memory instead of leading to the next table.

    Attributes:
        mask: Bits of the entry that tell.
        wanted: What they must be; None: any of them set.
    """

    mask: int
    wanted: int | None


class LargeLeaf(Value):
    """A page that a group of equal entries maps, each the part at its own virtual address.

    Attributes:
        test: Which leaves are of such a page.
        shift: log2 of its size, in bytes.
        masks: The masks, as `TableLevel.leaf_masks`.
    """

    test: LeafTest
    shift: int
    masks: tuple[tuple[int, int], ...]


class TableLevel(Value):
    """The tables of one level.

    Attributes:
        shift: log2 of what one entry maps, in bytes.
        entry_count: The number of entries of one table.
        leaf: Tells leaves; None where there are none; `ALWAYS_LEAF` at the last level.
        table_mask: The mask of an entry: the bits that are the gpa of the next table, once shifted.
        leaf_masks: The masks of a leaf: bits of the gpa, each with a shift to the left.
        address_shift: How far the bits of `table_mask` are shifted to the left.
        present: What an entry must pass as well to count, beside the test of all levels.
        large: Leaves of pages that are larger than what one entry maps.
    """

    shift: int
    entry_count: int
    leaf: LeafTest | None
    table_mask: int
    leaf_masks: tuple[tuple[int, int], ...]
    address_shift: int = 0
    present: LeafTest | None = None
    large: LargeLeaf | None = None

    def leaf_gpa(self, entry: int, gva: int) -> int:
        """Return where a leaf leads; `gva` is the first virtual address of it."""
        masks, gpa = self.leaf_masks, 0
        if self.large is not None and passes(entry, self.large.test.mask, self.large.test.wanted):
            masks, gpa = self.large.masks, gva & (1 << self.large.shift) - (1 << self.shift)
        for mask, left in masks:
            gpa |= (entry & mask) << left
        return gpa


ALWAYS_LEAF = LeafTest(0, 0)


class PageTableGeometry(Value):
    """The page tables of one mode of an architecture; each is made once, and is itself only.

    Attributes:
        name: What messages call it.
        entry_size: The entry size in bytes.
        levels: The levels of tables, from the root to the pages.
        present: An entry counts only if it is so.
        above: What an address has above the bits that the tables translate; `sign`: all as the
            highest of these.
        byte_order: The byte order of the entries.
    """

    name: str
    entry_size: int
    levels: tuple[TableLevel, ...]
    present: LeafTest
    above: Literal["sign"] | int
    byte_order: ByteOrder = "little"

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def address_bits(self) -> int:
        """How many bits of a virtual address the tables translate."""
        top = self.levels[0]
        return top.shift + (top.entry_count - 1).bit_length()

    def extended(self, bits: int) -> int:
        """Return the virtual address of which the tables translate `bits`."""
        if self.above == "sign":
            return bits | (ones_above(self.address_bits) if bits >> self.address_bits - 1 else 0)
        return bits | self.above


class PageTableRoot(Value):
    """Where the tables of a vCPU begin.

    Attributes:
        geometry: The geometry of the tables.
        gpa: The gpa of the root table.
        address_mask: Is applied to the gpa of every entry that is read.
        first: The first virtual address that is translated by them,
        last: and the last one; other tables translate the others.
        exchanged: (gpa, size): guest physical memory there, and as much at 0, are exchanged for
            what the tables map, but not for the tables.
    """

    geometry: PageTableGeometry
    gpa: int
    address_mask: int = U64_MAX
    first: int = 0
    last: int = U64_MAX
    exchanged: tuple[int, int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all that the tables map is as they map it."""
        return self.first == 0 and self.last == U64_MAX and self.exchanged is None

    def parts(self, gva: int, gpa: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield what is left of a run of pages as (gva, gpa, size)."""
        if self.is_plain:
            yield gva, gpa, size
            return
        start, end = max(gva, self.first), min(gva + size, self.last + 1)
        while start < end:
            address = gpa + start - gva
            step, target = end - start, address
            if self.exchanged is not None:
                other, length = self.exchanged
                for there, here in ((0, other), (other, 0)):
                    if there <= address < there + length:
                        step = min(step, there + length - address)
                        target = address - there + here
                        break
                    if address < there:
                        step = min(step, there - address)
            yield start, target, step
            start += step


class AddressWindow(Value):
    """Virtual addresses that the processor, or the kernel for good, maps without tables.

    Attributes:
        gva: First virtual address.
        size: The size in bytes.
        gpa: Guest physical address behind the first one.
    """

    gva: int
    size: int
    gpa: int


Translation = PageTableRoot | AddressWindow
"""One way from virtual addresses to guest physical ones."""


def passes(entry: int, mask: int, wanted: int | None) -> bool:
    return bool(entry & mask) if wanted is None else entry & mask == wanted


def ones_above(bits: int) -> int:
    """Return an address of 64 bits that has ones above the lowest `bits`."""
    return U64_MAX & -1 << bits
