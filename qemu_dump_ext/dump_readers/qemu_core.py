"""Read the guest in a core of the QEMU process: by gcore, by coredumpctl, of a QEMU that crashed.

Nothing in it tells what of QEMU's memory is the guest's, and no symbols of QEMU are needed: a
mapping is the guest's RAM where the kernel in it tells so, see `_ram_by_kernel`. The notes are
those of QEMU's threads; registers of the guest are in QEMU's own memory, and are not looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._ram_by_kernel import FileRange, RamLayout, find_layout
from qemu_dump_ext.dump_readers._range_headers import verify_memory
from qemu_dump_ext.dump_readers.elf import CoreOf, ElfCoreFile
from qemu_dump_ext.errors import NotADumpError
from qemu_dump_ext.structures.elf import ELF_MAGIC
from qemu_dump_ext.structures.elf_notes import Note

_SEARCH_SECONDS = 20.0
_SMALLEST_RAM = 1 << 20
_CANDIDATES_MAX = 32
"""Mappings that are looked at, the largest first; a guest of several NUMA nodes has a few."""


class QemuCoreFile(ElfCoreFile):
    """An open core of QEMU, as a dump of its guest.

    Attributes:
        layout: How the guest's RAM lies.
        ram: Where it is in the file.
    """

    core_of = CoreOf.PROCESS

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        super().__init__(image, format_suffix)
        self.format = f"qemu_core{format_suffix}"
        self.ram, self.layout = self._find_ram()
        self.header = MappingProxyType({"machine": self.layout.core.uname_machine})
        self.byte_order = self.layout.core.byte_order
        self.word_size = self.layout.core.word_size
        self.index = ExtentIndex()
        for gpa, offset, size in self.layout.windows:
            self.index.append(gpa, size, self.ram.place + offset)
        self.index.settle()

    def _find_ram(self) -> tuple[FileRange, RamLayout]:
        end = time.monotonic() + _SEARCH_SECONDS
        single = [FileRange(one.p_offset, one.p_filesz) for one in self.segments]
        for candidate in (*_largest(single), *_largest(self._neighbours())):
            left = end - time.monotonic()
            if left <= 0:
                break
            layout = find_layout(self.image, candidate, left)
            if layout is not None:
                return candidate, layout
        raise NotADumpError("the core of a process in which no kernel of a guest was found")

    def _neighbours(self) -> Iterator[FileRange]:
        """Yield mappings that follow each other as one: RAM may be several."""
        place = size = address = 0
        for segment in sorted(self.segments, key=lambda one: one.p_vaddr):
            if (segment.p_vaddr, segment.p_offset) == (address + size, place + size):
                size += segment.p_filesz
            else:
                yield FileRange(place, size)
                place, size, address = segment.p_offset, segment.p_filesz, segment.p_vaddr
            if segment.p_filesz < segment.p_memsz:
                yield FileRange(place, size)
                place = size = address = 0
        yield FileRange(place, size)

    @property
    def notes(self) -> tuple[Note, ...]:
        """None: those in the file are of QEMU's threads."""
        return ()

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest's RAM, ascending, merged."""
        return self.memory_ranges()


def _largest(ranges: Iterable[FileRange]) -> Sequence[FileRange]:
    large = [one for one in ranges if one.size >= _SMALLEST_RAM]
    return sorted(large, key=lambda one: -one.size)[:_CANDIDATES_MAX]


def _describe(dump: QemuCoreFile) -> Mapping[str, Callable[[], Any]]:
    return {
        "machine": lambda: dump.layout.machine.rstrip("-") or None,
        "windows": lambda: [
            {"gpa": gpa, "offset": dump.ram.place + offset, "size": size}
            for gpa, offset, size in dump.layout.windows
        ],
    }


READER = DumpReader(
    name="qemu_core",
    probe=lambda head: Fit.MAYBE if head.startswith(ELF_MAGIC) else Fit.NO,
    open=QemuCoreFile,
    describe=_describe,
    verify=verify_memory,
)
