"""A small guest made up in a test, whose kernel has page tables, a log, and struct pages."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.linux.kernel_pages import KernelPages
from tests.support.fake_kernel import KERNEL_MAP, FlatMemory

PAGE = 4096
STRUCT_PAGE = 64
SIZE = 4 << 20
LINEAR_MAP, VMALLOC, VMEMMAP = 0xFFFF888000000000, 0xFFFFC90000000000, 0xFFFFEA0000000000
IMAGE, TABLES, SECTIONS, MEM_MAP = 0x100000, 0x120000, 0x140000, 0x150000
STACK, OTHER_STACK, PER_CPU, LOG = 0x170000, 0x174000, 0x180000, 0x220000
IMAGE_SIZE, STACK_SIZE, PER_CPU_SIZE, LOG_SIZE = 0x10000, 0x4000, 0x8000, 0x8000
MEM_MAP_SIZE = SIZE // PAGE * STRUCT_PAGE
FLAGS, HEAD, MAPPING, PRIVATE, MAPCOUNT = 0, 8, 24, 40, 48
LRU, ANONYMOUS, NO_TYPE = 1 << 4, 1, 0xFFFFFFFF
_SEPARATOR = b"\0\0\0\0"
_PRESENT, _SECTION_BITS = 0x63, 21
_LOG_POINTER, _LOG_LENGTH = IMAGE_SIZE - 16, IMAGE_SIZE - 8

NUMBERS: Mapping[str, object] = {
    "OSRELEASE": "6.1.0",
    "PAGESIZE": PAGE,
    "SYMBOL(swapper_pg_dir)": f"{KERNEL_MAP + TABLES - IMAGE:x}",
    "NUMBER(phys_base)": IMAGE,
    "SYMBOL(_stext)": f"{KERNEL_MAP:x}",
    "SYMBOL(log_buf)": f"{KERNEL_MAP + _LOG_POINTER:x}",
    "SYMBOL(log_buf_len)": f"{KERNEL_MAP + _LOG_LENGTH:x}",
    "SYMBOL(mem_section)": f"{LINEAR_MAP + SECTIONS:x}",
    "SIZE(mem_section)": 16,
    "OFFSET(mem_section.section_mem_map)": 0,
    "NUMBER(SECTION_SIZE_BITS)": _SECTION_BITS,
    "NUMBER(MAX_PHYSMEM_BITS)": 46,
    "SIZE(page)": STRUCT_PAGE,
    "SIZE(list_head)": 16,
    "OFFSET(page.flags)": FLAGS,
    "OFFSET(page.mapping)": MAPPING,
    "OFFSET(page.private)": PRIVATE,
    "OFFSET(page._mapcount)": MAPCOUNT,
    "OFFSET(page.compound_head)": HEAD,
    "OFFSET(page.compound_dtor)": 16,
    "OFFSET(page.compound_order)": 17,
    "LENGTH(zone.free_area)": 11,
    "NUMBER(HUGETLB_PAGE_DTOR)": 2,
    "NUMBER(PG_lru)": 4,
    "NUMBER(PG_private)": 13,
    "NUMBER(PG_swapcache)": 10,
    "NUMBER(PG_swapbacked)": 19,
    "NUMBER(PG_slab)": 9,
    "NUMBER(PG_hwpoison)": 23,
    "NUMBER(PG_head_mask)": 0x10000,
    "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)": -129,
    "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)": -257,
}


class GuestWithPages:
    """4 MiB of memory with a kernel of v6.1 in it, of which every page is said to be anonymous.

    Attributes:
        memory: Guest physical memory.
        vmcoreinfo: Text of the kernel's.
        vcpus: Two, whose registers point to stacks and a per-CPU area; one of the stacks is in the
            linear map.
    """

    def __init__(self) -> None:
        """Make it up."""
        self.memory = FlatMemory(SIZE)
        self.vmcoreinfo = "".join(f"{key}={value}\n" for key, value in NUMBERS.items()).encode()
        registers = {"rsp": VMALLOC + STACK_SIZE // 2, "gs_base": LINEAR_MAP + PER_CPU}
        other = {"rsp": LINEAR_MAP + OTHER_STACK + STACK_SIZE - 8}
        self.vcpus: Sequence[Vcpu] = [Vcpu(0, registers), Vcpu(1, other)]
        self._next_table = TABLES + PAGE
        self._tables: dict[tuple[int, int], int] = {}
        self._map(KERNEL_MAP, IMAGE, IMAGE_SIZE)
        self._map(KERNEL_MAP + TABLES - IMAGE, TABLES, PAGE)
        self._map(LINEAR_MAP, 0, SIZE)
        self._map(VMALLOC, STACK, STACK_SIZE)
        self._map(VMEMMAP, MEM_MAP, MEM_MAP_SIZE)
        self.tables_end = self._next_table
        self.memory.put_entries(IMAGE + _LOG_POINTER, {0: LINEAR_MAP + LOG, 1: LOG_SIZE})
        self.memory.put_entries(SECTIONS, {0: LINEAR_MAP + SECTIONS + PAGE})
        self.memory.put_entries(SECTIONS + PAGE, {0: VMEMMAP | 1, 2: VMEMMAP | 1})
        for pfn in range(SIZE // PAGE):
            self.say(pfn, FLAGS, LRU)
            self.say(pfn, MAPPING, ANONYMOUS)
            self.say(pfn, MAPCOUNT, NO_TYPE, 4)

    def _map(self, gva: int, gpa: int, size: int) -> None:
        for offset in range(0, size, PAGE):
            self.map_page(gva + offset, gpa + offset)

    def map_page(self, gva: int, gpa: int) -> None:
        """Let the kernel's page tables map a page."""
        table = TABLES
        for shift in (39, 30, 21):
            place = (shift, gva >> shift)
            if place not in self._tables:
                self._tables[place] = self._next_table
                entry = {gva >> shift & 511: self._next_table | _PRESENT}
                self.memory.put_entries(table, entry)
                self._next_table += PAGE
            table = self._tables[place]
        self.memory.put_entries(table, {gva >> 12 & 511: gpa | _PRESENT})

    def say(self, pfn: int, offset: int, value: int, size: int = 8) -> None:
        """Put a field of a page's struct page."""
        self.memory.put(MEM_MAP + pfn * STRUCT_PAGE + offset, value.to_bytes(size, "little"))

    def to_bytes(self) -> bytes:
        """Return what a hostile guest may have otherwise: VMCOREINFO, page tables, struct pages."""
        area = memoryview(self.memory.data)
        entries = b"".join(
            struct.pack("<QQ", gpa, *struct.unpack_from("<Q", area, gpa))
            for gpa in range(TABLES, SECTIONS + 2 * PAGE, 8)
            if any(area[gpa : gpa + 8])
        )
        return _SEPARATOR.join((self.vmcoreinfo, area[MEM_MAP:][:MEM_MAP_SIZE], entries))

    def take(self, data: bytes) -> bool:
        """Be what `to_bytes` told; return whether nothing but struct pages is otherwise."""
        text, _, rest = data.partition(_SEPARATOR)
        map_, entries = rest[:MEM_MAP_SIZE], rest[MEM_MAP_SIZE + len(_SEPARATOR) :]
        _, _, of_ours = self.to_bytes().partition(_SEPARATOR)
        is_ours = text == self.vmcoreinfo and entries == of_ours[MEM_MAP_SIZE + len(_SEPARATOR) :]
        self.vmcoreinfo = text
        self.memory.put(MEM_MAP, map_)
        self.memory.put(TABLES, bytes(SECTIONS + 2 * PAGE - TABLES))
        for gpa, entry in struct.iter_unpack("<QQ", entries[: len(entries) // 16 * 16]):
            if gpa <= SIZE - 8:
                self.memory.put(gpa, struct.pack("<Q", entry))
        return is_ours

    def pages(self) -> KernelPages:
        """Return its pages as its kernel accounts for them."""
        return KernelPages(
            all_architectures()["x86_64"],
            self.memory,
            self.memory.blocks,
            vcpus=self.vcpus,
            vmcoreinfo=self.vmcoreinfo,
            byte_order="little",
        )

    def needed(self) -> Mapping[str, range]:
        """Return the pages that no struct page can bring out of a dump, by what they are."""
        places = {
            "the kernel's image": (IMAGE, IMAGE_SIZE),
            "page tables": (TABLES, self.tables_end - TABLES),
            "the stack of a vCPU": (STACK, STACK_SIZE),
            "the stack of another vCPU": (OTHER_STACK, STACK_SIZE),
            "the per-CPU area of a vCPU": (PER_CPU, PER_CPU_SIZE),
            "the log": (LOG, LOG_SIZE),
            "struct pages": (MEM_MAP, MEM_MAP_SIZE),
        }
        return {
            name: range(start // PAGE, (start + size) // PAGE)
            for name, (start, size) in places.items()
        }
