"""Kernel virtual memory of a Linux guest, from VMCOREINFO and guest physical memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qemu_dump_ext.architectures import Architecture, PageTableRoot, Translation
from qemu_dump_ext.errors import GuestMemoryFaultError, RequestError, SourceError
from qemu_dump_ext.guest.memory import GuestMemory, is_sparse
from qemu_dump_ext.guest.model import RamBlock, block_at
from qemu_dump_ext.paging.bulk_walk import BulkWalker, MappedRuns, joined
from qemu_dump_ext.paging.tables import TableReader, kernel_translations
from qemu_dump_ext.paging.walk import translate_by, translate_pages_by, unmapped_size
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.structures.utsname import UTSNAME_TOTAL_SIZE, UtsName, parse_new_utsname
from qemu_dump_ext.structures.vmcoreinfo import (
    kernel_word_size,
    vmcoreinfo_number,
    vmcoreinfo_value,
)
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

_SMALLEST_PAGE = 4096
_SCATTERED = 16
"""So many pages, each by itself, may well lie close together in another order."""
_UTSNAME_OFFSETS = (4, 0)


class KernelMappings(Value):
    """What the page tables of a kernel map elsewhere than all memory is mapped.

    Attributes:
        runs: Where, by ascending virtual address for each of several tables.
        tables: First gpa and end of these tables, in no order; there may be no memory.
    """

    runs: MappedRuns
    tables: Sequence[tuple[int, int]]


class KernelMemory:
    """Reads at kernel addresses, which its own page tables translate.

    Attributes:
        word_size: Of the kernel's `long`, in bytes; the dump's may be larger.
    """

    def __init__(
        self,
        architecture: Architecture,
        memory: GuestMemory,
        ram_blocks: Sequence[RamBlock],
        vmcoreinfo: bytes,
    ) -> None:
        """Prepare.

        Args:
            architecture: Of the guest.
            memory: Of the guest.
            ram_blocks: Where it has memory.
            vmcoreinfo: What the kernel says of itself; untrusted.

        Raises:
            SourceError: It says too little, or this architecture's tables are unknown.
        """
        self._memory = memory
        self._sparse = memory if is_sparse(memory) else None
        self._blocks = ram_blocks
        self._tables = TableReader(memory, ram_blocks)
        self._translations = kernel_translations(architecture, vmcoreinfo, ram_blocks)
        self._runs: MappedRuns | None = None
        if not self._translations:
            raise SourceError(
                f"kernel addresses of {architecture.name} cannot be translated:"
                " VMCOREINFO does not say where the kernel's page tables are"
            )
        self.word_size = kernel_word_size(vmcoreinfo)

    def mappings(self, others: Sequence[Translation] = ()) -> KernelMappings:
        """Return what the kernel maps elsewhere than all memory is mapped.

        That is its image, modules, stacks, per-CPU areas and struct pages, as far as they are
        mapped by page tables. The linear map is known as what maps most of all memory with one
        distance of virtual and physical addresses.

        Args:
            others: Roots of page tables, such as those of vCPUs, of which the tables alone count.

        Raises:
            SourceError: The kernel's page tables are hostile.
            MissingPackageError: numpy cannot be imported.
        """
        numpy = import_package("numpy", "a dump level")
        ranges = [(block.gpa, block.end) for block in self._blocks]
        walker = BulkWalker(self._tables, ranges)
        try:
            found = [walker.walk(root) for root in self._roots()]
            for root in others:
                if isinstance(root, PageTableRoot):
                    walker.find_tables(root)
        except RequestError as error:
            raise SourceError(error.message) from error
        if isinstance(self._translations[0], PageTableRoot):
            self._runs = found[0]  # by which addresses are translated many at a time
        mapped = joined(found)
        distances, which = numpy.unique(mapped.gvas - mapped.gpas, return_inverse=True)
        sizes = numpy.zeros(len(distances) + 1, numpy.uint64)
        numpy.add.at(sizes, which, mapped.sizes)
        most = int(sizes.argmax())
        is_linear = which == most
        if sizes[most] <= sum(end - first for first, end in ranges) // 2:
            is_linear[:] = False
        return KernelMappings(mapped[~is_linear], walker.tables)

    def _roots(self) -> Sequence[PageTableRoot]:
        return [root for root in self._translations if isinstance(root, PageTableRoot)]

    def physical_ranges(self, gva: int, size: int) -> list[tuple[int, int]]:
        """Return first gpa and end of what is mapped of a range of kernel addresses."""
        spans = self._spans(gva, size)
        return [(gpa, gpa + length) for _, gpa, length in spans if gpa is not None]

    def read_known(self, gva: int, view: memoryview) -> list[tuple[int, int]]:
        """Fill `view` from a kernel address on, as far as that can be done.

        Returns:
            First and end of each range of `view`, in bytes, that is not mapped to memory or cannot
            be read: its content is undefined.
        """
        missing: list[tuple[int, int]] = []
        spans = list(self._spans(gva, len(view)))
        if len(spans) >= _SCATTERED and self._gather(spans, view):
            return [(offset, offset + size) for offset, gpa, size in spans if gpa is None]
        for offset, gpa, size in spans:
            part = view[offset : offset + size]
            if gpa is None or not self._fill(gpa, part):
                missing.append((offset, offset + size))
        return missing

    def _gather(self, spans: Sequence[tuple[int, int | None, int]], view: memoryview) -> bool:
        """Fill `view` by one read, where what is mapped lies close together; return whether so."""
        mapped = [(offset, gpa, size) for offset, gpa, size in spans if gpa is not None]
        first = min((gpa for _, gpa, _ in mapped), default=0)
        end = max((gpa + size for _, gpa, size in mapped), default=0)
        if not 0 < end - first <= 2 * len(view):
            return False
        content = memoryview(bytearray(end - first))
        if not self._fill(first, content):
            return False
        for offset, gpa, size in mapped:
            view[offset : offset + size] = content[gpa - first : gpa - first + size]
        return True

    def _spans(self, gva: int, size: int) -> Iterator[tuple[int, int | None, int]]:
        """Yield offset, gpa or None, and size of what is mapped together, neighbours merged."""
        start, place, length = 0, None, 0
        for offset, gpa, run in self._pages(gva, size):
            follows = gpa == place if None in {gpa, place} else gpa == (place or 0) + length
            if not follows and length:
                yield start, place, length
                start, length = offset, 0
            if not length:
                place = gpa
            length += run
        if length:
            yield start, place, length

    def _pages(self, gva: int, size: int) -> Iterator[tuple[int, int | None, int]]:
        """Yield offset, gpa or None, and size of pages, the first and last in part."""
        end = 0
        for offset, gpa, run in self._walked(gva, size):
            yield from self._single_pages(gva, end, offset)
            yield offset, gpa, run
            end = offset + run
        yield from self._single_pages(gva, end, size)

    def _walked(self, gva: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield offset, gpa and size of what is known to be mapped since all was walked."""
        runs, end = self._runs, gva + size
        if runs is None or not 0 <= gva < end <= U64_MAX:
            return
        numpy = import_package("numpy", "a dump level")
        first_and_last = numpy.array([gva, end - 1], numpy.uint64)
        low, high = numpy.searchsorted(runs.gvas, first_and_last, side="right")
        for first, gpa, length in runs[max(low - 1, 0) : high].rows():
            start, behind = max(first, gva), min(first + length, end)
            if start < behind:
                yield start - gva, gpa + start - first, behind - start

    def _single_pages(
        self, gva: int, offset: int, size: int
    ) -> Iterator[tuple[int, int | None, int]]:
        """Yield offset, gpa or None, and size of each page from an offset on."""
        while offset < size:
            address = (gva + offset) & U64_MAX
            left = size - offset
            found = translate_pages_by(self._translations, self._tables, address, left)
            hole = [] if found else [(None, self._hole(address, left))]
            for gpa, run in found or hole:
                step = min(run, size - offset)
                if step <= 0:
                    break
                yield offset, gpa, step
                offset += step

    def _hole(self, gva: int, size: int) -> int:
        """Return how many bytes from an address on are not mapped: the rest of a page at least."""
        known = (unmapped_size(one, self._tables, gva, size) for one in self._translations)
        return max(min(known), _SMALLEST_PAGE - gva % _SMALLEST_PAGE)

    def _fill(self, gpa: int, view: memoryview) -> bool:
        block = block_at(self._blocks, gpa)
        if block is None or gpa + len(view) > block.end:
            return False
        filled = gpa
        try:
            parts = [(gpa, gpa + len(view))]
            for start, end in self._sparse.populated(gpa, len(view)) if self._sparse else parts:
                view[filled - gpa : start - gpa] = bytes(start - filled)
                self._memory.read_into(start, view[start - gpa : end - gpa])
                filled = end
        except GuestMemoryFaultError:
            return False
        view[filled - gpa :] = bytes(gpa + len(view) - filled)
        return True

    def read(self, gva: int, size: int) -> bytes:
        """Return `size` bytes at a kernel address; `size` is the caller's to bound.

        Raises:
            SourceError: The address is not mapped, or mapped to no memory.
        """
        data = bytearray(size)
        view = memoryview(data)
        while view:
            gpa, run = self._translate(gva)
            part = view[: min(run, len(view))]
            self._read_physical(gva, gpa, part)
            gva, view = (gva + len(part)) & U64_MAX, view[len(part) :]
        return bytes(data)

    def _translate(self, gva: int) -> tuple[int, int]:
        found = translate_by(self._translations, self._tables, gva)
        if found is None:
            raise SourceError(f"kernel address {gva:#x} is not mapped")
        return found

    def _read_physical(self, gva: int, gpa: int, view: memoryview) -> None:
        block = block_at(self._blocks, gpa)
        if block is None or gpa + len(view) > block.end:
            raise SourceError(f"kernel address {gva:#x} leads to no memory: {gpa:#x}")
        try:
            self._memory.read_into(gpa, view)
        except GuestMemoryFaultError as error:
            raise SourceError(f"kernel address {gva:#x}: {error}") from error


def read_utsname(
    memory: GuestMemory,
    architecture: Architecture,
    ram_blocks: Sequence[RamBlock],
    vmcoreinfo: bytes,
) -> UtsName:
    """Read the kernel's init_uts_ns, whose address VMCOREINFO tells.

    Returns:
        Empty strings where it is not found, or does not say what VMCOREINFO says.
    """
    address = vmcoreinfo_number(vmcoreinfo, "SYMBOL(init_uts_ns)", 16)
    if address is None:
        return UtsName()
    translations = kernel_translations(architecture, vmcoreinfo, ram_blocks)
    tables = TableReader(memory, ram_blocks)
    for offset in utsname_offsets(vmcoreinfo):
        found = translate_by(translations, tables, address + offset)
        if found is not None:
            name = _utsname_at(memory, ram_blocks, found[0])
            if name.release and name.release == vmcoreinfo_value(vmcoreinfo, "OSRELEASE"):
                return name
    return UtsName()


def utsname_offsets(vmcoreinfo: bytes) -> Sequence[int]:
    """Return where in its init_uts_ns a kernel may have its name, in bytes; the likely one first.

    Linux before 5.11 does not tell: there it lies behind a counter (struct kref).
    """
    told = vmcoreinfo_number(vmcoreinfo, "OFFSET(uts_namespace.name)")
    return _UTSNAME_OFFSETS if told is None else (told,)


def _utsname_at(memory: GuestMemory, ram_blocks: Sequence[RamBlock], gpa: int) -> UtsName:
    block = block_at(ram_blocks, gpa)
    if block is None or gpa + UTSNAME_TOTAL_SIZE > block.end:
        return UtsName()
    buffer = bytearray(UTSNAME_TOTAL_SIZE)
    try:
        memory.read_into(gpa, memoryview(buffer))
    except GuestMemoryFaultError:
        return UtsName()
    return parse_new_utsname(bytes(buffer)) or UtsName()
