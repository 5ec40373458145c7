"""What else may be missing in a dump for triage: struct pages of pages that are gone, and code.

Pages are left out by the addresses at which the kernel has them. What it has at another address as
well stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kallsyms import Kallsyms
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.mem_map import MemMapRun
from qemu_dump_ext.linux.needed_memory import AddressRange
from qemu_dump_ext.linux.struct_page import StructPage
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.structures.c_struct import U64_MAX
from qemu_dump_ext.structures.vmcoreinfo import VmcoreinfoNumbers

_TEXT_SIZE_MAX = 1 << 28


def unneeded_struct_pages(
    excluded: PageSet, layout: StructPage, runs: Sequence[MemMapRun]
) -> Iterator[AddressRange]:
    """Yield the kernel addresses of pages on which all struct pages are of excluded pages.

    Args:
        excluded: Pages that are not in the dump.
        layout: Of a struct page.
        runs: Where struct pages are, by ascending pfn, not overlapping.
    """
    index = 0
    for run in runs:
        while index < len(excluded.ranges) and excluded.ranges[index][1] <= run.first_pfn:
            index += 1
        at = index
        while at < len(excluded.ranges) and excluded.ranges[at][0] < run.first_pfn + run.count:
            first, end = excluded.ranges[at]
            first = max(first - run.first_pfn, 0)
            end = min(end - run.first_pfn, run.count)
            begin = -(-(run.gva + first * layout.size) // layout.page_size) * layout.page_size
            behind = (run.gva + end * layout.size) // layout.page_size * layout.page_size
            if begin < behind:
                yield begin & U64_MAX, behind - begin
            at += 1


def kernel_text(vmcoreinfo: bytes, kernel: KernelMemory, layout: StructPage) -> AddressRange:
    """Return the kernel address and size of the pages that have nothing but the kernel's code.

    Raises:
        SourceError: The kernel does not tell where its code ends.
    """
    begin = VmcoreinfoNumbers(vmcoreinfo).needed("SYMBOL(_stext)")
    symbols = Kallsyms(kernel, vmcoreinfo, layout.byte_order).addresses_of({"_stext", "_etext"})
    end = symbols.get("_etext", begin)
    if symbols.get("_stext") != begin or not begin < end <= begin + _TEXT_SIZE_MAX:
        raise SourceError("the kernel does not tell where its code ends")
    first, behind = -(-begin // layout.page_size), end // layout.page_size
    return first * layout.page_size, (behind - first) * layout.page_size
