"""Walk the page tables of a vCPU: tables are data, one stepper serves every architecture. Pure.

Tables are guest memory and may hold anything: cycles, addresses outside RAM, every entry set. The
depth is fixed, a subtree in which nothing is mapped is walked once, and the numbers of tables and
of mapped ranges are bounded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from struct import Struct
from typing import NamedTuple

from qemu_dump_ext.architectures import (
    ALWAYS_LEAF,
    AddressWindow,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    Translation,
    passes,
)
from qemu_dump_ext.errors import RequestError

_ENTRY_CODES = {4: "I", 8: "Q"}

ReadTable = Callable[[int, int], bytes]
"""Gets gpa and size of a table; what is not guest memory reads as zero."""

AddRun = Callable[[int, int, int, int], None]
"""Gets gva, gpa and size of consecutive pages, and the size of one page; all in bytes."""


@dataclass
class WalkBudget:
    """How much work hostile tables may cause.

    Attributes:
        tables: How many more may be walked.
        runs: How many more ranges may be found.
    """

    tables: int = 1 << 19
    runs: int = 1 << 19

    def take_table(self, geometry: PageTableGeometry, count: int = 1) -> None:
        """Count a table, or several.

        Raises:
            RequestError: There were too many.
        """
        self.tables -= count
        if self.tables < 0:
            raise self._too_many(geometry, "tables")

    def take_run(self, geometry: PageTableGeometry, count: int = 1) -> None:
        """Count a range, or several."""
        self.runs -= count
        if self.runs < 0:
            raise self._too_many(geometry, "ranges")

    @staticmethod
    def _too_many(geometry: PageTableGeometry, what: str) -> RequestError:
        return RequestError(
            f"the guest's page tables ({geometry.name}) have more {what} than any sound guest's:"
            " they are damaged, or made to keep us busy",
            hint="dump without -p",
        )


class MemoryMap:
    """Where guest physical memory is."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Keep ranges, given as (first, end), ascending."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            if self._ends and self._ends[-1] == start:
                self._ends[-1] = end
            else:
                self._starts.append(start)
                self._ends.append(end)

    def span(self, gpa: int) -> tuple[int, int]:
        """Return (first, end) of the memory around `gpa`; (0, 0) if there is none."""
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and gpa < self._ends[index]:
            return self._starts[index], self._ends[index]
        return 0, 0

    def touches(self, gpa: int, size: int) -> bool:
        """Tell whether there is memory in a range."""
        index = bisect_right(self._starts, gpa + size - 1) - 1
        return index >= 0 and gpa < self._ends[index]


@dataclass
class PageTableWalker:
    """Walks tables and collects what they map.

    Attributes:
        read_table: Reads guest memory.
        memory: Pages elsewhere are left out.
        whole_pages: A page counts as memory if its first byte is, as in QEMU; otherwise if any
            of it is.
        repeat: Walk a table again that another root has at the same virtual address.
        budget: Is spent.
    """

    read_table: ReadTable
    memory: MemoryMap
    whole_pages: bool
    repeat: bool
    budget: WalkBudget = field(default_factory=WalkBudget)

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        self._empty: set[tuple[PageTableGeometry, int, int]] = set()
        self._seen: set[tuple[PageTableGeometry, int, int, int]] = set()

    def walk(self, root: PageTableRoot, add_run: AddRun) -> None:
        """Report every run of pages, ascending by the position of their entries.

        Raises:
            RequestError: The budget is spent.
        """
        _Walk(self, root, add_run).run()


class _Walk:
    """One pass over the tables of one root."""

    def __init__(self, walker: PageTableWalker, root: PageTableRoot, add_run: AddRun) -> None:
        self._walker = walker
        self._root = root
        self._geometry = root.geometry
        self._add_run = add_run
        self._run = (0, 0, 0, 0)  # gva, gpa, size, page size
        self._found = 0
        self._span = (0, 0)

    def run(self) -> None:
        self._table(0, self._root.gpa, 0)
        self._flush()

    def _flush(self) -> None:
        if self._run[2]:
            self._add_run(*self._run)
        self._run = (0, 0, 0, 0)

    def _table(self, depth: int, gpa: int, base: int) -> None:
        walker, geometry = self._walker, self._geometry
        level = geometry.levels[depth]
        gpa &= self._root.address_mask
        codec = _table_codec(geometry, level.entry_count)
        if not walker.memory.touches(gpa, codec.size):
            return
        place = (geometry, depth, gpa)
        if place in walker._empty:  # noqa: SLF001 - the walker's own pass
            return
        if not walker.repeat:
            if (*place, base) in walker._seen:  # noqa: SLF001
                self._found += 1  # before: the table above is not empty for that
                return
            walker._seen.add((*place, base))  # noqa: SLF001
        walker.budget.take_table(geometry)
        found_before = self._found
        entries = codec.unpack(walker.read_table(gpa, codec.size))
        if level.leaf is ALWAYS_LEAF:
            self._pages(level, entries, base)
        else:
            self._inner(depth, level, entries, base)
        if self._found == found_before:
            walker._empty.add(place)  # noqa: SLF001

    def _inner(self, depth: int, level: TableLevel, entries: Sequence[int], base: int) -> None:
        leaf = level.leaf
        for index, entry in enumerate(entries):
            if not entry or not _is_present(self._geometry, level, entry):
                continue
            gva = base | index << level.shift if depth else self._top(index)
            if leaf is not None and passes(entry, leaf.mask, leaf.wanted):
                self._page(level, entry, gva)
            else:
                table = (entry & level.table_mask) << level.address_shift
                self._table(depth + 1, table, gva)

    def _top(self, index: int) -> int:
        """Return the virtual address of an entry of the root."""
        return self._geometry.extended(index << self._geometry.levels[0].shift)

    def _pages(self, level: TableLevel, entries: Sequence[int], base: int) -> None:
        """Take a table of the last level, where nearly all entries are."""
        present = level.present or self._geometry.present
        is_simple = len(level.leaf_masks) == 1 and level.large is None
        if not is_simple or len(self._geometry.levels) == 1 or present.wanted is None:
            for index, entry in enumerate(entries):
                if entry and _is_present(self._geometry, level, entry):
                    at_root = len(self._geometry.levels) == 1
                    gva = self._top(index) if at_root else base | index << level.shift
                    self._page(level, entry, gva)
            return
        ((mask, left),) = level.leaf_masks
        present_mask, wanted = present.mask, present.wanted
        size, shift = 1 << level.shift, level.shift
        if self._is_one_run(entries, size, left, mask) and entries[0] & present_mask == wanted:
            self._page(level, entries[0], base)
            self._grow(((entries[0] & mask) << left) + len(entries) * size)
            return
        low, high = self._span
        next_gpa = next_index = -1
        for index, entry in enumerate(entries):
            if entry & present_mask != wanted:
                continue
            gpa = (entry & mask) << left
            if gpa == next_gpa and index == next_index and low <= gpa < high:
                next_gpa += size
                next_index += 1
                continue
            if next_index >= 0:
                self._grow(next_gpa)
            self._page(level, entry, base | index << shift)
            low, high = self._span
            # Where the page was left out, the next one is looked at by itself.
            follows = self._run[2] and self._run[1] + self._run[2] == gpa + size
            next_gpa, next_index = (gpa + size, index + 1) if follows else (-1, -1)
        if next_index >= 0:
            self._grow(next_gpa)

    def _is_one_run(self, entries: Sequence[int], size: int, left: int, mask: int) -> bool:
        """Tell whether a table maps memory that lies together, as a linear map by small pages."""
        first, step, count = entries[0], size >> left, len(entries)
        gpa, last = (first & mask) << left, first + (count - 1) * step
        if not step or entries[-1] != last or (last & mask) << left != gpa + (count - 1) * size:
            return False
        low, high = self._walker.memory.span(gpa)
        is_inside = low <= gpa and gpa + count * size <= high
        return is_inside and entries == tuple(range(first, last + 1, step))

    def _grow(self, end: int) -> None:
        gva, gpa, _, page = self._run
        self._run = (gva, gpa, end - gpa, page)

    def _page(self, level: TableLevel, entry: int, gva: int) -> None:
        gpa = level.leaf_gpa(entry, gva)
        size = 1 << level.shift
        walker = self._walker
        if not self._span[0] <= gpa < self._span[1]:
            span = walker.memory.span(gpa)
            if span[1]:
                self._span = span
            elif walker.whole_pages or not walker.memory.touches(gpa, size):
                return
        run_gva, run_gpa, run_size, page = self._run
        self._found += 1
        if page == size and run_gpa + run_size == gpa and run_gva + run_size == gva:
            self._run = (run_gva, run_gpa, run_size + size, page)
            return
        self._flush()
        walker.budget.take_run(self._geometry)
        self._run = (gva, gpa, size, size)


def _is_present(geometry: PageTableGeometry, level: TableLevel, entry: int) -> bool:
    test = level.present
    return passes(entry, geometry.present.mask, geometry.present.wanted) and (
        test is None or passes(entry, test.mask, test.wanted)
    )


@cache
def _table_codec(geometry: PageTableGeometry, entry_count: int) -> Struct:
    order = "<" if geometry.byte_order == "little" else ">"
    return Struct(f"{order}{entry_count}{_ENTRY_CODES[geometry.entry_size]}")


def translate(translation: Translation, read_table: ReadTable, gva: int) -> tuple[int, int] | None:
    """Translate one virtual address.

    Returns:
        The gpa, and how many bytes from there on are on the same page; None if it is not mapped.
    """
    return next(iter(translate_pages(translation, read_table, gva, 1)), None)


def translate_pages(
    translation: Translation, read_table: ReadTable, gva: int, size: int
) -> list[tuple[int, int]]:
    """Translate the pages that one table maps, from a virtual address on.

    Args:
        translation: The tables, or what is mapped without any.
        read_table: Reads guest memory.
        gva: Where to begin.
        size: Bytes that are wanted; how many more are told is not said.

    Returns:
        The gpa and the bytes on each page, one page behind the other, to the first that is not
        mapped or the last of its table; empty if `gva` itself is not mapped.
    """
    if isinstance(translation, AddressWindow):
        offset = gva - translation.gva
        inside = 0 <= offset < translation.size
        return [(translation.gpa + offset, translation.size - offset)] if inside else []
    if (way := _way_to(translation, read_table, gva)) is None or not way.is_present:
        return []
    start, wanted = way.entries_for(gva, size)
    count = wanted if way.level.leaf is ALWAYS_LEAF else 1
    entries = _read_entries(translation.geometry, read_table, way.place, count)
    return _leaves(translation, way.level, entries, start, gva)


def unmapped_size(translation: Translation, read_table: ReadTable, gva: int, size: int) -> int:
    """Return how many bytes from a virtual address on one table says that it does not map.

    Args:
        translation: The tables, or what is mapped without any.
        read_table: Reads guest memory.
        gva: Where to begin.
        size: Bytes that are looked for; more are told where an entry stands for more.

    Returns:
        0 if `gva` is mapped, and where no table tells of it.
    """
    if isinstance(translation, AddressWindow):
        offset = gva - translation.gva
        if offset < 0:
            return min(size, -offset)
        return 0 if offset < translation.size else size
    if (way := _way_to(translation, read_table, gva)) is None or way.is_present:
        return 0
    geometry = translation.geometry
    start, count = way.entries_for(gva, size)
    entries = _read_entries(geometry, read_table, way.place, count)
    end = next(
        (at for at, entry in enumerate(entries) if _is_present(geometry, way.level, entry)), count
    )
    return start + (end << way.level.shift) - gva


class _Way(NamedTuple):
    """How far tables lead to a virtual address.

    Attributes:
        level: Of the last table that they lead to.
        number: Of the entry there.
        place: Its gpa.
        is_present: It maps the address.
    """

    level: TableLevel
    number: int
    place: int
    is_present: bool

    def entries_for(self, gva: int, size: int) -> tuple[int, int]:
        """Return the virtual address of the entry, and how many from it on `size` bytes take."""
        start = gva & -1 << self.level.shift
        wanted = -(-(gva + size - start) >> self.level.shift)
        return start, min(wanted, self.level.entry_count - self.number)


def _way_to(root: PageTableRoot, read_table: ReadTable, gva: int) -> _Way | None:
    """Follow tables to a virtual address; None if it is none that they have."""
    geometry = root.geometry
    inner = gva & (1 << geometry.address_bits) - 1
    if geometry.extended(inner) != gva:
        return None
    table = root.gpa
    for level in geometry.levels:
        index = inner >> level.shift & (1 << (level.entry_count - 1).bit_length()) - 1
        if index >= level.entry_count:
            return None
        place = (table & root.address_mask) + index * geometry.entry_size
        (entry,) = _read_entries(geometry, read_table, place, 1)
        if not _is_present(geometry, level, entry):
            return _Way(level, index, place, is_present=False)
        if level.leaf is not None and passes(entry, level.leaf.mask, level.leaf.wanted):
            return _Way(level, index, place, is_present=True)
        table = (entry & level.table_mask) << level.address_shift
    return None


def _read_entries(
    geometry: PageTableGeometry, read_table: ReadTable, gpa: int, count: int
) -> tuple[int, ...]:
    codec = _table_codec(geometry, count)
    return codec.unpack(read_table(gpa, codec.size))


def _leaves(
    root: PageTableRoot, level: TableLevel, entries: Sequence[int], start: int, gva: int
) -> list[tuple[int, int]]:
    """Return gpa and size of what leaves map, the first of them at `start`, from `gva` on."""
    page = 1 << level.shift
    simple = _simple_leaves(root.geometry, level) if root.is_plain else None
    if simple is None:
        return list(_any_leaves(root, level, entries, start, gva))
    mask, wanted, of_page, left = simple
    end = next((at for at, entry in enumerate(entries) if entry & mask != wanted), len(entries))
    pages = [((entry & of_page) << left, page) for entry in entries[:end]]
    if pages:
        pages[0] = pages[0][0] + gva - start, start + page - gva
    return pages


@cache
def _simple_leaves(
    geometry: PageTableGeometry, level: TableLevel
) -> tuple[int, int, int, int] | None:
    """Return mask and value of a present leaf, and mask and shift of its page.

    None where that does not tell all.
    """
    tests = [test for test in (geometry.present, level.present) if test is not None]
    if len(level.leaf_masks) != 1 or level.large is not None:
        return None
    mask = wanted = 0
    for test in tests:
        if test.wanted is None or (mask & test.mask):
            return None
        mask, wanted = mask | test.mask, wanted | test.wanted
    ((of_page, left),) = level.leaf_masks
    return mask, wanted, of_page, left


def _any_leaves(
    root: PageTableRoot, level: TableLevel, entries: Sequence[int], start: int, gva: int
) -> Iterator[tuple[int, int]]:
    page = 1 << level.shift
    for entry in entries:
        if not _is_present(root.geometry, level, entry):
            return
        gpa = level.leaf_gpa(entry, start)
        for part in root.parts(gva, gpa + gva - start, start + page - gva):
            if part[0] != gva:
                return
            yield part[1], part[2]
            gva += part[2]
        start += page
        if gva != start:
            return


def translate_by(
    translations: Iterable[Translation], read_table: ReadTable, gva: int
) -> tuple[int, int] | None:
    """Translate one virtual address by the first that maps it; returns as `translate`."""
    return next(iter(translate_pages_by(translations, read_table, gva, 1)), None)


def translate_pages_by(
    translations: Iterable[Translation], read_table: ReadTable, gva: int, size: int
) -> list[tuple[int, int]]:
    """Translate pages by the first that maps `gva`; returns as `translate_pages`."""
    found = (translate_pages(one, read_table, gva, size) for one in translations)
    return next(filter(None, found), [])
