"""Find damage in an ELF core of a guest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qemu_dump_ext.dump_readers._notes_verifier import verify_notes
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf import EV_CURRENT

if TYPE_CHECKING:
    from qemu_dump_ext.dump_readers.elf import ElfCoreFile, Segment

_READ_SIZE = 1 << 20


def verify_elf_core(
    dump: ElfCoreFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    """Verify everything.

    Raises:
        CorruptDumpError: What follows cannot be looked at.
    """
    verify_notes(dump, report)
    _verify_elf_headers(dump, report)
    _verify_sections(dump, report)
    _verify_segments(dump, report)
    _read_all(dump, report, pool, progress)


def _verify_elf_headers(dump: ElfCoreFile, report: VerifyReport) -> None:
    header = dump.header
    report.expect(header["e_version"] == EV_CURRENT, f"e_version is {header['e_version']}")
    report.expect(
        int(header["e_phoff"]) >= dump.ehdr_size,
        f"the program headers at offset {header['e_phoff']:#x} lie inside the ELF header",
    )
    if header["e_ehsize"] != dump.ehdr_size:
        report.remarks.append(
            f"e_ehsize is {header['e_ehsize']} instead of {dump.ehdr_size}, as QEMU 7.2 and newer"
            " write it"
        )
    report.expect(dump.has_notes, "no PT_NOTE")
    report.expect(dump.segments, "no PT_LOAD: no guest memory")


def _verify_sections(dump: ElfCoreFile, report: VerifyReport) -> None:
    """Check that what the section headers point to is in the file: it ends behind the memory."""
    for number, section in enumerate(dump.section_headers()):
        offset, size = section["sh_offset"], section["sh_size"]
        if offset + size <= dump.image.size:
            continue
        # Since 7.2 QEMU writes these in the byte order of its host.
        other: ByteOrder = "big" if dump.byte_order == "little" else "little"
        swapped_offset, swapped_size = (
            int.from_bytes(value.to_bytes(dump.word_size, dump.byte_order), other)
            for value in (offset, size)
        )
        if swapped_offset + swapped_size <= dump.image.size:
            report.remarks.append(f"section header {number} is in the wrong byte order")
        else:
            report.add_problem(
                f"section {number} at offset {min(offset, swapped_offset):#x} of"
                f" {min(size, swapped_size)} bytes reaches beyond the end of the file at"
                f" {dump.image.size:#x}: truncated"
            )


def _verify_segments(dump: ElfCoreFile, report: VerifyReport) -> None:
    cut = 0
    for segment in dump.segments:
        name = f"PT_LOAD {segment.number} of guest memory at {segment.p_paddr:#x}"
        report.expect(
            segment.p_filesz <= segment.p_memsz,
            f"{name}: p_filesz {segment.p_filesz:#x} is more than p_memsz {segment.p_memsz:#x}",
        )
        cut += segment.p_filesz < segment.p_memsz
        if segment.p_filesz:
            report.expect(
                segment.p_offset >= dump.headers_end,
                f"{name}: its data at offset {segment.p_offset:#x} lie inside the headers",
            )
            end = segment.p_offset + segment.p_filesz
            report.expect(
                end <= dump.image.size,
                f"{name}: its data end at offset {end:#x}, the file at {dump.image.size:#x}:"
                " truncated",
            )
    if cut:
        report.remarks.append(f"{cut} PT_LOAD have less data than memory: the rest reads as zero")
    stored = [segment for segment in dump.segments if segment.p_filesz]
    _verify_overlaps(stored, lambda s: s.p_paddr, "guest memory", report)
    _verify_overlaps(stored, lambda s: s.p_offset, "the file", report)


def _verify_overlaps(
    segments: list[Segment], start_of: Callable[[Segment], int], where: str, report: VerifyReport
) -> None:
    # Several mappings of the same memory (a paged dump has them) must find it at the same place.
    widest: Segment | None = None
    for segment in sorted(segments, key=start_of):
        if widest is None:
            widest = segment
            continue
        if (
            start_of(segment) < start_of(widest) + widest.p_filesz
            and segment.p_offset - segment.p_paddr != widest.p_offset - widest.p_paddr
        ):
            report.add_problem(
                f"PT_LOAD {segment.number} overlaps PT_LOAD {widest.number} in {where}"
                f" at {start_of(segment):#x}"
            )
        if start_of(segment) + segment.p_filesz > start_of(widest) + widest.p_filesz:
            widest = segment


def _read_all(
    dump: ElfCoreFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    # Nothing in the memory can be wrong, but a medium that lost it says so.
    def read(piece: tuple[int, int]) -> tuple[int, CorruptDumpError | None]:
        try:
            dump.image.read(*piece)
        except CorruptDumpError as error:
            return piece[1], error
        return piece[1], None

    ranges = list(_stored_ranges(dump))
    total = sum(size for _, size in ranges)
    done = 0
    pieces = (
        (start, min(_READ_SIZE, end - start))
        for offset, size in ranges
        for first, end in dump.image.stored(offset, size)
        for start in range(first, end, _READ_SIZE)
    )
    for size, error in pool.map(read, pieces):
        done += size
        if error:
            report.add_problem(error)
        progress(done, total)
    report.memory_bytes = total


def _stored_ranges(dump: ElfCoreFile) -> Iterator[tuple[int, int]]:
    # (offset, size) of the guest memory that is in the file, each byte once.
    done = 0
    for segment in sorted(dump.segments, key=lambda segment: segment.p_offset):
        start = max(done, segment.p_offset)
        done = max(done, min(segment.p_offset + segment.p_filesz, dump.image.size))
        if done > start:
            yield start, done - start
