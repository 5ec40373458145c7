"""The filter by numpy against one that goes from page to page, on struct pages of any content."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux import page_filter
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.mem_map import MemMapRun
from qemu_dump_ext.linux.page_filter import FilterRules, find_excluded_pages
from qemu_dump_ext.linux.struct_page import StructPage, parse_struct_page

_SIZE = 64
_FLAGS, _MAPPING, _PRIVATE, _HEAD, _MAPCOUNT = 0, 24, 40, 8, 48
_COMMON = {
    "PAGESIZE": 4096,
    "SIZE(page)": _SIZE,
    "SIZE(list_head)": 16,
    "OFFSET(page.flags)": _FLAGS,
    "OFFSET(page.mapping)": _MAPPING,
    "OFFSET(page.private)": _PRIVATE,
    "OFFSET(page._mapcount)": _MAPCOUNT,
    "LENGTH(zone.free_area)": 11,
}
_V6_1 = _COMMON | {
    "OSRELEASE": "6.1.0",
    "OFFSET(page.compound_head)": _HEAD,
    "OFFSET(page.compound_dtor)": 16,
    "OFFSET(page.compound_order)": 17,
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
_V7_2 = _COMMON | {
    "OSRELEASE": "7.2.0",
    "OFFSET(page.compound_info)": _HEAD,
    "NUMBER(PG_lru)": 5,
    "NUMBER(PG_private)": 14,
    "NUMBER(PG_swapcache)": 10,
    "NUMBER(PG_swapbacked)": 17,
    "NUMBER(PG_hwpoison)": 21,
    "NUMBER(PG_head_mask)": 0x40,
    "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)": -268435456,
    "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)": -251658240,
    "NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)": -201326592,
    "NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)": -184549376,
    "NUMBER(PAGE_UNACCEPTED_MAPCOUNT_VALUE)": -134217728,
}
_KERNELS = {"6.1": _V6_1, "7.2": _V7_2}


def _text(entries: Mapping[str, object]) -> bytes:
    return "".join(f"{key}={value}\n" for key, value in entries.items()).encode()


@dataclass
class _MemMap:
    """Struct pages at kernel address 0, some of them not there."""

    data: bytearray
    holes: tuple[tuple[int, int], ...] = ()

    def read_known(self, gva: int, view: memoryview) -> list[tuple[int, int]]:
        cut = ((max(low - gva, 0), min(high - gva, len(view))) for low, high in self.holes)
        missing = [(low, high) for low, high in cut if low < high]
        before = bytes(view)
        view[:] = self.data[gva : gva + len(view)]
        for low, high in missing:
            view[low:high] = before[low:high]
        return missing

    def put(self, pfn: int, offset: int, value: int, size: int = 8) -> None:
        at = pfn * _SIZE + offset
        self.data[at : at + size] = value.to_bytes(size, "little")

    def get(self, pfn: int, offset: int, size: int = 8) -> int:
        at = pfn * _SIZE + offset
        return int.from_bytes(self.data[at : at + size], "little")


def _excluded(
    map_: _MemMap, entries: Mapping[str, object], level: int, *, exact: bool, **more: object
) -> set[int]:
    layout = parse_struct_page(_text(entries), "little", level)
    runs = [MemMapRun(0, len(map_.data) // _SIZE, 0)]
    kept = cast("list[tuple[int, int]]", more.get("kept", []))
    found = find_excluded_pages(
        FilterRules(level, exact), layout, runs, cast("KernelMemory", map_), kept
    )
    return {pfn for first, end in found.ranges for pfn in range(first, end)}


def _walk(map_: _MemMap, layout: StructPage, level: int) -> Iterator[int]:
    """Yield what makedumpfile leaves out, page by page."""
    count = len(map_.data) // _SIZE
    pfn = 0
    while pfn < count:
        size, out = _judge(map_, layout, level, pfn, count)
        if out:
            yield from range(pfn, min(pfn + size, count))
            pfn += size
        else:
            pfn += 1


def _judge(map_: _MemMap, layout: StructPage, level: int, pfn: int, count: int) -> tuple[int, bool]:
    flags, types = map_.get(pfn, _FLAGS), map_.get(pfn, _MAPCOUNT, 4)
    if map_.get(pfn, _HEAD) & 1:
        return 1, False
    slab = bool(flags & layout.slab_bit) or types == layout.slab_type
    if level & 16 and types == layout.buddy and not slab:
        order = map_.get(pfn, _PRIVATE)
        return (1 << order, True) if order < layout.free_orders else (1, False)
    if level & 16 and types == layout.unaccepted:
        return 1 << layout.free_orders - 1, True
    anonymous = bool(map_.get(pfn, _MAPPING) & 1) and not slab
    order, hugetlb = 0, False
    if flags & layout.head and pfn + 1 < count:
        second = map_.get(pfn + 1, _FLAGS)
        if layout.hugetlb_type is not None:
            order, hugetlb = second & 0xFF, types == layout.hugetlb_type
        else:
            order = map_.get(pfn + 1, 17, 1)
            hugetlb = map_.get(pfn + 1, 16, 1) == layout.hugetlb_destructor
        if order >= 40 or pfn % (1 << order):
            order = 0
    cache = bool(flags & layout.lru) or flags & layout.swapcache == layout.swapcache
    private = bool(flags & layout.private_bit)
    out = (
        (cache and not anonymous and bool(level & 4 or (level & 2 and not private)))
        or (bool(level & 8) and (anonymous or hugetlb))
        or bool(flags & layout.hwpoison)
        or (types == layout.offline and not slab)
    )
    return 1 << order, out


def _random_map(seed: int, entries: Mapping[str, object]) -> _MemMap:
    """Mostly what a kernel may have, some of it nonsense."""
    dice = random.Random(seed)  # noqa: S311
    layout = parse_struct_page(_text(entries), "little", 31)
    map_ = _MemMap(bytearray(700 * _SIZE))
    bits = [layout.lru, layout.private_bit, layout.swapcache, layout.slab_bit, layout.hwpoison]
    types = [value for value in layout.known_types if value != layout.unaccepted]
    for pfn in range(700):
        flags = sum(bit for bit in set(bits) if dice.random() < 0.15)
        kind = dice.random()
        map_.put(pfn, _MAPCOUNT, dice.choice(types) if kind < 0.2 else 0xFFFFFFFF, 4)
        map_.put(pfn, _MAPPING, dice.getrandbits(62) << 1 | (dice.random() < 0.2))
        map_.put(pfn, _PRIVATE, dice.choice([0, 0, 1, 2, 3, 5, 11, 60]))
        map_.put(pfn, 16, dice.choice([0, 2]) | dice.choice([0, 1, 2, 3, 7, 200]) << 8, 2)
        if dice.random() < 0.1:
            flags |= layout.head
        if layout.hugetlb_type is not None and pfn and map_.get(pfn - 1, _FLAGS) & layout.head:
            flags = dice.choice([1, 2, 3, 9, 255])
        map_.put(pfn, _FLAGS, flags)
        map_.put(pfn, _HEAD, dice.random() < 0.2)
    return map_


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_walk_of_makedumpfile(kernel: str, seed: int):
    entries = _KERNELS[kernel]
    map_ = _random_map(seed, entries)
    layout = parse_struct_page(_text(entries), "little", 31)
    for level in range(2, 32):
        walked = set(_walk(map_, layout, level))
        assert _excluded(map_, entries, level, exact=True) == walked, level


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.parametrize("seed", range(20))
def test_in_doubt_a_page_stays(kernel: str, seed: int):
    entries = _KERNELS[kernel]
    map_ = _random_map(seed, entries)
    map_.holes = ((100 * _SIZE + 5, 130 * _SIZE + 1),)
    kept = [(3, 9), (650, 10_000)]
    safe = _excluded(map_, entries, 31, exact=False, kept=kept)
    assert safe <= _excluded(map_, entries, 31, exact=True)
    assert not safe & {*range(3, 9), *range(650, 700)}


def _block(map_: _MemMap, pfn: int, order: int, *, tails: bool = True) -> None:
    """Put anonymous memory of 2^order pages, as v7.2 has it."""
    map_.put(pfn, _FLAGS, 0x40)
    map_.put(pfn, _MAPPING, 1)
    for behind in range(pfn + 1, pfn + (1 << order)):
        map_.put(behind, _HEAD, tails)
        map_.put(behind, _FLAGS, order if behind == pfn + 1 else 0)


def test_a_block_is_left_out_whole():
    map_ = _MemMap(bytearray(64 * _SIZE))
    _block(map_, 16, 3)
    assert _excluded(map_, _V7_2, 8, exact=False) == set(range(16, 24))


@pytest.mark.parametrize("fault", ["a tail is none", "two overlap", "the end is behind mem_map"])
def test_a_block_that_contradicts_others_stays(fault: str):
    map_ = _MemMap(bytearray(64 * _SIZE))
    _block(map_, 16, 3)
    _block(map_, 32, 2)
    if fault == "a tail is none":
        map_.put(20, _HEAD, 0)
        map_.put(20, _FLAGS, 0)
    elif fault == "two overlap":
        map_.put(20, _HEAD, 0)
        _block(map_, 20, 1)
    else:
        map_.data = map_.data[: 20 * _SIZE]
    left_out = _excluded(map_, _V7_2, 8, exact=False)
    assert not left_out & set(range(16, 20))
    assert left_out <= {*range(32, 36)}


def test_what_cannot_be_read_is_not_what_was_read_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_filter, "_CHUNK", 64)
    map_ = _MemMap(bytearray(128 * _SIZE))
    _block(map_, 16, 3)
    _block(map_, 80, 3)
    map_.holes = ((82 * _SIZE, 88 * _SIZE),)
    assert _excluded(map_, _V7_2, 31, exact=False) == set(range(16, 24))


def test_private_cache_and_pages_of_unknown_types_stay():
    map_ = _MemMap(bytearray(8 * _SIZE))
    for pfn in range(4):
        map_.put(pfn, _FLAGS, 1 << 5)
        map_.put(pfn, _MAPCOUNT, 0xFFFFFFFF, 4)
    map_.put(1, _FLAGS, 1 << 5 | 1 << 14)
    map_.put(2, _MAPCOUNT, 0xF9000000, 4)
    assert _excluded(map_, _V7_2, 31, exact=False) == {0, 3}
    assert _excluded(map_, _V7_2, 31, exact=True) == {0, 1, 2, 3}
    assert _excluded(map_, _V7_2, 2, exact=True) == {0, 2, 3}


@pytest.mark.parametrize(
    ("missing", "level", "words"),
    [
        ("OFFSET(page.compound_info)", 2, "compound_head.* and .*compound_info"),
        ("NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)", 8, "PAGE_SLAB_MAPCOUNT_VALUE.* and .*PG_slab"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", 16, "PAGE_BUDDY_MAPCOUNT_VALUE"),
        ("OFFSET(page.mapping)", 16, "page.mapping"),
        ("SIZE(page)", 31, "SIZE"),
    ],
)
def test_what_a_level_needs_is_refused_by_its_name(missing: str, level: int, words: str):
    entries = {key: value for key, value in _V7_2.items() if key != missing}
    with pytest.raises(SourceError, match=words):
        parse_struct_page(_text(entries), "little", level)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_mem_map_make_no_difference(
    seed: int, exact: bool, monkeypatch: pytest.MonkeyPatch
):
    map_ = _random_map(seed, _V7_2)
    for pfn in range(1, 700, 2):  # no compound page begins at such a one
        map_.put(pfn, _FLAGS, map_.get(pfn, _FLAGS) & ~0x40)
    # Blocks that fill pieces, reach into later ones, or behind the end.
    for pfn, order in ((128, 7), (320, 6), (384, 7), (640, 6)):
        for page in range(pfn, min(pfn + (1 << order), 700)):
            map_.put(page, _FLAGS, order if page == pfn + 1 else 0)
            map_.put(page, _MAPCOUNT, 0xFFFFFFFF, 4)
            map_.put(page, _HEAD, page > pfn)
        map_.put(pfn, _FLAGS, 0x40)
        map_.put(pfn, _MAPPING, 1)
    map_.put(400 + 16 * seed, _HEAD, seed % 2)  # a tail that is none, or is one
    whole = _excluded(map_, _V7_2, 31, exact=exact)
    for size in (32, 64, 256):
        monkeypatch.setattr(page_filter, "_CHUNK", size)
        assert _excluded(map_, _V7_2, 31, exact=exact) == whole, size
    monkeypatch.setattr(page_filter, "_PIECE", 64)
    assert _excluded(map_, _V7_2, 31, exact=exact) == whole


def test_of_very_many_ranges_the_largest_are_left_out(monkeypatch: pytest.MonkeyPatch):
    map_ = _MemMap(bytearray(700 * _SIZE))
    for pfn in range(700):
        map_.put(pfn, _FLAGS, (1 << 5) * bool(pfn % (2 + pfn // 100)))
        map_.put(pfn, _MAPCOUNT, 0xFFFFFFFF, 4)
    whole = _excluded(map_, _V7_2, 31, exact=False)
    monkeypatch.setattr(page_filter, "_RANGES_MAX", 20)
    monkeypatch.setattr(page_filter, "_PIECE", 64)
    largest = _excluded(map_, _V7_2, 31, exact=False)
    assert largest < whole
    sizes = [
        next(size for size in range(1, 700) if first + size not in whole)
        for first in whole
        if first - 1 not in whole
    ]
    assert len(largest) == sum(sorted(sizes)[-20:])


class _Repeated:
    # Struct pages of a guest of any size, in which all kinds come in turn.
    def __init__(self) -> None:
        map_ = _MemMap(bytearray((1 << 14) * _SIZE))
        for pfn in range(1 << 14):
            map_.put(pfn, _MAPCOUNT, 0xFFFFFFFF, 4)
            map_.put(pfn, _FLAGS, (1 << 5) * (pfn % 2))
        for pfn in range(0, 1 << 13, 16):
            map_.put(pfn, _MAPCOUNT, 0xF0000000, 4)
            map_.put(pfn, _PRIVATE, 3)
        for pfn in range(1 << 13, 3 << 12, 512):
            _block(map_, pfn, 9)
        self._content = bytes(map_.data) * (page_filter._CHUNK >> 14)

    def read_known(self, gva: int, view: memoryview) -> list[tuple[int, int]]:
        at = gva % len(self._content)
        view[:] = self._content[at : at + len(view)]
        return []


@pytest.mark.parametrize("exact", [True, False])
def test_memory_for_a_large_guest_is_bounded(exact: bool):
    layout = parse_struct_page(_text(_V7_2), "little", 31)
    kernel, runs = cast("KernelMemory", _Repeated()), [MemMapRun(0, (16 << 30) // 4096, 0)]
    tracemalloc.start()
    try:
        found = find_excluded_pages(FilterRules(31, exact), layout, runs, kernel)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.page_count > runs[0].count // 4
    assert peak < (64 << 20) + 16 * (1 << 18)
