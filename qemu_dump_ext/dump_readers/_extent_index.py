"""Where each piece of an address space lies in a file: sorted, without overlap, later wins."""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain

_SORT_AT_ONCE = 1 << 16
"""Extents sorted as Python objects at one time; larger sets are merged from such runs."""


class ExtentIndex:
    """Extents of an address space, each at a place in a file.

    Millions of them are expected (a flattened dump has one for each 16 KiB), so they are kept as
    24 bytes each, about 60 while `settle` works.
    """

    def __init__(self) -> None:
        self._starts = array("Q")
        self._sizes = array("Q")
        self._places = array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, start: int, size: int, place: int) -> None:
        """Add `size` bytes (not 0) at address `start`, found at `place` in the file."""
        self._starts.append(start)
        self._sizes.append(size)
        self._places.append(place)

    def settle(self) -> None:
        """Sort; where extents overlap, keep what was appended last. Call once before `pieces`."""
        starts, sizes, places = self._starts, self._sizes, self._places
        order = self._order()
        self._starts, self._sizes, self._places = array("Q"), array("Q"), array("Q")
        reaching: list[int] = []  # negated index of what may reach beyond `position`, last first
        position = 0
        for index in chain(order, (-1,)):
            begin = starts[index] if index >= 0 else 1 << 65
            while reaching and position < begin:
                top = -reaching[0]
                stop = min(starts[top] + sizes[top], begin)
                if stop <= position:
                    heapq.heappop(reaching)
                    continue
                self.append(position, stop - position, places[top] + position - starts[top])
                position = stop
            position = begin
            heapq.heappush(reaching, -index)

    def _order(self) -> array[int]:
        count, key = len(self._starts), self._starts.__getitem__
        runs = [
            array("Q", sorted(range(first, min(first + _SORT_AT_ONCE, count)), key=key))
            for first in range(0, count, _SORT_AT_ONCE)
        ]
        return runs[0] if len(runs) == 1 else array("Q", heapq.merge(*runs, key=key))

    def pieces(self, start: int, size: int) -> Iterator[tuple[int, int | None]]:
        """Yield (size, place) of what makes up a range, in order; place is None in a gap."""
        index = bisect_right(self._starts, start) - 1
        end = start + size
        while start < end:
            if index >= 0 and start < (stop := self._starts[index] + self._sizes[index]):
                stop = min(stop, end)
                yield stop - start, self._places[index] + start - self._starts[index]
            else:
                last = index + 1 == len(self._starts)
                stop = end if last else min(self._starts[index + 1], end)
                if stop > start:
                    yield stop - start, None
                index += 1
            start = stop

    def extents(self) -> Iterator[tuple[int, int, int]]:
        """Yield (start, size, place) of every extent, ascending, not overlapping."""
        return zip(self._starts, self._sizes, self._places, strict=True)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (start, size) of what is covered, ascending, adjacent extents as one."""
        return merged(zip(self._starts, self._sizes, strict=True))


def merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, size) that go up and do not overlap, adjacent ones as one."""
    start = end = 0
    for first, size in ranges:
        if first != end:
            if end > start:
                yield start, end - start
            start = first
        end = first + size
    if end > start:
        yield start, end - start


def merged_pairs(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, end) that go up and do not overlap, adjacent ones as one."""
    for start, size in merged((start, end - start) for start, end in ranges):
        yield start, start + size
