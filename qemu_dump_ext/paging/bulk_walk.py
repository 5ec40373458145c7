"""Walk page tables with numpy, hundreds of tables at a time.

What is found is what `walk` finds, but that a table is walked at no more than two virtual
addresses: no page is lost for that, nor that it is mapped at two distances of virtual and physical
addresses. Tables are guest memory and may hold anything: their number, and that of ranges, are
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from qemu_dump_ext.architectures import (
    ALWAYS_LEAF,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
)
from qemu_dump_ext.paging.walk import ReadTable, WalkBudget
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

_BATCH_SIZE = 1 << 18
"""Bytes of tables that are looked at together: for more, the kernel would be asked for memory."""

Array = Any
"""An array of numpy, which is imported where it is needed and not before."""


class MappedRuns(Value):
    """Ranges of virtual addresses, each with consecutive memory behind it; a row each.

    Attributes:
        gvas: First virtual addresses.
        gpas: First guest physical addresses.
        sizes: Sizes in bytes.
    """

    gvas: Array
    gpas: Array
    sizes: Array

    def __getitem__(self, rows: Array) -> MappedRuns:
        """Return some of the rows, by a mask, by numbers, or as a slice."""
        return MappedRuns(self.gvas[rows], self.gpas[rows], self.sizes[rows])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.gvas)

    @property
    def lasts(self) -> Array:
        """The last virtual address of each."""
        return self.gvas + (self.sizes - 1)

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Return gva, gpa and size of each."""
        return zip(self.gvas.tolist(), self.gpas.tolist(), self.sizes.tolist(), strict=True)

    def memory(self) -> list[tuple[int, int]]:
        """Return first gpa and end of the memory behind them, ascending, with some between two."""
        numpy = import_package("numpy", "page tables")
        order = numpy.argsort(self.gpas, kind="stable")
        firsts = self.gpas[order]
        ends = numpy.maximum.accumulate(firsts + self.sizes[order])
        begins = numpy.ones(len(firsts), bool)
        begins[1:] = firsts[1:] > ends[:-1]
        places = begins.nonzero()[0]
        behind = numpy.append(places[1:], len(firsts))[: len(places)] - 1
        return list(zip(firsts[places].tolist(), ends[behind].tolist(), strict=True))


def joined(runs: Sequence[MappedRuns]) -> MappedRuns:
    """Return all of these, one behind the other."""
    numpy = import_package("numpy", "page tables")
    nothing = numpy.zeros(0, numpy.uint64)
    return MappedRuns(
        numpy.concatenate([nothing, *(one.gvas for one in runs)]),
        numpy.concatenate([nothing, *(one.gpas for one in runs)]),
        numpy.concatenate([nothing, *(one.sizes for one in runs)]),
    )


@cache
def _step(level: TableLevel) -> int | None:
    """Return by how much entries of pages behind each other differ; None where that is not all."""
    if level.leaf is not ALWAYS_LEAF or len(level.leaf_masks) != 1 or level.large is not None:
        return None
    ((mask, left),) = level.leaf_masks
    step = 1 << level.shift >> left
    is_one_number = step > 0 and mask % step == 0 and (mask // step + 1) & (mask // step) == 0
    return step if is_one_number else None


class BulkWalker:
    """Walks tables of one guest.

    Attributes:
        tables: First gpa and end of what has been walked, in no order, neighbours together.
    """

    def __init__(
        self,
        read_table: ReadTable,
        memory_ranges: Sequence[tuple[int, int]],
        budget: WalkBudget | None = None,
    ) -> None:
        """Begin with nothing known.

        Args:
            read_table: Reads guest memory.
            memory_ranges: First gpa and end of what counts as memory, ascending; there is some.
            budget: Other than usual; is spent.

        Raises:
            MissingPackageError: numpy cannot be imported.
        """
        self.tables: list[tuple[int, int]] = []
        numpy = self._np = import_package("numpy", "page tables")
        self._read_table = read_table
        self._starts, self._ends = numpy.array(memory_ranges, numpy.uint64).T
        self._budget = budget or WalkBudget()
        self._walked: dict[tuple[PageTableGeometry, int], dict[int, int]] = {}

    def walk(self, root: PageTableRoot) -> MappedRuns:
        """Return what the tables of a root map to memory, by ascending virtual address.

        Raises:
            RequestError: The budget is spent.
        """
        numpy = self._np
        found: list[MappedRuns] = []
        start = numpy.array([0, root.gpa], numpy.uint64)
        self._go_down(root, 0, start[:1], start[1:], found)
        runs = joined(found)
        if not root.is_plain:
            runs = self._of_parts(root, runs)
        return self._merged(runs[numpy.argsort(runs.gvas, kind="stable")])

    def find_tables(self, root: PageTableRoot) -> None:
        """Add to `tables` those of a root that were not walked before.

        Raises:
            RequestError: The budget is spent.
        """
        start = self._np.array([0, root.gpa], self._np.uint64)
        self._go_down(root, 0, start[:1], start[1:], None)

    def _go_down(
        self,
        root: PageTableRoot,
        depth: int,
        bases: Array,
        gpas: Array,
        found: list[MappedRuns] | None,
    ) -> None:
        """Walk tables of one level, and those behind them; with `found` None, only new ones."""
        geometry = root.geometry
        level = geometry.levels[depth]
        gpas = gpas & self._np.uint64(root.address_mask)
        size = self._np.uint64(level.entry_count * geometry.entry_size)
        rows = self._in_memory(gpas, size).nonzero()[0]
        rows = rows[self._seldom_walked(geometry, depth, gpas[rows], 1 if found is None else 2)]
        count = max(_BATCH_SIZE // int(size), 1)
        for first in range(0, len(rows), count):
            batch = rows[first : first + count]
            self._budget.take_table(geometry, len(batch))
            entries = self._entries(geometry, level, gpas[batch])
            if found is not None or level.leaf is not ALWAYS_LEAF:
                self._look(root, depth, bases[batch], entries, found)

    def _seldom_walked(
        self, geometry: PageTableGeometry, depth: int, gpas: Array, most: int
    ) -> Array:
        """Return the numbers of those tables of one level that were not walked `most` times yet."""
        numpy = self._np
        walked = self._walked.setdefault((geometry, depth), {})
        chosen = []
        rows = numpy.arange(len(gpas))
        for _ in range(most):
            places, firsts = numpy.unique(gpas[rows], return_index=True)
            is_new = numpy.zeros(len(places), bool)
            for index, gpa in enumerate(places.tolist()):
                times = walked.get(gpa, 0)
                is_new[index] = times < most
                walked[gpa] = min(times + 1, most)
            chosen.append(rows[firsts[is_new]])
            rows = numpy.delete(rows, firsts)
        return numpy.sort(numpy.concatenate(chosen))

    def _look(
        self,
        root: PageTableRoot,
        depth: int,
        bases: Array,
        entries: Array,
        found: list[MappedRuns] | None,
    ) -> None:
        numpy, geometry = self._np, root.geometry
        level = geometry.levels[depth]
        tables, places, counts = self._heads(level, entries)
        entries = entries[tables, places]
        present = self._passes(entries, geometry.present.mask, geometry.present.wanted)
        if level.present is not None:
            present &= self._passes(entries, level.present.mask, level.present.wanted)
        entries, tables, places = entries[present], tables[present], places[present]
        if depth:
            gvas = bases[tables] | places.astype(numpy.uint64) << numpy.uint64(level.shift)
        else:
            tops = [geometry.extended(place << level.shift) for place in places.tolist()]
            gvas = numpy.array(tops, numpy.uint64)
        is_leaf = numpy.zeros(len(entries), bool)
        if level.leaf is not None:
            is_leaf = self._passes(entries, level.leaf.mask, level.leaf.wanted)
        if found is not None and is_leaf.any():
            sizes = counts[present][is_leaf].astype(numpy.uint64) << numpy.uint64(level.shift)
            runs = self._leaves(level, entries[is_leaf], gvas[is_leaf], sizes)
            self._budget.take_run(geometry, len(runs))
            found.append(runs)
        if depth + 1 < len(geometry.levels):
            inner = entries[~is_leaf] & numpy.uint64(level.table_mask)
            inner <<= numpy.uint64(level.address_shift)
            self._go_down(root, depth + 1, gvas[~is_leaf], inner, found)

    def _heads(self, level: TableLevel, entries: Array) -> tuple[Array, Array, Array]:
        """Return table, place and count of runs of entries that lead to consecutive memory alike.

        At levels where that is not looked for, each that is not zero is one.
        """
        numpy = self._np
        step = _step(level)
        if step is None:
            tables, places = (entries != 0).nonzero()
            return tables, places, numpy.ones(len(tables), numpy.int64)
        begins = numpy.ones(entries.shape, bool)
        numpy.not_equal(entries[:, 1:] - entries[:, :-1], step, out=begins[:, 1:])
        heads = begins.ravel().nonzero()[0]
        counts = numpy.diff(heads, append=begins.size)
        flat = entries.ravel()
        others = numpy.uint64(U64_MAX & ~level.leaf_masks[0][0])
        if ((flat[heads] ^ flat[heads + counts - 1]) & others).any():  # an address has overflowed
            heads = numpy.arange(begins.size)
            counts = numpy.ones(begins.size, numpy.int64)
        return *divmod(heads, level.entry_count), counts

    def _entries(self, geometry: PageTableGeometry, level: TableLevel, gpas: Array) -> Array:
        """Return the entries of tables, a row each; neighbours in memory are read together."""
        numpy = self._np
        size = level.entry_count * geometry.entry_size
        places, rows = numpy.unique(gpas, return_inverse=True)
        breaks = (numpy.diff(places) != size).nonzero()[0] + 1
        order = "<" if geometry.byte_order == "little" else ">"
        shape = (-1, level.entry_count)
        entries = numpy.empty((len(places), level.entry_count), f"{order}u{geometry.entry_size}")
        at = 0
        for part in numpy.split(places, breaks):
            first, end = int(part[0]), int(part[-1]) + size
            self.tables.append((first, end))
            content = numpy.frombuffer(self._read_table(first, end - first), entries.dtype)
            entries[at : at + len(part)] = content.reshape(shape)
            at += len(part)
        return entries.astype(numpy.uint64, copy=False)[rows]

    def _passes(self, entries: Array, mask: int, wanted: int | None) -> Array:
        masked = entries & self._np.uint64(mask)
        return masked != 0 if wanted is None else masked == wanted

    def _leaves(self, level: TableLevel, entries: Array, gvas: Array, sizes: Array) -> MappedRuns:
        numpy = self._np
        gpas = self._masked(entries, level.leaf_masks)
        if level.large is not None:
            within = (1 << level.large.shift) - (1 << level.shift)
            large = self._masked(entries, level.large.masks) | gvas & numpy.uint64(within)
            test = level.large.test
            gpas = numpy.where(self._passes(entries, test.mask, test.wanted), large, gpas)
        runs = MappedRuns(gvas, gpas, sizes)
        return self._merged(runs[self._in_memory(gpas, sizes)])

    def _masked(self, entries: Array, masks: Sequence[tuple[int, int]]) -> Array:
        numpy = self._np
        gpas = numpy.zeros(len(entries), numpy.uint64)
        for mask, left in masks:
            gpas |= (entries & numpy.uint64(mask)) << numpy.uint64(left)
        return gpas

    def _in_memory(self, gpas: Array, sizes: Array) -> Array:
        """Return which of some ranges have any memory."""
        numpy = self._np
        index = numpy.searchsorted(self._starts, gpas + (sizes - numpy.uint64(1)), side="right")
        return gpas < numpy.append(numpy.uint64(0), self._ends)[index]

    def _merged(self, runs: MappedRuns) -> MappedRuns:
        """Join what follows the one before, in virtual and physical addresses."""
        numpy = self._np
        if not len(runs):
            return runs
        ends = runs.gvas + runs.sizes, runs.gpas + runs.sizes
        begins = numpy.ones(len(runs), bool)
        begins[1:] = (runs.gvas[1:] != ends[0][:-1]) | (runs.gpas[1:] != ends[1][:-1])
        firsts = begins.nonzero()[0]
        return MappedRuns(
            runs.gvas[firsts], runs.gpas[firsts], numpy.add.reduceat(runs.sizes, firsts)
        )

    def _of_parts(self, root: PageTableRoot, runs: MappedRuns) -> MappedRuns:
        parts = [part for run in runs.rows() for part in root.parts(*run)]
        return MappedRuns(*self._np.array(parts, self._np.uint64).reshape(-1, 3).T)
