"""What is known of pages that a hostile stream scatters takes no memory out of proportion."""

from __future__ import annotations

import tracemalloc

import pytest

from qemu_dump_ext.dump_readers._page_places import PagePlaces
from qemu_dump_ext.errors import CorruptDumpError

PAGE = 4096
_FAR = 1 << 24


def _fill(places: PagePlaces, count: int) -> None:
    for number in range(count):
        places.fill(number * _FAR, 0x55)


def test_filled_pages_too_many_and_too_far_apart_are_refused():
    places = PagePlaces(PAGE)
    tracemalloc.start()
    with pytest.raises(CorruptDumpError, match="too many and too far apart"):
        _fill(places, 100_000)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_filled_pages_that_lie_together_are_known_whatever_their_number():
    places = PagePlaces(PAGE)
    for number in range(20_000):
        places.fill(number * PAGE * 9, 0x55)
    assert len(list(places.stored(0, 20_000 * PAGE * 9))) == 20_000
    assert list(places.pieces(9 * PAGE, 2 * PAGE)) == [(PAGE, 0, b"\x55"), (PAGE, 0, b"\0")]


def test_pages_that_the_file_has_may_be_as_far_apart_as_they_like():
    places = PagePlaces(PAGE)
    tracemalloc.start()
    for number in range(20_000):
        places.add(number * _FAR, PAGE * (number + 1))
    assert tracemalloc.get_traced_memory()[0] < 20_000 * PAGE // 4
    tracemalloc.stop()
    assert list(places.pieces(_FAR, PAGE)) == [(PAGE, 2 * PAGE, b"")]


def test_pages_that_come_again_and_again_take_no_more_memory():
    places = PagePlaces(PAGE)
    for _ in range(5):
        for first in (0, 1):
            for page in range(first, 40_000, 2):
                places.fill(page * PAGE, 0)
    assert len(places._seen_from) <= 1 << 16
    assert list(places.seen()) == [(0, 40_000 * PAGE)]
