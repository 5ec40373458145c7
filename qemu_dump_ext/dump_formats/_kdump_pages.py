"""Write the page descriptors and the page data of a kdump.

In bulk, which is fast, or in QEMU's order of writes through two small caches, which makes a
flattened stream byte-identical to QEMU's. Both lead to the same raw file.

Source: QEMU dump/dump.c write_dump_pages(), struct DataCache.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qemu_dump_ext.pages.dedup import EqualPages, PageDeduplicator
from qemu_dump_ext.pages.packing import Packer
from qemu_dump_ext.pages.pipeline import Buffer, Piece, PieceWork
from qemu_dump_ext.pages.zero_pages import numpy_if_loaded
from qemu_dump_ext.structures.c_struct import BoundStruct
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CACHED_BLOCKS = 4
_ZERO_DESCRIPTORS = 1 << 16
_REMEMBERED = 64 << 20
"""Bytes of pages, before they are packed, that are known again without numpy."""
_NUMPY_TYPES = {"q": "i8", "I": "u4", "Q": "u8"}

_NOTHING = memoryview(b"")

WriteAt = Callable[[int, bytes | memoryview], None]


class PageForm(Value):
    """How pages are stored.

    Attributes:
        page_size: The page size in bytes.
        descriptor: struct page_desc.
        page_flag: The flag of compressed pages.
        keep_zero_pages: Pages of zeros have descriptors, which all point to one page of zeros.
        pfn_base: Number of the page that the first bit of a bitmap stands for.
    """

    page_size: int
    descriptor: BoundStruct
    page_flag: int
    keep_zero_pages: bool = True
    pfn_base: int = 0


class PackedPiece(Value):
    """The pages of a piece.

    Attributes:
        piece: Which.
        sizes: The sizes of each page, as `pack_pages` has them; None: all are pages of zeros.
        data: The packed pages, one behind the other.
    """

    piece: Piece
    sizes: array[int] | None
    data: memoryview


class _PageWriter:
    def __init__(
        self,
        form: PageForm,
        packer: Packer,
        write_at: WriteAt,
        *,
        descriptor_offset: int,
        data_offset: int,
        equal_pages: PageDeduplicator | None = None,
        once: bool = False,
        index_of: Callable[[int], int] | None = None,
    ) -> None:
        self._form = form
        self._equal_pages = equal_pages
        self._once = once
        self._index_of = index_of
        self._packer = packer
        self._write_at = write_at
        self._descriptor_offset = descriptor_offset
        self._data_offset = data_offset
        self._zero_descriptor = form.descriptor.codec.pack(data_offset, form.page_size, 0, 0)
        self._begin()

    def _begin(self) -> None:
        raise NotImplementedError

    def work(self) -> PieceWork[PackedPiece]:
        """Return what the pipeline does with pieces."""
        return PieceWork(
            self._pack, lambda piece: PackedPiece(piece, None, _NOTHING), self._consume
        )

    def _pack(self, piece: Piece, buffer: Buffer) -> PackedPiece:
        sizes = self._packer.pack_piece(piece, buffer, self._form.page_size)
        return PackedPiece(piece, sizes, buffer.view[: sum(sizes)])

    def _page_count(self, piece: Piece) -> int:
        return piece.size // self._form.page_size

    def _flags(self, size: int) -> int:
        return self._form.page_flag if size < self._form.page_size else 0

    def _consume(self, packed: PackedPiece) -> None:
        raise NotImplementedError


class _DescriptorTable:
    # The descriptors of a piece, by numpy; those of pages that are stored once are shared.

    def __init__(
        self,
        numpy: ModuleType,
        form: PageForm,
        zero_descriptor: bytes,
        equal_pages: PageDeduplicator | None,
    ) -> None:
        self._numpy = numpy
        self._form = form
        self._zero = numpy.frombuffer(
            zero_descriptor, dtype=numpy.dtype(_numpy_fields(form.descriptor))
        )
        self._equal_pages = equal_pages
        self._found: deque[EqualPages] = deque()
        # As one value each: field by field, numpy takes five times as long to move them.
        self._of_slots = numpy.empty(
            equal_pages.slot_count if equal_pages else 0, dtype=f"V{form.descriptor.size}"
        )

    @property
    def prepare(self) -> Callable[[Piece, Buffer], None] | None:
        return self._take_out if self._equal_pages is not None else None

    def _take_out(self, piece: Piece, buffer: Buffer) -> None:
        if self._equal_pages is not None:
            self._found.append(self._equal_pages.take_out(piece, buffer))

    def make(self, page_sizes: array[int], data_offset: int) -> tuple[bytes, int]:
        """Return the descriptors of the next piece, and which pages have one, if not all have.

        Bit N of that is about page N of the piece.
        """
        numpy, form = self._numpy, self._form
        sizes = numpy.frombuffer(page_sizes, dtype=numpy.uint32)
        is_there = sizes > 0
        table = numpy.repeat(self._zero, len(sizes))
        stored = sizes[is_there]
        ends = numpy.cumsum(stored, dtype=numpy.int64)
        table["size"][is_there] = stored
        table["offset"][is_there] = ends - stored + data_offset
        table["flags"][is_there] = numpy.where(stored < form.page_size, form.page_flag, 0)
        if self._found:
            whole = table.view(self._of_slots.dtype)
            self._share(self._found.popleft(), whole, is_there)
        if form.keep_zero_pages:
            return table.tobytes(), 0
        bits = numpy.packbits(is_there, bitorder="little")
        return table[is_there].tobytes(), int.from_bytes(bits.tobytes(), "little")

    def _share(self, found: EqualPages, table: NDArray[Any], is_there: NDArray[Any]) -> None:
        table[found.from_slots] = self._of_slots[found.slots]
        table[found.copies] = table[found.originals]
        is_there[found.from_slots] = is_there[found.copies] = True
        self._of_slots[found.fresh_slots] = table[found.fresh]


class BulkPageWriter(_PageWriter):
    """Writes the descriptors of a piece at once, and its data.

    Attributes:
        bitmap: Which pages have a descriptor, where not all have: blocks of a bitmap by number,
            for those that are not zero.
    """

    def _begin(self) -> None:
        self.bitmap: dict[int, bytearray] = {}
        self._zero_descriptors = self._zero_descriptor * _ZERO_DESCRIPTORS
        self._table: _DescriptorTable | None = None
        self._known: dict[bytes, bytes] = {}
        self._first_descriptor = self._descriptor_offset
        numpy = numpy_if_loaded()
        if numpy is not None:
            self._table = _DescriptorTable(
                numpy, self._form, self._zero_descriptor, self._equal_pages
            )
        if self._form.keep_zero_pages:
            # There even if no page needs it, as QEMU has it.
            self._append_data(bytes(self._form.page_size))

    def work(self) -> PieceWork[PackedPiece]:
        """Return what the pipeline does with pieces."""
        return replace(super().work(), prepare=self._table.prepare if self._table else None)

    def _append_data(self, data: bytes | memoryview) -> None:
        if data:
            self._write_at(self._data_offset, data)
            self._data_offset += len(data)

    def _begin_piece(self, piece: Piece) -> None:
        if self._index_of is not None:
            index = self._index_of(piece.gpa // self._form.page_size)
            self._descriptor_offset = self._first_descriptor + index * self._form.descriptor.size

    def _append_descriptors(self, data: bytes | memoryview) -> None:
        if data:
            self._write_at(self._descriptor_offset, data)
            self._descriptor_offset += len(data)

    def _consume(self, packed: PackedPiece) -> None:
        sizes = packed.sizes
        self._begin_piece(packed.piece)
        if sizes is None:
            if self._form.keep_zero_pages:
                self._append_zero_descriptors(self._page_count(packed.piece))
            return
        data: bytes | memoryview = packed.data
        if self._table is not None:
            descriptors, bits = self._table.make(sizes, self._data_offset)
        else:
            descriptors, data = self._store_once(sizes, packed.data)
            bits = int("".join("1" if size else "0" for size in reversed(sizes)), 2)
        if not self._form.keep_zero_pages:
            self._mark(packed.piece, bits)
        self._append_descriptors(descriptors)
        self._append_data(data)

    def _append_zero_descriptors(self, count: int) -> None:
        size = self._form.descriptor.size
        while count:
            some = min(count, _ZERO_DESCRIPTORS)
            self._append_descriptors(memoryview(self._zero_descriptors)[: some * size])
            count -= some

    def _store_once(self, sizes: array[int], data: memoryview) -> tuple[bytes, bytes]:
        """Return descriptors and data of a piece without what was stored before.

        Pages are equal when they are packed to the same.
        """
        known, descriptors, stored = self._known, [], []
        offset, start = self._data_offset, 0
        for size in sizes:
            if not size:
                descriptors.append(self._zero_descriptor if self._form.keep_zero_pages else b"")
                continue
            page = data[start : start + size].tobytes()
            start += size
            descriptor = known.get(page)
            if descriptor is None:
                descriptor = self._form.descriptor.codec.pack(offset, size, self._flags(size), 0)
                stored.append(page)
                offset += size
                if self._once and len(known) < _REMEMBERED // self._form.page_size:
                    known[page] = descriptor
            descriptors.append(descriptor)
        return b"".join(descriptors), b"".join(stored)

    def _mark(self, piece: Piece, bits: int) -> None:
        size = self._form.page_size
        place, shift = divmod(piece.gpa // size - self._form.pfn_base, 8)
        marks = (bits << shift).to_bytes((self._page_count(piece) + shift + 7) // 8, "little")
        while marks:
            index, start = divmod(place, size)
            some, marks = marks[: size - start], marks[size - start :]
            place += len(some)
            block = self.bitmap.setdefault(index, bytearray(size))
            # Two pieces may share a byte.
            end = start + len(some)
            both = int.from_bytes(block[start:end], "little") | int.from_bytes(some, "little")
            block[start:end] = both.to_bytes(len(some), "little")

    def finish(self) -> None:
        """Nothing is left to be written."""


class _Cache:
    """Collects small writes; flushed when the next item would not fit, as QEMU does."""

    def __init__(self, write_at: WriteAt, offset: int, capacity: int) -> None:
        self._write_at = write_at
        self._capacity = capacity
        self._data = bytearray()
        self.offset = offset

    def add(self, item: bytes | memoryview) -> None:
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


class OrderedPageWriter(_PageWriter):
    """Writes in QEMU's order, with QEMU's borders between writes."""

    def _begin(self) -> None:
        capacity = _CACHED_BLOCKS * self._form.page_size
        self._descriptors = _Cache(self._write_at, self._descriptor_offset, capacity)
        self._data = _Cache(self._write_at, self._data_offset, capacity)
        self._data.add(bytes(self._form.page_size))

    def _consume(self, packed: PackedPiece) -> None:
        if packed.sizes is None:
            self._add_zero_descriptors(self._page_count(packed.piece))
            return
        make_descriptor = self._form.descriptor.codec.pack
        start = 0
        for size in packed.sizes:
            if not size:
                self._descriptors.add(self._zero_descriptor)
                continue
            # The descriptor follows its data through the caches, as in QEMU.
            offset = self._data.position()
            self._data.add(packed.data[start : start + size])
            self._descriptors.add(make_descriptor(offset, size, self._flags(size), 0))
            start += size

    def _add_zero_descriptors(self, count: int) -> None:
        for _ in range(count):
            self._descriptors.add(self._zero_descriptor)

    def finish(self) -> None:
        """Write what is still in the caches."""
        self._descriptors.flush()
        self._data.flush()


def _numpy_fields(descriptor: BoundStruct) -> dict[str, Any]:
    order, letters = descriptor.codec.format[0], descriptor.codec.format[1:]
    return {
        "names": list(descriptor.offsets),
        "offsets": list(descriptor.offsets.values()),
        "formats": [order + _NUMPY_TYPES[letter] for letter in letters],
        "itemsize": descriptor.size,
    }
