"""Read what AVML writes compressed: ranges of memory, each a stream of snappy's frames.

Source: AVML src/image.rs (version 2: the frames, then how many bytes they are); snappy
framing_format.txt.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._extent_index import merged
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._range_headers import (
    RANGE_HEADER_SIZE,
    RangeHeader,
    describe_ranges,
    read_range_header,
    verify_memory,
)
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError
from qemu_dump_ext.third_party import import_package

_MAGIC = b"AVML"
_VERSION = 2
_HEAD = _MAGIC + _VERSION.to_bytes(4, "little")
_COUNT_SIZE = 8
_CHUNK_HEADER_SIZE = 4
_CHECKSUM_SIZE = 4
_PREAMBLE_MAX = 5
_PACKED, _PLAIN, _STREAM_NAME = 0x00, 0x01, 0xFF
_FIRST_SKIPPABLE = 0x80
_FRAME_MAX = 1 << 16
"""Bytes that a chunk unpacks to, at most."""
_CHUNKS_MAX = 1 << 26
"""Of a terabyte and more."""
_CHUNKS_KEPT = 64
_STREAM_NAME_TEXT = b"sNaPpY"
_STREAM_HEAD = bytes((_STREAM_NAME, len(_STREAM_NAME_TEXT), 0, 0)) + _STREAM_NAME_TEXT


class AvmlFile(DumpFile):
    """An open file of AVML.

    Attributes:
        ranges: Their headers, in the order of the file.
    """

    page_size = 1
    byte_order = "little"
    word_size = 8

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        self.image = image
        self.format = f"avml{format_suffix}"
        self.header = MappingProxyType({"version": _VERSION})
        self.ranges: list[RangeHeader] = []
        # Of each chunk of data, by ascending gpa: first gpa, bytes unpacked, offset of its header.
        self._starts, self._sizes, self._places = array("Q"), array("I"), array("Q")
        try:
            self._read_ranges()
        except CorruptDumpError as error:
            if not self.ranges:
                raise
            image.problems = (*image.problems, str(error))
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def _read_ranges(self) -> None:
        position = 0
        while position < self.image.size:
            header = read_range_header(self.image, position, _MAGIC, _VERSION)
            if header is None:
                raise CorruptDumpError(
                    f"no header of a range at offset {position:#x}: what follows is not read"
                )
            if self._starts and header.first < self._starts[-1] + self._sizes[-1]:
                raise CorruptDumpError(f"the range at offset {position:#x} goes back")
            self.ranges.append(header)
            end = self._read_chunks(header)
            told = int.from_bytes(self.image.read(end, _COUNT_SIZE), "little")
            position = header.offset + RANGE_HEADER_SIZE
            if told != end - position:
                raise CorruptDumpError(
                    f"{end - position:#x} bytes of chunks before offset {end:#x}, which says"
                    f" {told:#x}"
                )
            position = end + _COUNT_SIZE

    def _read_chunks(self, header: RangeHeader) -> int:
        """Know the chunks of a range; returns the offset behind the last one."""
        read = self.image.read
        position = header.offset + RANGE_HEADER_SIZE
        gpa, end = header.first, header.first + header.size
        while gpa < end:
            head = read(position, _CHUNK_HEADER_SIZE)
            kind, size = head[0], int.from_bytes(head[1:], "little")
            data = position + _CHUNK_HEADER_SIZE
            self.image.check(data, size)
            if kind in {_PACKED, _PLAIN}:
                count = size - _CHECKSUM_SIZE
                if kind == _PACKED:
                    preamble = read(data + _CHECKSUM_SIZE, max(0, min(count, _PREAMBLE_MAX)))
                    count = _unpacked_size(preamble)
                if not 0 < count <= min(_FRAME_MAX, end - gpa):
                    raise CorruptDumpError(f"chunk at offset {position:#x} has {count} bytes")
                if len(self._starts) >= _CHUNKS_MAX:
                    raise CorruptDumpError(f"more than {_CHUNKS_MAX} chunks: no guest is so large")
                self._starts.append(gpa)
                self._sizes.append(count)
                self._places.append(position)
                gpa += count
            elif kind == _STREAM_NAME and read(data, min(size, 16)) != _STREAM_NAME_TEXT:
                raise CorruptDumpError(f"chunk at offset {position:#x} names no stream of snappy")
            elif kind < _FIRST_SKIPPABLE:
                raise CorruptDumpError(f"chunk at offset {position:#x} has the kind {kind:#x}")
            position = data + size
        return position

    def _note_areas(self) -> list[tuple[int, int]]:
        return []

    def memory_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of what the headers tell of, ascending, merged."""
        return merged((header.first, header.size) for header in self.ranges)

    def readable_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the chunks in the file, ascending, merged."""
        return merged(zip(self._starts, self._sizes, strict=True))

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa`."""
        while buffer:
            index = bisect_right(self._starts, gpa) - 1
            if index < 0 or gpa >= self._starts[index] + self._sizes[index]:
                raise GuestMemoryFaultError(gpa, len(buffer), "not in the dump")
            skip = gpa - self._starts[index]
            size = min(self._sizes[index] - skip, len(buffer))
            buffer[:size] = self._chunk(index)[skip : skip + size]
            buffer, gpa = buffer[size:], gpa + size

    def _chunk(self, index: int) -> bytes:
        with self._lock:
            if index in self._unpacked:
                self._unpacked.move_to_end(index)
                return self._unpacked[index]
        data = self._unpack(index)
        with self._lock:
            self._unpacked[index] = data
            if len(self._unpacked) > _CHUNKS_KEPT:
                self._unpacked.popitem(last=False)
        return data

    def _unpack(self, index: int) -> bytes:
        position, count = self._places[index], self._sizes[index]
        head = self.image.read(position, _CHUNK_HEADER_SIZE)
        size = int.from_bytes(head[1:], "little")
        chunk = self.image.read(position, _CHUNK_HEADER_SIZE + size)
        snappy = import_package("snappy", "what AVML has packed")
        try:
            # As a stream of its own, so that its checksum is looked at.
            data: bytes = snappy.StreamDecompressor().decompress(_STREAM_HEAD + chunk)
        except (OSError, snappy.UncompressError) as error:
            raise CorruptDumpError(f"chunk at offset {position:#x}: {error}") from error
        if len(data) != count:
            raise CorruptDumpError(
                f"chunk at offset {position:#x} has {len(data)} bytes, not {count}"
            )
        return data


def _unpacked_size(preamble: bytes) -> int:
    size = 0
    for index, byte in enumerate(preamble):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return size
    return 0


def _describe(dump: AvmlFile) -> Mapping[str, Callable[[], Any]]:
    return describe_ranges(dump.ranges)


READER = DumpReader(
    name="avml",
    probe=lambda head: Fit.SURE if head.startswith(_HEAD) else Fit.NO,
    open=AvmlFile,
    describe=_describe,
    verify=verify_memory,
)
