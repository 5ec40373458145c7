"""kdump-compressed: headers, bitmaps, page descriptors, compressed pages; raw or flattened.

Source: makedumpfile IMPLEMENTATION and diskdump_mod.h; QEMU dump/dump.c create_kdump_vmcore().
With --exact the order of writes and their borders are QEMU's, so that a flattened stream is
byte-identical as well; otherwise writes are large.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate

from qemu_dump_ext.dump_formats._declaration import (
    DumpFormat,
    FormatFamily,
    ProgressCallback,
    WriteDump,
)
from qemu_dump_ext.dump_formats._flattened_stream import FlattenedStream
from qemu_dump_ext.dump_formats._kdump_pages import (
    BulkPageWriter,
    OrderedPageWriter,
    PageForm,
    WriteAt,
)
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.memory import GuestMemory, PackedMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.page_codecs import UNCOMPRESSED, PageCodec, all_page_codecs
from qemu_dump_ext.pages.dedup import PageDeduplicator, deduplicator
from qemu_dump_ext.pages.packing import CopyingPacker, Packer
from qemu_dump_ext.pages.packing_processes import start_packer
from qemu_dump_ext.pages.page_packing import Compression
from qemu_dump_ext.pages.pipeline import Piece, cut, read_through, worker_count
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.structures.c_struct import U32_MAX, Abi
from qemu_dump_ext.structures.kdump import (
    DISK_DUMP_HEADER,
    HEADER_VERSION,
    KDUMP_SIGNATURE,
    KDUMP_SUB_HEADER,
    PAGE_DESCRIPTOR,
)
from qemu_dump_ext.value import Value

_DUMP_LEVEL_OF_QEMU = 1
_CODECS_OF_QEMU = frozenset(("zlib", "lzo", "snappy"))
_LOOKAHEAD = 1024
"""Pieces with content among which those of zeros are spread: they take half a megabyte."""
_WORTH_PROCESSES = 256 << 20
"""Bytes of guest memory from which on starting them takes less time than they save."""


class PageRun(Value):
    """Consecutive pages of the dump.

    Attributes:
        first_pfn: Of the run.
        end_pfn: First pfn behind it.
        blocks: What is in them; bytes that no block covers are zero.
    """

    first_pfn: int
    end_pfn: int
    blocks: tuple[RamBlock, ...]


class KdumpLayout(Value):
    """Everything of the file but the pages, and where it goes.

    Attributes:
        abi: Of all structures.
        header: At offset 0.
        sub_header: Followed by the notes, at `sub_header_offset`.
        sub_header_offset: In bytes, as all offsets.
        notes_offset: Of the notes area.
        bitmap_offset: Of the first bitmap; the second one follows.
        bitmap_blocks: Of one bitmap.
        descriptor_offset: Of the page descriptors.
        data_offset: Of the first page's data.
        runs: By ascending pfn.
        covered_runs: Likewise, with the pages that are left out.
    """

    abi: Abi
    header: bytes
    sub_header: bytes
    sub_header_offset: int
    notes_offset: int
    bitmap_offset: int
    bitmap_blocks: int
    descriptor_offset: int
    data_offset: int
    runs: tuple[PageRun, ...]
    covered_runs: tuple[PageRun, ...]


def page_runs(blocks: Sequence[RamBlock], page_size: int, *, compose: bool) -> list[PageRun]:
    """Find the pages of all blocks.

    Args:
        blocks: By ascending gpa.
        page_size: In bytes.
        compose: Blocks that share a page share its descriptor; otherwise each block has its own,
            as QEMU has it.
    """
    runs: list[PageRun] = []
    for block in blocks:
        first_pfn, end_pfn = block.gpa // page_size, -(-block.end // page_size)
        if compose and runs and runs[-1].end_pfn > first_pfn:
            last = runs.pop()
            runs.append(PageRun(last.first_pfn, max(last.end_pfn, end_pfn), (*last.blocks, block)))
        else:
            runs.append(PageRun(first_pfn, end_pfn, (block,)))
    return runs


def pieces_of_runs(memory: GuestMemory, runs: Sequence[PageRun], page_size: int) -> Iterator[Piece]:
    """Cut runs into pieces of whole pages."""
    for run in runs:
        yield from cut(
            memory, run.blocks, run.first_pfn * page_size, run.end_pfn * page_size, page_size
        )


def with_zeros_between(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces in an order in which those of zeros lie evenly between the others.

    Their descriptors are written while the others are packed; the order depends on nothing else.
    """
    content: list[Piece] = []
    zeros: list[Piece] = []
    for piece in pieces:
        (content if piece.extents else zeros).append(piece)
        if len(content) == _LOOKAHEAD:
            yield from _merged(content, zeros)
            content, zeros = [], []
    yield from _merged(content, zeros)


def _merged(content: Sequence[Piece], zeros: Sequence[Piece]) -> Iterator[Piece]:
    done = 0
    for number, piece in enumerate(content, 1):
        yield piece
        end = number * len(zeros) // len(content)
        yield from zeros[done:end]
        done = end
    yield from zeros[done:]


def page_index(runs: Sequence[PageRun]) -> Callable[[int], int]:
    """Return what tells the number of a page among those of `runs`, which share none."""
    firsts = [run.first_pfn for run in runs]
    counts = accumulate((run.end_pfn - run.first_pfn for run in runs), initial=0)
    shifts = [count - first for count, first in zip(counts, firsts, strict=False)]
    return lambda pfn: pfn + shifts[bisect_right(firsts, pfn) - 1]


def lay_out(plan: DumpPlan, codec: PageCodec) -> KdumpLayout:
    """Compute headers and offsets.

    Raises:
        RequestError: Memory is at addresses that are too high for a page map.
    """
    core, page_size = plan.core, plan.page_size
    exact = plan.dialect.whole_pages_only
    runs = page_runs(plan.ram_blocks, page_size, compose=not exact)
    covered_runs = page_runs(plan.covered_blocks, page_size, compose=not exact)
    end = plan.covered_blocks[-1].end
    max_mapnr = (end // page_size if exact else -(-end // page_size)) - plan.pfn_base
    bitmap_blocks = -(-max_mapnr // (8 * page_size))
    if 2 * bitmap_blocks > U32_MAX:
        raise RequestError(
            "the page map of a kdump does not reach guest memory at"
            f" {plan.covered_blocks[-1].gpa:#x}",
            hint="take an ELF core, or what is below with --range BEGIN LENGTH",
        )
    abi = Abi(core.byte_order, core.word_size, max_align=core.word_size)
    align = core.word_size if plan.dialect.packed_sub_header else core.u64_align
    header = DISK_DUMP_HEADER.bind(abi)
    sub_header = KDUMP_SUB_HEADER.bind(Abi(core.byte_order, core.word_size, max_align=align))
    notes_offset = page_size + sub_header.size
    sub_header_blocks = -(-(sub_header.size + len(plan.notes)) // page_size)
    bitmap_offset = page_size * (1 + sub_header_blocks)
    descriptor_offset = bitmap_offset + 2 * bitmap_blocks * page_size
    page_count = sum(run.end_pfn - run.first_pfn for run in runs)
    word = (1 << 8 * core.word_size) - 1
    vmcoreinfo_start, vmcoreinfo_size = plan.vmcoreinfo_span or (0, 0)
    return KdumpLayout(
        abi=abi,
        header=header.pack(
            signature=KDUMP_SIGNATURE,
            header_version=HEADER_VERSION,
            **plan.utsname.encode(),
            status=codec.page_flag,
            block_size=page_size,
            sub_hdr_size=sub_header_blocks,
            bitmap_blocks=2 * bitmap_blocks,
            max_mapnr=min(max_mapnr, U32_MAX),
            nr_cpus=plan.vcpu_count,
        ),
        sub_header=sub_header.pack(
            phys_base=plan.phys_base & word,
            dump_level=plan.dump_level or _DUMP_LEVEL_OF_QEMU,
            offset_vmcoreinfo=notes_offset + vmcoreinfo_start if plan.vmcoreinfo_span else 0,
            size_vmcoreinfo=vmcoreinfo_size,
            offset_note=notes_offset,
            size_note=len(plan.notes),
            max_mapnr_64=max_mapnr,
        ),
        sub_header_offset=page_size,
        notes_offset=notes_offset,
        bitmap_offset=bitmap_offset,
        bitmap_blocks=bitmap_blocks,
        descriptor_offset=descriptor_offset,
        data_offset=descriptor_offset + page_count * PAGE_DESCRIPTOR.bind(abi).size,
        runs=tuple(runs),
        covered_runs=tuple(covered_runs),
    )


def bitmap_block(runs: Sequence[PageRun], first_pfn: int, size: int) -> bytes:
    """Return `size` bytes of a bitmap whose first bit is `first_pfn`, LSB first."""
    bits = 0
    end_pfn = first_pfn + 8 * size
    index = bisect_right(runs, first_pfn, key=lambda run: run.end_pfn)
    while index < len(runs) and runs[index].first_pfn < end_pfn:
        run = runs[index]
        low = max(run.first_pfn, first_pfn) - first_pfn
        bits |= (1 << min(run.end_pfn, end_pfn) - first_pfn) - (1 << low)
        index += 1
    return bits.to_bytes(size, "little")


class _Kdump(Value):
    # One format: the codec of its pages, whether it is a stream, and what packs if it was started.
    codec: PageCodec
    raw: bool
    packer: Packer | None = None

    def declare(self) -> DumpFormat:
        return DumpFormat(
            name=f"kdump-raw-{self.codec.name}" if self.raw else f"kdump-{self.codec.name}",
            extension="kdump",
            write=self.write,
            start=self.start,
            check=self.check,
            require=self.require,
            check_sink=self.check_sink,
            whole_pages=True,
            codec=self.codec.name,
            raw=self.raw,
            is_of_qemu=self.codec.name in _CODECS_OF_QEMU,
            failure=_failure,
        )

    def check(self, request: DumpRequest) -> None:
        bounds = request.memory_range
        refused_range = bounds is not None and (request.exact or not bounds.is_extension)
        if request.paging or refused_range:
            raise RequestError(
                "kdump-compressed format doesn't support paging or filter",
                hint=None if request.paging or request.exact else "--range BEGIN LENGTH does",
            )
        if request.level is not None and (request.exact or self.codec.tuned is None):
            what = "--exact" if request.exact else f"a kdump of codec {self.codec.name}"
            raise RequestError(f"{what} has no levels", hint="leave out --level")
        if request.omit_zero and request.exact:
            raise RequestError("QEMU keeps pages of zeros", hint="--exact or --omit-zero")

    def check_sink(self, sink: Sink) -> None:
        if self.raw and not sink.seekable:
            raise RequestError("kdump-raw formats require a seekable file", hint="leave out -R")

    def require(self, request: DumpRequest) -> None:
        self._compression(request).compressor()

    def _compression(self, request: DumpRequest) -> Compression:
        return Compression(self.codec.name, request.exact, request.level)

    @contextmanager
    def start(self, request: DumpRequest, memory_size: int) -> Iterator[WriteDump]:
        with self._start_packer(request, memory_size) as packer:
            yield replace(self, packer=packer).write

    def _start_packer(self, request: DumpRequest, memory_size: int) -> Packer:
        workers, compression = request.threads or worker_count(), self._compression(request)
        if workers == 1 or self.codec == UNCOMPRESSED or memory_size < _WORTH_PROCESSES:
            return Packer(compression)
        return start_packer(compression, workers)

    def _packer(
        self, request: DumpRequest, plan: DumpPlan, memory: GuestMemory
    ) -> AbstractContextManager[Packer]:
        if isinstance(memory, PackedMemory) and request.level is None:
            read_packed = memory.packed_pages(self.codec.name, plan.page_size)
            if read_packed is not None:
                return CopyingPacker(self._compression(request), read_packed)
        # Where more pages are left than were expected, processes are started late.
        if self.packer is not None and (self.packer.buffers or plan.memory_size < _WORTH_PROCESSES):
            return nullcontext(self.packer)
        return self._start_packer(request, plan.memory_size)

    def write(
        self,
        request: DumpRequest,
        plan: DumpPlan,
        memory: GuestMemory,
        sink: Sink,
        progress: ProgressCallback,
    ) -> None:
        layout = lay_out(plan, self.codec)
        form = PageForm(
            page_size=plan.page_size,
            descriptor=PAGE_DESCRIPTOR.bind(layout.abi),
            page_flag=self.codec.page_flag,
            keep_zero_pages=not request.omit_zero,
            pfn_base=plan.pfn_base,
        )
        holes = self.raw and not request.exact and sink.can_leave_holes()
        with (
            self._packer(request, plan, memory) as packer,
            _container(sink, raw=self.raw) as write_at,
        ):
            write_at(0, layout.header)
            write_at(layout.sub_header_offset, layout.sub_header)
            write_at(layout.notes_offset, plan.notes)
            pieces: Iterable[Piece] = pieces_of_runs(memory, layout.runs, plan.page_size)
            data_offset = layout.data_offset
            index_of = None
            if not request.exact and not request.omit_zero:
                pieces = with_zeros_between(pieces)
                index_of = page_index(layout.runs)
            if request.omit_zero:
                pieces = list(pieces)
                most = sum(piece.size // plan.page_size for piece in pieces if piece.extents)
                data_offset = layout.descriptor_offset + most * form.descriptor.size
            make_writer = OrderedPageWriter if request.exact and not self.raw else BulkPageWriter
            writer = make_writer(
                form,
                packer,
                write_at,
                descriptor_offset=layout.descriptor_offset,
                data_offset=data_offset,
                equal_pages=None if request.exact else _equal_pages(plan, memory),
                once=not request.exact,
                index_of=index_of,
            )
            _write_bitmaps(
                layout,
                plan,
                write_at,
                both=not request.omit_zero,
                holes=holes,
            )
            read_through(
                memory,
                pieces,
                writer.work(),
                progress,
                threads=request.threads,
                buffers=packer.buffers,
            )
            writer.finish()
            if isinstance(writer, BulkPageWriter) and request.omit_zero:
                _write_second_bitmap(layout, plan.page_size, writer.bitmap, write_at)


def _equal_pages(plan: DumpPlan, memory: GuestMemory) -> PageDeduplicator | None:
    count = plan.memory_size // plan.page_size
    return deduplicator(memory, plan.ram_blocks, plan.page_size, count)


def _container(sink: Sink, *, raw: bool) -> AbstractContextManager[WriteAt]:
    return nullcontext(sink.write_at) if raw else FlattenedStream(sink.write)


def _write_bitmaps(
    layout: KdumpLayout, plan: DumpPlan, write_at: WriteAt, *, both: bool, holes: bool
) -> None:
    second = layout.bitmap_blocks * plan.page_size
    bits = 8 * plan.page_size
    # Where memory is far up, most of the map says that there is none.
    indexes = _blocks_with_bits(layout, plan, bits) if holes else range(layout.bitmap_blocks)
    for index in indexes:
        offset = layout.bitmap_offset + index * plan.page_size
        first_pfn = plan.pfn_base + index * bits
        write_at(offset, bitmap_block(layout.covered_runs, first_pfn, plan.page_size))
        if both:
            write_at(offset + second, bitmap_block(layout.runs, first_pfn, plan.page_size))


def _blocks_with_bits(layout: KdumpLayout, plan: DumpPlan, bits: int) -> Iterator[int]:
    """Yield the blocks of the first bitmap that are not zero, ascending."""
    behind = 0
    for run in layout.covered_runs:
        first, last = ((pfn - plan.pfn_base) // bits for pfn in (run.first_pfn, run.end_pfn - 1))
        yield from range(max(first, behind), last + 1)
        behind = max(behind, last + 1)


def _write_second_bitmap(
    layout: KdumpLayout, page_size: int, blocks: Mapping[int, bytearray], write_at: WriteAt
) -> None:
    start = layout.bitmap_offset + layout.bitmap_blocks * page_size
    for index in range(layout.bitmap_blocks):
        write_at(start + index * page_size, bytes(blocks.get(index, bytes(page_size))))


def _failure(has_begun: bool, _reason: str) -> str:
    # QEMU leaves the reason out.
    return f"dump: failed to {'write page data' if has_begun else 'write start flat header'}"


def _formats() -> list[DumpFormat]:
    codecs = (*all_page_codecs().values(), UNCOMPRESSED)
    return [_Kdump(codec, raw).declare() for codec in codecs for raw in (False, True)]


FORMATS = FormatFamily("kdump", _formats)
