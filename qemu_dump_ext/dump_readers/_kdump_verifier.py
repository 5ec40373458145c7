"""Find damage in a kdump-compressed dump."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from qemu_dump_ext.dump_readers._notes_verifier import verify_notes
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.kdump import DUMP_DH_COMPRESSED_INCOMPLETE, PAGE_DESCRIPTOR_SIZE

if TYPE_CHECKING:
    from qemu_dump_ext.dump_readers._page_unpacker import Descriptor
    from qemu_dump_ext.dump_readers.kdump import KdumpFile

_MAX_MAPNR_32 = (1 << 32) - 1
_BACK_MAX = 1 << 20
"""Different descriptors that point back, which are looked at."""
_PROBLEMS_MAX = 1 << 16
"""Enough to call a dump damaged; bitmaps of a small file may claim millions of pages."""


@dataclass
class _Batch:
    pfns: array[int]
    rank: int


@dataclass
class _BatchResult:
    pfns: array[int]
    descriptors: list[Descriptor]
    problems: list[str]
    zero: int = 0
    raw: int = 0
    packed: int = 0


class KdumpVerifier:
    """Verifies one kdump-compressed dump."""

    def __init__(self, dump: KdumpFile, report: VerifyReport) -> None:
        self._dump = dump
        self._report = report
        # Extents of page data, by ascending offset: descriptors that follow each other in the
        # file are one extent.
        self._starts = array("Q")
        self._ends = array("Q")
        self._first_pfns = array("Q")
        # Descriptors that point back: at the data of an earlier page, or at a gap.
        self._back: dict[Descriptor, int] = {}  # the first pfn of each
        self._back_count = 0
        self._left_out = 0  # pages that the guest had, and the dump has not

    def verify(self, pool: OrderedPool, progress: Progress) -> None:
        """Verify everything.

        Raises:
            CorruptDumpError: What follows cannot be looked at.
        """
        dump, report = self._dump, self._report
        report.counts_pages = True
        verify_notes(dump, report)
        self._verify_headers()
        self._verify_bitmaps()
        total = dump.page_count * dump.page_size
        for result in pool.map(self._verify_batch, self._batches()):
            for problem in result.problems:
                report.add_problem(problem)
            report.zero_pages += result.zero
            report.raw_pages += result.raw
            report.packed_pages += result.packed
            report.memory_bytes += len(result.pfns) * dump.page_size
            self._note_extents(result)
            progress(report.memory_bytes, total)
            if report.problem_count > _PROBLEMS_MAX:
                report.add_problem("so many problems that the other pages were not looked at")
                return
        self._verify_extents()

    def _verify_headers(self) -> None:
        dump, report = self._dump, self._report
        header, sub_header = dump.header, dump.sub_header
        report.expect(
            not int(header["status"]) & DUMP_DH_COMPRESSED_INCOMPLETE,
            "the dump says that it is incomplete",
        )
        if int(header["header_version"]) >= 6:
            report.expect(
                header["max_mapnr"] == min(dump.max_mapnr, _MAX_MAPNR_32),
                f"max_mapnr is {header['max_mapnr']:#x} in the header"
                f" and {dump.max_mapnr:#x} in the sub-header",
            )
        for what in ("note", "vmcoreinfo"):
            report.expect(
                dump.is_in_sub_header(what),
                f"offset_{what} {sub_header[f'offset_{what}']:#x} and size_{what}"
                f" {sub_header[f'size_{what}']:#x} point outside the sub-header",
            )

    def _verify_bitmaps(self) -> None:
        dump, report = self._dump, self._report
        unknown = beyond = 0
        for number, first, second in dump.bitmap_pairs():
            left = max(0, dump.max_mapnr - 8 * dump.bitmap_piece * number)
            bits, in_dump = (int.from_bytes(piece, "little") for piece in (first, second))
            unknown += (in_dump & ~bits).bit_count()
            self._left_out += (bits & ~in_dump).bit_count()
            beyond += ((bits | in_dump) >> left).bit_count()
        report.expect(not unknown, f"{unknown} pages are in the second bitmap only")
        report.expect(
            not beyond, f"{beyond} bits of the bitmaps lie beyond max_mapnr {dump.max_mapnr:#x}"
        )

    def _batches(self) -> Iterator[_Batch]:
        pfns, rank = self._dump.pfns(), 0
        while batch := array("Q", islice(pfns, self._dump.pages_at_once)):
            yield _Batch(batch, rank)
            rank += len(batch)

    def _verify_batch(self, batch: _Batch) -> _BatchResult:
        dump = self._dump
        descriptors = dump.read_descriptors(batch.rank, len(batch.pfns))
        result = _BatchResult(batch.pfns, descriptors, [])
        zero_page = dump.zero_page_descriptor
        pages = dump.unpacker().unpack(descriptors)
        for pfn, descriptor, page in zip(batch.pfns, descriptors, pages, strict=True):
            if isinstance(page, CorruptDumpError):
                result.problems.append(f"page {pfn:#x}: {page}")
            elif descriptor == zero_page:
                result.zero += 1
            elif descriptor[2]:
                result.packed += 1
            else:
                result.raw += 1
        return result

    def _note_extents(self, result: _BatchResult) -> None:
        starts, ends = self._starts, self._ends
        for pfn, descriptor in self._with_data(result.pfns, result.descriptors):
            offset, size, *_ = descriptor
            if ends and offset == ends[-1]:
                ends[-1] += size
            elif not ends or offset > ends[-1]:
                starts.append(offset)
                ends.append(offset + size)
                self._first_pfns.append(pfn)
            elif descriptor not in self._back:
                self._back_count += 1
                if len(self._back) < _BACK_MAX:
                    self._back[descriptor] = pfn

    def _with_data(
        self, pfns: Iterable[int], descriptors: Iterable[Descriptor]
    ) -> Iterator[tuple[int, Descriptor]]:
        zero_page, limit = self._dump.zero_page_descriptor, self._dump.image.size
        for pfn, descriptor in zip(pfns, descriptors, strict=True):
            offset, size, *_ = descriptor
            if descriptor != zero_page and size and 0 <= offset <= limit - size:
                yield pfn, descriptor

    def _verify_back_references(self) -> None:
        """Whoever points back shares all the data of a page, or has data of its own in a gap."""
        if self._back_count > len(self._back):
            self._report.remarks.append(
                f"{self._back_count - len(self._back)} pages that share data were not looked at"
            )
        unknown = dict(self._back)
        if not unknown:
            return
        end = -1
        for batch in self._batches():
            descriptors = self._dump.read_descriptors(batch.rank, len(batch.pfns))
            for _, descriptor in self._with_data(batch.pfns, descriptors):
                offset, size, *_ = descriptor
                if offset >= end:
                    unknown.pop(descriptor, None)
                    end = offset + size
        self._verify_gaps(unknown)
        ends, last, last_pfn = self._ends, 0, 0
        for descriptor, pfn in sorted(unknown.items(), key=lambda item: item[0][0]):
            offset, size, *_ = descriptor
            index = bisect_right(ends, offset)  # the first extent that ends behind its first byte
            if index < len(ends) and self._starts[index] < offset + size:
                other = self._first_pfns[index]
            elif offset < last:
                other = last_pfn
            else:
                last, last_pfn = offset + size, pfn
                continue
            self._report.add_problem(
                f"page {pfn:#x}: its data at offset {offset:#x} overlap those of page"
                f" {other:#x} or its followers"
            )

    def _is_page_of_zeroes(self, offset: int) -> bool:
        # One that pages share: a writer has it in front of all page data, or not at all.
        size = self._dump.page_size
        return (offset, size, 0, 0) in self._back and not any(self._dump.image.read(offset, size))

    def _verify_gaps(self, in_gaps: Iterable[Descriptor]) -> None:
        # A page that points at the data of another one by mistake leaves its own behind.
        gaps = sum(self._starts[1:]) - sum(self._ends[:-1])
        orphaned = gaps - sum(size for _, size, *_ in in_gaps)
        self._report.expect(
            orphaned <= 0,
            f"{orphaned} bytes among the page data belong to no page: a descriptor is wrong",
        )

    def _verify_extents(self) -> None:
        dump, report = self._dump, self._report
        starts, ends = self._starts, self._ends
        data = dump.data_offset
        end = 0
        if report.zero_pages:
            end = data + dump.page_size
            # One page alone there may be any page, of a writer that has no page of zeroes.
            report.expect(
                report.zero_pages == 1 or not any(dump.zero_page),
                f"the page of zeroes at offset {data:#x} is not zero"
                f" ({report.zero_pages} pages share it)",
            )
        if starts:
            lowest = min([starts[0], *(descriptor[0] for descriptor in self._back)])
            # A writer that leaves pages out while it writes has had room for their descriptors.
            unused, rest = divmod(lowest - data, PAGE_DESCRIPTOR_SIZE)
            report.expect(
                lowest == data + dump.page_size
                or lowest <= (end or data)
                or (not rest and unused <= self._left_out and not self._is_page_of_zeroes(lowest)),
                f"page data begin at offset {lowest:#x}, the descriptors end at {data:#x}:"
                " bitmap and descriptors disagree",
            )
            if starts[0] < end:
                report.add_problem(
                    f"page {self._first_pfns[0]:#x}: its data at offset {starts[0]:#x} overlap the"
                    " page of zeroes"
                )
            end = max(end, ends[-1])
        self._verify_back_references()
        behind = dump.image.size - max(end, data)
        # Pages with problems are not counted among the extents.
        if behind > (0 if end > data else dump.page_size) and not report.problem_count:
            report.remarks.append(f"{behind} bytes behind the last page")


def verify_kdump(
    dump: KdumpFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    """Verify everything.

    Raises:
        CorruptDumpError: What follows cannot be looked at.
    """
    KdumpVerifier(dump, report).verify(pool, progress)
