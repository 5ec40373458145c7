"""The pages of a guest as its Linux kernel accounts for them, and which a dump leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qemu_dump_ext.architectures import Architecture
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.mem_map import MemMapRun, find_mem_map
from qemu_dump_ext.linux.mini_dump import kernel_text, unneeded_struct_pages
from qemu_dump_ext.linux.needed_memory import AddressRange, needed_addresses
from qemu_dump_ext.linux.page_filter import FilterRules, find_excluded_pages
from qemu_dump_ext.linux.struct_page import StructPage, parse_struct_page
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.paging.bulk_walk import MappedRuns
from qemu_dump_ext.paging.tables import roots_of_vcpus
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.third_party import import_package


class KernelPages:
    """Finds what may be left out of dumps of a guest that does not change meanwhile.

    Attributes:
        remarks: What could not be left out though it was asked for.
    """

    def __init__(
        self,
        architecture: Architecture,
        memory: GuestMemory,
        ram_blocks: Sequence[RamBlock],
        *,
        vcpus: Sequence[Vcpu],
        vmcoreinfo: bytes,
        byte_order: ByteOrder,
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Prepare.

        Args:
            architecture: Of the guest.
            memory: Of the guest.
            ram_blocks: Where it has memory, by ascending gpa.
            vcpus: Of the guest, as far as they are known.
            vmcoreinfo: What the kernel says of itself; untrusted.
            byte_order: Of the guest.
            kept: First gpa and end of what must not be left out.

        Raises:
            SourceError: There is no VMCOREINFO, or it says too little.
        """
        if not vmcoreinfo:
            raise SourceError("there is no VMCOREINFO, which tells where struct pages are")
        self.remarks: tuple[str, ...] = ()
        self._architecture = architecture
        self._blocks = ram_blocks
        self._vcpus = vcpus
        self._vmcoreinfo = vmcoreinfo
        self._order = byte_order
        self._also_kept = kept
        self._kernel = KernelMemory(architecture, memory, ram_blocks, vmcoreinfo)
        self._found: dict[tuple[int, bool], tuple[PageSet, StructPage, Sequence[MemMapRun]]] = {}
        self._needed: tuple[MappedRuns, list[tuple[int, int]]] | None = None

    def excluded(self, rules: FilterRules) -> PageSet:
        """Return the pages that a dump leaves out.

        Raises:
            SourceError: The kernel's struct pages cannot be found or read.
            MissingPackageError: numpy cannot be imported.
        """
        excluded, layout, runs = self._by_level(rules.level, exact=rules.exact)
        if not (rules.without_struct_pages or rules.without_text):
            return excluded
        more = list(self._beyond_levels(rules, excluded, layout, runs))
        spare = PageSet.touched_by(layout.page_size, self._physical(more))
        return excluded.union(spare.without(self._kept(layout, more)))

    def _by_level(
        self, level: int, *, exact: bool
    ) -> tuple[PageSet, StructPage, Sequence[MemMapRun]]:
        if (level, exact) not in self._found:
            self._found[level, exact] = self._look(level, exact=exact)
        return self._found[level, exact]

    def _look(self, level: int, *, exact: bool) -> tuple[PageSet, StructPage, Sequence[MemMapRun]]:
        layout = parse_struct_page(self._vmcoreinfo, self._order, level)
        runs = find_mem_map(
            self._vmcoreinfo,
            self._architecture,
            layout,
            self._kernel,
            -(-self._blocks[-1].end // layout.page_size),
            exact=exact,
        )
        kept = PageSet(layout.page_size, ()) if exact else self._kept(layout, ())
        rules = FilterRules(level, exact)
        return find_excluded_pages(rules, layout, runs, self._kernel, kept.ranges), layout, runs

    def _beyond_levels(
        self, rules: FilterRules, excluded: PageSet, layout: StructPage, runs: Sequence[MemMapRun]
    ) -> Iterator[AddressRange]:
        if rules.without_struct_pages:
            yield from unneeded_struct_pages(excluded, layout, runs)
        if rules.without_text:
            try:
                yield kernel_text(self._vmcoreinfo, self._kernel, layout)
            except SourceError as error:
                self.remarks = (f"the kernel's code is in the dump: {error}",)

    def _physical(self, addresses: Iterable[AddressRange]) -> Iterator[tuple[int, int]]:
        for gva, size in addresses:
            yield from self._kernel.physical_ranges(gva, size)

    def _kept(self, layout: StructPage, left_out: Sequence[AddressRange]) -> PageSet:
        """Return what stays in every dump, but for what only these kernel addresses lead to."""
        if self._needed is None:
            self._needed = self._find_needed(layout)
        runs, ranges = self._needed
        gone = PageSet.touched_by(1, ((gva, gva + size) for gva, size in left_out))
        kept = PageSet.touched_by(layout.page_size, [*ranges, *_memory_outside(runs, gone)])
        needed = needed_addresses(
            self._architecture, self._vcpus, self._vmcoreinfo, self._kernel, self._order
        )
        addresses = PageSet.touched_by(1, ((gva, gva + size) for gva, size in needed))
        physical = self._physical((gva, end - gva) for gva, end in addresses.without(gone).ranges)
        return kept.union(PageSet.touched_by(layout.page_size, physical))

    def _find_needed(self, layout: StructPage) -> tuple[MappedRuns, list[tuple[int, int]]]:
        try:
            roots = roots_of_vcpus(self._architecture, self._vcpus, native=False)
        except SourceError:
            roots = []
        mappings = self._kernel.mappings(roots)
        ranges = [*mappings.tables, *self._also_kept]
        if self._architecture.phys_base_is_lowest:
            # By which readers know where the kernel was loaded.
            first = self._blocks[0].gpa
            ranges.append((first, first + layout.page_size))
        return mappings.runs, ranges


def _memory_outside(runs: MappedRuns, gone: PageSet) -> Iterator[tuple[int, int]]:
    """Yield first gpa and end of what runs map at other addresses than these."""
    if not gone.ranges:
        yield from runs.memory()
        return
    numpy = import_package("numpy", "a dump level")
    firsts, ends = numpy.array(gone.ranges, object).T
    firsts, lasts = firsts.astype(numpy.uint64), (ends - 1).astype(numpy.uint64)
    # The last of the ranges that begin before a run ends, if there is one.
    index = numpy.searchsorted(firsts, runs.lasts, side="right") - 1
    is_touched = (index >= 0) & (lasts[index] >= runs.gvas)
    is_inside = is_touched & (firsts[index] <= runs.gvas) & (lasts[index] >= runs.lasts)
    yield from runs[~is_touched].memory()
    for gva, gpa, size in runs[is_touched & ~is_inside].rows():
        for first, end in PageSet(1, ((gva, gva + size),)).without(gone).ranges:
            yield gpa + first - gva, gpa + end - gva
