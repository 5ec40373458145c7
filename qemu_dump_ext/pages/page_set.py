"""Sets of page frames: what of a guest's memory stays out of a dump."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.value import Value


class PageSet(Value):
    """Pages of a guest, as ranges of page frames.

    Attributes:
        page_size: In bytes.
        ranges: First pfn and first pfn behind of each range, ascending, with pages between them.
    """

    page_size: int
    ranges: Sequence[tuple[int, int]]

    @classmethod
    def touched_by(cls, page_size: int, ranges: Iterable[tuple[int, int]]) -> PageSet:
        """Return the pages of which some byte is in one of `ranges`.

        Args:
            page_size: In bytes.
            ranges: First gpa and end of each, in any order; they may overlap.
        """
        pages = ((first // page_size, -(-end // page_size)) for first, end in ranges)
        return cls(page_size, tuple(_merged(pages)))

    def union(self, other: PageSet) -> PageSet:
        """Return the pages that are in this set or in another one of the same page size."""
        return replace(self, ranges=tuple(_merged([*self.ranges, *other.ranges])))

    def without(self, other: PageSet) -> PageSet:
        """Return the pages of this set that are not in another one of the same page size."""
        return replace(self, ranges=tuple(self._remaining(other.ranges)))

    def _remaining(self, others: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for begin, end in self.ranges:
            first = begin
            at = max(bisect_right(others, first, key=itemgetter(0)) - 1, 0)
            while at < len(others) and others[at][1] <= first:
                at += 1
            while first < end and at < len(others) and others[at][0] < end:
                if first < others[at][0]:
                    yield first, others[at][0]
                first = max(first, others[at][1])
                at += 1
            if first < end:
                yield first, end

    @property
    def page_count(self) -> int:
        """Pages in the set."""
        return sum(end - first for first, end in self.ranges)

    def in_pages_of(self, page_size: int) -> PageSet:
        """Return the larger pages of which all pages are in the set.

        Args:
            page_size: In bytes, a multiple of the set's; a smaller one changes nothing.
        """
        ratio = page_size // self.page_size
        if ratio <= 1:
            return self
        whole = ((-(-first // ratio), end // ratio) for first, end in self.ranges)
        return PageSet(page_size, tuple((first, end) for first, end in whole if first < end))

    def touched(self, page_size: int) -> PageSet:
        """Return the larger pages of which a part is in the set.

        Args:
            page_size: In bytes, a multiple of the set's.
        """
        ratio = page_size // self.page_size
        merged: list[tuple[int, int]] = []
        for first, end in self.ranges:
            low, high = first // ratio, -(-end // ratio)
            if merged and low <= merged[-1][1]:
                low = merged.pop()[0]
            merged.append((low, high))
        return PageSet(page_size, tuple(merged))

    def cut_from(self, blocks: Sequence[RamBlock]) -> list[RamBlock]:
        """Return what of RAM blocks lies on no page of the set.

        Args:
            blocks: By ascending gpa, not overlapping.

        Returns:
            The parts, by ascending gpa; of a page that the set has nothing is left.
        """
        return [part for block in blocks for part in self._outside(block)]

    def _outside(self, block: RamBlock) -> Iterator[RamBlock]:
        position = block.gpa
        index = bisect_right(self.ranges, (position // self.page_size, -1))
        if index and self.ranges[index - 1][1] * self.page_size > position:
            index -= 1
        while position < block.end:
            first, end = self.ranges[index] if index < len(self.ranges) else (None, None)
            stop = block.end if first is None else min(first * self.page_size, block.end)
            if stop > position:
                yield replace(
                    block,
                    gpa=position,
                    size=stop - position,
                    region_offset=block.region_offset + position - block.gpa,
                )
            position = block.end if end is None else max(position, end * self.page_size)
            index += 1


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges in ascending order, with something between two of them."""
    begin = behind = 0
    for first, end in sorted(ranges):
        if first > behind or behind == begin:
            if begin < behind:
                yield begin, behind
            begin, behind = first, end
        else:
            behind = max(behind, end)
    if begin < behind:
        yield begin, behind
