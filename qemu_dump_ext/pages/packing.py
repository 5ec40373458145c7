"""Pack the pages of pieces of guest memory: what a dump has to do it."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from typing import Self

from qemu_dump_ext.guest.memory import ReadPacked
from qemu_dump_ext.page_codecs import Compress
from qemu_dump_ext.pages.page_packing import Compression, pack_pages
from qemu_dump_ext.pages.pipeline import Buffer, Piece


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
