"""Where each page of a RAM block is in a file by the capability mapped-ram.

The bitmap stays in the file: of a guest of terabytes it has many MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from qemu_dump_ext.dump_readers._bitmap_runs import length_of_run, runs_of_ones
from qemu_dump_ext.dump_readers._extent_index import merged
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.migration import PageMap

_PIECE_SIZE = 1 << 14
"""Bytes of bitmap that are read at one time."""
_PIECE_BITS = 8 * _PIECE_SIZE
_PIECES_KEPT = 8


class MappedPages:
    """The pages of one RAM block; has what `PagePlaces` has.

    Raises:
        CorruptDumpError: The file does not have the block, or the map has a page behind its end.
    """

    def __init__(self, image: DumpImage, pages: PageMap) -> None:
        self._image = image
        self._pages = pages
        self._piece = lru_cache(_PIECES_KEPT)(self._read_piece)
        image.check(pages.place, pages.size)
        count = -(-pages.size // pages.page_size)
        last = self._bits(count)
        if last:
            offset = (count + (last & -last).bit_length() - 1) * pages.page_size
            raise CorruptDumpError(f"a page at {offset:#x} of a RAM block of {pages.size:#x} bytes")

    def _read_piece(self, number: int) -> bytes:
        start = number * _PIECE_SIZE
        size = min(_PIECE_SIZE, max(0, self._pages.bitmap_size - start))
        return self._image.read(self._pages.bitmap_place + start, size)

    def _bits(self, page: int) -> int:
        """Return the bits from that of a page on, up to the end of their piece."""
        number, bit = divmod(page, _PIECE_BITS)
        return int.from_bytes(self._piece(number)[bit // 8 :], "little") >> bit % 8

    def seen(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is known of the block: all."""
        yield 0, self._pages.size

    def stored(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is no page of zeros in a range, ascending, merged."""
        page_size, place = self._pages.page_size, self._pages.place
        for page, count in merged(self._stored_pages(offset // page_size, -(-end // page_size))):
            low, high = max(page * page_size, offset), min((page + count) * page_size, end)
            for start, stop in self._image.stored(place + low, high - low):
                yield start - place, stop - place

    def _stored_pages(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        for number in self._stored_pieces(first // _PIECE_BITS, -(-end // _PIECE_BITS)):
            for page, count in runs_of_ones(self._piece(number), number * _PIECE_BITS):
                low, high = max(page, first), min(page + count, end)
                if low < high:
                    yield low, high - low

    def _stored_pieces(self, first: int, end: int) -> Iterator[int]:
        """Yield the numbers of pieces of the bitmap that are not in a hole of the file."""
        place = self._pages.bitmap_place
        start, size = place + first * _PIECE_SIZE, (end - first) * _PIECE_SIZE
        for low, high in self._image.stored(start, min(size, self._image.size - start)):
            stop = min(-(-(high - place) // _PIECE_SIZE), end)
            yield from range(max(first, (low - place) // _PIECE_SIZE), stop)
            first = stop

    def pieces(self, offset: int, size: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield what makes up a range, in order, as `PagePlaces.pieces` does."""
        page_size, place = self._pages.page_size, self._pages.place
        while size:
            page = offset // page_size
            bits = self._bits(page)
            run = length_of_run(bits)
            is_there = bool(run)
            if not is_there:
                left = _PIECE_BITS - page % _PIECE_BITS
                run = (bits & -bits).bit_length() - 1 if bits else left
            count = min((page + run) * page_size - offset, size)
            yield count, place + offset if is_there else 0, b"" if is_there else b"\0"
            offset, size = offset + count, size - count
