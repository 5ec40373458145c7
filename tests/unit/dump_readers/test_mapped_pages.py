"""A block of mapped-ram is told of as its bitmap says, whatever part of it is asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._mapped_pages import MappedPages
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.migration import PageMap

_PAGE = 4096
_BITMAP_AT = 100
_PAGES_AT = 1 << 20
_PIECE = 1 << 17
"""Pages of which a piece of the bitmap tells."""


class _Bitmap(DumpImage):
    """An image that has a bitmap, and is as large as it has to be."""

    def __init__(self, bits: int, pages: int) -> None:
        self._bytes = bits.to_bytes(-(-pages // 64) * 8, "little")
        self.size = _PAGES_AT + pages * _PAGE

    def read_into(self, offset: int, buffer: memoryview) -> None:
        start = offset - _BITMAP_AT
        buffer[:] = self._bytes[start : start + len(buffer)]

    def stored(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        yield offset, offset + size

    def close(self) -> None:
        pass


def _block(bits: int, pages: int, *, size: int = 0) -> MappedPages:
    told = PageMap(0, _PAGES_AT, size or pages * _PAGE, _PAGE, _BITMAP_AT)
    return MappedPages(_Bitmap(bits, pages), told)


@pytest.mark.parametrize("pages", [130, _PIECE + 77])
def test_every_part_is_as_the_bitmap_says(pages: int):
    chance = random.Random(5)  # noqa: S311 - the same each time
    bits = 0
    for _ in range(40):
        bits |= ((1 << chance.randrange(1, 30)) - 1) << chance.randrange(pages)
    bits |= 0x7FF << _PIECE - 5
    bits &= (1 << pages) - 1
    block = _block(bits, pages)
    assert list(block.seen()) == [(0, pages * _PAGE)]
    for _ in range(60):
        first = chance.randrange(pages)
        end = min(pages, first + chance.randrange(1, 300))
        offset, stop = first * _PAGE + chance.randrange(2) * 8, end * _PAGE
        expected = [bits >> page & 1 for page in range(first, end)]
        found: list[int] = []
        position = offset
        for count, place, fill in block.pieces(offset, stop - offset):
            assert place in {0, _PAGES_AT + position}
            assert fill == (b"" if place else b"\0")
            position += count
            found += [int(bool(place))] * (-(-position // _PAGE) - first - len(found))
        assert (found, position) == (expected, stop)
        stored = [0] * (end - first)
        for low, high in block.stored(offset, stop):
            assert offset <= low < high <= stop
            for page in range(low // _PAGE, -(-high // _PAGE)):
                stored[page - first] = 1
        assert stored == expected


def test_last_page_may_be_cut():
    block = _block(0b111, 3, size=2 * _PAGE + 10)
    assert list(block.stored(0, 2 * _PAGE + 10)) == [(0, 2 * _PAGE + 10)]
    assert list(block.pieces(0, 2 * _PAGE + 10)) == [(2 * _PAGE + 10, _PAGES_AT, b"")]


def test_page_behind_the_end_is_refused():
    with pytest.raises(CorruptDumpError, match="a page at 0x3000 of a RAM block of 0x2800 bytes"):
        _block(0b1000, 4, size=0x2800)
