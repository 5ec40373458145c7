"""Read the crash dump of Windows: full, or with a bitmap of the pages that it has.

Source: as structures/win_dmp.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._declaration import LISTED_MAX, DumpReader, Fit
from qemu_dump_ext.dump_readers._extent_dump import ExtentDump
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._range_headers import read_memory
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.errors import CorruptDumpError, NotADumpError
from qemu_dump_ext.structures.elf import EM_386, EM_X86_64
from qemu_dump_ext.structures.win_dmp import (
    DUMP_TYPE_BITMAP_FULL,
    DUMP_TYPE_FULL,
    HEADERS,
    MACHINE_IMAGE_TYPES,
    MOST_RUNS,
    PAGE_SHIFT,
    PAGE_SIZE,
    SIGNATURE,
    SUMMARY,
    SUMMARY_VALID_DUMP,
    VALID_DUMP,
    PageRun,
    parse_runs,
)

_DUMP_TYPE_BITMAP_KERNEL = 6
_BITMAP_TYPES = frozenset((DUMP_TYPE_BITMAP_FULL, _DUMP_TYPE_BITMAP_KERNEL))
_SUMMARY_SIGNATURES = frozenset((b"FDMP", b"SDMP"))
_GPA_BITS = 52
"""Of the widest physical address of x86."""
_BITMAP_SIZE_MAX = 1 << 28
"""Bytes: of 8 TiB of guest memory."""
_RUNS_MAX = 1 << 22
"""More than any guest has; each takes memory, and a bitmap of 256 MiB may have 1 << 30."""


class WindowsDumpFile(ExtentDump):
    """A crash dump of Windows.

    Attributes:
        runs: The physical memory runs of its header, as far as that has room for them.
        summary: Members of the header of a bitmap dump; empty for a full one.
    """

    def __init__(self, image: DumpImage, suffix: str) -> None:
        """Read the headers.

        Raises:
            NotADumpError: It is of a kind that has only parts of guest memory at virtual addresses.
            CorruptDumpError: They contradict the format, or are cut off.
        """
        self.image = image
        self.format = f"win-dmp{suffix}"
        self.byte_order = "little"
        self.page_size = PAGE_SIZE
        valid = image.read(4, 4)
        widths = [size for size, word in VALID_DUMP.items() if word == valid]
        if not widths:
            raise NotADumpError(f"a dump of Windows has DUMP or DU64 at offset 4, not {valid!r}")
        self.word_size = widths[0]
        layout = HEADERS[self.word_size]
        data = image.read(0, layout.size)
        self._members = layout.unpack_integers(data)
        hidden = {name for name in self._members if name.startswith(("reserved", "unused"))}
        self.header = MappingProxyType(
            {name: value for name, value in self._members.items() if name not in hidden}
        )
        first = layout.offsets["Run"]
        self.runs: Sequence[PageRun] = parse_runs(
            data[first : layout.offsets["ContextBuffer"]],
            self.word_size,
            self._members["NumberOfRuns"],
        )
        self.summary: Mapping[str, int] = {}
        self.index = ExtentIndex()
        kind = self._members["DumpType"]
        if kind == DUMP_TYPE_FULL:
            self._index_runs(layout.size)
        elif kind in _BITMAP_TYPES:
            self._index_bitmap(layout.size)
        else:
            raise NotADumpError(f"a dump of Windows of type {kind} has no physical memory to read")
        self.index.settle()

    def _index_runs(self, offset: int) -> None:
        count = self._members["NumberOfRuns"]
        if count > MOST_RUNS[self.word_size]:
            raise CorruptDumpError(
                f"{count} physical memory runs, and a header has room for"
                f" {MOST_RUNS[self.word_size]}"
            )
        for run in self.runs:
            if run.gpa + run.size > 1 << _GPA_BITS:
                raise CorruptDumpError(
                    f"a physical memory run of {run.count:#x} pages at page {run.first:#x}:"
                    " no machine has so much memory"
                )
            if run.size:
                self.index.append(run.gpa, run.size, offset)
            offset += run.size
        self._end = offset

    def _index_bitmap(self, start: int) -> None:
        data = self.image.read(start, SUMMARY.size)
        members = SUMMARY.unpack(data)
        signature, valid = members["Signature"], members["ValidDump"]
        if signature not in _SUMMARY_SIGNATURES or valid != SUMMARY_VALID_DUMP:
            raise CorruptDumpError(
                f"a dump with a bitmap has FDMP or SDMP, and DUMP, at offset {start:#x}"
            )
        self.summary = SUMMARY.unpack_integers(data)
        size = -(-self.summary["BitmapSize"] // 8)
        if size > _BITMAP_SIZE_MAX:
            raise CorruptDumpError(f"a bitmap of {size:#x} bytes is larger than any dump needs")
        bitmap = self.image.read(start + SUMMARY.size, size)
        offset = self.summary["HeaderSize"]
        for first, count in _runs_of_bits(bitmap, self.summary["BitmapSize"]):
            if len(self.index) == _RUNS_MAX:
                raise CorruptDumpError(
                    f"a bitmap of more than {_RUNS_MAX} runs of pages: no guest has so many"
                )
            self.index.append(first << PAGE_SHIFT, count << PAGE_SHIFT, offset)
            offset += count << PAGE_SHIFT
        self._end = offset

    @property
    def end(self) -> int:
        """Where the last page of memory ends in the file."""
        return self._end

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the physical memory runs, as far as there are bits for their pages.

        Ascending, merged.
        """
        if not self.summary:
            yield from self.memory_ranges()
            return
        listed = ExtentIndex()
        for run in self.runs:
            size = min(run.gpa + run.size, self.summary["BitmapSize"] << PAGE_SHIFT) - run.gpa
            if size > 0:
                listed.append(run.gpa, size, 0)
        for gpa, size in self.memory_ranges():
            listed.append(gpa, size, 0)
        listed.settle()
        yield from listed.ranges()

    @property
    def machine(self) -> int:
        """EM_* of the guest."""
        return EM_X86_64 if self.word_size == 8 else EM_386

    @property
    def windows_header(self) -> bytes:
        """The header, as that of a full dump."""
        layout = HEADERS[self.word_size]
        values = layout.unpack(self.image.read(0, layout.size))
        pages = sum(run.count for run in self.runs)
        values |= {
            "DumpType": DUMP_TYPE_FULL,
            "RequiredDumpSpace": layout.size + (pages << PAGE_SHIFT),
        }
        return layout.pack(**values)


def _runs_of_bits(bitmap: bytes, bits: int) -> Iterator[tuple[int, int]]:
    """Yield first bit and count of each run of ones, LSB first."""
    first: int | None = None
    for index, byte in enumerate(bitmap):
        if byte == 0 and first is None:
            continue
        if byte == 0xFF and first is not None:
            continue
        for bit in range(8 * index, min(8 * index + 8, bits)):
            if byte >> (bit & 7) & 1:
                first = bit if first is None else first
            elif first is not None:
                yield first, bit - first
                first = None
    if first is not None:
        yield first, bits - first


def _describe(dump: WindowsDumpFile) -> Mapping[str, Callable[[], Any]]:
    parts: dict[str, Callable[[], Any]] = {
        "physical_memory_runs": lambda: [
            {"first_page": run.first, "page_count": run.count} for run in dump.runs[:LISTED_MAX]
        ]
    }
    if dump.summary:
        parts["bitmap"] = lambda: dict(dump.summary)
    return parts


def _verify(
    dump: WindowsDumpFile, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    header = dump.header
    expected = MACHINE_IMAGE_TYPES[dump.word_size]
    report.expect(
        header["MachineImageType"] == expected,
        f"MachineImageType is {header['MachineImageType']:#x}, not {expected:#x}",
    )
    report.expect(header["NumberProcessors"], "NumberProcessors is 0")
    pages = sum(run.count for run in dump.runs)
    if header["NumberOfPages"] != pages:
        report.remarks.append(
            f"NumberOfPages is {header['NumberOfPages']}, and the runs have {pages} pages"
        )
    end = 0
    for run in dump.runs:
        report.expect(
            run.gpa >= end or not run.size,
            f"physical memory runs do not ascend at page {run.first:#x}",
        )
        end = max(end, run.gpa + run.size)
    _verify_size(dump, report)
    read_memory(dump, report, pool, progress)


def _verify_size(dump: WindowsDumpFile, report: VerifyReport) -> None:
    report.expect(
        dump.end <= dump.image.size,
        f"guest memory ends at offset {dump.end:#x}, the file at {dump.image.size:#x}: truncated",
    )
    required = int(dump.header["RequiredDumpSpace"])
    if required != dump.end:
        report.remarks.append(f"RequiredDumpSpace is {required:#x} instead of {dump.end:#x}")
    if dump.summary:
        pages = (dump.end - dump.summary["HeaderSize"]) >> PAGE_SHIFT
        report.expect(
            dump.summary["Pages"] == pages,
            f"the bitmap has {pages} pages, its header {dump.summary['Pages']}",
        )


READER = DumpReader(
    name="win_dmp",
    probe=lambda head: (
        Fit.SURE if head[:4] == SIGNATURE and head[4:8] in VALID_DUMP.values() else Fit.NO
    ),
    open=WindowsDumpFile,
    describe=_describe,
    verify=_verify,
)
