"""Where the RAM of a machine lies in guest physical memory, told by the kernel that is in it.

Of RAM alone nothing tells that. What QEMU's source says of each machine is tried; it is believed
where the kernel's own page tables, which VMCOREINFO leads to, lead to the kernel's name, and where
what they map one to one is the memory that the machine then has.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from qemu_dump_ext.architectures import Architecture, Core, MachineRam, all_architectures
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.errors import CorruptDumpError, DumpError, GuestMemoryFaultError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.linux.kernel_memory import read_utsname
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.paging.tables import TableReader, collect_mappings, kernel_translations
from qemu_dump_ext.value import Value

_CANDIDATES_MAX = 16
"""Notes that are looked at; a guest has one, and one of each kernel that ran before."""
_FROM_ZERO = MachineRam("", ((0, 0, None),))
_ADDRESS_END = 1 << 52


class FileRange(Value):
    """RAM in a file: where it begins there, and its size in bytes."""

    place: int
    size: int


class RamLayout(Value):
    """How RAM lies.

    Attributes:
        windows: gpa, offset in RAM, size, by ascending gpa.
        architecture: Of the guest.
        core: Of its kernel.
        machine: How the type of the machine begins; empty: of none that is known.
    """

    windows: Sequence[tuple[int, int, int]]
    architecture: Architecture
    core: Core
    machine: str


class _Ram:
    """RAM in a file, as guest memory that lies like this."""

    name = "dump"
    is_slow = False

    def __init__(
        self, image: DumpImage, ram: FileRange, windows: Sequence[tuple[int, int, int]]
    ) -> None:
        self._image, self._ram, self._windows = image, ram, windows
        self._starts = [gpa for gpa, _, _ in windows]
        self.blocks = [RamBlock(gpa, size, "", offset) for gpa, offset, size in windows]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        place = self._place(gpa, len(buffer))
        try:
            self._image.read_into(place, buffer)
        except CorruptDumpError as error:  # of a dump that is cut, the rest is searched
            raise GuestMemoryFaultError(gpa, len(buffer), str(error)) from error

    def _place(self, gpa: int, size: int) -> int:
        first, offset, length = self._windows[max(0, bisect_right(self._starts, gpa) - 1)]
        if not first <= gpa <= gpa + size <= first + length:
            raise GuestMemoryFaultError(gpa, size, "not in the dump")
        return self._ram.place + offset + gpa - first

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return what is in the file, and no hole of it: it may be cut, or lie of its size."""
        place = self._place(gpa, size)
        there = max(0, min(size, self._image.size - place))
        return [
            (gpa + start - place, gpa + end - place)
            for start, end in self._image.stored(place, there)
        ]

    def close(self) -> None:
        """Leave the file to its owner."""


def find_layout(image: DumpImage, ram: FileRange, seconds: float) -> RamLayout | None:
    """Return how RAM lies; None where there is no kernel in it that says so.

    Args:
        image: The file.
        ram: Where in the file it is.
        seconds: How long a kernel may be searched for.
    """
    flat = _Ram(image, ram, ((0, 0, ram.size),))
    any_architecture = next(iter(all_architectures().values()))
    search = NoteSearch(any_architecture, "little", flat, flat.blocks, seconds=seconds)
    started = time.monotonic()
    for note in islice(search.candidates(), _CANDIDATES_MAX):
        fitting = list(_fitting(image, ram, note.text))
        if fitting:
            # The first of those that fit best is the likely one.
            return max(fitting, key=lambda one: one[0])[1]
        if time.monotonic() - started > seconds:
            break
    return None


def _fitting(image: DumpImage, ram: FileRange, text: bytes) -> Iterator[tuple[int, RamLayout]]:
    """Yield the layouts in which a kernel's page tables lead to its name, and how well they fit."""
    for architecture in all_architectures().values():
        if architecture.kernel_page_tables is None:
            continue
        seen = set()
        for machine in (*architecture.machines, _FROM_ZERO):
            windows = machine.windows_of(ram.size)
            if ram.size < machine.size_min or windows in seen:
                continue
            seen.add(windows)
            memory = _Ram(image, ram, windows)
            try:
                name = read_utsname(memory, architecture, memory.blocks, text)
                cores = [core for core in architecture.cores if core.uname_machine == name.machine]
                if name.release and cores:
                    layout = RamLayout(windows, architecture, cores[0], machine.machine)
                    yield _mapped(memory, architecture, text), layout
            except CorruptDumpError:
                continue


def _mapped(memory: _Ram, architecture: Architecture, text: bytes) -> int:
    """Return the bytes of RAM that the kernel maps one to one, less those where there is none."""
    roots = kernel_translations(architecture, text, memory.blocks)
    reader = TableReader(memory, memory.blocks)
    try:
        segments = collect_mappings(roots, reader, [(0, _ADDRESS_END)], native=False)
    except DumpError:
        return 0
    sizes: Counter[int] = Counter()
    for segment in segments:
        sizes[segment.gva - segment.gpa] += segment.size
    if not sizes:
        return 0
    ((linear, whole),) = sizes.most_common(1)
    inside = sum(
        max(0, min(segment.gpa + segment.size, block.end) - max(segment.gpa, block.gpa))
        for segment in segments
        if segment.gva - segment.gpa == linear
        for block in memory.blocks
    )
    return 2 * inside - whole
