"""Where each page of a RAM block is in a file, as pages come in any order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from qemu_dump_ext.dump_readers._extent_index import merged_pairs
from qemu_dump_ext.errors import CorruptDumpError

_CHUNK = 64
"""Pages whose places are kept together."""
_SEEN_MAX = 1 << 16
"""Runs of pages, in the order of the stream, that are kept before those that meet become one."""
_SCATTERED_MAX = 1 << 14
_PAGES_PER_CHUNK = 8
"""On the average, where there are more chunks than so many: what fills pages otherwise takes nine
bytes of the file, and a hundred times as much of memory. QEMU fills pages with zeros alone."""
_FILL = 1 << 63
"""Place of a page that is one byte over and over; the byte is in it."""


class PagePlaces:
    """The pages of one RAM block.

    A page that has data takes 8 bytes, and some of its neighbours as well; the file has it whole.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._chunks: dict[int, array[int]] = {}
        self._seen_from = array("Q")
        self._seen_to = array("Q")
        self._seen_max = _SEEN_MAX
        self._told = 0

    def add(self, offset: int, place: int) -> None:
        """Know that the page at an offset is at `place` in the file."""
        page = self._see(offset)
        number, index = divmod(page, _CHUNK)
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._chunks[number] = array("Q", bytes(8 * _CHUNK))
        chunk[index] = place

    def fill(self, offset: int, byte: int) -> None:
        """Know that the page at an offset is nothing but one byte.

        Raises:
            CorruptDumpError: There are more such pages, further apart, than memory is given for.
        """
        if byte:
            if len(self._chunks) > _SCATTERED_MAX + self._told // _PAGES_PER_CHUNK:
                raise CorruptDumpError(
                    "pages of one byte over and over, too many and too far apart"
                )
            self.add(offset, _FILL | byte)
            return
        number, index = divmod(self._see(offset), _CHUNK)
        if number in self._chunks:
            self._chunks[number][index] = 0

    def _see(self, offset: int) -> int:
        page = offset // self._page_size
        self._told += 1
        if self._seen_to and self._seen_to[-1] == page:
            self._seen_to[-1] = page + 1
        else:
            self._seen_from.append(page)
            self._seen_to.append(page + 1)
            if len(self._seen_from) > self._seen_max:
                self._settle_seen()
        return page

    def _settle_seen(self) -> None:
        """Make one run of those that meet: pages of a guest that ran come again and again."""
        runs = list(merged_pairs(self._seen_runs()))
        self._seen_from = array("Q", (first for first, _ in runs))
        self._seen_to = array("Q", (end for _, end in runs))
        self._seen_max = max(_SEEN_MAX, 2 * len(runs))

    def _seen_runs(self) -> Iterator[tuple[int, int]]:
        """Yield the first page and the one behind of runs, ascending, none twice."""
        last = 0
        for first, end in sorted(zip(self._seen_from, self._seen_to, strict=True)):
            if end > last:
                yield max(first, last), end
                last = end

    def seen(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is known of the block, ascending, merged."""
        for first, end in merged_pairs(self._seen_runs()):
            yield first * self._page_size, end * self._page_size

    def stored(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, end) of what is no page of zeros in a range, ascending, merged."""
        size = self._page_size
        first = last = offset
        for page in self._stored_pages(offset // size, -(-end // size)):
            if page * size > last:
                if last > first:
                    yield first, last
                first = max(page * size, offset)
            last = min((page + 1) * size, end)
        if last > first:
            yield first, last

    def _stored_pages(self, first: int, end: int) -> Iterator[int]:
        # A range may be larger than anything that the file has.
        low, high = first // _CHUNK, -(-end // _CHUNK)
        if high - low <= len(self._chunks):
            numbers = [number for number in range(low, high) if number in self._chunks]
        else:
            numbers = sorted(number for number in self._chunks if low <= number < high)
        for number in numbers:
            base = number * _CHUNK
            for page, place in enumerate(self._chunks[number], base):
                if place and first <= page < end:
                    yield page

    def pieces(self, offset: int, size: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield what makes up a range, in order.

        Yields:
            Bytes of it, and their place in the file; 0 where they are nothing but one byte, and
            that byte.
        """
        while size:
            page, inside = divmod(offset, self._page_size)
            count = min(self._page_size - inside, size)
            number, index = divmod(page, _CHUNK)
            chunk = self._chunks.get(number)
            place = chunk[index] if chunk is not None else 0
            if place & _FILL or not place:
                yield count, 0, bytes((place & 0xFF,))
            else:
                yield count, place + inside, b""
            offset, size = offset + count, size - count
