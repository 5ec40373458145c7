"""Unpack what lzop has packed: blocks of LZO1X, each with its sizes and checksums before it.

Source: lzop 1.04 src/lzop.c, write_header() and lzo_compress(); src/conf.h for the flags.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.third_party import import_package

_MAGIC = b"\x89LZO\0\r\n\x1a\n"
_LATER = 0x0940
"""Version since which the header says more."""
_METHODS = range(1, 4)
"""All of LZO1X."""
_ADLER_OF_CONTENT, _ADLER_OF_PACKED = 1 << 0, 1 << 1
_CRC_OF_CONTENT, _CRC_OF_PACKED = 1 << 8, 1 << 9
_EXTRA, _MULTIPART, _FILTER, _CRC_OF_HEADER = 1 << 6, 1 << 10, 1 << 11, 1 << 12
_BLOCK_SIZE_MAX = 64 << 20
_EXTRA_SIZE_MAX = 1 << 20

_Checksum = Callable[[bytes, int], int]
_CONTENT_SUMS: tuple[tuple[int, _Checksum, int], ...] = (
    (_ADLER_OF_CONTENT, zlib.adler32, 1),
    (_CRC_OF_CONTENT, zlib.crc32, 0),
)
_PACKED_SUMS: tuple[tuple[int, _Checksum, int], ...] = (
    (_ADLER_OF_PACKED, zlib.adler32, 1),
    (_CRC_OF_PACKED, zlib.crc32, 0),
)
"""Flag, checksum, and what that begins with."""


class LzopUnpacker:
    """Gives what was packed, block by block."""

    def __init__(self, source: io.BufferedReader) -> None:
        """Read the header.

        Raises:
            MissingPackageError: python-lzo is not installed.
            CorruptDumpError: The header is damaged, or of a kind that is not read.
            EOFError: It is cut off.
        """
        self._lzo = import_package("lzo", "a stream that lzop has packed")
        self._source = source
        self._header = b""
        self._flags = self._read_header()
        self._at_end = False

    def _take(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _number(self, size: int = 4) -> int:
        data = self._take(size)
        self._header += data
        return int.from_bytes(data, "big")

    def _read_header(self) -> int:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise CorruptDumpError("it does not begin as lzop writes")
        later = self._number(2) >= _LATER
        self._number(2)  # version of the library
        if later:
            self._number(2)  # which version is needed
        method = self._number(1)
        if later:
            self._number(1)  # level
        flags = self._number()
        if method not in _METHODS or flags & (_FILTER | _MULTIPART):
            raise CorruptDumpError(
                f"packed by lzop with method {method} and flags {flags:#x}, which are not read"
            )
        for _ in range(3 if later else 2):
            self._number()  # mode, and time
        name_size = self._number(1)
        self._header += self._take(name_size)
        expected = (
            zlib.crc32(self._header) if flags & _CRC_OF_HEADER else zlib.adler32(self._header)
        )
        if self._number() != expected:
            raise CorruptDumpError("the header that lzop wrote is damaged")
        if flags & _EXTRA:
            size = self._number()
            if size > _EXTRA_SIZE_MAX:
                raise CorruptDumpError(f"lzop's header has {size:#x} bytes more")
            self._take(size + 4)
        return flags

    def read(self, size: int, /) -> bytes:
        """Return the next block; nothing at the end.

        Raises:
            CorruptDumpError: It is damaged.
            EOFError: It is cut off.
        """
        if self._at_end:
            return b""
        size = self._number()
        self._header = b""
        if not size:
            self._at_end = True
            return b""
        packed_size = self._number()
        if size > _BLOCK_SIZE_MAX or not 0 < packed_size <= size:
            raise CorruptDumpError(f"a block of lzop of {size:#x} bytes, {packed_size:#x} packed")
        of_content = self._sums(_CONTENT_SUMS)
        of_packed = self._sums(_PACKED_SUMS) if packed_size < size else []
        packed = self._take(packed_size)
        _check(packed, of_packed)
        content = packed if packed_size == size else self._unpack(packed, size)
        _check(content, of_content)
        return content

    def _sums(
        self, kinds: tuple[tuple[int, _Checksum, int], ...]
    ) -> list[tuple[_Checksum, int, int]]:
        return [
            (checksum, start, int.from_bytes(self._take(4), "big"))
            for flag, checksum, start in kinds
            if self._flags & flag
        ]

    def _unpack(self, packed: bytes, size: int) -> bytes:
        try:
            content: bytes = self._lzo.decompress(packed, False, size)
        except self._lzo.error as error:
            raise CorruptDumpError(f"a block of lzop is damaged: {error}") from error
        if len(content) != size:
            raise CorruptDumpError(f"a block of lzop has {len(content):#x} bytes, not {size:#x}")
        return content


def _check(data: bytes, sums: list[tuple[_Checksum, int, int]]) -> None:
    for checksum, start, expected in sums:
        if checksum(data, start) != expected:
            raise CorruptDumpError("a block of lzop is damaged: its checksum is another one")
