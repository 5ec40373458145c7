"""Which pages of a Linux guest nobody will look for in a dump: makedumpfile's dump levels.

All of mem_map goes through numpy in pieces; there is no loop over pages. mem_map is guest memory
and may say anything: every doubt keeps a page, and nothing runs longer than mem_map is long.

Source: makedumpfile's makedumpfile.c, __exclude_unnecessary_pages(); Linux page-flags.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.mem_map import MemMapRun
from qemu_dump_ext.linux.struct_page import Field, StructPage
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from types import ModuleType

ZERO = 1
CACHE = 2
PRIVATE_CACHE = 4
USER = 8
FREE = 16
_CHUNK = 1 << 15
"""Struct pages looked at together: 2 MiB of them, usually. A power of 2."""
_PIECE = 1 << 18
"""Pages whose ranges are found together."""
_LARGEST_ORDER = 40
_FIRST_TYPE, _NO_TYPE = 0xF0000000, 0xFF000000
"""Page types are from the first on, where they are in the top byte, and below the second."""
_RANGES_MAX = 1 << 17
"""Of pages that are left out: each end of one costs the dump something."""

Array = Any
"""An array of numpy, which is imported where a filter is asked for and not before."""


class FilterRules(Value):
    """What is left out.

    Attributes:
        level: Sum of CACHE, PRIVATE_CACHE (which has CACHE in it), USER and FREE; pages of zeros
            are a matter of the format.
        exact: As makedumpfile does it. Otherwise cache with private data stays (file systems
            keep their own structures there), so do blocks that contradict others, pages of types
            that are not known, and what else `kept` has.
        without_struct_pages: Leave out those of pages that are left out.
        without_text: Leave out the kernel's code, which readers take from its vmlinux.
    """

    level: int
    exact: bool = False
    without_struct_pages: bool = False
    without_text: bool = False


def find_excluded_pages(
    rules: FilterRules,
    layout: StructPage,
    runs: Sequence[MemMapRun],
    kernel: KernelMemory,
    kept: Sequence[tuple[int, int]] = (),
) -> PageSet:
    """Return the pages that a dump of this level leaves out.

    Args:
        rules: Which.
        layout: Of a struct page.
        runs: Where struct pages are, by ascending pfn, not overlapping.
        kernel: Memory at the kernel's addresses.
        kept: First pfn and first pfn behind of ranges that stay, whatever is said of them.

    Raises:
        MissingPackageError: numpy cannot be imported.
        SourceError: Not one struct page can be read.
    """
    numpy = import_package("numpy", "a dump level")
    if not _does_anything(rules, layout):
        return PageSet(layout.page_size, ())
    map_ = _Map(numpy, rules, layout, runs)
    for run in runs:
        start = 0
        while start < run.count:
            # Up to where blocks of so many pages begin.
            count = min(_CHUNK - (run.first_pfn + start) % _CHUNK, run.count - start)
            map_.add(kernel, run, start, count)
            start += count
        map_.end_run()
    if not map_.is_known:
        raise SourceError("the kernel's struct pages cannot be read where VMCOREINFO leads")
    return PageSet(layout.page_size, map_.ranges(kept))


def _does_anything(rules: FilterRules, layout: StructPage) -> bool:
    # Pages that are poisoned or offline are no user's choice: makedumpfile looks for them only
    # where it looks at all, or where the kernel tells of poison.
    return bool(
        rules.level & (CACHE | PRIVATE_CACHE | USER)
        or layout.hwpoison
        or (rules.level & FREE and layout.buddy is not None)
    )


class _Blocks(Value):
    """Blocks of pages that begin in one chunk, by ascending start.

    Attributes:
        starts: First page of each, counted from the first of the chunk.
        sizes: Pages of each, a power of 2.
        compound: Whether each is a compound page, and no free block.
    """

    starts: Array
    sizes: Array
    compound: Array


class _LargeBlock(Value):
    """A sound block that ends behind the chunk in which it begins: it fills chunks.

    Attributes:
        first: Page, counted from the first of all struct pages.
        end: First page behind.
        compound: As of `_Blocks`.
        tails: Of the pages that were seen, how many are tails.
    """

    first: int
    end: int
    compound: bool
    tails: int


class _Map:
    """What has been found, for the pages from the first to the last struct page.

    A byte for each page, and what one chunk takes; nothing else grows with the guest.

    Attributes:
        is_known: Some struct page was read.
    """

    def __init__(
        self,
        numpy: ModuleType,
        rules: FilterRules,
        layout: StructPage,
        runs: Sequence[MemMapRun],
    ) -> None:
        self._np = numpy
        self._rules = rules
        self._layout = layout
        self.is_known = False
        self._first = runs[0].first_pfn
        count = runs[-1].first_pfn + runs[-1].count - self._first
        self._out = numpy.zeros(count, dtype=bool)
        self._room = bytearray(min(count, _CHUNK) * layout.size)
        self._reached = 0  # first page behind all blocks so far
        self._large: _LargeBlock | None = None

    def add(self, kernel: KernelMemory, run: MemMapRun, start: int, count: int) -> None:
        """Look at struct pages `start` to `start + count` of a run."""
        layout = self._layout
        data = memoryview(self._room)[: count * layout.size]
        missing = kernel.read_known(run.gva + start * layout.size, data)
        for low, high in missing:
            data[low:high] = bytes(high - low)  # and not what an earlier chunk had there
        chunk = _Chunk(self._np, layout, data, count, run.first_pfn + start)
        for low, high in missing:
            chunk.live[low // layout.size : -(-high // layout.size)] = False
        self.is_known |= sum(high - low for low, high in missing) < len(data)
        at = run.first_pfn + start - self._first
        begins, found = self._free_blocks(chunk)
        single = self._left_out(chunk)
        single[begins] = False
        heads, orders = chunk.compounds
        is_big = (orders > 0) & single[heads]
        if is_big.any():
            found.append((heads[is_big], self._sizes(orders[is_big]), True))
            single[heads[is_big]] = False
        self._out[at : at + count] |= single
        blocks = self._sorted(found)
        if self._rules.exact:
            self._take_as_a_walk(blocks, at, count)
        else:
            self._take_sound(blocks, chunk, at)

    def _sizes(self, orders: Array) -> Array:
        return self._np.left_shift(self._np.int64(1), orders.astype(self._np.int64))

    def _free_blocks(self, chunk: _Chunk) -> tuple[Array, list[tuple[Array, Array, bool]]]:
        """Return the pages with which free blocks begin, for which no other rule is, and blocks."""
        layout = self._layout
        found: list[tuple[Array, Array, bool]] = []
        if not self._rules.level & FREE or layout.private is None:
            return [], found
        free = chunk.places_of_type(layout.buddy)
        free = free[~chunk.slab[free]]
        orders = chunk.view(layout.private)[free]
        good = orders < layout.free_orders  # one of an order that cannot be stays
        found.append((free[good], self._sizes(orders[good]), False))
        unaccepted = chunk.places_of_type(layout.unaccepted)
        largest = self._np.full(len(unaccepted), max(layout.free_orders - 1, 0))
        found.append((unaccepted, self._sizes(largest), False))
        return self._np.concatenate((free, unaccepted)), found

    def _left_out(self, chunk: _Chunk) -> Array:
        """Return which pages are left out for what their own struct page says."""
        layout, level, exact = self._layout, self._rules.level, self._rules.exact
        out = self._np.zeros(chunk.count, dtype=bool)
        if level & (CACHE | PRIVATE_CACHE):
            out |= chunk.cache & ~chunk.anonymous
            if not (level & PRIVATE_CACHE and exact):
                out &= ~chunk.has_all(layout.private_bit)
        if level & USER:
            out |= chunk.anonymous
            out[chunk.hugetlb] = True
        if not exact:
            out[chunk.of_unknown_types(out)] = False
        if layout.hwpoison:
            out |= chunk.has_all(layout.hwpoison)
        offline = chunk.places_of_type(layout.offline)
        out[offline[~chunk.slab[offline]]] = True
        out &= chunk.live
        return out

    def _sorted(self, found: Sequence[tuple[Array, Array, bool]]) -> _Blocks:
        numpy = self._np
        if not found:
            nothing = numpy.zeros(0, dtype=numpy.int64)
            return _Blocks(nothing, nothing, nothing)
        starts = numpy.concatenate([one[0] for one in found])
        sizes = numpy.concatenate([one[1] for one in found])
        compound = numpy.repeat([one[2] for one in found], [len(one[0]) for one in found])
        if len(found) == 1:
            return _Blocks(starts, sizes, compound)
        order = numpy.argsort(starts, kind="stable")
        return _Blocks(starts[order], sizes[order], compound[order])

    def _take_as_a_walk(self, blocks: _Blocks, at: int, count: int) -> None:
        # What a walk in ascending order meets that skips what a block covers.
        self._out[at : max(at, min(self._reached, at + count))] = True
        starts, ends = blocks.starts + at, blocks.starts + blocks.sizes + at
        if not len(starts):
            return
        good = self._np.ones(len(starts), dtype=bool)
        reached = self._reached
        if starts[0] < reached or (starts[1:] < self._np.maximum.accumulate(ends)[:-1]).any():
            for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
                good[index] = start >= reached
                if good[index]:
                    reached = end
        self._leave_out(blocks.starts[good], blocks.sizes[good], at, count)
        self._reached = max(reached, int(ends[good].max(initial=0)))

    def _leave_out(self, starts: Array, sizes: Array, at: int, count: int) -> None:
        # No two of them overlap: the sum is 0 or 1 everywhere, and only the last may reach the end.
        covered = self._np.zeros(count + 1, dtype=self._np.int8)
        covered[starts] += 1
        covered[self._np.minimum(starts + sizes, count)] -= 1
        self._np.cumsum(covered, dtype=self._np.int8, out=covered)
        self._out[at : at + count] |= covered[:-1].view(bool)

    def _take_sound(self, blocks: _Blocks, chunk: _Chunk, at: int) -> None:
        # Aligned, in one run, overlapped by no other, and compound ones with all their tails.
        numpy, count = self._np, chunk.count
        starts, ends = blocks.starts, blocks.starts + blocks.sizes
        self._continue_large(chunk, at, is_overlapped=len(starts) > 0)
        if not len(starts):
            return
        good = (starts + chunk.first_pfn) & (blocks.sizes - 1) == 0
        reached = numpy.maximum(numpy.maximum.accumulate(ends), self._reached - at)
        good[0] &= starts[0] >= self._reached - at
        good[1:] &= starts[1:] >= reached[:-1]
        good[:-1] &= starts[1:] >= ends[:-1]
        self._reached = int(reached[-1]) + at
        crosses = good & (ends > count)
        if crosses.any():
            if count == _CHUNK:  # it is aligned: the only block of this chunk, which it fills
                size, is_compound = int(blocks.sizes[0]), bool(blocks.compound[0])
                self._large = _LargeBlock(at, at + size, is_compound, int(chunk.tail.sum()))
                return
            good &= ~crosses
        places = (good & blocks.compound).nonzero()[0]
        if len(places):
            # Pages behind the first of each, and of what is between two of them.
            borders = numpy.stack((starts[places] + 1, ends[places]), axis=1).ravel()
            padded = numpy.append(chunk.tail, numpy.False_)  # one more, which sums may end at
            tails = numpy.add.reduceat(padded, borders, dtype=numpy.int64)[::2]
            good[places] = tails == blocks.sizes[places] - 1
        self._leave_out(starts[good], blocks.sizes[good], at, count)

    def _continue_large(self, chunk: _Chunk, at: int, *, is_overlapped: bool) -> None:
        large = self._large
        if large is None:
            return
        tails = large.tails + int(chunk.tail.sum())
        is_last = at + chunk.count >= large.end
        self._large = None if is_overlapped or is_last else replace(large, tails=tails)
        has_all_tails = not large.compound or tails == large.end - large.first - 1
        if is_last and has_all_tails and not is_overlapped:
            self._out[large.first : large.end] = True

    def end_run(self) -> None:
        """Know that what is still to come is elsewhere: a sound block ends where its run does."""
        self._large = None

    def ranges(self, kept: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return first pfn and first pfn behind of what is left out."""
        out = self._out
        for first, end in kept:
            out[max(first - self._first, 0) : max(end - self._first, 0)] = False
        starts, ends = self._largest_ranges()
        return list(
            zip((starts + self._first).tolist(), (ends + self._first).tolist(), strict=True)
        )

    def _largest_ranges(self) -> tuple[Array, Array]:
        numpy, out = self._np, self._out
        starts = ends = numpy.zeros(0, dtype=numpy.int64)
        for at in range(0, len(out), _PIECE):
            piece = out[at : at + _PIECE]
            edges = numpy.empty(len(piece) + 1, dtype=bool)
            numpy.not_equal(piece[1:], piece[:-1], out=edges[1:-1])
            edges[0], edges[-1] = piece[0], piece[-1]
            places = edges.nonzero()[0] + at
            more_starts, more_ends = places[::2], places[1::2]
            if len(ends) and len(more_starts) and ends[-1] == more_starts[0]:
                ends, more_starts = ends[:-1], more_starts[1:]
            starts = numpy.concatenate((starts, more_starts))
            ends = numpy.concatenate((ends, more_ends))
            is_last = at + _PIECE >= len(out)
            if len(starts) > (1 if is_last else 2) * _RANGES_MAX:
                largest = numpy.argpartition(starts - ends, _RANGES_MAX)[:_RANGES_MAX]
                largest.sort()
                starts, ends = starts[largest], ends[largest]
        return starts, ends


class _Chunk:
    """Struct pages, by field; a row each.

    Attributes:
        count: How many.
        first_pfn: Of the first page.
        live: Rows that are looked at: not tails, and readable.
        tail: Rows of pages of a compound page other than its first.
        slab: Rows of pages of the slab allocator.
        anonymous: Rows of anonymous memory.
    """

    def __init__(
        self, numpy: ModuleType, layout: StructPage, data: memoryview, count: int, first_pfn: int
    ) -> None:
        self._np = numpy
        self._layout = layout
        self._data = data
        self.count = count
        self.first_pfn = first_pfn
        self._flags = self._words(layout.flags)
        self._types = self._words(layout.mapcount)
        self._none = numpy.zeros(count, dtype=bool)
        self._none.flags.writeable = False
        self.tail = self._none if layout.compound is None else self._has_bit_0(layout.compound)
        self.live = ~self.tail
        self.slab = self.has_all(layout.slab_bit)
        if layout.slab_type is not None:
            self.slab = self.slab | (self._types == layout.slab_type)
        self.anonymous = self._has_bit_0(layout.mapping) & ~self.slab

    def view(self, field: Field) -> Array:
        """Return a field of all rows, where it lies."""
        order = "<" if self._layout.byte_order == "little" else ">"
        return self._np.ndarray(
            self.count,
            dtype=f"{order}u{field.size}",
            buffer=self._data,
            offset=field.offset,
            strides=(self._layout.size,),
        )

    def _words(self, field: Field) -> Array:
        """Return a field of all rows, in the byte order of this machine."""
        return self.view(field).astype(f"u{field.size}")

    def _has_bit_0(self, field: Field) -> Array:
        return (self.view(field.lowest_byte(self._layout.byte_order)) & 1).view(bool)

    def has_all(self, mask: int) -> Array:
        """Return which rows have all bits of a mask of flags; none for mask 0."""
        return self._flags & mask == mask if mask else self._none

    def places_of_type(self, value: int | None) -> Array:
        """Return the live rows that have a page type, by number."""
        places = (self._none if value is None else self._types == value).nonzero()[0]
        return places[self.live[places]]

    @property
    def cache(self) -> Array:
        """Rows of the page cache, or of the swap cache."""
        return self.has_all(self._layout.lru) | self.has_all(self._layout.swapcache)

    def of_unknown_types(self, rows: Array) -> Array:
        """Return the rows with a page type that VMCOREINFO does not tell of, by number.

        Args:
            rows: Which are looked at; of those that may be left out, few have a type.
        """
        if not self._layout.typed_by_top_byte:
            return []
        places = (rows & (self._types >= _FIRST_TYPE) & (self._types < _NO_TYPE)).nonzero()[0]
        return places[~self._np.isin(self._types[places], self._layout.known_types)]

    @cached_property
    def _heads(self) -> Array:
        heads = (self.has_all(self._layout.head) & self.live).nonzero()[0]
        return heads[heads < self.count - 1]  # the next row tells

    @cached_property
    def compounds(self) -> tuple[Array, Array]:
        """First rows of compound pages, by number, and the order of each; 0 where it cannot be."""
        numpy, heads = self._np, self._heads
        orders = numpy.zeros(len(heads), dtype=numpy.int64)
        if self._layout.order is None:
            return heads, orders
        low = self._layout.order.lowest_byte(self._layout.byte_order)
        told = self.view(low)[heads + 1].astype(numpy.int64)
        size = numpy.left_shift(numpy.int64(1), numpy.minimum(told, _LARGEST_ORDER))
        fits = (told <= _LARGEST_ORDER) & ((heads + self.first_pfn) & (size - 1) == 0)
        return heads, numpy.where(fits, told, 0)

    @property
    def hugetlb(self) -> Array:
        """Rows of the first pages of hugetlb, by number."""
        layout, heads = self._layout, self._heads
        if layout.hugetlb_type is not None:
            return heads[self._types[heads] == layout.hugetlb_type]
        if layout.hugetlb_bit:
            return heads[self._flags[heads + 1] & layout.hugetlb_bit != 0]
        if layout.destructor is None or layout.hugetlb_destructor is None:
            return heads[:0]
        return heads[self.view(layout.destructor)[heads + 1] == layout.hugetlb_destructor]
