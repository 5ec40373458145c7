from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.pages.page_set import PageSet

_PAGE = 4096


def _ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ranges with pages between them, from the distances of their borders."""
    borders, last = [], 0
    for number in numbers:
        last += number
        borders.append(last)
    return tuple(zip(borders[::2], borders[1::2], strict=False))


def _bytes_outside(ranges: tuple[tuple[int, int], ...], block: RamBlock) -> set[int]:
    # In units of a quarter of a page, at which the blocks begin and end.
    excluded = {pfn for first, end in ranges for pfn in range(first, end)}
    step = _PAGE // 4
    return {at for at in range(block.gpa, block.end, step) if at // _PAGE not in excluded}


@given(
    st.lists(st.integers(1, 5), max_size=12),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=4),
)
def test_what_is_left_of_blocks(numbers: list[int], sizes: list[tuple[int, int]]):
    ranges = _ranges(numbers)
    blocks, position = [], 0
    for gap, size in sizes:
        position += gap * _PAGE // 4
        blocks.append(RamBlock(position, size * _PAGE // 4, "ram", 100 + position))
        position += size * _PAGE // 4
    left = PageSet(_PAGE, ranges).cut_from(blocks)
    step = _PAGE // 4
    covered = [at for block in left for at in range(block.gpa, block.end, step)]
    assert covered == sorted({at for block in blocks for at in _bytes_outside(ranges, block)})
    assert all(block.region_offset == 100 + block.gpa for block in left)


def test_larger_pages_are_in_the_set_if_all_of_theirs_are():
    pages = PageSet(_PAGE, ((0, 17), (31, 33), (47, 80)))
    assert pages.in_pages_of(16 * _PAGE) == PageSet(16 * _PAGE, ((0, 1), (3, 5)))
    assert pages.in_pages_of(_PAGE) is pages
    assert pages.page_count == 17 + 2 + 33


def test_pages_that_ranges_touch_are_merged():
    found = PageSet.touched_by(4096, [(8192, 8193), (0, 1), (4095, 4097), (20480, 20480)])
    assert found.ranges == ((0, 3),)


def _pages(pages: PageSet) -> set[int]:
    return {page for first, end in pages.ranges for page in range(first, end)}


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=9),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=9),
)
def test_union_and_difference_are_those_of_sets(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
):
    sets, pages = [], []
    for places in (one, other):
        ranges = [(first, first + count) for first, count in places]
        sets.append(PageSet.touched_by(1, ranges))
        pages.append({page for first, end in ranges for page in range(first, end)})
    for found, expected in (
        (sets[0], pages[0]),
        (sets[0].union(sets[1]), pages[0] | pages[1]),
        (sets[0].without(sets[1]), pages[0] - pages[1]),
    ):
        assert _pages(found) == expected
        borders = [border for bounds in found.ranges for border in bounds]
        assert borders == sorted(set(borders))
