"""kdump-compressed: headers, bitmaps, page descriptors, compressed pages; raw or flattened.

Source: makedumpfile IMPLEMENTATION and diskdump_mod.h; QEMU dump/dump.c create_kdump_vmcore().
The order of writes, and where its two caches are flushed, are QEMU's, so that a flattened stream
is byte-identical as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from qemu_dump_ext.c_struct import Abi
from qemu_dump_ext.dump_formats._declaration import DumpFormat, ProgressCallback
from qemu_dump_ext.dump_plan import DumpPlan
from qemu_dump_ext.dump_request import DumpRequest
from qemu_dump_ext.dump_sink import Sink
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.flattened_stream import FlattenedStream
from qemu_dump_ext.guest import GuestMemory, RamBlock
from qemu_dump_ext.kdump_structs import (
    DISK_DUMP_HEADER,
    HEADER_VERSION,
    KDUMP_SIGNATURE,
    KDUMP_SUB_HEADER,
    PAGE_DESCRIPTOR,
)
from qemu_dump_ext.page_codecs import all_page_codecs
from qemu_dump_ext.page_codecs._declaration import PageCodec
from qemu_dump_ext.page_pipeline import PIECE_SIZE, Extent, Piece, read_through

UNCOMPRESSED = "none"
"""The word for a kdump whose pages are stored as they are."""
_U32 = (1 << 32) - 1
_CACHED_BLOCKS = 4
_DUMP_LEVEL = 1

WriteAt = Callable[[int, bytes | memoryview], None]


@dataclass(frozen=True)
class PageRun:
    """Consecutive pages of the dump.

    Attributes:
        first_pfn: Of the run.
        end_pfn: First pfn behind it.
        blocks: What is in them; bytes that no block covers are zero.
    """

    first_pfn: int
    end_pfn: int
    blocks: tuple[RamBlock, ...]


@dataclass(frozen=True)
class KdumpLayout:
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


def pieces_of_runs(runs: Sequence[PageRun], page_size: int) -> Iterator[Piece]:
    """Cut runs into pieces of whole pages."""
    step = PIECE_SIZE // page_size * page_size
    for run in runs:
        end = run.end_pfn * page_size
        for start in range(run.first_pfn * page_size, end, step):
            stop = min(start + step, end)
            extents = []
            for block in run.blocks:
                low, high = max(start, block.gpa), min(stop, block.end)
                if low < high:
                    extents.append(Extent(low, high - low, low - start))
            yield Piece(stop - start, tuple(extents))


def lay_out(plan: DumpPlan, codec: PageCodec | None) -> KdumpLayout:
    """Compute headers and offsets."""
    core, page_size = plan.core, plan.page_size
    exact = plan.dialect.whole_pages_only
    runs = page_runs(plan.ram_blocks, page_size, compose=not exact)
    end = plan.ram_blocks[-1].end
    max_mapnr = (end // page_size if exact else -(-end // page_size)) - plan.pfn_base
    bitmap_blocks = -(-max_mapnr // (8 * page_size))
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
            status=codec.page_flag if codec else 0,
            block_size=page_size,
            sub_hdr_size=sub_header_blocks,
            bitmap_blocks=2 * bitmap_blocks,
            max_mapnr=min(max_mapnr, _U32),
            nr_cpus=plan.vcpu_count,
        ),
        sub_header=sub_header.pack(
            phys_base=plan.phys_base & word,
            dump_level=_DUMP_LEVEL,
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
    )


def bitmap_block(runs: Sequence[PageRun], first_pfn: int, size: int) -> bytes:
    """Return `size` bytes of a bitmap whose first bit is `first_pfn`, LSB first."""
    bits = 0
    for run in runs:
        low = max(run.first_pfn, first_pfn) - first_pfn
        high = min(run.end_pfn, first_pfn + 8 * size) - first_pfn
        if low < high:
            bits |= (1 << high) - (1 << low)
    return bits.to_bytes(size, "little")


class _Cache:
    """Collects small writes; flushed when the next item would not fit, as QEMU does."""

    def __init__(self, write_at: WriteAt, offset: int, capacity: int) -> None:
        self._write_at = write_at
        self._capacity = capacity
        self._data = bytearray()
        self.offset = offset

    def add(self, item: bytes) -> None:
        if len(self._data) + len(item) > self._capacity:
            self.flush()
        self._data += item

    def flush(self) -> None:
        if not self._data:
            return
        self._write_at(self.offset, bytes(self._data))
        self.offset += len(self._data)
        self._data.clear()

    def position(self) -> int:
        return self.offset + len(self._data)


PackedPages = list[tuple[bytes, int] | None]
"""For each page its data and descriptor flags; None for a page of zeros."""


def page_packer(codec: PageCodec | None, page_size: int) -> Callable[[memoryview], PackedPages]:
    """Make the function that packs all pages of a buffer; it may run in many threads.

    Raises:
        CodecUnavailableError: Now, rather than in the middle of the dump.
    """
    zeros = bytes(page_size)
    local = threading.local()
    if codec is not None:
        codec.compressor()

    def pack(view: memoryview) -> PackedPages:
        packed: PackedPages = []
        compress = getattr(local, "compress", None)
        if compress is None and codec is not None:
            compress = local.compress = codec.compressor()
        for offset in range(0, len(view), page_size):
            page = view[offset : offset + page_size].tobytes()
            if page == zeros:
                packed.append(None)
                continue
            if compress is not None and codec is not None:
                data = compress(page)
                if len(data) < page_size:
                    packed.append((data, codec.page_flag))
                    continue
            packed.append((page, 0))
        return packed

    return pack


def _write(
    request: DumpRequest,
    plan: DumpPlan,
    memory: GuestMemory,
    sink: Sink,
    progress: ProgressCallback,
) -> None:
    codec = None if request.codec in {None, UNCOMPRESSED} else all_page_codecs()[request.codec]
    layout = lay_out(plan, codec)
    pack = page_packer(codec, plan.page_size)
    if request.raw and not sink.seekable:
        raise RequestError(
            f"{sink.name}: kdump-raw formats require a seekable file", hint="leave out -R"
        )
    with _container(sink, raw=request.raw) as write_at:
        write_at(0, layout.header)
        write_at(layout.sub_header_offset, layout.sub_header)
        write_at(layout.notes_offset, plan.notes)
        _write_bitmaps(layout, plan, write_at)
        _write_pages(layout, plan, memory, pack, write_at=write_at, progress=progress)


def _container(sink: Sink, *, raw: bool) -> AbstractContextManager[WriteAt]:
    return nullcontext(sink.write_at) if raw else FlattenedStream(sink.write)


def _write_bitmaps(layout: KdumpLayout, plan: DumpPlan, write_at: WriteAt) -> None:
    second = layout.bitmap_blocks * plan.page_size
    for index in range(layout.bitmap_blocks):
        offset = layout.bitmap_offset + index * plan.page_size
        first_pfn = plan.pfn_base + index * plan.page_size * 8
        bits = bitmap_block(layout.runs, first_pfn, plan.page_size)
        write_at(offset, bits)
        write_at(offset + second, bits)


def _write_pages(
    layout: KdumpLayout,
    plan: DumpPlan,
    memory: GuestMemory,
    pack: Callable[[memoryview], PackedPages],
    *,
    write_at: WriteAt,
    progress: ProgressCallback,
) -> None:
    page_size = plan.page_size
    capacity = _CACHED_BLOCKS * page_size
    descriptors = _Cache(write_at, layout.descriptor_offset, capacity)
    data = _Cache(write_at, layout.data_offset, capacity)
    make_descriptor = PAGE_DESCRIPTOR.bind(layout.abi).codec.pack
    # All pages of zeros share the first data item; it is there even if no page needs it.
    zero_descriptor = make_descriptor(data.position(), page_size, 0, 0)
    data.add(bytes(page_size))

    def consume(packed: PackedPages) -> None:
        for page in packed:
            if page is None:
                descriptors.add(zero_descriptor)
            else:
                content, flags = page
                # The descriptor follows its data through the caches, as in QEMU.
                offset = data.position()
                data.add(content)
                descriptors.add(make_descriptor(offset, len(content), flags, 0))

    read_through(memory, pieces_of_runs(layout.runs, page_size), pack, consume, progress)
    descriptors.flush()
    data.flush()


FORMAT = DumpFormat("kdump", _write)
