"""What a Linux kernel's `struct page` says of its page, by the numbers in VMCOREINFO.

Kernels differ in nearly all of it, and VMCOREINFO tells nearly all of it: nothing here asks for
a version but where the width of a field changed and nothing else tells.

Source: Linux include/linux/page-flags.h, mm_types.h, kernel/vmcore_info.c (crash_core.c before
v6.9); makedumpfile's makedumpfile.c, __exclude_unnecessary_pages().
"""

from __future__ import annotations

import re

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.structures.c_struct import U32_MAX, ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import (
    PAGE_SIZES,
    VmcoreinfoNumbers,
    kernel_word_size,
    vmcoreinfo_value,
)
from qemu_dump_ext.value import Value

_STRUCT_PAGE_MAX = 256
_MOST_ORDERS = 32
_SWAPBACKED_BEHIND_PRIVATE = 6
_BYTES_SINCE = (4, 16)
"""Since this version order and destructor of a compound page are bytes; before, of two bytes."""


class Field(Value):
    """An integer in a struct page.

    Attributes:
        offset: In bytes.
        size: In bytes.
    """

    offset: int
    size: int

    def lowest_byte(self, byte_order: ByteOrder) -> Field:
        """Return the byte of it that has its lowest bits."""
        return Field(self.offset + (0 if byte_order == "little" else self.size - 1), 1)


class StructPage(Value):
    """The layout of `struct page` in one kernel, and what its values mean.

    Attributes:
        page_size: Of a page, in bytes.
        size: Of a struct page, in bytes.
        word_size: Of the kernel's `long`, in bytes.
        byte_order: Of all fields.
        flags: A word of bits.
        mapping: A word; bit 0 is set for anonymous memory.
        mapcount: Four bytes that are a page type where they are not a count.
        private: A word; the order of a free block.
        compound: A word; bit 0 is set for all pages of a compound page but its first.
        order: In the second struct page of a compound page: its order in the low byte.
        destructor: There, too, before v6.6: what kind of compound page it is.
        lru, private_bit, swapcache, slab_bit, hwpoison, head: Masks of `flags`; all bits must be
            set; 0 where the kernel has none.
        hugetlb_bit: Mask of `flags` of the second struct page; 0 where the kernel has none.
        hugetlb_destructor: Value of `destructor`, or None.
        buddy, offline, unaccepted, slab_type, hugetlb_type: Page types, or None.
        free_orders: Orders of free blocks: below this number.
    """

    page_size: int
    size: int
    word_size: int
    byte_order: ByteOrder
    flags: Field
    mapping: Field
    mapcount: Field
    private: Field | None
    compound: Field | None
    order: Field | None
    destructor: Field | None
    lru: int
    private_bit: int
    swapcache: int
    slab_bit: int
    hwpoison: int
    head: int
    hugetlb_bit: int
    hugetlb_destructor: int | None
    buddy: int | None
    offline: int | None
    unaccepted: int | None
    slab_type: int | None
    hugetlb_type: int | None
    free_orders: int

    @property
    def known_types(self) -> tuple[int, ...]:
        """Page types whose meaning is known."""
        types = (self.buddy, self.offline, self.unaccepted, self.slab_type, self.hugetlb_type)
        return tuple(value for value in types if value is not None)

    @property
    def typed_by_top_byte(self) -> bool:
        """Whether a page type is in the top byte, as since v6.12, and not in single bits."""
        return self.buddy is not None and not self.buddy & 0xFFFFFF


def parse_struct_page(vmcoreinfo: bytes, byte_order: ByteOrder, level: int) -> StructPage:
    """Return the layout of struct page that a kernel tells of itself.

    Args:
        vmcoreinfo: Its text; untrusted.
        byte_order: Of the guest.
        level: The dump level that is asked for: what it does not need may be missing.

    Raises:
        SourceError: VMCOREINFO lacks an entry that this level needs.
    """
    info = _Entries(vmcoreinfo)
    word = kernel_word_size(vmcoreinfo)
    size = info.needed("SIZE(page)")
    page_size = info.needed("PAGESIZE")
    if page_size not in PAGE_SIZES or not word <= size <= _STRUCT_PAGE_MAX:
        raise SourceError(
            f"VMCOREINFO makes no sense: pages of {page_size}, struct pages of {size} bytes"
        )
    _require(info, level)
    order, destructor, hugetlb_bit, hugetlb_destructor = _second_page(
        info, size, word, width=1 if _version(vmcoreinfo) >= _BYTES_SINCE else 2
    )
    return StructPage(
        page_size=page_size,
        size=size,
        word_size=word,
        byte_order=byte_order,
        flags=info.field("page.flags", word, size),
        mapping=info.field("page.mapping", word, size),
        mapcount=info.field("page._mapcount", 4, size),
        private=info.field_or_none("page.private", word, size),
        compound=info.field_or_none("page.compound_head", word, size)
        or info.field_or_none("page.compound_info", word, size),
        order=order,
        destructor=destructor,
        lru=info.bit("PG_lru", word),
        private_bit=info.bit("PG_private", word),
        swapcache=_swapcache(info, word),
        slab_bit=info.bit("PG_slab", word),
        hwpoison=info.bit("PG_hwpoison", word),
        head=(info.get("NUMBER(PG_head_mask)") or 0) & (1 << 8 * word) - 1,
        hugetlb_bit=hugetlb_bit,
        hugetlb_destructor=hugetlb_destructor,
        buddy=info.page_type("BUDDY"),
        offline=info.page_type("OFFLINE"),
        unaccepted=info.page_type("UNACCEPTED"),
        slab_type=info.page_type("SLAB"),
        hugetlb_type=info.page_type("HUGETLB"),
        free_orders=min(max(info.get("LENGTH(zone.free_area)") or 0, 0), _MOST_ORDERS),
    )


class _Entries(VmcoreinfoNumbers):
    # What VMCOREINFO says of struct page.
    def field_or_none(self, name: str, width: int, size: int) -> Field | None:
        offset = self.get(f"OFFSET({name})")
        if offset is None:
            return None
        if not 0 <= offset <= size - width:
            raise SourceError(f"VMCOREINFO makes no sense: OFFSET({name}) is {offset}")
        return Field(offset, width)

    def field(self, name: str, width: int, size: int) -> Field:
        found = self.field_or_none(name, width, size)
        if found is None:
            raise SourceError(f"VMCOREINFO lacks OFFSET({name})")
        return found

    def bit(self, name: str, word: int) -> int:
        number = self.get(f"NUMBER({name})")
        return 1 << number if number is not None and 0 <= number < 8 * word else 0

    def page_type(self, name: str) -> int | None:
        value = self.get(f"NUMBER(PAGE_{name}_MAPCOUNT_VALUE)")
        return None if value is None else value & U32_MAX


def _require(info: VmcoreinfoNumbers, level: int) -> None:
    # A kernel that changed more than this reader knows must not lose what readers need.
    if level & 0b1110:
        info.require("OFFSET(page.compound_head)", "OFFSET(page.compound_info)")
        info.require("NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)", "NUMBER(PG_slab)")
        info.require("NUMBER(PG_lru)")
        info.require("NUMBER(PG_private)")
        info.require("NUMBER(PG_head_mask)")
    if level & 0b10000:
        info.require("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)")
        info.require("OFFSET(page.private)")
        info.require("LENGTH(zone.free_area)")


def _version(vmcoreinfo: bytes) -> tuple[int, int]:
    release = vmcoreinfo_value(vmcoreinfo, "OSRELEASE") or ""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _swapcache(info: _Entries, word: int) -> int:
    # An alias of a file system's bit since v4.10, and meant only together with PG_swapbacked.
    swapcache, swapbacked = info.bit("PG_swapcache", word), info.bit("PG_swapbacked", word)
    if not swapcache:
        return 0
    private = info.bit("PG_private", word)
    if not swapbacked and swapcache < private:
        swapbacked = private << _SWAPBACKED_BEHIND_PRIVATE
    return swapcache | swapbacked


def _second_page(
    info: _Entries, size: int, word: int, *, width: int
) -> tuple[Field | None, Field | None, int, int | None]:
    """Return order, destructor, bit and value of hugetlb in a compound page's second struct."""
    if info.page_type("HUGETLB") is not None or info.get("NUMBER(PG_hugetlb)") is not None:
        flags = info.field("page.flags", word, size)
        return flags, None, info.bit("PG_hugetlb", word), None
    of_folio = info.get("OFFSET(folio._folio_order)")
    if of_folio is not None:
        of_dtor = info.get("OFFSET(folio._folio_dtor)")
        offsets = of_folio - size, None if of_dtor is None else of_dtor - size
    else:
        of_page = info.get("OFFSET(page.compound_order)")
        if of_page is None:
            return None, None, 0, None
        offsets = of_page, info.get("OFFSET(page.compound_dtor)")
    order, destructor = (
        Field(offset, width) if offset is not None and 0 <= offset <= size - width else None
        for offset in offsets
    )
    return order, destructor, 0, info.get("NUMBER(HUGETLB_PAGE_DTOR)")
