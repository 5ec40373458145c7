"""Write the page descriptors and the page data of a kdump.

In bulk, which is fast, or in QEMU's order of writes through two small caches, which makes a
flattened stream byte-identical to QEMU's. Both lead to the same raw file.

Source: QEMU dump/dump.c write_dump_pages(), struct DataCache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qemu_dump_ext.c_struct import BoundStruct
from qemu_dump_ext.page_codecs._declaration import Compress
from qemu_dump_ext.page_pipeline import Piece, PieceWork
from qemu_dump_ext.zero_pages import numpy_or_none, pages_with_content

_CACHED_BLOCKS = 4
_ZERO_DESCRIPTORS = 1 << 16
_NUMPY_TYPES = {"q": "i8", "I": "u4", "Q": "u8"}

WriteAt = Callable[[int, bytes | memoryview], None]


@dataclass(frozen=True)
class PageForm:
    """How pages are stored.

    Attributes:
        page_size: In bytes.
        descriptor: struct page_desc.
        compressor: Makes a compressor for one thread; None: pages are stored as they are.
        page_flag: Of compressed pages.
        keep_zero_pages: Pages of zeros have descriptors, which all point to one page of zeros.
        pfn_base: Number of the page that the first bit of a bitmap stands for.
    """

    page_size: int
    descriptor: BoundStruct
    compressor: Callable[[], Compress] | None
    page_flag: int
    keep_zero_pages: bool = True
    pfn_base: int = 0


@dataclass(frozen=True)
class PackedPiece:
    """The pages of a piece.

    Attributes:
        piece: Which.
        stored: Numbers within the piece of the pages that are not zero.
        contents: Of those, compressed where that makes them smaller.
        plain: Positions in `stored` of those that are not compressed.
        data: `contents` joined; empty in QEMU's order of writes.
        table: Descriptors, with offsets within `data`, and where in it the stored ones are; None:
            made when the piece is consumed.
    """

    piece: Piece
    stored: Sequence[int]
    contents: Sequence[bytes | memoryview]
    plain: Sequence[int]
    data: bytes = b""
    table: tuple[Any, Any] | None = None


class _PageWriter:
    def __init__(
        self, form: PageForm, write_at: WriteAt, *, descriptor_offset: int, data_offset: int
    ) -> None:
        self._form = form
        self._write_at = write_at
        self._descriptor_offset = descriptor_offset
        self._data_offset = data_offset
        self._local = threading.local()
        self._zero_descriptor = form.descriptor.codec.pack(data_offset, form.page_size, 0, 0)

    def work(self) -> PieceWork[PackedPiece]:
        """Return what the pipeline does with pieces."""
        return PieceWork(self._pack, lambda piece: PackedPiece(piece, (), (), ()), self._consume)

    def _pack(self, piece: Piece, view: memoryview) -> PackedPiece:
        size = self._form.page_size
        stored = pages_with_content(view, size)
        pages = [view[number * size : (number + 1) * size] for number in stored]
        compress = self._compressor()
        if compress is None:
            return PackedPiece(piece, stored, pages, range(len(pages)))
        plain = []
        contents: list[bytes | memoryview] = []
        for position, page in enumerate(pages):
            packed = compress(page)
            if len(packed) < size:
                contents.append(packed)
            else:
                plain.append(position)
                contents.append(page)
        return PackedPiece(piece, stored, contents, plain)

    def _compressor(self) -> Compress | None:
        if self._form.compressor is None:
            return None
        compress: Compress | None = getattr(self._local, "compress", None)
        if compress is None:
            compress = self._local.compress = self._form.compressor()
        return compress

    def _consume(self, packed: PackedPiece) -> None:
        raise NotImplementedError


class BulkPageWriter(_PageWriter):
    """Writes the descriptors of a piece at once, and its data.

    Attributes:
        bitmap: Which pages have a descriptor, where not all have: blocks of a bitmap by number,
            for those that are not zero.
    """

    def __init__(
        self, form: PageForm, write_at: WriteAt, *, descriptor_offset: int, data_offset: int
    ) -> None:
        super().__init__(
            form, write_at, descriptor_offset=descriptor_offset, data_offset=data_offset
        )
        self.bitmap: dict[int, bytearray] = {}
        self._zero_descriptors = self._zero_descriptor * _ZERO_DESCRIPTORS
        numpy = numpy_or_none()
        self._dtype = None if numpy is None else numpy.dtype(_numpy_fields(form.descriptor))
        if form.keep_zero_pages:
            # There even if no page needs it, as QEMU has it.
            self._append_data(bytes(form.page_size))

    def _append_data(self, data: bytes) -> None:
        if data:
            self._write_at(self._data_offset, data)
            self._data_offset += len(data)

    def _append_descriptors(self, data: bytes | memoryview) -> None:
        if data:
            self._write_at(self._descriptor_offset, data)
            self._descriptor_offset += len(data)

    def _pack(self, piece: Piece, view: memoryview) -> PackedPiece:
        packed = super()._pack(piece, view)
        sizes = [len(content) for content in packed.contents]
        data = b"".join(packed.contents)
        table = None
        numpy = numpy_or_none()
        if numpy is not None:
            count = piece.size // self._form.page_size
            where = numpy.array(packed.stored, dtype=numpy.intp)
            if not self._form.keep_zero_pages:
                count, where = len(packed.stored), slice(None)
            zero = numpy.frombuffer(self._zero_descriptor, dtype=self._dtype)
            descriptors = numpy.repeat(zero, count)
            ends = numpy.cumsum(sizes, dtype=numpy.int64)
            descriptors["size"][where] = sizes
            descriptors["offset"][where] = ends - sizes
            flags = numpy.full(len(sizes), self._form.page_flag)
            flags[list(packed.plain)] = 0
            descriptors["flags"][where] = flags
            table = descriptors, where
        # Sizes are all that is still needed of the contents.
        contents = () if table else packed.contents
        return PackedPiece(piece, packed.stored, contents, packed.plain, data, table)

    def _consume(self, packed: PackedPiece) -> None:
        if not self._form.keep_zero_pages:
            self._mark(packed)
        if not packed.stored:
            if self._form.keep_zero_pages:
                self._append_zero_descriptors(packed.piece.size // self._form.page_size)
            return
        if packed.table is not None:
            descriptors, where = packed.table
            descriptors["offset"][where] += self._data_offset
            self._append_descriptors(descriptors.tobytes())
        else:
            self._append_descriptors(b"".join(self._descriptors(packed)))
        self._append_data(packed.data)

    def _append_zero_descriptors(self, count: int) -> None:
        size = self._form.descriptor.size
        while count:
            some = min(count, _ZERO_DESCRIPTORS)
            self._append_descriptors(memoryview(self._zero_descriptors)[: some * size])
            count -= some

    def _descriptors(self, packed: PackedPiece) -> Iterator[bytes]:
        pack = self._form.descriptor.codec.pack
        plain = set(packed.plain)
        next_page = 0
        offsets = accumulate(map(len, packed.contents), initial=self._data_offset)
        pairs = enumerate(zip(packed.stored, packed.contents, offsets, strict=False))
        for position, (number, content, offset) in pairs:
            if self._form.keep_zero_pages:
                yield self._zero_descriptor * (number - next_page)
                next_page = number + 1
            yield pack(offset, len(content), 0 if position in plain else self._form.page_flag, 0)
        if self._form.keep_zero_pages:
            page_count = packed.piece.size // self._form.page_size
            yield self._zero_descriptor * (page_count - next_page)

    def _mark(self, packed: PackedPiece) -> None:
        size = self._form.page_size
        first_pfn = packed.piece.gpa // size - self._form.pfn_base
        for number in packed.stored:
            index, bit = divmod(first_pfn + number, 8 * size)
            block = self.bitmap.get(index)
            if block is None:
                block = self.bitmap[index] = bytearray(size)
            block[bit >> 3] |= 1 << (bit & 7)

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

    def __init__(
        self, form: PageForm, write_at: WriteAt, *, descriptor_offset: int, data_offset: int
    ) -> None:
        super().__init__(
            form, write_at, descriptor_offset=descriptor_offset, data_offset=data_offset
        )
        capacity = _CACHED_BLOCKS * form.page_size
        self._descriptors = _Cache(write_at, descriptor_offset, capacity)
        self._data = _Cache(write_at, data_offset, capacity)
        self._data.add(bytes(form.page_size))

    def _consume(self, packed: PackedPiece) -> None:
        make_descriptor = self._form.descriptor.codec.pack
        plain = set(packed.plain)
        next_page = 0
        for position, (number, content) in enumerate(
            zip(packed.stored, packed.contents, strict=True)
        ):
            self._add_zero_descriptors(number - next_page)
            next_page = number + 1
            flags = 0 if position in plain else self._form.page_flag
            # The descriptor follows its data through the caches, as in QEMU.
            offset = self._data.position()
            self._data.add(content)
            self._descriptors.add(make_descriptor(offset, len(content), flags, 0))
        self._add_zero_descriptors(packed.piece.size // self._form.page_size - next_page)

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
