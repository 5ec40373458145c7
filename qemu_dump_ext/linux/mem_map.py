"""Where a Linux kernel keeps its struct pages: its memory model, by VMCOREINFO and memory.

Source: Linux mm/sparse.c, include/linux/mmzone.h; makedumpfile's makedumpfile.c, get_mem_map().
"""

from __future__ import annotations

from collections.abc import Iterator

from qemu_dump_ext.architectures import Architecture
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.struct_page import StructPage
from qemu_dump_ext.structures.vmcoreinfo import VmcoreinfoNumbers
from qemu_dump_ext.value import Value

_PRESENT = 1
_SECTION_STATE_BITS_OF_MAKEDUMPFILE = 5
_PFNS_MAX = 1 << 40
"""More than any machine has; bounds the search for sections."""
_SECTIONS_MAX = 1 << 22
_SECTION_PAGES_BITS_MIN = 8
"""Of the smallest sections, those of ppc64 with pages of 64 KiB; bounds how many there are."""
_SECTION_SIZE_BITS = {
    "aarch64": 27,
    "arm": 28,
    "i386": 26,
    "loongarch64": 29,
    "mips64": 28,
    "mips64el": 28,
    "ppc64": 24,
    "riscv32": 27,
    "riscv64": 27,
    "s390x": 28,
    "x86_64": 27,
}
"""Of kernels before v5.13, which do not tell."""


class MemMapRun(Value):
    """Consecutive pages whose struct pages lie one behind the other.

    Attributes:
        first_pfn: Of the first page.
        count: Pages.
        gva: Kernel address of the first struct page.
    """

    first_pfn: int
    count: int
    gva: int


def find_mem_map(
    vmcoreinfo: bytes,
    architecture: Architecture,
    layout: StructPage,
    kernel: KernelMemory,
    end_pfn: int,
    *,
    exact: bool = False,
) -> list[MemMapRun]:
    """Return where struct pages are, by ascending pfn.

    Args:
        vmcoreinfo: Text of the kernel's; untrusted.
        architecture: Of the guest.
        layout: Of a struct page.
        kernel: Memory at the kernel's addresses.
        end_pfn: First pfn behind the guest's memory: struct pages of others do not matter.
        exact: Read `section_mem_map` as makedumpfile does, which knows fewer state bits.

    Raises:
        SourceError: VMCOREINFO tells of no memory model, or what it tells leads nowhere.
    """
    end_pfn = min(end_pfn, _PFNS_MAX)
    info = VmcoreinfoNumbers(vmcoreinfo)
    if info.get("SYMBOL(mem_section)") is not None:
        sections = _Sections(info, architecture, layout, kernel, end_pfn, exact=exact)
        runs = sections.runs()
    else:
        runs = _flat(info, layout, kernel, end_pfn)
    if not runs:
        raise SourceError("the kernel's struct pages were not found where VMCOREINFO leads")
    return runs


def _flat(
    info: VmcoreinfoNumbers, layout: StructPage, kernel: KernelMemory, end_pfn: int
) -> list[MemMapRun]:
    node = info.get("SYMBOL(contig_page_data)")
    if node is None:
        raise SourceError("VMCOREINFO lacks SYMBOL(mem_section) and SYMBOL(contig_page_data)")
    first, spanned, gva = (
        _word(kernel, layout, node + info.needed(f"OFFSET(pglist_data.{name})"))
        for name in ("node_start_pfn", "node_spanned_pages", "node_mem_map")
    )
    count = min(spanned, end_pfn - first)
    return [MemMapRun(first, count, gva)] if count > 0 else []


def _word(kernel: KernelMemory, layout: StructPage, gva: int) -> int:
    return int.from_bytes(kernel.read(gva, layout.word_size), layout.byte_order)


class _Sections:
    """SPARSEMEM: sections of memory, each with struct pages of its own."""

    def __init__(
        self,
        info: VmcoreinfoNumbers,
        architecture: Architecture,
        layout: StructPage,
        kernel: KernelMemory,
        end_pfn: int,
        *,
        exact: bool,
    ) -> None:
        self._layout = layout
        self._kernel = kernel
        self._end_pfn = end_pfn
        bits = info.get("NUMBER(SECTION_SIZE_BITS)") or _SECTION_SIZE_BITS.get(architecture.name)
        page_shift = layout.page_size.bit_length() - 1
        if bits is None:
            raise SourceError("VMCOREINFO lacks NUMBER(SECTION_SIZE_BITS)")
        if not page_shift + _SECTION_PAGES_BITS_MIN <= bits < 64:
            raise SourceError(f"VMCOREINFO makes no sense: NUMBER(SECTION_SIZE_BITS)={bits}")
        self._pages = 1 << (bits - page_shift)
        self._array = info.needed("SYMBOL(mem_section)")
        self._size = info.needed("SIZE(mem_section)")
        self._offset = info.needed("OFFSET(mem_section.section_mem_map)")
        is_whole = 0 <= self._offset <= self._size - layout.word_size
        if not is_whole or self._size > layout.page_size:  # a root is a page of them
            raise SourceError("VMCOREINFO makes no sense: mem_section.section_mem_map")
        self._per_root = layout.page_size // self._size
        self._is_extreme = self._has_roots(info, bits)
        state_bits = min(page_shift, self._pages.bit_length() - 1)
        if exact:
            state_bits = _SECTION_STATE_BITS_OF_MAKEDUMPFILE
        self._address_mask = ((1 << 8 * layout.word_size) - 1) & ~((1 << state_bits) - 1)

    def _has_roots(self, info: VmcoreinfoNumbers, bits: int) -> bool:
        length, reach = info.get("LENGTH(mem_section)"), info.get("NUMBER(MAX_PHYSMEM_BITS)")
        if length is None:
            return True
        if reach is not None and bits < reach <= 64:
            return length == -(-(1 << (reach - bits)) // self._per_root)
        return length * self._pages < self._end_pfn

    def runs(self) -> list[MemMapRun]:
        """Return runs, merged where struct pages are neighbours."""
        found = self._runs_at(self._array)
        if not found:
            # Some kernels around v4.15 tell the address of the pointer.
            found = self._runs_at(_word(self._kernel, self._layout, self._array))
        return found

    def _runs_at(self, array: int) -> list[MemMapRun]:
        runs: list[MemMapRun] = []
        wrap = (1 << 8 * self._layout.word_size) - 1
        for number, coded in self._coded(array):
            first = number * self._pages
            gva = ((coded & self._address_mask) + first * self._layout.size) & wrap
            count = min(self._pages, self._end_pfn - first)
            last = runs[-1] if runs else None
            if (
                last
                and last.first_pfn + last.count == first
                and last.gva + last.count * self._layout.size == gva
            ):
                runs[-1] = MemMapRun(last.first_pfn, last.count + count, last.gva)
            else:
                runs.append(MemMapRun(first, count, gva))
        return runs

    def _coded(self, array: int) -> Iterator[tuple[int, int]]:
        """Yield number and section_mem_map of every section that is present."""
        sections = -(-self._end_pfn // self._pages)
        if sections > _SECTIONS_MAX:
            raise SourceError(f"VMCOREINFO makes no sense: {sections} sections of memory")
        word, order = self._layout.word_size, self._layout.byte_order
        for first in range(0, sections, self._per_root):
            count = min(self._per_root, sections - first)
            root = self._root(array, first // self._per_root)
            if not root:
                continue
            try:
                data = self._kernel.read(root, count * self._size)
            except SourceError:
                continue
            for index in range(count):
                start = index * self._size + self._offset
                coded = int.from_bytes(data[start : start + word], order)
                if coded & _PRESENT:
                    yield first + index, coded

    def _root(self, array: int, number: int) -> int:
        if not self._is_extreme:
            return array + number * self._per_root * self._size
        try:
            return _word(self._kernel, self._layout, array + number * self._layout.word_size)
        except SourceError:
            return 0
