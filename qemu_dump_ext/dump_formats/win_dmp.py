"""The crash dump of Windows: a header, and the pages of the guest's physical memory runs.

With `--omit-zero` it is a bitmap dump, in which pages of zeros are left out.

Source: QEMU dump/win_dump.c create_win_dump(), write_runs(); Volatility 3 layers/crash.py for the
bitmap.
"""

from __future__ import annotations

from qemu_dump_ext.dump_formats._declaration import DumpFormat, FormatFamily, ProgressCallback
from qemu_dump_ext.dump_formats._memory_image import Area, MemoryImage, write_image
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.pages.patched_memory import PatchedMemory
from qemu_dump_ext.pages.pipeline import Buffer, Piece, PieceWork, cut, read_through
from qemu_dump_ext.pages.zero_pages import pages_with_content
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.plan.request import WINDOWS_FORMAT, DumpRequest
from qemu_dump_ext.plan.windows_plan import blocks_in_runs
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.structures.win_dmp import (
    DUMP_TYPE_BITMAP_FULL,
    HEADERS,
    PAGE_SHIFT,
    PAGE_SIZE,
    SUMMARY,
    SUMMARY_SIGNATURE,
    SUMMARY_VALID_DUMP,
    WindowsDump,
)

_WORD_BITS = 32
"""Readers take a bitmap in words of this size."""


def _check(request: DumpRequest) -> None:
    if request.paging or request.memory_range is not None:
        raise RequestError("kdump-compressed format doesn't support paging or filter")
    if request.level is not None:
        raise RequestError("a Windows dump has no levels", hint="leave out --level")
    if request.level_of_pages or request.kernel is not None:
        raise RequestError(
            "--dump-level, --mini and --kernel are for Linux guests",
            hint="--omit-zero leaves pages of zeros out of a Windows dump",
        )
    if request.omit_zero and request.exact:
        raise RequestError("QEMU keeps pages of zeros", hint="--exact or --omit-zero")


def _write(
    request: DumpRequest,
    plan: DumpPlan,
    memory: GuestMemory,
    sink: Sink,
    progress: ProgressCallback,
) -> None:
    windows = plan.windows
    if windows is None:
        raise TypeError("a plan of no Windows dump")
    patched = PatchedMemory(memory, windows.patches)
    areas = tuple(
        Area(run.gpa, run.size, tuple(blocks_in_runs(plan.ram_blocks, [run])))
        for run in windows.runs
    )
    if not request.omit_zero:
        image = MemoryImage(windows.header, areas, granule=PAGE_SIZE)
        write_image(request, image, patched, sink, progress)
        return
    if not sink.seekable:
        raise RequestError(
            "a Windows dump without pages of zeros requires a seekable file",
            hint="leave out --omit-zero",
        )
    _BitmapDump(windows, areas, sink).write(request, patched, progress)


class _BitmapDump:
    # Which pages are there is known when the last of them is written: the bitmap comes then.
    def __init__(self, windows: WindowsDump, areas: tuple[Area, ...], sink: Sink) -> None:
        self._windows = windows
        self._areas = areas
        self._sink = sink
        pages = max((area.end for area in areas), default=0) >> PAGE_SHIFT
        self._bit_count = pages + -pages % _WORD_BITS
        self._bitmap = bytearray(self._bit_count // 8)
        self._bitmap_offset = len(windows.header) + SUMMARY.size
        end = self._bitmap_offset + len(self._bitmap)
        self._data_offset = end + -end % PAGE_SIZE
        self._page_count = 0

    def write(self, request: DumpRequest, memory: GuestMemory, progress: ProgressCallback) -> None:
        pieces = (
            piece
            for area in self._areas
            for piece in cut(memory, area.blocks, area.gpa, area.end, PAGE_SIZE)
        )
        work = PieceWork(self._find_pages, lambda _: None, self._append)
        read_through(memory, pieces, work, progress, threads=request.threads)
        size = self._data_offset + self._page_count * PAGE_SIZE
        self._sink.write_at(self._bitmap_offset, bytes(self._bitmap))
        self._sink.write_at(
            len(self._windows.header),
            SUMMARY.pack(
                Signature=SUMMARY_SIGNATURE,
                ValidDump=SUMMARY_VALID_DUMP,
                HeaderSize=self._data_offset,
                Pages=self._page_count,
                BitmapSize=self._bit_count,
            ),
        )
        gap = self._data_offset - self._bitmap_offset - len(self._bitmap)
        self._sink.write_at(self._data_offset - gap, bytes(gap))
        self._sink.write_at(0, self._header(size))

    def _find_pages(self, piece: Piece, buffer: Buffer) -> tuple[Piece, Buffer, list[int]] | None:
        numbers = pages_with_content(buffer.view, PAGE_SIZE)
        # Moved together, so that they are written at once.
        for index, number in enumerate(numbers):
            if index != number:
                page = buffer.view[number * PAGE_SIZE :][:PAGE_SIZE]
                buffer.view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page
        return piece, buffer, numbers

    def _append(self, found: tuple[Piece, Buffer, list[int]] | None) -> None:
        if found is None:
            return
        piece, buffer, numbers = found
        first = piece.gpa >> PAGE_SHIFT
        for number in numbers:
            self._bitmap[first + number >> 3] |= 1 << (first + number & 7)
        if numbers:
            offset = self._data_offset + self._page_count * PAGE_SIZE
            self._sink.write_at(offset, buffer.view[: len(numbers) * PAGE_SIZE])
            self._page_count += len(numbers)

    def _header(self, size: int) -> bytes:
        layout = HEADERS[self._windows.word_size]
        values = layout.unpack(self._windows.header)
        return layout.pack(
            **values | {"DumpType": DUMP_TYPE_BITMAP_FULL, "RequiredDumpSpace": size}
        )


def _failure(has_begun: bool, reason: str) -> str:
    return f"win-dump: failed to {'save memory' if has_begun else 'write header'}: {reason}"


FORMATS = FormatFamily(
    "win_dmp",
    lambda: (
        DumpFormat(
            WINDOWS_FORMAT,
            "dmp",
            write=_write,
            check=_check,
            of_windows=True,
            whole_pages=True,
            is_of_qemu=True,
            failure=_failure,
        ),
    ),
)
