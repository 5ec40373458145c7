"""The segments of a paged dump: what the page tables of all vCPUs map, merged. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.structures.c_struct import U64_MAX


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of virtual addresses and the guest physical memory behind it.

    Attributes:
        gva: First virtual address.
        gpa: First guest physical address.
        size: The size in bytes.
    """

    gva: int
    gpa: int
    size: int


@dataclass(slots=True, eq=False)
class _Element:
    # phys, virt and length of QEMU's MemoryMapping.
    key: tuple[int, int]  # place in QEMU's list: phys, newest first
    gpa: int
    gva: int
    size: int
    hidden: list[_Element] = field(default_factory=list)
    hider: _Element | None = None

    @property
    def end(self) -> int:
        return self.gpa + self.size


_KEY = attrgetter("key")
_END = attrgetter("end")


class NativeMappingList:
    """QEMU's list of mappings, page for page the same, without its scans.

    QEMU keeps elements sorted by physical address and, for each page, scans from the head for the
    first element that the page continues or overlaps with the same distance between virtual and
    physical addresses. Both conditions name one distance, so elements are kept by distance here;
    among those of one distance, an element that ends behind a later one hides it from the scan,
    and the rest ends in ascending order: the first match is found by bisection. When a page is
    merged in front of an element QEMU moves its virtual address and forgets the physical one;
    that changes the element's distance, and its place in the list stays.

    Source: QEMU softmmu/memory_mapping.c memory_mapping_list_add_merge_sorted(), mapping_merge().
    """

    def __init__(self) -> None:
        self._chains: dict[int, list[_Element]] = {}
        self._elements: list[_Element] = []
        self._last: _Element | None = None

    def add_run(self, gva: int, gpa: int, size: int, page_size: int) -> None:
        """Add consecutive pages, as if one by one."""
        while size:
            last = self._last
            if last is not None and gpa == last.end and gva == (last.gva + last.size) & U64_MAX:
                self._resize(last, last.gva, last.size + size)
                return
            found = self._find(gva, gpa, page_size)
            if found is None:
                self._create(gva, gpa, size)
                return
            self._last = found
            taken = self._merge(found, gva, gpa, size, page_size)
            gva, gpa, size = (gva + taken) & U64_MAX, gpa + taken, size - taken

    def segments(self) -> list[Segment]:
        """Return the list in QEMU's order."""
        ordered = sorted(self._elements, key=_KEY)
        return [Segment(element.gva, element.gpa, element.size) for element in ordered]

    def _find(self, gva: int, gpa: int, page_size: int) -> _Element | None:
        chain = self._chains.get((gva - gpa) & U64_MAX)
        if not chain:
            return None
        index = bisect_left(chain, gpa, key=_END)
        if index == len(chain) or chain[index].gpa > gpa + page_size:
            return None
        return chain[index]

    def _merge(self, found: _Element, gva: int, gpa: int, size: int, page_size: int) -> int:
        """Merge the first page, or all pages where the result is the same; return the bytes."""
        wraps = found.gva + found.size > U64_MAX or gva + size > U64_MAX
        if gpa >= found.gpa and not wraps:
            # Pages inside change nothing, and behind the end each continues the element.
            if gpa + size > found.end:
                self._resize(found, found.gva, gpa + size - found.gpa)
            return size
        start, length = found.gva, found.size
        if gpa == found.end and gva == (start + length) & U64_MAX:
            length += page_size
        else:
            if gva < start:
                length += start - gva
                start = gva
            if (gva + page_size) & U64_MAX > (start + length) & U64_MAX:
                length = (gva + page_size - start) & U64_MAX
        self._resize(found, start, length)
        return page_size

    def _create(self, gva: int, gpa: int, size: int) -> None:
        element = _Element((gpa, -len(self._elements)), gpa, gva, size)
        self._elements.append(element)
        self._last = element
        self._link(element)

    def _resize(self, element: _Element, gva: int, size: int) -> None:
        if element.hider is None and gva == element.gva and size > element.size:
            chain = self._chains[(gva - element.gpa) & U64_MAX]
            if chain[-1] is element:  # the usual case: nothing behind it to hide
                element.size = size
                return
        self._unlink(element)
        element.gva, element.size = gva, size
        self._link(element)

    def _link(self, element: _Element) -> None:
        chain = self._chains.setdefault((element.gva - element.gpa) & U64_MAX, [])
        index = bisect_left(chain, element.key, key=_KEY)
        if index and chain[index - 1].end >= element.end:
            element.hider = chain[index - 1]
            element.hider.hidden.append(element)
            return
        behind = bisect_right(chain, element.end, lo=index, key=_END)
        for shorter in chain[index:behind]:
            shorter.hider = element
        element.hidden += chain[index:behind]
        chain[index:behind] = [element]

    def _unlink(self, element: _Element) -> None:
        if element.hider is not None:
            element.hider.hidden.remove(element)
            element.hider = None
        else:
            chain = self._chains[(element.gva - element.gpa) & U64_MAX]
            del chain[bisect_left(chain, element.key, key=_KEY)]
        hidden, element.hidden = element.hidden, []
        for other in hidden:
            other.hider = None
            self._link(other)


def identity_segments(blocks: Iterable[RamBlock]) -> list[Segment]:
    """Return one segment for each block, at its guest physical address."""
    return [Segment(block.gpa, block.gpa, block.size) for block in blocks]


def merge_within_blocks(runs: Iterable[Segment], blocks: Sequence[RamBlock]) -> list[Segment]:
    """Merge mapped ranges; each result lies within one block.

    Args:
        runs: They may overlap, touch, and leave the blocks.
        blocks: The blocks by ascending gpa.

    Returns:
        By ascending gva, as the ELF specification wants PT_LOADs, then by gpa. Every pair of
        virtual and physical address that a run maps to a block is in exactly one of them.
    """
    by_distance: dict[int, list[tuple[int, int]]] = {}
    for run in runs:
        distance = (run.gva - run.gpa) & U64_MAX
        by_distance.setdefault(distance, []).append((run.gpa, run.gpa + run.size))
    ends = [block.end for block in blocks]
    segments = []
    for distance, ranges in by_distance.items():
        ranges.sort()
        start, end = ranges[0]
        for first, behind in [*ranges[1:], (1 << 65, 0)]:
            if first <= end:
                end = max(end, behind)
                continue
            index = bisect_right(ends, start)
            while index < len(blocks) and blocks[index].gpa < end:
                low, high = max(start, blocks[index].gpa), min(end, ends[index])
                segments.append(Segment((low + distance) & U64_MAX, low, high - low))
                index += 1
            start, end = first, behind
    segments.sort(key=attrgetter("gva", "gpa"))
    return segments


def overlap_size(segments: Iterable[Segment]) -> int:
    """Return how many bytes of virtual addresses are in more than one segment.

    Args:
        segments: The segments by ascending gva.
    """
    overlap = end = 0
    for segment in segments:
        behind = segment.gva + segment.size
        overlap += max(0, min(end, behind) - segment.gva)
        end = max(end, behind)
    return overlap


def unmapped_size(segments: Iterable[Segment], blocks: Sequence[RamBlock]) -> int:
    """Return how many bytes of the blocks are in no segment."""
    covered = end = 0
    starts = sorted((segment.gpa, segment.gpa + segment.size) for segment in segments)
    clipped = 0
    index = 0
    for block in blocks:
        end = max(end, block.gpa)
        while index < len(starts) and starts[index][0] < block.end:
            low, high = max(starts[index][0], end), min(starts[index][1], block.end)
            if high > low:
                clipped += high - low
                end = high
            if starts[index][1] > block.end:
                break
            index += 1
        covered += block.size
    return covered - clipped
