"""What stays in a dump whatever struct pages say, and what more goes from a mini dump."""

from __future__ import annotations

import random

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.page_filter import FilterRules
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.structures.c_struct import U64_MAX
from tests.support.fake_kernel import KERNEL_MAP
from tests.support.fake_pages import (
    FLAGS,
    HEAD,
    IMAGE,
    LINEAR_MAP,
    LRU,
    MAPCOUNT,
    MAPPING,
    MEM_MAP,
    MEM_MAP_SIZE,
    NO_TYPE,
    NUMBERS,
    PAGE,
    SIZE,
    STRUCT_PAGE,
    TABLES,
    VMALLOC,
    VMEMMAP,
    GuestWithPages,
)

_ALL = SIZE // PAGE
_WITHOUT_PAGE_TABLES = ("SYMBOL(swapper_pg_dir)", "NUMBER(phys_base)")
_OF_WHAT_IS_NEEDED = ("SYMBOL(log_buf)", "SYMBOL(log_buf_len)", "SYMBOL(_stext)")
_MINI = FilterRules(31, without_struct_pages=True)


def _pages(found: PageSet) -> set[int]:
    return {pfn for first, end in found.ranges for pfn in range(first, end)}


@pytest.fixture
def guest() -> GuestWithPages:
    return GuestWithPages()


def test_makedumpfile_would_leave_everything_out(guest: GuestWithPages):
    assert _pages(guest.pages().excluded(FilterRules(31, exact=True))) == set(range(_ALL))


def test_what_readers_need_stays_though_all_struct_pages_lie(guest: GuestWithPages):
    excluded = _pages(guest.pages().excluded(FilterRules(31)))
    for name, pages in guest.needed().items():
        assert not excluded & set(pages), name
    assert len(excluded) > _ALL * 3 // 4


def test_a_mini_dump_lacks_struct_pages_of_pages_that_it_lacks(guest: GuestWithPages):
    level = _pages(guest.pages().excluded(FilterRules(31)))
    mini = _pages(guest.pages().excluded(_MINI))
    per_page = PAGE // STRUCT_PAGE
    first = MEM_MAP // PAGE
    gone = {
        first + number
        for number in range(MEM_MAP_SIZE // PAGE)
        if set(range(number * per_page, (number + 1) * per_page)) <= level
    }
    assert mini == level | gone
    assert gone
    for name, pages in guest.needed().items():
        assert name == "struct pages" or not mini & set(pages), name


def test_a_page_that_the_kernel_has_at_another_address_as_well_stays(guest: GuestWithPages):
    # Sections that lead to the page tables and to the image for struct pages.
    guest.memory.put(IMAGE, bytes(PAGE))
    for target in (TABLES, IMAGE):
        guest.memory.put_entries(0x141000, {0: LINEAR_MAP + target | 1, 2: LINEAR_MAP + target | 1})
        excluded = _pages(guest.pages().excluded(_MINI))
        for name, pages in guest.needed().items():
            assert name == "struct pages" or not excluded & set(pages), name


def test_a_page_of_struct_pages_that_is_mapped_twice_stays_for_either(guest: GuestWithPages):
    # As with the optimised vmemmap of hugetlb.
    of_image = MEM_MAP + IMAGE // PAGE * STRUCT_PAGE
    guest.map_page(VMEMMAP + MEM_MAP_SIZE - PAGE, of_image)
    excluded = _pages(guest.pages().excluded(_MINI))
    assert of_image // PAGE not in excluded
    assert {(MEM_MAP + MEM_MAP_SIZE) // PAGE - 2, _ALL - 1} <= excluded


def test_addresses_lead_where_they_led_before_all_tables_were_walked(guest: GuestWithPages):
    dice = random.Random(5)  # noqa: S311
    for _ in range(40):
        guest.map_page(VMALLOC + dice.randrange(16, 64) * PAGE, dice.randrange(_ALL + 9) * PAGE)
    by_page, by_run = (
        KernelMemory(
            all_architectures()["x86_64"], guest.memory, guest.memory.blocks, guest.vmcoreinfo
        )
        for _ in range(2)
    )
    by_run.mappings()
    for area in (LINEAR_MAP, VMALLOC, VMEMMAP, KERNEL_MAP, U64_MAX - 9 * PAGE):
        for _ in range(40):
            gva, size = area + dice.randrange(-9, 64) * PAGE + dice.choice((0, 5)), 9 * PAGE + 7
            assert by_run.physical_ranges(gva, size) == by_page.physical_ranges(gva, size)
            known, told = memoryview(bytearray(size)), memoryview(bytearray(size))
            assert by_run.read_known(gva, told) == by_page.read_known(gva, known)
            assert told == known


def test_struct_pages_are_found_page_by_page(guest: GuestWithPages):
    for pfn in range(700, 750):
        guest.say(pfn, FLAGS, 0)
        guest.say(pfn, MAPPING, 0)
    expected = _pages(guest.pages().excluded(FilterRules(31)))
    assert not expected & set(range(700, 750))
    content = bytes(guest.memory.data[MEM_MAP : MEM_MAP + MEM_MAP_SIZE])
    for offset in range(0, MEM_MAP_SIZE, PAGE):
        # As memory from the end on is given to them, page by page.
        place = MEM_MAP + MEM_MAP_SIZE - PAGE - offset
        guest.map_page(VMEMMAP + offset, place)
        guest.memory.put(place, content[offset : offset + PAGE])
    reads = guest.memory.reads
    assert _pages(guest.pages().excluded(FilterRules(31))) == expected
    assert guest.memory.reads - reads < MEM_MAP_SIZE // PAGE


def _of_all_kinds() -> GuestWithPages:
    guest, dice = GuestWithPages(), random.Random(7)  # noqa: S311
    for pfn in range(256, _ALL):
        kind = dice.choice([LRU, LRU | 1 << 13, 1 << 10, 1 << 10 | 1 << 19, 1 << 9, 0x10000])
        is_free = dice.random() < 0.2
        guest.say(pfn, FLAGS, 0 if is_free else kind)
        guest.say(pfn, MAPPING, not is_free and dice.random() < 0.3)
        guest.say(pfn, MAPCOUNT, -129 & NO_TYPE if is_free else NO_TYPE, 4)
        guest.say(pfn, HEAD, not is_free and dice.random() < 0.2)
    return guest


@pytest.mark.parametrize("level", [2, 4, 8, 16, 31])
@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in _OF_WHAT_IS_NEEDED])
def test_without_an_entry_of_vmcoreinfo_no_more_is_left_out(key: str, level: int):
    guest = _of_all_kinds()
    whole = guest.pages().excluded(FilterRules(level))
    assert whole.ranges
    lines = guest.vmcoreinfo.splitlines(keepends=True)
    guest.vmcoreinfo = b"".join(line for line in lines if not line.startswith(key.encode()))
    assert guest.vmcoreinfo != b"".join(lines)
    try:
        found = guest.pages().excluded(FilterRules(level))
    except SourceError as error:
        said = str(error)
        assert key in said or (key in _WITHOUT_PAGE_TABLES and "page tables" in said)
    else:
        assert not found.without(whole).ranges
