"""Pack the pages of a buffer in place: one behind the other, compressed, without those of zeros."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from qemu_dump_ext.guest.memory import ReadPacked
from qemu_dump_ext.page_codecs import Compress, find_page_codec
from qemu_dump_ext.pages.pipeline import Buffer, Piece

PAGE_SIZES = "I"
"""Type code of the array of packed sizes."""


@dataclass(frozen=True)
class Compression:
    """How the pages of a kdump are compressed.

    Attributes:
        codec: Name of it.
        exact: As QEMU does it.
        level: The level of the codec; None: the best trade of time and size.
    """

    codec: str
    exact: bool = False
    level: int | None = None

    def compressor(self) -> Compress:
        """Return a compressor for one thread.

        Raises:
            CodecUnavailableError: A package cannot be imported.
            RequestError: The codec has no such level.
        """
        codec = find_page_codec(self.codec)
        if self.exact or codec.tuned is None:
            return codec.compressor()
        return codec.tuned(self.level)


def pack_pages(
    view: memoryview, page_size: int, compress: Callable[[memoryview], bytes | memoryview]
) -> array[int]:
    """Pack in place.

    Args:
        view: A whole number of pages; afterwards the packed ones, then what is left of others.
        page_size: The page size in bytes.
        compress: Packs one page; is asked for each that is no zeros, in their order.

    Returns:
        For each page its packed size in bytes: 0 for one of zeros, which is left out, and
        `page_size` for one that compression would not make smaller, which stays as it is.
    """
    zeros = bytes(page_size)
    content = view.tobytes()
    pages = memoryview(content)  # of which a slice is no copy
    sizes = array(PAGE_SIZES)
    end = 0
    for start in range(0, len(content), page_size):
        if content.startswith(zeros, start):
            sizes.append(0)
            continue
        page = pages[start : start + page_size]
        packed = compress(page)
        size = len(packed)
        if size >= page_size:
            packed, size = page, page_size
        view[end : end + size] = packed
        end += size
        sizes.append(size)
    return sizes


class Packer:
    """Packs buffers in the thread that asks.

    Attributes:
        buffers: What it can pack; none: any.
    """

    buffers: Sequence[Buffer] = ()

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._local = threading.local()

    def pack_piece(self, piece: Piece, buffer: Buffer, page_size: int) -> array[int]:  # noqa: ARG002
        """Pack what a buffer has of a piece; as `pack`."""
        return self.pack(buffer, page_size)

    def pack(self, buffer: Buffer, page_size: int) -> array[int]:
        """Pack in place, as `pack_pages` does.

        Raises:
            DumpWriteError: What packs has gone.
        """
        return pack_pages(buffer.view, page_size, self._compressor())

    def _compressor(self) -> Compress:
        if not hasattr(self._local, "compress"):
            self._local.compress = self._compression.compressor()
        compress: Compress = self._local.compress
        return compress

    def close(self) -> None:
        """End what packs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CopyingPacker(Packer):
    """Takes pages as memory has them packed already, and packs the others."""

    def __init__(self, compression: Compression, read_packed: ReadPacked) -> None:
        super().__init__(compression)
        self._read_packed = read_packed

    def pack_piece(self, piece: Piece, buffer: Buffer, page_size: int) -> array[int]:
        """Put packed pages in place of those that were read of the same memory."""
        content, zeros = buffer.view.tobytes(), bytes(page_size)
        starts = range(0, len(content), page_size)
        wanted = [piece.gpa + start for start in starts if not content.startswith(zeros, start)]
        packed, compress = self._read_packed(wanted), self._compressor()
        return pack_pages(buffer.view, page_size, lambda page: next(packed) or compress(page))
