"""Which pages of a process hold anything, from the kernel's page map, without touching them.

Source: Linux Documentation/admin-guide/mm/pagemap.rst; struct pm_scan_arg in linux/fs.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from array import array
from itertools import pairwise

from qemu_dump_ext.qemu.process import refusal

_ENTRY_SIZE = 8
_STORED = 1 << 62  # bit 63: present, bit 62: swapped
_ENTRIES_AT_ONCE = 1 << 18

_PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16  # _IOWR('f', 16, struct pm_scan_arg)
_PAGE_IS_PRESENT, _PAGE_IS_SWAPPED, _PAGE_IS_PFNZERO = 1 << 3, 1 << 4, 1 << 5
_REGIONS_AT_ONCE = 4096

AddressRange = tuple[int, int]
"""First address, and first address behind."""


class _PageRegion(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("categories", ctypes.c_uint64),
    )


class _ScanArgument(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


class PageMap:
    """The page map of one process."""

    def __init__(self, pid: int) -> None:
        """Open it.

        Raises:
            SourceError: Not permitted, or the process is gone.
        """
        try:
            self._descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise refusal(pid, error) from error
        self._can_scan = True

    def stored(self, start: int, end: int) -> list[AddressRange]:
        """Return where private anonymous memory may hold something else than zeros.

        Args:
            start: The start of a range of addresses, as `end` a multiple of a page.
            end: First address behind it.
        """
        if self._can_scan:
            try:
                return self._scan(start, end)
            except OSError:  # before Linux 6.7
                self._can_scan = False
        return self._read(start, end)

    def close(self) -> None:
        """Give it back; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _scan(self, start: int, end: int) -> list[AddressRange]:
        # Skips at once what has no page tables, and tells the kernel's shared page of zeros.
        regions = (_PageRegion * _REGIONS_AT_ONCE)()
        found: list[AddressRange] = []
        while start < end:
            argument = _ScanArgument(
                size=ctypes.sizeof(_ScanArgument),
                start=start,
                end=end,
                vec=ctypes.addressof(regions),
                vec_len=_REGIONS_AT_ONCE,
                category_inverted=_PAGE_IS_PFNZERO,
                category_mask=_PAGE_IS_PFNZERO,
                category_anyof_mask=_PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,
                return_mask=_PAGE_IS_PRESENT,
            )
            count = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument)
            for region in regions[:count]:
                _append(found, region.start, region.end)
            start = argument.walk_end
        return found

    def _read(self, start: int, end: int) -> list[AddressRange]:
        page = mmap.PAGESIZE
        found: list[AddressRange] = []
        step = _ENTRIES_AT_ONCE * page
        for first in range(start, end, step):
            count = (min(first + step, end) - first) // page
            content = os.pread(self._descriptor, count * _ENTRY_SIZE, first // page * _ENTRY_SIZE)
            entries = array("Q", content[:_ENTRY_SIZE])
            if not entries or (entries[0] < _STORED and content == entries.tobytes() * count):
                continue  # all are alike: none is looked at by itself
            entries.frombytes(content[_ENTRY_SIZE:])
            pages = [index for index, entry in enumerate(entries) if entry >= _STORED]
            breaks = [-1, *(i for i, (a, b) in enumerate(pairwise(pages)) if b != a + 1)]
            ends = [*breaks[1:], len(pages) - 1]
            for before, last in zip(breaks, ends, strict=True):
                low, high = pages[before + 1], pages[last] + 1
                _append(found, first + low * page, first + high * page)
        return found


def _append(ranges: list[AddressRange], start: int, end: int) -> None:
    if ranges and ranges[-1][1] == start:
        ranges[-1] = ranges[-1][0], end
    else:
        ranges.append((start, end))
