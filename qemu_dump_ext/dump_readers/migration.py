"""Read QEMU's migration stream: a file by `migrate` to `file:` or through `exec:cat`.

Everything is read once when it is opened: nothing in a stream tells where a page is, but for one by
the capability mapped-ram, whose pages are not read before they are asked for. Its notes are those
that a dump of the guest would have, made of what the vCPUs' sections say.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._declaration import LISTED_MAX, DumpReader, Fit
from qemu_dump_ext.dump_readers._dump_file import VMCOREINFO_SIZE_MAX
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._made_notes import MadeNotes
from qemu_dump_ext.dump_readers._mapped_pages import MappedPages
from qemu_dump_ext.dump_readers._notes_verifier import verify_notes
from qemu_dump_ext.dump_readers._page_places import PagePlaces
from qemu_dump_ext.dump_readers._page_table_proof import page_tables_lead
from qemu_dump_ext.dump_readers._ram_layout import RamPiece, possible_layouts
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.errors import (
    CorruptDumpError,
    DumpError,
    GuestMemoryFaultError,
    UnsupportedTargetError,
)
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.registers.from_migration import (
    architecture_of_stream,
    registers_without_note,
    vcpus_of_stream,
)
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.migration import (
    MIGRATION_MAGIC,
    StreamBlock,
    StreamBuffer,
    parse_stream,
)
from qemu_dump_ext.structures.vmcoreinfo import note_at_page_start
from qemu_dump_ext.structures.win_dmp import is_windows_note

_NO_PROOF = "no vCPU uses page tables that are known, and there is no note of the kernel"


class _Index:
    """Takes where the pages of a stream are."""

    def __init__(self) -> None:
        self.places: list[PagePlaces] = []

    def begin(self, blocks: Sequence[StreamBlock], page_size: int) -> None:
        """Know the RAM blocks."""
        self.places = [PagePlaces(page_size) for _ in blocks]

    def page(self, block: int, offset: int, _data: memoryview, place: int) -> None:
        """Know a page."""
        self.places[block].add(offset, place)

    def fill(self, block: int, offset: int, byte: int) -> None:
        """Know a page of one byte over and over."""
        self.places[block].fill(offset, byte)


class MigrationFile(MadeNotes):
    """An open migration stream.

    Attributes:
        stream: What it tells.
        pieces: Where its RAM blocks are in guest physical memory, by ascending gpa.
        layout_proof: What proves that, in words; None: nothing contradicts it.
    """

    what = "stream"

    def __init__(self, image: DumpImage, format_suffix: str = "", place: int = 0) -> None:
        """Read the stream that begins at `place` and reaches up to the end."""
        self.image = image
        self.format = f"migration{format_suffix}"
        index = _Index()
        reader = _Reader(image, place)
        self.stream = parse_stream(StreamBuffer(reader.fill, reader.skip, place), index)
        self._places: list[PagePlaces | MappedPages] = [*index.places]
        for pages in self.stream.maps:
            self._places[pages.block] = MappedPages(image, pages)
        self.page_size = self.stream.page_size
        if self.stream.problem is not None:
            image.problems = (*image.problems, str(self.stream.problem))
        self.architecture = architecture_of_stream(self.stream)
        self._vcpus = vcpus_of_stream(self.stream, self.architecture)
        self.pieces, self.layout_proof = self._prove_layout()
        self.core = self.architecture.select_core(
            self.vcpus, self._blocks(self.pieces), MENDED, f"{self.stream.machine}-machine"
        )
        self.byte_order = self.core.byte_order
        self.word_size = self.core.word_size
        self.header = MappingProxyType(
            {
                "machine_type": self.stream.machine,
                "target": self.architecture.name,
                "e_machine": self.core.e_machine,
                "page_size": self.page_size,
            }
        )

    def _prove_layout(self) -> tuple[tuple[RamPiece, ...], str | None]:
        """Choose among the ways in which RAM may lie.

        Raises:
            UnsupportedTargetError: None is known, or the guest contradicts each.
        """
        unproved = None
        for pieces in possible_layouts(self.stream, self.architecture):
            self.pieces = pieces
            self._starts = [piece.gpa for piece in pieces]
            proof = self._proof()
            if proof:
                return pieces, proof
            if proof is None and unproved is None:
                unproved = pieces
        if unproved is None:
            raise UnsupportedTargetError(
                f"the RAM of this {self.stream.machine} lies otherwise than is known: the page"
                " tables of its vCPUs are not where they should be"
            )
        self.pieces = unproved
        self._starts = [piece.gpa for piece in unproved]
        return unproved, None

    def _proof(self) -> str | None:
        """Return what proves where RAM lies, empty where it is not so, None where nothing tells."""
        if self._vmcoreinfo_note is not None:
            return "the kernel's VMCOREINFO is where the kernel has said"
        blocks = self._blocks(self.pieces)
        walked = [page_tables_lead(self, blocks, self.architecture, vcpu) for vcpu in self.vcpus]
        if True in walked:
            return "the page tables of a vCPU lead to its program counter"
        return "" if False in walked else None

    def _blocks(self, pieces: Sequence[RamPiece]) -> Sequence[RamBlock]:
        names = [block.name for block in self.stream.blocks]
        return [
            RamBlock(piece.gpa, piece.size, names[piece.block], piece.offset) for piece in pieces
        ]

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs, in the order of their making."""
        return self._vcpus

    @property
    def lacking(self) -> Sequence[str]:
        """What of the guest is not in it, besides memory, in words."""
        proof = () if self.layout_proof else (f"where RAM lies is not proved: {_NO_PROOF}",)
        return (*super().lacking, *proof)

    @property
    def _vmcoreinfo_note(self) -> bytes | None:
        """The note that the guest has told its vmcoreinfo device of, where it is one."""
        for device in self.stream.find("vmcoreinfo"):
            try:
                place = device.fields.integer("vmcoreinfo.paddr")
                size = device.fields.integer("vmcoreinfo.size") or 0
                if not place or not 0 < size <= VMCOREINFO_SIZE_MAX:
                    continue
                data = self.read(place, size)
                if is_windows_note(data):
                    return data
                for order in {core.byte_order for core in self.architecture.cores}:
                    if (note := note_at_page_start(data, order)) is not None:
                        return note
            except (CorruptDumpError, GuestMemoryFaultError):
                continue
        return None

    @property
    def _other_notes(self) -> bytes:
        return self._vmcoreinfo_note or b""

    @property
    def missing_registers(self) -> Mapping[str, Sequence[str]]:
        """Registers that the stream does not have, by what they belong to."""
        return {
            **super().missing_registers,
            **registers_without_note(self.stream, self.architecture, self.vcpus),
        }

    def _note_areas(self) -> list[tuple[int, int]]:
        return []

    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what the stream tells of guest memory."""
        first = last = -1
        for piece in self.pieces:
            for low, high in self._known(piece):
                if low != last:
                    if last > first:
                        yield first, last - first
                    first = low
                last = high
        if last > first:
            yield first, last - first

    def _known(self, piece: RamPiece) -> Iterator[tuple[int, int]]:
        """Yield (gpa, end) of what the stream tells of a piece."""
        if self.stream.problem is None:
            yield piece.gpa, piece.end
            return
        for low, high in self._places[piece.block].seen():
            start, end = max(low, piece.offset), min(high, piece.offset + piece.size)
            if start < end:
                yield piece.gpa + start - piece.offset, piece.gpa + end - piece.offset

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return (gpa, end) of what is no page of zeros."""
        found = []
        for piece, start, count in self._parts(gpa, size):
            base = piece.gpa - piece.offset
            places = self._places[piece.block]
            found += [
                (base + low, base + high)
                for low, high in places.stored(start - base, start - base + count)
            ]
        return found

    def _parts(self, gpa: int, size: int) -> Iterator[tuple[RamPiece, int, int]]:
        """Yield the pieces that make up a range, and gpa and size of the part in each.

        Raises:
            GuestMemoryFaultError: Some of it is in none.
        """
        while size:
            index = bisect_right(self._starts, gpa) - 1
            piece = self.pieces[index] if index >= 0 else None
            if piece is None or gpa >= piece.end:
                raise GuestMemoryFaultError(gpa, size, "not in the dump")
            count = min(size, piece.end - gpa)
            yield piece, gpa, count
            gpa, size = gpa + count, size - count

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa`."""
        if self.stream.problem is not None:
            self._check_known(gpa, len(buffer))
        done = 0
        for piece, start, count in self._parts(gpa, len(buffer)):
            offset = start - piece.gpa + piece.offset
            for size, place, fill in self._places[piece.block].pieces(offset, count):
                part = buffer[done : done + size]
                if place:
                    self.image.read_into(place, part)
                else:
                    part[:] = fill * size
                done += size

    def _check_known(self, gpa: int, size: int) -> None:
        if any(low <= gpa and gpa + size <= low + count for low, count in self._known_ranges):
            return
        raise GuestMemoryFaultError(gpa, size, "the stream ends before it")

    @cached_property
    def _known_ranges(self) -> Sequence[tuple[int, int]]:
        return tuple(self.memory_ranges())


class _Reader:
    """An image from an offset to the end."""

    def __init__(self, image: DumpImage, place: int) -> None:
        self._image = image
        self._position = place

    def fill(self, buffer: memoryview) -> int:
        """Put the next bytes into a buffer, and return how many."""
        count = min(len(buffer), self._image.size - self._position)
        if count <= 0:
            return 0
        self._image.read_into(self._position, buffer[:count])
        self._position += count
        return count

    def skip(self, size: int) -> None:
        """Leave out so many."""
        self._position += size


def _describe(dump: MigrationFile) -> Mapping[str, Callable[[], Any]]:
    placed = {piece.block for piece in dump.pieces}
    return {
        "ram_blocks": lambda: {
            block.name: f"{block.size} bytes{'' if number in placed else ', left out'}"
            for number, block in enumerate(dump.stream.blocks)
        },
        "layout": lambda: dump.layout_proof or f"not proved: {_NO_PROOF}",
        "devices": lambda: " ".join(
            dict.fromkeys(device.name for device in dump.stream.devices[:LISTED_MAX])
        ),
        "missing_registers": lambda: {
            note: " ".join(names) for note, names in dump.missing_registers.items()
        },
    }


def _verify(
    dump: MigrationFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    """Read every page again: what else can be wrong was found when it was opened."""
    verify_notes(dump, report)
    report.counts_pages = True
    ranges = list(dump.memory_ranges())
    total = report.memory_bytes = sum(size for _, size in ranges)
    stored = [part for gpa, size in ranges for part in dump.populated(gpa, size)]
    pieces = (
        (start, min(_READ_SIZE, end - start))
        for low, end in stored
        for start in range(low, end, _READ_SIZE)
    )

    def read(piece: tuple[int, int]) -> tuple[int, DumpError | None]:
        try:
            dump.read(*piece)
        except (CorruptDumpError, GuestMemoryFaultError) as error:
            return piece[1], error
        return piece[1], None

    done = 0
    for size, error in pool.map(read, pieces):
        done += size
        report.raw_pages += -(-size // dump.page_size)
        if error:
            report.add_problem(error)
        progress(done, total)
    report.zero_pages = total // dump.page_size - report.raw_pages
    for owner, names in dump.missing_registers.items():
        report.remarks.append(f"{owner}: the stream does not have {', '.join(names)}")


_READ_SIZE = 1 << 20

READER = DumpReader(
    name="migration",
    probe=lambda head: Fit.SURE if head.startswith(MIGRATION_MAGIC) else Fit.NO,
    open=MigrationFile,
    describe=_describe,
    verify=_verify,
)
