"""Read a kdump-compressed dump: 32 and 64 bit, both byte orders.

Source: makedumpfile diskdump_mod.h, IMPLEMENTATION; crash diskdump.c; QEMU dump/dump.c.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._bitmap_runs import length_of_run, runs_of_ones
from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._descriptor_runs import faulty_runs, zero_runs
from qemu_dump_ext.dump_readers._dump_file import VMCOREINFO_SIZE_MAX, DumpFile
from qemu_dump_ext.dump_readers._extent_index import merged
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._kdump_verifier import verify_kdump
from qemu_dump_ext.dump_readers._page_unpacker import Descriptor, PageUnpacker, UnpackingThreads
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError
from qemu_dump_ext.guest.memory import ReadPacked
from qemu_dump_ext.page_codecs import all_page_codecs
from qemu_dump_ext.structures.c_struct import Abi, BoundStruct, ByteOrder
from qemu_dump_ext.structures.kdump import (
    DISK_DUMP_HEADER,
    KDUMP_SIGNATURE,
    KDUMP_SUB_HEADER,
    PAGE_DESCRIPTOR,
    PAGE_DESCRIPTOR_SIZE,
)
from qemu_dump_ext.structures.utsname import UTSNAME_FIELDS

_BYTE_ORDERS: tuple[ByteOrder, ...] = ("little", "big")
_VERSIONS = range(1, 32)
_BLOCK_SIZES = tuple(1 << shift for shift in range(12, 17))
_CPUS_MAX = 1 << 16
_SUB_HEADER_BLOCKS_MAX = 1 << 20
_PACKED = 4
"""Alignment of 64-bit members in the 32-bit sub-header of QEMU and of i386; 8 elsewhere."""

BITMAP_PIECE = 1 << 14
"""Bytes of bitmap read at one time."""
PAGES_AT_ONCE = 256
"""Pages read and unpacked as one piece of work."""
_NO_RUN = (1 << 64, 1 << 64)
_ZEROS = 1
"""Of a dump level: pages of zeros."""


@dataclass
class PageCounts:
    """How the pages of a dump are stored.

    Attributes:
        zero: Pages that share the one page of zeroes.
        raw: Pages stored as they are.
        packed: Pages by name of the codec.
        lost: Pages whose descriptor is empty, as an incomplete dump has them.
        bad: Pages whose descriptor is impossible.
        stored_bytes: Of raw and packed pages.
    """

    zero: int = 0
    raw: int = 0
    packed: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    bad: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """Pages that are unpacked at a time.

    Attributes:
        gpa: Of the first byte that is wanted.
        skip: Bytes of the first page before that.
        rank: Number of the first page's descriptor.
        count: Of pages.
        buffer: Gets what is wanted.
    """

    gpa: int
    skip: int
    rank: int
    count: int
    buffer: memoryview


class KdumpFile(DumpFile):
    """An open kdump-compressed dump.

    Attributes:
        sub_header: Integers of the sub-header; members newer than the dump's version are 0.
        sub_header_size: In bytes: 80 packed or 96 padded (32 bit), 104 (64 bit).
        max_mapnr: Number of the last page frame + 1.
        bitmaps_offset: Of the first bitmap.
        bitmap_size: Of each of the two bitmaps, in bytes.
        descriptors_offset: Of the first page descriptor.
        bitmap_piece: Bytes of bitmap that are read at one time.
        pages_at_once: Pages that are read and unpacked as one piece of work.
        part: Of one part of a split dump, the first pfn of its pages and the first one behind;
            None: it has all pages.
    """

    bitmap_piece = BITMAP_PIECE
    pages_at_once = PAGES_AT_ONCE
    codecs_by_flag = MappingProxyType(
        {codec.page_flag: codec for codec in all_page_codecs().values()}
    )

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        self.image = image
        self.format = f"kdump{format_suffix}"
        self._integers = self._read_header()
        self.page_size = block = self._integers["block_size"]
        sub_blocks, bitmap_blocks = (
            self._integers[name] for name in ("sub_hdr_size", "bitmap_blocks")
        )
        self.bitmaps_offset = block * (1 + sub_blocks)
        self.bitmap_size = bitmap_blocks // 2 * block
        self.descriptors_offset = self.bitmaps_offset + bitmap_blocks * block
        image.check(0, self.descriptors_offset)
        self._read_sub_header()
        new = self._integers["header_version"] >= 6
        self.max_mapnr = self.sub_header["max_mapnr_64"] if new else self._integers["max_mapnr"]
        self.part: tuple[int, int] | None = None
        if self.sub_header["split"]:
            first, end = (self.sub_header[f"{name}_pfn{'_64' * new}"] for name in ("start", "end"))
            self.part = first, max(first, min(end, self.max_mapnr))
        if self.max_mapnr > 8 * self.bitmap_size:
            raise CorruptDumpError(
                f"two bitmaps in {bitmap_blocks} blocks do not hold {self.max_mapnr:#x} bits"
            )
        self._unpacking = UnpackingThreads(self)
        self._piece = -1, b""

    def _read_header(self) -> dict[str, int]:
        size = DISK_DUMP_HEADER.bind(Abi("little", 8, 8)).size
        data = self.image.read(0, size)
        faults = []
        for byte_order in _BYTE_ORDERS:
            for word_size in (8, 4):
                layout = DISK_DUMP_HEADER.bind(Abi(byte_order, word_size, word_size))
                fields = layout.unpack_integers(data)
                fault = _header_fault(layout, fields)
                if fault is None:
                    self.byte_order, self.word_size = byte_order, word_size
                    strings = {
                        name: value.partition(b"\0")[0].decode("utf-8", "backslashreplace")
                        for name, value in layout.unpack(data).items()
                        if name in UTSNAME_FIELDS and isinstance(value, bytes)
                    }
                    self.header = MappingProxyType({**strings, **fields})
                    return fields
                if fields["header_version"] in _VERSIONS:
                    faults.append(f"{fault} ({8 * word_size} bit)")
        raise CorruptDumpError(
            "the kdump header fits neither byte order nor word size: "
            + ("; ".join(faults) or "header_version at offset 0x8 is impossible")
        )

    def _read_sub_header(self) -> None:
        # If neither fits, what is damaged is most likely what QEMU writes.
        for max_align in (_PACKED, 8, _PACKED) if self.word_size == 4 else (8,):
            layout = KDUMP_SUB_HEADER.bind(Abi(self.byte_order, self.word_size, max_align))
            self.sub_header_size = layout.size
            fields = layout.unpack_integers(self.image.read(self.page_size, layout.size))
            self.sub_header = MappingProxyType(fields)
            # Padding may be taken for the size of notes that are not there.
            exists = fields["size_note"] > 0
            if exists and self.is_in_sub_header("note") and self.is_in_sub_header("vmcoreinfo"):
                break

    @property
    def phys_base(self) -> int:
        """Physical minus link address of the kernel, modulo the size of its word."""
        return self.sub_header["phys_base"]

    def unpacker(self) -> PageUnpacker:
        """Return what unpacks pages, for one thread."""
        return PageUnpacker(self)

    def is_in_sub_header(self, what: str) -> bool:
        """Tell whether `note` or `vmcoreinfo` lies where it belongs, or is not there at all."""
        offset, size = self.sub_header[f"offset_{what}"], self.sub_header[f"size_{what}"]
        start = self.page_size + self.sub_header_size
        return not size or (start <= offset and offset + size <= self.bitmaps_offset)

    def _note_areas(self) -> list[tuple[int, int]]:
        offset, size = self.sub_header["offset_note"], self.sub_header["size_note"]
        return [(offset, size)] if size else []

    @cached_property
    def vmcoreinfo(self) -> bytes | None:
        """Text of the guest kernel's VMCOREINFO, up to its first NUL; None without."""
        offset, size = self.sub_header["offset_vmcoreinfo"], self.sub_header["size_vmcoreinfo"]
        if not size:
            return None
        if size > VMCOREINFO_SIZE_MAX:
            raise CorruptDumpError(f"VMCOREINFO of {size:#x} bytes: too large")
        return self.image.read(offset, size).partition(b"\0")[0]

    def bitmap_pieces(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield (index, content) of the pieces of the first (0) or second (1) bitmap, ascending.

        A piece has `BITMAP_PIECE` bytes, the last one may have fewer. Pieces in a hole of the
        file are left out: they are zero.
        """
        start, next_index = self.bitmaps_offset + number * self.bitmap_size, 0
        for first, end in self.image.stored(start, self.bitmap_size):
            low, high = (first - start) // BITMAP_PIECE, -(-(end - start) // BITMAP_PIECE)
            for index in range(max(low, next_index), high):
                yield index, self._bitmap_piece(number, index)
            next_index = high

    def _bitmap_piece(self, number: int, index: int) -> bytes:
        done = index * BITMAP_PIECE
        start = self.bitmaps_offset + number * self.bitmap_size + done
        piece = self.image.read(start, min(BITMAP_PIECE, self.bitmap_size - done))
        if number and self.part is not None:
            first, end = (min(max(0, pfn - 8 * done), 8 * len(piece)) for pfn in self.part)
            inside = (1 << end) - (1 << first)
            masked = int.from_bytes(piece, "little") & inside
            piece = masked.to_bytes(len(piece), "little")
        return piece

    def count_bits(self, number: int) -> int:
        """Return the number of pages in the first (0) or second (1) bitmap."""
        pieces = self.bitmap_pieces(number)
        return sum(int.from_bytes(piece, "little").bit_count() for _, piece in pieces)

    @property
    def may_leave_zeros_out(self) -> bool:
        """Whether pages were left out, and pages of zeros may be among them.

        QEMU, and who writes like it, says so of every dump: there they share one page.
        """
        return bool(self.sub_header["dump_level"] & _ZEROS) and any(
            int.from_bytes(first, "little") & ~int.from_bytes(second, "little")
            for _, first, second in self.bitmap_pairs()
        )

    @cached_property
    def _ranks(self) -> tuple[array[int], array[int]]:
        # Indexes of the pieces of the second bitmap; descriptors before each, and in all.
        indexes, ranks = array("Q"), array("Q", (0,))
        for index, piece in self.bitmap_pieces(1):
            indexes.append(index)
            ranks.append(ranks[-1] + int.from_bytes(piece, "little").bit_count())
        return indexes, ranks

    @property
    def page_count(self) -> int:
        """Number of pages in the dump: of bits in the second bitmap."""
        return self._ranks[1][-1]

    @cached_property
    def data_offset(self) -> int:
        """Offset behind the last page descriptor."""
        return self.descriptors_offset + PAGE_DESCRIPTOR_SIZE * self.page_count

    @cached_property
    def zero_page_descriptor(self) -> Descriptor:
        """What the descriptor of a page of zeroes is: the page at the begin of the data."""
        return self.data_offset, self.page_size, 0, 0

    @cached_property
    def zero_page(self) -> bytes:
        """The page at the begin of the data."""
        return self.image.read(self.data_offset, self.page_size)

    def descriptor_fault(self, descriptor: Descriptor) -> str | None:
        """Say what is impossible about a descriptor; None if nothing."""
        offset, size, flags, _ = descriptor
        if not any(descriptor):
            return "empty descriptor: the page was lost when the dump was written"
        if flags and flags not in self.codecs_by_flag:
            return f"descriptor with unknown flags {flags:#x}"
        if not 0 < size <= self.page_size or (not flags and size != self.page_size):
            return f"descriptor of {size:#x} bytes for a page of {self.page_size:#x}"
        if offset < self.data_offset or offset + size > self.image.size:
            return (
                f"descriptor with offset {offset:#x} and size {size:#x} points outside the data"
                f" from {self.data_offset:#x} to {self.image.size:#x}"
            )
        return None

    def read_descriptors(self, rank: int, count: int) -> list[Descriptor]:
        """Return `count` page descriptors, the first being number `rank` of the dump."""
        codec = PAGE_DESCRIPTOR.bind(Abi(self.byte_order, 8, 8)).codec
        return list(codec.iter_unpack(self.read_descriptor_table(rank, count)))

    def read_descriptor_table(self, rank: int, count: int) -> bytes:
        """Return page descriptors as `read_descriptors`, as they stand in the file."""
        start = self.descriptors_offset + PAGE_DESCRIPTOR_SIZE * rank
        return self.image.read(start, PAGE_DESCRIPTOR_SIZE * count)

    def page_runs(self) -> Iterator[tuple[int, int]]:
        """Yield (pfn, pages) of what the second bitmap has, ascending, merged."""
        return merged(
            run
            for number, piece in self.bitmap_pieces(1)
            for run in runs_of_ones(piece, 8 * BITMAP_PIECE * number)
        )

    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest memory in the dump, ascending, merged."""
        for pfn, count in self.page_runs():
            yield pfn * self.page_size, count * self.page_size

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the pages of both bitmaps, ascending, merged."""
        page_size = self.page_size
        runs = (
            run
            for index, *bits in self.bitmap_pairs()
            for run in runs_of_ones(_united(*bits), 8 * BITMAP_PIECE * index)
        )
        for pfn, count in merged(runs):
            yield pfn * page_size, count * page_size

    def bitmap_pairs(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (index, piece of the first bitmap, of the second); empty where it is zero."""

        def tagged(number: int) -> Iterator[tuple[int, int, bytes]]:
            return ((index, number, piece) for index, piece in self.bitmap_pieces(number))

        both = heapq.merge(tagged(0), tagged(1))
        for index, group in groupby(both, key=itemgetter(0)):
            pieces = {number: piece for _, number, piece in group}
            yield index, pieces.get(0, b""), pieces.get(1, b"")

    def readable_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the pages whose descriptor leads to data, ascending, merged."""
        page_size = self.page_size
        for pfn, count in merged(self._readable_runs()):
            yield pfn * page_size, count * page_size

    def _readable_runs(self) -> Iterator[tuple[int, int]]:
        faulty = faulty_runs(self)
        bad, bad_end = next(faulty, _NO_RUN)
        rank = 0  # of the first page of a run
        for first, count in self.page_runs():
            at, behind = rank, rank + count
            while at < behind:
                if bad_end <= at:
                    bad, bad_end = next(faulty, _NO_RUN)
                    continue
                stop = min(bad if bad > at else bad_end, behind)
                if bad > at:
                    yield first + at - rank, stop - at
                at = stop
            rank = behind

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return (gpa, end) but for long runs of pages that share the page of zeroes."""
        pfn, page_size = gpa // self.page_size, self.page_size
        rank, _ = self._run_from(pfn, 1)
        ranks = range(rank, rank + -(-(gpa + size) // page_size) - pfn)
        found: list[tuple[int, int]] = []
        start, end = gpa, gpa + size
        for first, last in zero_runs(self, ranks):
            low, high = ((pfn + number - rank) * page_size for number in (first, last))
            if max(low, gpa) > start:
                found.append((start, low))
            start = min(max(high, gpa), end)
        return [*found, (start, end)] if start < end else found

    def count_pages(self) -> PageCounts:
        """Count how pages are stored, from their descriptors alone.

        Raises:
            CorruptDumpError: The descriptors are not all there.
        """
        counts = PageCounts()
        zero_page, codecs = self.zero_page_descriptor, self.codecs_by_flag
        packed = counts.packed
        looked_at = 0
        for rank, number in self._stored_descriptors():
            looked_at += number
            for descriptor in self.read_descriptors(rank, number):
                if descriptor == zero_page:
                    counts.zero += 1
                elif not any(descriptor):
                    counts.lost += 1
                elif self.descriptor_fault(descriptor):
                    counts.bad += 1
                else:
                    counts.stored_bytes += descriptor[1]
                    if flags := descriptor[2]:
                        name = codecs[flags].name
                        packed[name] = packed.get(name, 0) + 1
                    else:
                        counts.raw += 1
        counts.lost += self.page_count - looked_at
        return counts

    def _stored_descriptors(self) -> Iterator[tuple[int, int]]:
        # (rank, count) of descriptors that are not in a hole of the file, where they are empty.
        size, start, next_rank = PAGE_DESCRIPTOR_SIZE, self.descriptors_offset, 0
        for first, end in self.image.stored(start, size * self.page_count):
            stop = -(-(end - start) // size)
            for rank in range(max((first - start) // size, next_rank), stop, PAGES_AT_ONCE):
                yield rank, min(PAGES_AT_ONCE, stop - rank)
            next_rank = stop

    def _run_from(self, pfn: int, limit: int) -> tuple[int, int]:
        # (rank of pfn, number of present pages from pfn on, at most limit), within one piece.
        number, bit = divmod(pfn, 8 * BITMAP_PIECE)
        indexes, ranks = self._ranks
        place = bisect_left(indexes, number)
        if place == len(indexes) or indexes[place] != number:
            return 0, 0
        known, piece = self._piece  # one after the other would not do: other threads ask, too
        if number != known:
            piece = self._bitmap_piece(1, number)
            self._piece = number, piece
        byte, bit = divmod(bit, 8)
        before = int.from_bytes(piece[:byte], "little").bit_count()
        window = piece[byte : byte + limit // 8 + 2]
        bits = int.from_bytes(window, "little")
        rank = ranks[place] + before + (bits & (1 << bit) - 1).bit_count()
        return rank, min(length_of_run(bits >> bit), limit)

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa`."""
        if batches := list(self._batches(gpa, buffer)):
            self._unpacking.run(self._read_batch, batches)

    def _batches(self, gpa: int, buffer: memoryview) -> Iterator[_Batch]:
        """Cut what is to be read into what is unpacked at a time."""
        while buffer:
            pfn, skip = divmod(gpa, self.page_size)
            wanted = (skip + len(buffer) + self.page_size - 1) // self.page_size
            rank, count = self._run_from(pfn, min(wanted, PAGES_AT_ONCE))
            if not count:
                raise GuestMemoryFaultError(gpa, len(buffer), "not in the dump")
            size = min(count * self.page_size - skip, len(buffer))
            yield _Batch(gpa, skip, rank, count, buffer[:size])
            buffer, gpa = buffer[size:], gpa + size

    def _read_batch(self, unpacker: PageUnpacker, batch: _Batch) -> None:
        descriptors = self.read_descriptors(batch.rank, batch.count)
        buffer, gpa, skip = batch.buffer, batch.gpa, batch.skip
        for descriptor, page in zip(descriptors, unpacker.unpack(descriptors), strict=True):
            if isinstance(page, CorruptDumpError):
                if not any(descriptor):
                    raise GuestMemoryFaultError(gpa, len(buffer), "the dump is incomplete")
                raise CorruptDumpError(f"guest memory at {gpa:#x}: {page}")
            size = min(self.page_size - skip, len(buffer))
            buffer[:size] = page[skip : skip + size]
            buffer, gpa, skip = buffer[size:], gpa + size, 0

    def packed_pages(self, codec: str, page_size: int) -> ReadPacked | None:
        """Return what reads pages as they are packed, where the header names this codec.

        Of pages that are stored as they are, it made none smaller.
        """
        known = all_page_codecs().get(codec)
        if known is None or page_size != self.page_size:
            return None
        flag = known.page_flag
        return partial(self._packed, flag) if self._integers["status"] & flag else None

    def _packed(self, flag: int, gpas: Sequence[int]) -> Iterator[bytes | memoryview | None]:
        unpacker = self.unpacker()
        for first in range(0, len(gpas), PAGES_AT_ONCE):
            pfns = [gpa // self.page_size for gpa in gpas[first : first + PAGES_AT_ONCE]]
            descriptors = self._descriptors_of(pfns)
            for (_, size, flags, _), data in zip(
                descriptors, unpacker.stored(descriptors), strict=True
            ):
                as_it_is = not flags or (flags == flag and size < self.page_size)
                yield data if as_it_is and not isinstance(data, CorruptDumpError) else None

    def _descriptors_of(self, pfns: Sequence[int]) -> Sequence[Descriptor]:
        """Return the descriptors of pages, ascending; empty ones of pages that are not there."""
        found: list[Descriptor] = []
        while len(found) < len(pfns):
            pfn = pfns[len(found)]
            rank, count = self._run_from(pfn, min(pfns[-1] + 1 - pfn, PAGES_AT_ONCE))
            if not count:
                found.append((0, 0, 0, 0))
                continue
            run = self.read_descriptors(rank, count)
            inside = pfns[len(found) : bisect_left(pfns, pfn + count)]
            found += (run[one - pfn] for one in inside)
        return found

    def close(self) -> None:
        """End what unpacks, and close the file."""
        self._unpacking.close()
        super().close()

    def pfns(self) -> Iterator[int]:
        """Yield the page frame number of each descriptor, in their order."""
        for pfn, count in self.page_runs():
            yield from range(pfn, pfn + count)


def _united(first: bytes, second: bytes) -> bytes:
    bits = int.from_bytes(first, "little") | int.from_bytes(second, "little")
    return bits.to_bytes(max(len(first), len(second)), "little")


def _header_fault(layout: BoundStruct, fields: dict[str, int]) -> str | None:
    plausible = {
        "header_version": fields["header_version"] in _VERSIONS,
        "block_size": fields["block_size"] in _BLOCK_SIZES,
        "sub_hdr_size": 0 < fields["sub_hdr_size"] <= _SUB_HEADER_BLOCKS_MAX,
        "bitmap_blocks": fields["bitmap_blocks"] > 0,
        "nr_cpus": 0 <= fields["nr_cpus"] <= _CPUS_MAX,
    }
    for name, good in plausible.items():
        if not good:
            return f"{name} at offset {layout.offsets[name]:#x} is {fields[name]:#x}"
    return None


def _describe_pages(dump: KdumpFile) -> dict[str, Any]:
    counts = dump.count_pages()
    memory = dump.page_count * dump.page_size
    return {
        "page_bytes": dump.page_size,
        "first_bitmap": dump.count_bits(0),
        "second_bitmap": dump.page_count,
        **asdict(counts),
        "ratio": round(memory / counts.stored_bytes, 2) if counts.stored_bytes else None,
    }


def _describe(dump: KdumpFile) -> Mapping[str, Callable[[], Any]]:
    return {"sub_header": lambda: dict(dump.sub_header), "pages": lambda: _describe_pages(dump)}


READER = DumpReader(
    name="kdump",
    probe=lambda head: Fit.SURE if head.startswith(KDUMP_SIGNATURE) else Fit.NO,
    open=KdumpFile,
    describe=_describe,
    verify=verify_kdump,
)
